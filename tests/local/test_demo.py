"""The main job as a newcomer runs it, on a small synthetic shop: cut off at bad moments first, then to its end.

One scenario in its order, because each part is what the next one finds on disk.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from endcap.files import read_json
from endcap.report import build

DEADLINE_S = 420
# Epochs, not seconds: how good the candidate gets must not hang on how fast the machine is.
ARGUMENTS = ["--dataset", "synthetic", "--epochs", "14", "--train-seconds", "600", "--rate", "100"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("main-job") / "demo"


@contextmanager
def demo(out: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "endcap.cli", "demo", "--out", str(out), *ARGUMENTS],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What the demo said, up to the line with these words."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if words in line:
            return "".join(said)
    raise AssertionError(f"the demo ended before it said {words!r}:\n{''.join(said)}")


def processes_of(out: Path) -> dict[int, str]:
    """Every process whose command line or environment names the demo's folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                continue
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(out).encode() in command + environment:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")[:150]
    return found


def assert_all_gone(out: Path) -> None:
    ends_at = time.monotonic() + 20
    left = processes_of(out)
    while left and time.monotonic() < ends_at:
        left = processes_of(out)
    assert not left, f"left running: {left}"


def test_killed_in_the_pipeline_it_leaves_no_process(out: Path) -> None:
    with demo(out) as process:
        read_until(process, "item-kNN: train")
        assert len(processes_of(out)) > 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_all_gone(out)


def test_killed_while_shoppers_are_served_it_leaves_no_process_and_a_report_can_be_built(out: Path) -> None:
    with demo(out) as process:
        read_until(process, "Rollout of version")
        second = subprocess.run(
            [sys.executable, "-m", "endcap.cli", "demo", "--out", str(out), *ARGUMENTS],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"in use by process {process.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        assert len(processes_of(out)) > 6
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert_all_gone(out)
    summary = build(out)
    assert not summary.ok
    assert summary.load is not None
    assert summary.load.requests > 0, "what was recorded before the kill is there"


def test_the_next_run_does_the_whole_job(out: Path) -> None:
    with demo(out) as process:
        watchdog = time.monotonic() + DEADLINE_S
        said = read_until(process, "report: ")
        assert process.wait(60) == 0, said
        assert time.monotonic() < watchdog
    assert_all_gone(out)
    assert "SYNTHETIC" in said
    summary = read_json(out / "summary.json")
    assert summary["ok"] is True
    assert summary["data"]["synthetic"] is True
    promoted, *others = summary["rollouts"]
    assert promoted["verdict"] == "promoted"
    assert promoted["failed_requests"] == 0
    verdicts = {rollout["to"]: (rollout["verdict"], rollout["reason"]) for rollout in others}
    assert verdicts["3"][0] == "rolled_back"
    assert "click-through" in verdicts["3"][1]
    assert verdicts["4"][0] == "rolled_back"
    assert "availability" in verdicts["4"][1]
    assert verdicts["tampered"][0] == "refused"
    drills = {drill["name"]: drill for drill in summary["drills"]}
    assert drills["replica-kill"]["held"]
    assert drills["replica-kill"]["failed_requests"] == 0
    assert drills["zone-loss"]["held"]
    for name in (
        "requests.parquet",
        "access.jsonl",
        "attempts.jsonl",
        "faults.jsonl",
        "target.jsonl",
        "feedback.jsonl",
    ):
        assert (out / "records" / name).stat().st_size > 0, name
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = set(re.findall(r"out/demo/([\w./-]+)", readme))
    assert {"report.html", "packages/recommender-2"} <= shown
    for place in shown:
        assert (out / place).exists(), f"README names out/demo/{place}"


def test_the_report_is_made_of_the_records_alone_and_anyone_gets_the_same(out: Path, tmp_path: Path) -> None:
    page, summary = (out / "report.html").read_bytes(), (out / "summary.json").read_bytes()
    for name in ("report.html", "summary.json"):
        (out / name).unlink()
    shown = subprocess.run(
        [sys.executable, "-m", "endcap.cli", "report", "build", str(out), "--json"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert json.loads(shown.stdout)["ok"] is True
    assert (out / "report.html").read_bytes() == page
    assert (out / "summary.json").read_bytes() == summary
    assert b"synthetic" in page.lower()
