"""The model server as a real process: start, refusals, drain, faults, and the kserve package's own client."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from endcap.processes import free_port
from serving import impressions
from tests.kserve_client import ask
from tests.packages import ITEMS, make_package
from tests.process import Program, run_to_end, started, wait_until

FOREVER = 2_000_000_000
"""Turns of the stalling loop that no test waits out."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    make_package(folder / "good", fails_on=[ITEMS[10]], stalls_on=[ITEMS[20]], stall_loops=FOREVER)
    make_package(folder / "slow", stalls_on=[ITEMS[20]], stall_loops=500_000)
    impressions.ensure_key(folder / "impression.key")
    return folder


def arguments(folder: Path, port: int, *more: str, package: str = "good", key: str = "signing.pub") -> list[str]:
    return [
        "-m", "serving.server", "--package", str(folder / package), "--public-key", str(folder / "keys" / key),
        "--version", "2", "--zone", "b", "--port", str(port), "--impression-key", str(folder / "impression.key"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Program]:
    port = free_port()
    with started(["-X", "importtime", *arguments(folder, port, "--timeout-s", "30")], port, folder / "log") as program:
        program.wait_for("/v2/health/ready")
        yield program


def recommend(program: Program, history: list[str]) -> httpx.Response:
    return httpx.post(program.url + "/v1/recommend", json={"shopper": "1", "history": history}, timeout=30.0)


def whole_answer(raw: socket.socket) -> bytes:
    """One answer with a content length: its bytes may come in any parts."""
    found = b""
    while True:
        head, end, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length is not None and len(body) >= int(length[1]):
            return found
        part = raw.recv(4096)
        assert part, found
        found += part


def imported(log: str) -> set[str]:
    """Top-level modules in the output of ``python -X importtime``."""
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\w+)", log, re.MULTILINE))


def test_it_answers_and_imports_nothing_heavy(server: Program, folder: Path) -> None:
    answer = recommend(server, ["104"])
    assert (answer.status_code, answer.json()["items"][:2]) == (200, ["105", "106"])
    assert answer.headers["x-endcap-zone"] == "b"
    key = impressions.read_key(folder / "impression.key")
    assert impressions.read(key, answer.json()["impression"]).version == "2"
    modules = imported(server.log.read_text())
    assert {"onnxruntime", "model_signing", "uvicorn"} <= modules
    assert not modules & {"torch", "kserve", "mlflow", "pandas", "transformers", "matplotlib", "pytest"}


def test_a_failing_graph_is_a_500_and_never_a_dead_process(server: Program) -> None:
    assert [recommend(server, [ITEMS[10]]).status_code for _ in range(5)] == [500] * 5
    assert recommend(server, ["104"]).status_code == 200


def test_a_stalled_graph_holds_neither_health_nor_others(server: Program) -> None:
    with httpx.Client(base_url=server.url, timeout=0.5) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/recommend", json={"shopper": "1", "history": [ITEMS[20]]})
    # Its run goes on (30 s are allowed); meanwhile:
    wait_until(lambda: 'in_flight{version="2"} 1.0' in server.get("/metrics").text, "the run is under way")
    assert server.get("/v2/health/ready").status_code == 200
    assert recommend(server, ["104"]).status_code == 200


def test_bytes_that_are_no_http_do_not_harm(server: Program) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10.0) as raw:
        raw.sendall(b"\x16\x03\x01\x00\xa5 not http at all\r\n\r\n")
        assert raw.recv(1024).startswith(b"HTTP/1.1 400")
    assert recommend(server, ["104"]).status_code == 200


def test_the_kserve_client_passes(server: Program) -> None:
    found = ask(server.url)
    assert (found.live, found.ready, found.model_ready, found.other_ready) == (True, True, True, False)
    assert (found.answer.id, found.answer.model_name) == ("q", "recommender")
    items, scores = found.answer.outputs
    assert (items.name, items.shape, items.as_numpy()[:, 0].tolist()) == ("items", [2, 20], [3, 6])
    assert (scores.name, scores.datatype) == ("scores", "FP32")


@pytest.mark.parametrize("fault", ["unsigned", "changed", "wrong key", "missing"])
def test_a_package_that_does_not_verify_is_refused_before_onnxruntime_is_even_imported(
    folder: Path, tmp_path: Path, fault: str
) -> None:
    package = tmp_path / "package"
    if fault != "missing":
        make_package(
            package, sign=fault != "unsigned", key=None if fault == "wrong key" else folder / "keys/signing.key"
        )
    if fault == "changed":
        raw = bytearray((package / "model.onnx").read_bytes())
        raw[len(raw) // 2] ^= 1
        (package / "model.onnx").write_bytes(raw)
    ended = run_to_end(["-X", "importtime", *arguments(folder, 0, package=str(package))])
    said = [line for line in ended.stderr.splitlines() if not line.startswith("import time:")]
    assert (ended.returncode, len(said), ended.stdout) == (3, 1, "")
    assert str(package) in said[0]
    assert "onnxruntime" not in imported(ended.stderr)


@pytest.mark.parametrize("more", [(), ("--processes", "2", "--threads", "1")])
def test_a_package_that_another_container_brings_later_is_waited_for_and_verified(
    folder: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """KServe's images: a link to the files, made by a container that begins after this one."""
    port = free_port()
    run = arguments(folder, port, *more, package=str(tmp_path / "models"))
    with started(run, port, tmp_path / "log", environment={"MODEL_INIT_MODE": "async"}) as program:
        if not more:
            wait_until(lambda: program.status("/v2/health/live") == 200, "it lives without its package")
            assert program.status("/v2/health/ready") == 503
        (tmp_path / "models").symlink_to(folder / "good")
        program.wait_for("/v2/health/ready")
        assert recommend(program, ["104"]).json()["items"][:2] == ["105", "106"]
    make_package(tmp_path / "other" / "package")
    (tmp_path / "models").unlink()
    (tmp_path / "models").symlink_to(tmp_path / "other" / "package")
    with started(run, port, tmp_path / "log", environment={"MODEL_INIT_MODE": "async"}) as program:
        assert program.process.wait(60) == 3


def test_a_port_in_use_and_a_bad_key_are_said_on_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_to_end(arguments(folder, port))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert f"port {port} is in use" in ended.stderr
    ended = run_to_end(arguments(folder, 0, "--impression-key", str(tmp_path / "none.key")))
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "none.key" in ended.stderr


def test_sigterm_fails_readiness_first_and_loses_no_request(folder: Path, tmp_path: Path) -> None:
    """As behind a gateway: senders stop once an answer tells that the replica is draining."""
    port = free_port()
    run = arguments(folder, port, "--drain-s", "30", "--timeout-s", "30", package="slow")
    with started(run, port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        statuses: list[int] = []
        told: list[bool] = []
        faults: list[str] = []

        def send_until_told(history: list[str]) -> None:
            with httpx.Client(base_url=program.url, timeout=30.0) as client:
                draining = False
                while not draining:
                    try:
                        answer = client.post("/v1/recommend", json={"shopper": "1", "history": history})
                    except httpx.HTTPError as error:
                        faults.append(repr(error))
                        return
                    statuses.append(answer.status_code)
                    draining = "x-envoy-immediate-health-check-fail" in answer.headers
                told.append(True)

        # One of them always has a slow run in flight.
        senders = [threading.Thread(target=send_until_told, args=([item],)) for item in ("104", "105", ITEMS[20])]
        for sender in senders:
            sender.start()
        wait_until(lambda: len(statuses) > 50, "requests are answered")
        program.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=program.url, timeout=10.0) as client:
            wait_until(lambda: client.get("/v2/health/ready").status_code == 503, "readiness fails")
        for sender in senders:
            sender.join()
        assert faults == []
        assert set(statuses) == {200}
        assert told == [True] * 3
        assert program.process.wait(30) == 0


def test_it_dies_with_the_process_that_started_it(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
    with started(["-c", parent, *arguments(folder, port)], port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        program.process.kill()
        program.process.wait()

        def gone() -> bool:
            try:
                program.get("/v2/health/live")
            except httpx.TransportError:
                return True
            return False

        wait_until(gone, "the server is gone")


def test_without_a_package_argument_it_says_how_to_call_it() -> None:
    ended = run_to_end(["-m", "serving.server"])
    assert ended.returncode == 2
    assert "usage: python -m serving.server" in ended.stderr


def test_answers_to_compared_requests_are_on_disk_while_it_serves_and_after_it_ended(
    folder: Path, tmp_path: Path
) -> None:
    port, answers = free_port(), tmp_path / "answers.jsonl"
    with started(arguments(folder, port, "--answers", str(answers)), port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")

        def ask_compared(request_id: str, **headers: str) -> str | None:
            headers = {"x-request-id": request_id, "x-endcap-compare": "1", **headers}
            body = {"shopper": "1", "history": ["104"]}
            answer = httpx.post(program.url + "/v1/recommend", json=body, headers=headers, timeout=30.0).json()
            impression: str | None = answer["impression"]
            return impression

        assert ask_compared("id-1") is not None
        wait_until(lambda: b"id-1" in answers.read_bytes(), "the answer is logged")
        assert ask_compared("id-2", **{"x-endcap-shadow": "1"}) is None
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0
    found = [orjson.loads(line) for line in answers.read_bytes().splitlines()]
    assert [(one["request_id"], one["version"], one["shadow"], one["code"]) for one in found] == [
        ("id-1", "2", False, 200), ("id-2", "2", True, 200),
    ]  # fmt: skip
    ended = run_to_end(arguments(folder, 0, "--answers", str(answers / "below")))
    assert ended.returncode != 0
    assert ended.stderr.count("\n") == 1


def test_a_crowded_server_refuses_before_it_reads_the_body_and_the_connection_lives_on(
    folder: Path, tmp_path: Path
) -> None:
    port = free_port()
    limits = ["--max-waiting", "1", "--timeout-s", "30"]
    with started(arguments(folder, port, *limits), port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        body = orjson.dumps({"shopper": "1", "history": [ITEMS[20]]})
        head = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", port), timeout=30.0) as busy:
            busy.sendall(head + b"\r\n" + body)
            wait_until(lambda: 'in_flight{version="2"} 1.0' in program.get("/metrics").text, "a run is under way")
            with socket.create_connection(("127.0.0.1", port), timeout=30.0) as raw:
                for more, status in ((b"", b"503"), (b"x-endcap-priority: batch\r\n", b"429")):
                    raw.sendall(head + more + b"\r\n")  # and not yet its body
                    answer = whole_answer(raw)
                    assert answer.startswith(b"HTTP/1.1 " + status)
                    assert b"\r\nretry-after: " in answer
                    assert b"\r\nx-endcap-version: 2\r\n" in answer
                    assert orjson.loads(answer.partition(b"\r\n\r\n")[2])["error"]["next"]
                    raw.sendall(body + b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
                    assert whole_answer(raw).startswith(b"HTTP/1.1 200")
                raw.sendall(head + b"expect: 100-continue\r\n\r\n")
                assert b"\r\nconnection: close\r\n" in whole_answer(raw)
                assert raw.recv(4096) == b""
            assert 'outcome="shed",route="recommend",version="2"} 3.0' in program.get("/metrics").text
