"""The local target with a trivial model server: what rollouts and drills rely on, tried with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from endcap.errors import CapacityError, FencedError, InputError, TargetError, VerificationError
from endcap.files import read_json_lines, write_json
from serving.gateway import AdminClient
from serving.targets import LocalTarget, ModelVersion, StableVersion, SupervisorConfig, open_target, start_local_target
from tests.local.load import Load, eventually


def package(folder: Path, **behaviour: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "behaviour.json", behaviour)
    return folder


def config(folder: Path, **changes: object) -> SupervisorConfig:
    (folder / "key.pub").write_text("not read by the fake replica")
    stable = StableVersion(label="1", package=package(folder / "1"))
    base = SupervisorConfig(
        folder=folder / "target", records=folder / "records", public_key=folder / "key.pub", stable=stable,
        thresholds_ms=(100, 400), server_module="tests.fake_replica", feedback_module=None, capacity_s=20,
    )  # fmt: skip
    return base.model_copy(update=changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("local")


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[LocalTarget]:
    with start_local_target(config(folder)) as started:
        yield started


@pytest.fixture
def token(target: LocalTarget) -> Iterator[int]:
    token = target.acquire("test")
    yield token
    token = target.acquire("test")
    stable = ModelVersion("1", target.state().versions["1"])
    target.set_shares({stable: 1.0}, token=token)
    for label in target.state().versions:
        if label != "1":
            target.retire(label, token=token)


def stable_of(folder: Path) -> ModelVersion:
    return ModelVersion("1", folder / "1")


def events(folder: Path, name: str) -> list[dict[str, object]]:
    return [record for record in read_json_lines(folder / "records" / "target.jsonl") if record["event"] == name]


def test_a_version_with_all_requests_has_two_replicas_in_each_zone(target: LocalTarget) -> None:
    places = sorted((r.version, r.zone, r.index) for r in target.replicas())
    assert places == [("1", "a", 0), ("1", "a", 1), ("1", "b", 0), ("1", "b", 1)]
    assert target.healthy() == {"1": 4}
    assert httpx.get(target.url + "/healthz").status_code == 200
    with open_target(target.folder) as other:
        assert other.url == target.url


def test_shares_change_under_load_without_a_failed_request_and_are_kept_to(
    target: LocalTarget, folder: Path, token: int
) -> None:
    stable, canary = stable_of(folder), ModelVersion("split", package(folder / "split"))
    before = {label: seen.attempts.total for label, seen in target.observe().versions.items()}
    with Load(target.url, rate=120) as load:
        load.more(20)
        target.ensure_capacity({canary: 0.6, stable: 0.4}, token=token)
        for step in range(30):
            share = step % 10 / 10
            target.set_shares({canary: share, stable: 1 - share}, token=token)
        target.set_shares({canary: 0.25, stable: 0.75}, token=token)
        settled = load.more(400)[20:]
        assert list(target.observe().shares.items()) == [("split", 0.25), ("1", 0.75)]
    assert load.failed == []
    on_canary = sum(answer.version == "split" for answer in settled)
    # Binomial: seven standard deviations, so that a run in 10^11 fails by chance.
    assert abs(on_canary - 0.25 * len(settled)) < 7 * (len(settled) * 0.25 * 0.75) ** 0.5

    def counted() -> bool:
        seen = target.observe().versions
        return sum(seen[label].attempts.total - before.get(label, 0) for label in ("1", "split")) >= len(load.answers)

    eventually(counted, what="every attempt is counted")
    # Envoy counts for itself; its own numbers and those from its log are the same.
    assert asyncio.run(request_totals(target))["version-split"] == target.observe().versions["split"].attempts.total


async def request_totals(target: LocalTarget) -> dict[str, int]:
    admin = AdminClient(target.found.envoy_admin_url)
    try:
        return await admin.request_totals()
    finally:
        await admin.close()


def test_attempts_show_what_retries_hide_from_the_shopper(target: LocalTarget, folder: Path, token: int) -> None:
    stable, canary = stable_of(folder), ModelVersion("failing", package(folder / "failing", fail_every=4))
    target.ensure_capacity({canary: 0.5, stable: 0.5}, token=token)
    target.set_shares({canary: 0.5, stable: 0.5}, token=token)
    with Load(target.url, rate=120) as load:
        load.more(240)
    answers = [answer for answer in load.answers if answer.version == "failing"]

    def seen() -> bool:
        return target.observe().versions["failing"].attempts.total >= len(answers)

    eventually(seen)
    versions = target.observe().versions
    attempts = versions["failing"].attempts
    assert 0.6 < attempts.good / attempts.total < 0.9
    assert len(load.failed) < 0.1 * len(answers)
    assert versions["1"].attempts.good == versions["1"].attempts.total > 0


def test_a_version_that_hangs_fails_its_attempts_and_one_that_is_slow_misses_its_time(
    target: LocalTarget, folder: Path, token: int
) -> None:
    stable = stable_of(folder)
    hanging = ModelVersion("hanging", package(folder / "hanging", stall_every=2))
    slow = ModelVersion("slow", package(folder / "slow", slow_ms=200))
    target.ensure_capacity({hanging: 0.3, slow: 0.3, stable: 0.4}, token=token)
    target.set_shares({hanging: 0.3, slow: 0.3, stable: 0.4}, token=token)
    with Load(target.url, rate=60) as load:
        load.more(120)
    eventually(lambda: target.observe().versions["slow"].attempts.total >= 10)
    seen = target.observe().versions
    assert 1 - seen["hanging"].attempts.good / seen["hanging"].attempts.total > 0.2
    assert seen["slow"].within_ms[100].good == 0
    assert seen["slow"].within_ms[100].total == seen["slow"].attempts.good > 0


def test_a_killed_replica_costs_no_request_and_comes_back(target: LocalTarget, folder: Path) -> None:
    with Load(target.url) as load:
        load.more(20)
        killed = target.replicas()[0]
        assert killed.pid is not None
        os.kill(killed.pid, signal.SIGKILL)
        eventually(lambda: target.replicas()[0].pid not in (None, killed.pid))
        eventually(lambda: target.healthy() == {"1": 4})
        load.more(20)
    assert load.failed == []
    assert events(folder, "replica_died")[-1]["detail"] == "signal 9"


def test_a_zone_that_hangs_is_left_and_taken_back(target: LocalTarget, folder: Path) -> None:
    stopped = [replica.pid for replica in target.replicas() if replica.zone == "a" and replica.pid is not None]
    try:
        with Load(target.url) as load:
            load.more(20)
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            eventually(lambda: target.healthy() == {"1": 2}, what="the zone is held for ill")
            begin = len(load.answers)
            eventually(lambda: len(load.answers) > begin and {a.zone for a in load.more(40)} == {"b"})
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            eventually(lambda: target.healthy() == {"1": 4}, what="the zone is back")
            eventually(lambda: {a.zone for a in load.more(40)} == {"a", "b"}, what="the zone gets requests again")
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert load.failed == []
    assert {event["zone"] for event in events(folder, "replica_unhealthy")[-2:]} == {"a"}
    assert {event["zone"] for event in events(folder, "replica_healthy")[-2:]} == {"a"}


def test_a_package_that_is_refused_gets_no_replica_and_no_share(target: LocalTarget, folder: Path, token: int) -> None:
    tampered = ModelVersion("tampered", package(folder / "tampered", refuse=True))
    with pytest.raises(VerificationError, match="the signature does not verify"):
        target.ensure_capacity({tampered: 0.05, stable_of(folder): 0.95}, token=token)
    assert dict(target.observe().shares) == {"1": 1.0}
    assert target.healthy() == {"1": 4}
    assert events(folder, "replica_refused")
    with pytest.raises(CapacityError, match="tampered has no replicas"):
        target.set_shares({tampered: 0.05, stable_of(folder): 0.95}, token=token)
    assert "tampered" not in target.observe().versions


def test_a_replica_that_cannot_start_is_a_capacity_error_in_its_own_words(
    target: LocalTarget, folder: Path, token: int
) -> None:
    crashing = ModelVersion("crashing", package(folder / "crashing", crash=True))
    with pytest.raises(CapacityError, match="out of cheese"):
        target.ensure_capacity({crashing: 0.05}, token=token)
    assert target.healthy() == {"1": 4}


def test_a_replica_that_refused_is_tried_again_when_capacity_is_asked_for(
    target: LocalTarget, folder: Path, token: int
) -> None:
    mended = ModelVersion("mended", package(folder / "mended"))
    target.ensure_capacity({mended: 0.05}, token=token)
    package(folder / "mended", refuse=True)
    killed = next(replica.pid for replica in target.replicas() if replica.version == "mended")
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    eventually(lambda: any(event["version"] == "mended" for event in events(folder, "replica_refused")))
    package(folder / "mended")
    target.ensure_capacity({mended: 0.05}, token=token)
    assert target.healthy()["mended"] == 2


def test_an_older_token_is_refused(target: LocalTarget, folder: Path, token: int) -> None:
    stable = stable_of(folder)
    with pytest.raises(FencedError):
        target.set_shares({stable: 1.0}, token=token - 1)
    with pytest.raises(FencedError):
        target.retire("2", token=token - 1)
    with pytest.raises(FencedError):
        target.ensure_capacity({stable: 1.0}, token=token - 1)


def test_who_takes_over_stops_what_the_last_holder_began(target: LocalTarget, folder: Path, token: int) -> None:
    never = ModelVersion("never", package(folder / "never", never_ready=True))
    with ThreadPoolExecutor(1) as pool:
        growing = pool.submit(target.ensure_capacity, {never: 0.05}, token=token)
        eventually(lambda: any(replica.version == "never" for replica in target.replicas()))
        later = target.acquire("later")
        with pytest.raises(FencedError):
            growing.result(timeout=20)
    assert {replica.version for replica in target.replicas()} == {"1"}
    target.ensure_capacity({stable_of(folder): 1.0}, token=later)


def test_what_cannot_be_is_refused(target: LocalTarget, folder: Path, token: int) -> None:
    stable = stable_of(folder)
    with pytest.raises(InputError, match=r"sum to 0\.5"):
        target.set_shares({stable: 0.5}, token=token)
    with pytest.raises(TargetError, match="still has a share"):
        target.retire("1", token=token)
    with pytest.raises(InputError, match="is served from"):
        target.ensure_capacity({ModelVersion("1", folder / "elsewhere"): 1.0}, token=token)
    target.retire("never-was", token=token)


def test_the_control_api_needs_its_token_and_keeps_it_private(target: LocalTarget) -> None:
    assert httpx.post(target.found.control_url + "/v1/acquire", json={"holder": "x"}).status_code == 401
    assert (target.folder / "target.json").stat().st_mode & 0o077 == 0
    assert (target.folder / "impression.key").stat().st_mode & 0o077 == 0
    for pid in (target.found.pid, *(replica.pid for replica in target.replicas())):
        assert target.found.control_token not in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_dead_gateway_is_started_again_on_its_port(target: LocalTarget) -> None:
    before = target.state().gateway_pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    eventually(lambda: target.state().gateway_pid not in (None, before))

    def serves() -> bool:
        try:
            return httpx.post(target.url + "/v1/recommend", json={}).status_code == 200
        except httpx.HTTPError:
            return False

    eventually(serves)
    json.loads((target.folder / "target.json").read_text())
