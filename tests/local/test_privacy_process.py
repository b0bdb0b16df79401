"""No log, record or file of a run holds what a shopper sent: neither good requests nor those that fail."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson
import pytest

from endcap.processes import free_port
from serving.targets import LocalTarget, StableVersion, SupervisorConfig, start_local_target
from tests.local.load import eventually
from tests.packages import ITEMS, make_package
from tests.process import Program, started, wait_until

SECRET = "5ec4e7"
"""In every shopper, history and item that is sent."""
FAILS = SECRET + "-fails"
TABLE = (*ITEMS, FAILS, SECRET + "-sold")

Send = Callable[[str, bytes], httpx.Response]


def everything(send: Send) -> list[int]:
    """Requests of every kind and of every way to fail, each with the secret; their statuses."""
    shopper, history = SECRET + "-shopper", [SECRET + "-sold", SECRET + "-unknown", "104"]
    good = {"shopper": shopper, "history": history}
    bodies: list[object] = [
        good,
        {**good, "history": [*history, FAILS]},
        {**good, "history": [*history, 7]},
        {**good, SECRET: 1},
        {**good, "k": SECRET},
        {**good, "context": {"scene": SECRET}},
        {**good, "filters": {"exclude": [SECRET], "candidates": [SECRET, SECRET]}},
        {**good, "explain": True},
        {"shopper": [shopper], "history": SECRET},
        {**good, "history": [SECRET] * 1001},
    ]
    sent = [send("/v1/recommend", orjson.dumps(body)).status_code for body in bodies]
    sent.append(send("/v1/recommend", f'{{"shopper": "{SECRET}", '.encode()).status_code)
    sent.append(send("/v1/recommend", b'{"history": "' + SECRET.encode() * 50_000 + b'"}').status_code)
    sent.append(send(f"/v2/models/{SECRET}/infer", SECRET.encode()).status_code)
    sent.append(send("/v2/models/recommender/infer", orjson.dumps({
        "inputs": [{"name": "history", "shape": [1, 1], "datatype": "INT64", "data": [SECRET]}],
    })).status_code)  # fmt: skip
    sent.append(send(f"/v1/models/recommender:predict?{SECRET}", orjson.dumps({"instances": [[SECRET]]})).status_code)
    sent.append(send("/v1/feedback", orjson.dumps({"events": [{"impression": SECRET, "type": SECRET}]})).status_code)
    return sent


def holding(folders: list[Path]) -> list[Path]:
    """Files that hold the secret, the packages and their copies apart."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != "items.json"]
    assert files
    return [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    make_package(folder / "1", items=TABLE, popular=ITEMS[:20], fails_on=[FAILS])
    return folder


def served(program: Program) -> Send:
    return lambda path, body: httpx.post(program.url + path, content=body, timeout=30.0)


@pytest.mark.parametrize("to", ["file", "standard output"])
def test_the_server_s_own_logs(package: Path, tmp_path: Path, to: str) -> None:
    port = free_port()
    argv = [
        "-m", "serving.server", "--package", str(package / "1"), "--public-key", str(package / "keys/signing.pub"),
        "--version", "2", "--zone", "b", "--port", str(port), "--drain-s", "0", "--cache", "memory:100",
        "--access-log", str(tmp_path / "access.jsonl") if to == "file" else "-",
        *(["--answers", str(tmp_path / "answers.jsonl")] if to == "file" else ["--processes", "2", "--threads", "1"]),
    ]  # fmt: skip
    with started(argv, port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        statuses = everything(served(program))
        headers = {"x-request-id": "r-1", "x-endcap-compare": "1"}
        httpx.post(program.url + "/v1/recommend", headers=headers,
                   json={"shopper": SECRET, "history": [SECRET, "104"]}, timeout=30.0)  # fmt: skip
        written = tmp_path / ("access.jsonl" if to == "file" else "log")
        wait_until(lambda: '"r-1"' in written.read_text(), "it is logged")
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0
    assert {200, 400, 404, 413, 500} <= set(statuses)
    assert holding([tmp_path]) == []
    lines = [json.loads(line) for line in written.read_text().splitlines() if line.startswith("{")]
    of_models = [status for status in statuses[:-1] if status]
    assert sorted(line["status"] for line in lines) == sorted([*of_models, 200])
    (last,) = [line for line in lines if line["request_id"] == "r-1"]
    assert (last["route"], last["outcome"], last["version"], last["zone"]) == ("recommend", "answered", "2", "b")


def test_everything_that_a_target_keeps(package: Path, tmp_path: Path) -> None:
    config = SupervisorConfig(
        folder=tmp_path / "target", records=tmp_path / "records", public_key=package / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=package / "1"), thresholds_ms=(100,), replicas_full=1,
    )  # fmt: skip

    def shown(target: LocalTarget) -> bool:
        token = httpx.post(target.url + "/v1/recommend", timeout=30.0,
                           json={"shopper": SECRET, "history": [SECRET]}).json()["impression"]  # fmt: skip
        event = {"impression": token, "type": "shown"}
        return httpx.post(target.url + "/v1/feedback", json={"events": [event]}, timeout=30.0).status_code == 200

    with start_local_target(config) as target:
        statuses = everything(lambda path, body: httpx.post(target.url + path, content=body, timeout=30.0))
        assert shown(target)
        logged = tmp_path / "records" / "access.jsonl"
        eventually(
            lambda: len(logged.read_text().splitlines()) >= len(statuses) + 2, what="the gateway has logged them"
        )
    assert {200, 400, 404, 500} <= set(statuses)
    assert holding([tmp_path]) == []
