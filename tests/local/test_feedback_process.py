"""The feedback collector as a real process: kills, damage, a full disk."""

from __future__ import annotations

import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import orjson

from endcap.processes import free_port
from serving import impressions
from tests.process import Program, run_to_end, started, wait_until


def arguments(folder: Path, port: int) -> list[str]:
    return [
        "-m", "serving.feedback", "--database", str(folder / "feedback.sqlite"),
        "--impression-key", str(folder / "impression.key"), "--window-s", "600", "--port", str(port),
    ]  # fmt: skip


def events(key: bytes, count: int, kind: str = "shown") -> tuple[list[str], list[dict[str, str]]]:
    """(impression ids, events) that are fresh."""
    made = [impressions.mint(key, version="2", shopper="1", now_s=time.time()) for _ in range(count)]
    return [identity for identity, _ in made], [{"impression": token, "type": kind} for _, token in made]


def exported(program: Program) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in program.get("/v1/export").content.splitlines()]


def test_a_sigkill_in_the_middle_of_load_loses_no_acknowledged_event(tmp_path: Path) -> None:
    key = impressions.ensure_key(tmp_path / "impression.key")
    acknowledged: dict[str, dict[str, str]] = {}
    port = free_port()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")

        def send_until_killed() -> None:
            with httpx.Client(base_url=program.url, timeout=30.0) as client:
                while True:
                    identities, batch = events(key, 3)
                    try:
                        answer = client.post("/v1/feedback", json={"events": batch})
                    except httpx.TransportError:
                        return
                    assert answer.json()["accepted"] == 3
                    acknowledged.update(zip(identities, batch, strict=True))

        senders = [threading.Thread(target=send_until_killed) for _ in range(4)]
        for sender in senders:
            sender.start()
        wait_until(lambda: len(acknowledged) > 600, "events are acknowledged")
        program.process.send_signal(signal.SIGKILL)
        for sender in senders:
            sender.join()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")
        kept = {event["impression"] for event in exported(program)}
        assert set(acknowledged) <= kept
        assert program.get("/v1/evidence").json()["versions"]["2"]["open"] == len(kept)
        again = list(acknowledged.values())[:100]
        answer = httpx.post(program.url + "/v1/feedback", json={"events": again}, timeout=30.0).json()
        assert (answer["accepted"], answer["repeated"]) == (0, 100)


def test_a_full_disk_is_a_507_and_the_collector_goes_on_when_there_is_space(tmp_path: Path) -> None:
    key = impressions.ensure_key(tmp_path / "impression.key")
    port = free_port()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")
        with httpx.Client(base_url=program.url, timeout=30.0) as client:
            first, batch = events(key, 10)
            assert client.post("/v1/feedback", json={"events": batch}).status_code == 200
            _, hard = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
            size = (tmp_path / "feedback.sqlite-wal").stat().st_size
            resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (size + 2000, hard))
            second, batch = events(key, 100)
            refused = client.post("/v1/feedback", json={"events": batch})
            assert refused.status_code == 507
            assert refused.json()["error"]["next"]
            assert client.get("/v1/evidence").json()["versions"]["2"]["open"] == 10
            resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
            assert client.post("/v1/feedback", json={"events": batch}).json()["accepted"] == 100
        assert {event["impression"] for event in exported(program)} == {*first, *second}


def test_sigterm_finishes_and_folds_the_log_in(tmp_path: Path) -> None:
    key = impressions.ensure_key(tmp_path / "impression.key")
    port = free_port()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")
        _, batch = events(key, 10)
        assert httpx.post(program.url + "/v1/feedback", json={"events": batch}, timeout=30.0).status_code == 200
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0
    assert not (tmp_path / "feedback.sqlite-wal").exists()


def test_a_damaged_or_held_database_is_named_and_nothing_starts(tmp_path: Path) -> None:
    impressions.ensure_key(tmp_path / "impression.key")
    database = tmp_path / "feedback.sqlite"
    database.write_bytes(b"this is no database, whatever its name says" * 100)
    ended = run_to_end(arguments(tmp_path, 0))
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert str(database) in ended.stderr
    assert "damaged" in ended.stderr
    database.unlink()
    port = free_port()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")
        ended = run_to_end(arguments(tmp_path, 0))
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert f"in use by process {program.process.pid}" in ended.stderr
