"""The answers log, and what the server does with requests that a shadow gets too."""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from endcap.errors import InputError, StorageError
from serving import impressions
from serving.server.answers import AnswerLog, LoggedAnswer
from serving.server.app import Replica, ServerApp
from serving.server.service import Limits, Service, load_service
from tests.asgi_client import Answer, AsgiClient
from tests.packages import ITEMS, make_package
from tests.process import wait_until

KEY = bytes(32)
COMPARED = (b"x-endcap-compare", b"1")
SHADOW = (b"x-endcap-shadow", b"1")


def answer(number: int, **more: Any) -> LoggedAnswer:
    return LoggedAnswer(f"r-{number}", "2", False, 200, 1.5, ["7", "8"], [2.0, 1.0], **more)


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines that can be read."""
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n")
        try:
            found.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            continue
    return found


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., AnswerLog]]:
    logs: list[AnswerLog] = []

    def make(**limits: int) -> AnswerLog:
        logs.append(AnswerLog(tmp_path / "answers" / "2-a.jsonl", **limits))
        return logs[-1]

    yield make
    for one in logs:
        one.close()


def test_an_answer_is_written_soon_and_for_its_owner_only(opened: Callable[..., AnswerLog]) -> None:
    log = opened()
    log.add(LoggedAnswer("r-1", "2", True, 200, 1.5, [str(n) for n in range(60)], [float(n) for n in range(60)]))
    wait_until(lambda: log.path.stat().st_size > 0, "the line is written while the server runs")
    log.close()
    assert lines(log.path) == [
        {"request_id": "r-1", "version": "2", "shadow": True, "code": 200, "ms": 1.5,
         "items": [str(n) for n in range(50)], "scores": [float(n) for n in range(50)]},
    ]  # fmt: skip
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_a_full_file_becomes_the_one_before_and_space_is_bounded(opened: Callable[..., AnswerLog]) -> None:
    log = opened(max_bytes=40_000)
    for number in range(2000):
        log.add(answer(number))
    log.close()
    before = log.path.with_name("2-a.jsonl.1")
    kept = [line["request_id"] for path in (before, log.path) for line in lines(path)]
    assert kept == [f"r-{number}" for number in range(2000 - len(kept), 2000)]
    assert max(before.stat().st_size, log.path.stat().st_size) <= 40_000
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["2-a.jsonl", "2-a.jsonl.1"]


def test_a_log_is_taken_on_after_a_torn_line(opened: Callable[..., AnswerLog]) -> None:
    log = opened()
    log.add(answer(1))
    log.close()
    with log.path.open("ab") as file:
        file.write(b'{"request_id": "r-')
    log.path.chmod(0o644)
    log = opened()
    log.add(answer(2))
    log.close()
    assert [line["request_id"] for line in lines(log.path)] == ["r-1", "r-2"]
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def test_what_a_full_disk_does_not_take_is_counted_and_the_next_that_fits_is_whole(
    opened: Callable[..., AnswerLog], caplog: pytest.LogCaptureFixture
) -> None:
    log = opened()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for number in range(100):
            log.add(answer(number))
        wait_until(lambda: log.dropped > 80, "answers are dropped")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.add(answer(100))
    log.close()
    kept = lines(log.path)
    assert len(kept) + log.dropped == 101
    assert kept[-1]["request_id"] == "r-100"
    assert caplog.text.count("answers are not logged") == 1


def test_a_disk_that_hangs_holds_nobody(opened: Callable[..., AnswerLog], monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, goes_on, write = threading.Event(), threading.Event(), os.write

    def stuck(handle: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait(60)
        return write(handle, data)

    log = opened(max_pending=10)
    monkeypatch.setattr(os, "write", stuck)
    log.add(answer(0))
    assert hangs.wait(60)
    for number in range(1, 31):
        log.add(answer(number))
    assert log.dropped == 20
    goes_on.set()
    log.close()
    assert [line["request_id"] for line in lines(log.path)] == [f"r-{number}" for number in range(11)]


def test_a_log_that_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        AnswerLog(tmp_path / "file" / "answers.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="a plain file"):
        AnswerLog(tmp_path / "pipe")


# The server


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    package = make_package(tmp_path_factory.mktemp("packages") / "good", fails_on=[ITEMS[10]], max_history=10)
    return load_service(package, package.parent / "keys" / "signing.pub")


@pytest.fixture
def client(service: Service, opened: Callable[..., AnswerLog]) -> Iterator[AsgiClient]:
    service = service.limited(Limits(workers=1, timeout_s=60.0, max_waiting=3))
    log = opened()
    app = ServerApp(Replica("7", "a"), impression_key=KEY, answers=log)
    app.open(service)
    with AsgiClient(app) as client:
        client.log = log  # type: ignore[attr-defined]
        yield client
    service.close()


def ask(client: AsgiClient, history: list[Any], *headers: tuple[bytes, bytes], request_id: bytes = b"id-1") -> Answer:
    body = {"shopper": "shopper-secret", "history": history, "k": 3}
    return client.post("/v1/recommend", body, headers=[(b"x-request-id", request_id), *headers])


def logged(client: AsgiClient) -> list[dict[str, Any]]:
    client.log.close()  # type: ignore[attr-defined]
    return lines(client.log.path)  # type: ignore[attr-defined]


def test_only_what_is_compared_is_logged_with_nothing_of_the_shopper(client: AsgiClient) -> None:
    said = ask(client, ["104", "item-secret"], COMPARED).json
    assert impressions.read(KEY, said["impression"]).version == "7"
    ask(client, ["104"], request_id=b"id-2")
    ask(client, ["104"], (b"x-endcap-compare", b"0"), request_id=b"id-3")
    ask(client, ["104"], COMPARED, request_id=b"")
    ask(client, ["104"], COMPARED, request_id=b"x" * 129)
    (line,) = logged(client)
    assert 0 < line.pop("ms") < 60_000
    assert line == {"request_id": "id-1", "version": "7", "shadow": False, "code": 200,
                    "items": said["items"], "scores": said["scores"]}  # fmt: skip
    assert b"secret" not in client.log.path.read_bytes()  # type: ignore[attr-defined]


def test_errors_are_logged_without_items(client: AsgiClient) -> None:
    ask(client, [ITEMS[10]], COMPARED)
    ask(client, [5], COMPARED, SHADOW, request_id=b"id-2")
    found = [(line["request_id"], line["code"], line["items"], line["shadow"]) for line in logged(client)]
    assert found == [("id-1", 500, [], False), ("id-2", 400, [], True)]


def test_a_copy_earns_no_impression_and_counts_apart(client: AsgiClient) -> None:
    def count(name: str, **labels: str) -> float:
        return float(client.app.metrics.registry.get_sample_value(name, {"version": "7", **labels}))

    said = ask(client, [], COMPARED, SHADOW).json
    assert (said["impression"], said["fallback"], len(said["items"])) == (None, "popular", 3)
    ask(client, ["104"], SHADOW)  # not compared: not logged
    assert ask(client, ["104"], (b"x-endcap-shadow", b"0")).json["impression"] is not None
    assert count("endcap_server_attempts_total", route="shadow", outcome="answered") == 2
    assert count("endcap_server_latency_seconds_count", route="shadow") == 2
    assert count("endcap_server_attempts_total", route="recommend", outcome="answered") == 1
    assert count("endcap_server_fallbacks_total", fallback="popular") == 0
    assert b'endcap_server_answers_dropped{version="7"} 0.0' in client.get("/metrics").body
    assert [(line["shadow"], line["request_id"]) for line in logged(client)] == [(True, "id-1")]
