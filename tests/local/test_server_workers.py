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
import numpy as np
import pytest

from endcap.package import Task
from endcap.processes import free_port
from tests.packages import make_package
from tests.process import Program, run_to_end, started, wait_until
from tests.task_packages import make_task_package

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


def memory_mb(pid: int, *kinds: str) -> float:
    rolled = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(re.search(rf"^{kind}:\s+(\d+) kB", rolled, re.MULTILINE)[1]) for kind in kinds) / 1024  # type: ignore[index]


def test_workers_share_one_copy_of_the_weights(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).random((64 << 18, 1), np.float32)  # 64 MB that no compression finds out
    make_task_package(tmp_path / "encoder", Task.ENCODER, table=weights)
    port = free_port()
    argv = [
        "-m", "serving.server", "--package", str(tmp_path / "encoder"), "--public-key",
        str(tmp_path / "keys/signing.pub"), "--version", "2", "--zone", "b", "--port", str(port), "--processes", "3",
        "--threads", "1",
    ]  # fmt: skip
    body = {"inputs": [{"name": name, "datatype": "INT64", "shape": [1, 2], "data": [1, 1]}
                       for name in ("input_ids", "attention_mask")]}  # fmt: skip
    with started(argv, port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        for _ in range(30):
            answer = httpx.post(f"{program.url}/v2/models/encoder/infer", json=body, timeout=30.0)
            assert answer.status_code == 200
        workers = workers_of(program)
        assert len(workers) == 3
        for worker in workers:
            assert memory_mb(worker, "Rss") > 64
            assert memory_mb(worker, "Private_Clean", "Private_Dirty") < 40
        everything = sum(memory_mb(pid, "Pss") for pid in (program.process.pid, *workers))
        # One copy, twice while it was loaded; with a copy for each worker it would be four at the least.
        assert everything < memory_mb(program.process.pid, "Rss") + 3 * 40


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


@pytest.mark.parametrize("asked", [("--variant", "int4"), ("--provider", "cuda")])
def test_what_each_worker_would_refuse_ends_the_server(folder: Path, asked: tuple[str, str]) -> None:
    ended = run_to_end(arguments(folder, 0, "--threads", "2", *asked))  # so that each loads for itself
    assert (ended.returncode, asked[0] in ended.stderr) == (2, True), ended.stderr
