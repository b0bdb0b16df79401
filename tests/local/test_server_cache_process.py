"""A model server that keeps answers: in its process, and in a Redis that another server shares."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from endcap.files import write_json
from endcap.package import ensure_signing_key
from endcap.processes import free_port
from serving import impressions
from tests.packages import ITEMS, make_package
from tests.process import Program, run_to_end, started, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    ensure_signing_key(folder / "keys")
    make_package(folder / "package")
    impressions.ensure_key(folder / "impression.key")
    return folder


def arguments(folder: Path, port: int, *more: str, version: str = "2") -> list[str]:
    return ["-m", "serving.server", "--package", str(folder / "package"), "--zone", "a", "--port", str(port),
            "--public-key", str(folder / "keys" / "signing.pub"), "--version", version,
            "--impression-key", str(folder / "impression.key"), *more]  # fmt: skip


def ask(program: Program, *history: str, **more: Any) -> Any:
    body = {"shopper": "shopper-secret", "history": list(history), "k": 3} | more
    answer = httpx.post(program.url + "/v1/recommend", json=body, timeout=30.0)
    assert answer.status_code == 200, answer.text
    return answer.json()


def counted(program: Program, series: str) -> float:
    lines = [line for line in program.get("/metrics").text.splitlines() if line.startswith("endcap_server_cache")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if series in line)


def test_a_kept_answer_is_the_same_with_an_impression_of_its_own(folder: Path, tmp_path: Path) -> None:
    port, stock = free_port(), tmp_path / "stock.json"
    write_json(stock, {"out_of_stock": []})
    more = ("--cache", "memory:100", "--stock", str(stock))
    with started(arguments(folder, port, *more), port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        answers = [ask(program, ITEMS[4]) for _ in range(3)]
        assert len({answer.pop("impression") for answer in answers}) == 3
        assert answers[0] == answers[1] == answers[2]
        assert answers[0]["items"] == [ITEMS[5], ITEMS[6], ITEMS[7]]
        assert (counted(program, 'result="hit"'), counted(program, 'result="miss"')) == (2, 1)
        assert [step["step"] for step in ask(program, ITEMS[4], explain=True)["explain"]][:2] == ["history", "graph"]
        tensor = {"name": "history", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
        path = program.url + "/v2/models/recommender/infer"
        first, second = (httpx.post(path, json={"inputs": [tensor]}, timeout=30.0).json() for _ in range(2))
        assert first["outputs"] == second["outputs"] and counted(program, 'result="hit"') == 3
        # What is sold out is not served from the cache either.
        write_json(stock, {"out_of_stock": [ITEMS[5]]})
        wait_until(lambda: ask(program, ITEMS[4])["items"][0] == ITEMS[6], "the stock file is read again")
        stock.write_text("half a fi")
        refused = "endcap_server_files_refused_total"
        wait_until(lambda: f'{refused}{{version="2"}} 1.0' in program.get("/metrics").text, "a damaged file is counted")
        assert ask(program, ITEMS[4])["items"][0] == ITEMS[6]


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    folder = tmp_path_factory.mktemp("r")
    program = shutil.which("redis-server")
    assert program is not None, "apt-get install redis-server"
    socket = folder / "redis.sock"
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    wait_until(socket.exists, "Redis listens")
    yield f"unix://{socket}", process
    process.kill()
    process.wait()


def test_servers_of_one_version_share_answers_and_another_version_never_sees_them(
    folder: Path, tmp_path: Path, redis: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, process = redis
    ports = [free_port() for _ in range(3)]

    def kept(number: int, version: str) -> Any:
        port = ports[number]
        return started(arguments(folder, port, "--cache", url, version=version), port, tmp_path / f"log{number}")

    def connected(program: Program) -> None:
        def asked() -> bool:
            ask(program, ITEMS[30])
            return counted(program, 'result="hit"') > 0

        wait_until(asked, "the server uses Redis")

    with kept(0, "2") as first, kept(1, "2") as second, kept(2, "3") as third:
        for program in (first, second, third):
            program.wait_for("/v2/health/ready")
            connected(program)
        history = [ITEMS[7], ITEMS[9]]
        wait_until(lambda: bool(ask(first, *history)) and counted(first, 'result="hit"') >= 2, "the answer is kept")
        misses = counted(second, 'result="miss"')
        assert ask(second, *history)["version"] == "2" and counted(second, 'result="miss"') == misses
        misses = counted(third, 'result="miss"')
        assert ask(third, *history)["version"] == "3" and counted(third, 'result="miss"') == misses + 1
        process.send_signal(signal.SIGSTOP)
        for number in range(20):
            assert ask(first, ITEMS[number])["items"][0] == ITEMS[number + 1]
        process.kill()
        for number in range(20):
            assert ask(second, ITEMS[number])["items"][0] == ITEMS[number + 1]
        assert counted(first, 'result="bypassed"') >= 18
        for program in (first, second, third):
            program.process.terminate()
        assert [program.process.wait(30) for program in (first, second, third)] == [0, 0, 0]
    for number in range(3):
        log = (tmp_path / f"log{number}").read_text()
        assert "shopper-secret" not in log and "Traceback" not in log and "Exception" not in log, log


@pytest.mark.parametrize("bad", ["disk:/tmp", "memory:none", "redis://me:hunter2@localhost:6379/0"])
def test_a_cache_that_cannot_be_is_refused_on_one_line(folder: Path, bad: str) -> None:
    ended = run_to_end(arguments(folder, 0, "--cache", bad))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "--cache" in ended.stderr and "hunter2" not in ended.stderr
