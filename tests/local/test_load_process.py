"""A real load process against a small real HTTP server."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from endcap.errors import InputError
from endcap.processes import free_port
from endcap.records import convert_requests, read_requests
from loadtests.run import LoadConfig, LoadProcess, LoadSummary, start_load

DEADLINE_S = 30.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about in time"
        time.sleep(0.02)


@dataclass
class Shop:
    """A service with the recommender's two routes; ``hold_s`` and ``status`` may be changed while it runs."""

    url: str = ""
    hold_s: float = 0.0
    status: int = 200
    events: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0
    shoppers: list[tuple[str, str | None]] = field(default_factory=list)
    """(in the body, in the header), request by request."""


@pytest.fixture
def shop() -> Iterator[Shop]:
    shop = Shop()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            document = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status = 200
            answer: dict[str, object] = {"accepted": 1}
            if self.path == "/v1/feedback":
                shop.events.extend(document["events"])
            else:
                shop.asked += 1
                shop.shoppers.append((document["shopper"], self.headers["x-endcap-shopper"]))
                time.sleep(shop.hold_s)  # what a stalled service does, not synchronisation
                status = shop.status
                token = base64.urlsafe_b64encode(b"\x01" + os.urandom(16) + b"x" * 49).rstrip(b"=").decode()
                answer = {"items": ["7"], "scores": [1.0], "version": "3", "impression": token, "fallback": None}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    shop.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield shop
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def config(shop: Shop, tmp_path: Path) -> LoadConfig:
    shoppers = tmp_path / "shoppers.jsonl"
    # Every second shopper's next purchase is in the answer.
    lines = [{"shopper": str(n), "history": ["1"], "next": "7" if n % 2 else "8"} for n in range(10)]
    shoppers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return LoadConfig(shoppers=shoppers, out=tmp_path / "records", url=shop.url, rate_rps=60, seed=1)


def changed(config: LoadConfig, **changes: object) -> LoadConfig:
    from dataclasses import replace

    return replace(config, **changes)  # type: ignore[arg-type]


def finish(load: LoadProcess) -> LoadSummary:
    assert load.wait(DEADLINE_S)
    return load.summary()


@pytest.fixture
def start() -> Iterator[Callable[[LoadConfig], LoadProcess]]:
    started: list[LoadProcess] = []

    def begin(config: LoadConfig) -> LoadProcess:
        started.append(start_load(config))
        return started[-1]

    yield begin
    for load in started:
        load.kill()


def test_stopped_by_hand_it_loses_nothing_and_clicks_like_a_shopper(
    shop: Shop, config: LoadConfig, start: Callable[[LoadConfig], LoadProcess]
) -> None:
    load = start(config)
    load.wait_until_answered()
    wait_until(lambda: shop.asked >= 60)
    assert load.progress()["state"] == "running"
    summary = load.stop()
    assert not load.running()
    assert summary.requests == shop.asked
    assert (summary.failed, summary.saturated) == (0, 0)

    records = read_requests(config.out)
    assert not list(config.out.glob("requests-*.jsonl"))
    asked = [record for record in records if record.kind == "recommend"]
    assert len(asked) == summary.requests
    assert all(record.version == "3" and record.sent_s >= record.intended_s for record in asked)
    assert {record.clicked for record in asked} == {True, False}
    shown = [event["impression"] for event in shop.events if event["type"] == "shown"]
    clicked = [event for event in shop.events if event["type"] == "clicked"]
    assert len(set(shown)) == len(shown) == len(asked)
    assert {base64.urlsafe_b64decode(token[:24])[1:17].hex() for token in shown} == {r.impression for r in asked}
    assert len(clicked) == sum(record.clicked for record in asked)
    assert {event["item"] for event in clicked} == {"7"}
    assert len(records) - len(asked) == summary.feedback < len(shop.events)
    assert all(header == body for body, header in shop.shoppers)
    assert len({body.partition("~")[0] for body, _ in shop.shoppers}) == 10
    assert len({body for body, _ in shop.shoppers}) == len(asked), "later rounds are other people"


def test_an_id_that_no_header_takes_is_sent_encoded(
    shop: Shop, config: LoadConfig, start: Callable[[LoadConfig], LoadProcess]
) -> None:
    strange = ["a b", "x\r\ny-injected: 1", "\u00e9\u4e2d", "100%"]
    config.shoppers.write_text("".join(json.dumps({"shopper": one, "history": []}) + "\n" for one in strange))
    summary = finish(start(changed(config, duration_s=1.0)))
    assert summary.failed == 0
    assert len({header.partition("~")[0] for _, header in shop.shoppers}) == len(strange)
    assert all(header is not None and unquote(header) == body for body, header in shop.shoppers)


def test_a_stalled_service_slows_no_arrival_and_hides_no_wait(
    shop: Shop, config: LoadConfig, start: Callable[[LoadConfig], LoadProcess]
) -> None:
    """A closed loop would send a few requests and call them slow; shoppers keep coming, and time out."""
    shop.hold_s = 1.5
    load = start(changed(config, duration_s=2.0, timeout_s=1.0))
    assert load.wait(DEADLINE_S)
    summary = load.summary()
    assert summary.requests > 80
    assert summary.failed == summary.requests
    records = [record for record in read_requests(config.out) if record.kind == "recommend"]
    assert {record.error for record in records} <= {"timeout", "unfinished when the load ended"}
    assert all(record.latency_s >= 0.99 for record in records if record.error == "timeout")


def test_arrivals_that_cannot_be_sent_are_reported(
    shop: Shop, config: LoadConfig, start: Callable[[LoadConfig], LoadProcess]
) -> None:
    shop.hold_s = 0.5
    summary = finish(start(changed(config, duration_s=1.0, max_in_flight=3)))
    assert summary.saturated > 0
    assert summary.requests == summary.saturated + shop.asked
    assert summary.failed == summary.saturated


def test_killed_it_leaves_records_that_the_next_reader_converts(
    shop: Shop, config: LoadConfig, start: Callable[[LoadConfig], LoadProcess]
) -> None:
    load = start(config)
    wait_until(lambda: len(read_requests(config.out)) >= 20)
    load.kill()
    seen = len(read_requests(config.out))
    assert convert_requests(config.out) == seen
    assert len(read_requests(config.out)) == seen


def test_objectives_decide_the_exit_code(shop: Shop, config: LoadConfig, tmp_path: Path) -> None:
    objectives = tmp_path / "objectives.yaml"
    objectives.write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Objectives\nmetadata: {name: recommender}\n"
        "spec:\n  service: recommender\n  objectives:\n  - {name: availability, goal: 0.99, good: answered}\n"
    )
    shop.status = 503

    def run(*extra: str) -> subprocess.CompletedProcess[str]:
        argv = changed(config, objectives=objectives, duration_s=0.5).to_argv()
        return subprocess.run(
            [sys.executable, "-m", "loadtests.run", *argv, *extra], capture_output=True, text=True, timeout=DEADLINE_S
        )

    broken = run()
    assert broken.returncode == 4
    assert "availability" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert run("--no-thresholds").returncode == 0


def test_errors_reach_the_caller_by_their_kind(config: LoadConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        finish(start_load(changed(config, shoppers=tmp_path / "missing.jsonl")))
    # A service that is not there is the load's finding, not an error of the load.
    nobody = f"http://127.0.0.1:{free_port()}"
    summary = finish(start_load(changed(config, url=nobody, duration_s=0.5)))
    assert summary.failed == summary.requests > 0
    assert {record.error for record in read_requests(config.out)} == {"refused"}
