"""The feedback collector as a real process: kills, damage, a full disk."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from endcap.errors import TargetError
from endcap.processes import free_port
from serving import impressions
from serving.targets.collector import Collector, CollectorEvidence, VersionEvidence
from serving.targets.config import SupervisorConfig
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


def test_a_targets_counts_by_shopper_hold_while_the_collector_is_away_and_go_on_after(tmp_path: Path) -> None:
    key_file = tmp_path / "impression.key"
    key = impressions.ensure_key(key_file)
    (tmp_path / "logs").mkdir()
    config = SupervisorConfig(folder=tmp_path, records=tmp_path, public_key=tmp_path / "none.pub", window_s=1)
    since_s = time.time()

    async def click(url: str | None, version: str, shopper: str) -> None:
        """Until one was taken in time."""
        async with asyncio.timeout(30), httpx.AsyncClient(timeout=5.0) as client:
            while True:
                _, token = impressions.mint(key, version=version, shopper=shopper, now_s=time.time())
                body = {"events": [{"impression": token, "type": "clicked"}]}
                try:
                    if (await client.post(f"{url}/v1/feedback", json=body)).json()["accepted"]:
                        return
                except httpx.TransportError:
                    await asyncio.sleep(0.01)

    async def closed(collector: Collector, count: int) -> CollectorEvidence:
        async with asyncio.timeout(30):
            while True:
                found = await collector.evidence(since_s)
                if sum(version.closed for version in found.versions.values()) == count:
                    return found
                await asyncio.sleep(0.01)

    async def life() -> None:
        collector = Collector(config, impression_key=key_file, emit=lambda event: None)
        assert await collector.evidence(since_s) == CollectorEvidence()
        await collector.start()
        watch = asyncio.create_task(collector.watch())
        try:
            await click(collector.url, "2", "a")
            first = await closed(collector, 1)
            assert first == CollectorEvidence(
                1.0, {"2": VersionEvidence(closed=1, clicked=1, shoppers=1, shoppers_clicked=1)}
            )
            assert (await collector.evidence(since_s + 3600)).versions == {"2": VersionEvidence(closed=1, clicked=1)}
            died = collector.pid
            assert died is not None
            os.kill(died, signal.SIGSTOP)
            assert await collector.evidence(since_s) == first
            with pytest.raises(TargetError, match="does not answer"):
                await collector.evidence(since_s - 40)
            os.kill(died, signal.SIGKILL)
            await click(collector.url, "3", "a")  # the same shopper, who counts no more
            await click(collector.url, "3", "b")
            assert (await closed(collector, 3)).versions == {
                "2": VersionEvidence(closed=1, clicked=1, shoppers=1, shoppers_clicked=1),
                "3": VersionEvidence(closed=2, clicked=2, shoppers=1, shoppers_clicked=1),
            }
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await collector.stop()

    asyncio.run(life())


def test_a_client_that_means_no_good_is_cut_off(tmp_path: Path) -> None:
    impressions.ensure_key(tmp_path / "impression.key")
    port = free_port()
    with started(arguments(tmp_path, port), port, tmp_path / "log") as program:
        program.wait_for("/healthz")
        with socket.create_connection(("127.0.0.1", port), timeout=60.0) as peer:
            peer.sendall(b"POST /v1/feedback HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")
            sent = 0
            with pytest.raises(OSError):
                while sent < 50_000_000:
                    peer.sendall(b"a: b\r\n" * 10_000)
                    sent += 60_000
        assert program.status("/healthz") == 200
