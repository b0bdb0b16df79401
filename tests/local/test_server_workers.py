"""Several worker processes on one port: one copy of the package, restarts, counts, and a drain that loses nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from endcap.processes import free_port
from tests.packages import make_package
from tests.process import Program, run_to_end, started, wait_until

BODY = {"shopper": "1", "history": ["104"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    make_package(folder / "good")
    return folder


def arguments(folder: Path, port: int, *more: str, key: str = "signing.pub") -> list[str]:
    return [
        "-m", "serving.server", "--package", str(folder / "good"), "--public-key", str(folder / "keys" / key),
        "--version", "2", "--zone", "b", "--port", str(port), "--processes", "3", *more,
    ]  # fmt: skip


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Program]:
    port = free_port()
    with started(arguments(folder, port, "--drain-s", "30"), port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        yield program


def workers_of(program: Program) -> set[int]:
    pid = program.process.pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def answered(program: Program) -> float:
    found = re.search(
        r'attempts_total\{outcome="answered",route="recommend",version="2"\} (\S+)', program.get("/metrics").text
    )
    assert found is not None
    return float(found[1])


def test_all_answer_a_killed_one_is_replaced_and_counts_are_of_all(server: Program) -> None:
    wait_until(lambda: len(workers_of(server)) == 3, "three workers")
    first = workers_of(server)
    for _ in range(40):  # a connection each: the kernel deals them out
        assert httpx.post(server.url + "/v1/recommend", json=BODY, timeout=30.0).status_code == 200
    assert answered(server) == 40
    os.kill(min(first), signal.SIGKILL)
    wait_until(lambda: len(workers_of(server)) == 3 and workers_of(server) != first, "another follows")
    for _ in range(40):
        assert httpx.post(server.url + "/v1/recommend", json=BODY, timeout=30.0).status_code == 200
    assert answered(server) == 80


def test_sigterm_loses_no_request_and_ends_all(server: Program) -> None:
    statuses: list[int] = []
    faults: list[str] = []

    def send_until_told() -> None:
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            while True:
                try:
                    answer = client.post("/v1/recommend", json=BODY)
                except httpx.HTTPError as error:
                    faults.append(repr(error))
                    return
                statuses.append(answer.status_code)
                if "x-envoy-immediate-health-check-fail" in answer.headers:
                    return

    senders = [threading.Thread(target=send_until_told) for _ in range(6)]
    for sender in senders:
        sender.start()
    wait_until(lambda: len(statuses) > 100, "requests are answered")
    workers = workers_of(server)
    server.process.send_signal(signal.SIGTERM)
    for sender in senders:
        sender.join()
    assert (faults, set(statuses)) == ([], {200})
    assert server.process.wait(60) == 0
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_workers_die_with_their_supervisor(server: Program) -> None:
    workers = workers_of(server)
    server.process.kill()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), "the workers are gone")


def test_what_cannot_be_served_is_said_once(folder: Path, tmp_path: Path) -> None:
    make_package(tmp_path / "other")
    (folder / "keys" / "other.pub").write_bytes((tmp_path / "keys" / "signing.pub").read_bytes())
    ended = run_to_end(arguments(folder, 0, key="other.pub"))
    assert (ended.returncode, ended.stderr.count("\n")) == (3, 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run_to_end(arguments(folder, taken.getsockname()[1]))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "is in use" in ended.stderr
    for wrong in (("--processes", "0"), ("--processes", "65"), ("--answers", str(tmp_path / "answers"))):
        ended = run_to_end(arguments(folder, 0, *wrong))
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
