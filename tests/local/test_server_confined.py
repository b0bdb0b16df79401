"""The model server as an ordinary user without capabilities, where nothing at all can be written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from endcap.processes import free_port
from serving import impressions
from tests.packages import make_package
from tests.process import Program, wait_until

NOBODY = 65532

CONFINE = """
set -e
mount -t tmpfs -o mode=755 none /mnt
for pair in "python:$1" "site:$2" "repository:$3"; do
  mkdir "/mnt/${pair%%:*}"
  mount --bind "${pair#*:}" "/mnt/${pair%%:*}"
done
shift 3
while read -r _ at _; do
  case "$at" in /proc|/proc/*|/sys|/sys/*|/dev|/dev/pts) ;; *) mount -o remount,bind,ro "$at" 2>/dev/null || : ;; esac
done < /proc/self/mounts
cd /mnt/repository
exec "$@"
"""
"""In a mount namespace of the process's own: the interpreter, its packages and the repository where any user reaches
them, then every mount read-only but what the kernel itself shows."""

PROBE = """
import os, sys, tempfile
for folder in (".", "/", "/tmp", "/var/tmp", "/dev/shm", *sys.argv[1].split(":")):
    try:
        open(os.path.join(folder, "probe"), "w")
    except OSError:
        continue
    sys.exit(f"{folder} can be written")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Open to all users, which pytest's own folders are not."""
    made = Path(tempfile.mkdtemp(prefix="endcap-confined-"))
    made.chmod(0o755)
    make_package(made / "package")
    impressions.ensure_key(made / "impression.key")
    if os.geteuid() == 0:
        os.chown(made / "impression.key", NOBODY, NOBODY)
    yield made
    shutil.rmtree(made)


def confined(folder: Path, arguments: list[str]) -> list[str]:
    """``python arguments`` so that it can write nowhere and has no rights."""
    root = os.geteuid() == 0
    drop = ["setpriv", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    if root:
        drop += [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    site = Path(httpx.__file__).parents[1]
    repository = Path(__file__).parents[2]
    python = f"/mnt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    return [
        "unshare", "--mount", *([] if root else ["--map-root-user"]), "sh", "-c", CONFINE, "sh",
        sys.base_prefix, str(site), str(repository), *drop, python, "-c", PROBE, str(folder), *arguments,
    ]  # fmt: skip


ENVIRONMENT = {
    "PYTHONHOME": "/mnt/python", "LD_LIBRARY_PATH": "/mnt/python/lib", "PYTHONPATH": "/mnt/repository:/mnt/site",
    "HOME": "/nowhere",
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_it_serves_without_rights_and_without_a_place_to_write(folder: Path, tmp_path: Path, processes: int) -> None:
    port, grpc_port = free_port(), free_port()
    argv = confined(folder, [
        "-m", "serving.server", "--package", str(folder / "package"), "--public-key", str(folder / "keys/signing.pub"),
        "--version", "2", "--zone", "b", "--port", str(port), "--grpc-port", str(grpc_port), "--threads", "1",
        "--impression-key", str(folder / "impression.key"), "--cache", "memory:100", "--drain-s", "0",
        "--access-log", "-", "--processes", str(processes),
    ])  # fmt: skip
    with (tmp_path / "log").open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})
    program = Program(process, f"http://127.0.0.1:{port}", tmp_path / "log")
    try:
        program.wait_for("/v2/health/ready")
        answer = httpx.post(program.url + "/v1/recommend", json={"shopper": "1", "history": ["104"]}, timeout=30.0)
        assert (answer.status_code, answer.json()["items"][:2]) == (200, ["105", "106"])
        assert answer.json()["impression"]
        assert program.get("/openapi.json").status_code == 200
        for pid in (process.pid, *children(process.pid)):
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            assert {int(uid) for uid in status["Uid"].split()} == {NOBODY if os.geteuid() == 0 else os.geteuid()}
            assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
        wait_until(lambda: '"route":"recommend"' in program.log.read_text(), "the access log is written to")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
