"""Copies of requests to a shadow on a real Envoy: the shadow gets them, shoppers and counts do not notice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from endcap.errors import CapacityError, FencedError, InputError
from endcap.files import read_json_lines
from serving.gateway import AdminClient
from serving.targets import LocalTarget, ModelVersion, start_local_target
from tests.local.load import Load, eventually
from tests.local.test_local_target import config, package, stable_of

Seen = list[dict[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shadow")


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[LocalTarget]:
    with start_local_target(config(folder, replicas_full=1)) as started:
        yield started


@pytest.fixture(scope="module")
def shadow(folder: Path) -> ModelVersion:
    return ModelVersion("2", package(folder / "2", log=True))


@pytest.fixture
def token(target: LocalTarget, folder: Path, shadow: ModelVersion) -> Iterator[int]:
    package(folder / "1", log=True)
    token = target.acquire("test")
    target.ensure_capacity({shadow: 0.05}, token=token)
    yield token
    target.set_shadow(None, token=target.acquire("test"))


def seen_by(folder: Path, label: str, *, since: int = 0) -> Seen:
    return list(read_json_lines(folder / label / "seen.jsonl"))[since:]


def post(target: LocalTarget, count: int, path: str = "/v1/recommend", **headers: str) -> list[str]:
    """The ids of ``count`` requests, all of which stable answered."""
    with httpx.Client(base_url=target.url, headers=headers) as client:
        answers = [client.post(path, json={}) for _ in range(count)]
    assert {(answer.status_code, answer.headers["x-endcap-version"]) for answer in answers} == {(200, "1")}
    return [answer.headers["x-request-id"] for answer in answers]


def stat(target: LocalTarget, name: str) -> int:
    text = httpx.get(f"{target.found.envoy_admin_url}/stats?filter=^cluster\\.shadow-2\\.{name}$").text
    return sum(int(line.rpartition(":")[2]) for line in text.splitlines())


def test_the_shadow_gets_each_copied_request_marked_and_stable_its_own(
    target: LocalTarget, folder: Path, shadow: ModelVersion, token: int
) -> None:
    before = {label: len(seen_by(folder, label)) for label in ("1", "2")}
    target.set_shadow(shadow, share=1.0, token=token)
    ids = post(target, 30)
    eventually(lambda: len(seen_by(folder, "2", since=before["2"])) >= 30, what="every copy arrived")
    copies, originals = (seen_by(folder, label, since=before[label]) for label in ("2", "1"))
    assert sorted(copy["x-request-id"] for copy in copies) == sorted(ids)
    assert {(copy.get("x-endcap-compare"), copy.get("x-endcap-shadow")) for copy in copies} == {("1", "1")}
    assert {(one.get("x-endcap-compare"), one.get("x-endcap-shadow")) for one in originals} == {("1", None)}
    assert {copy["host"] for copy in copies} == {one["host"] for one in originals}
    target.set_shadow(None, token=token)
    post(target, 5)
    assert len(seen_by(folder, "2", since=before["2"])) == 30
    assert "x-endcap-compare" not in seen_by(folder, "1")[-1]


def test_copies_are_nobody_s_attempts_requests_or_outcomes(
    target: LocalTarget, folder: Path, shadow: ModelVersion, token: int
) -> None:
    begin = target.observe()
    copied = len(seen_by(folder, "2"))
    target.set_shadow(shadow, share=1.0, token=token)
    post(target, 25)
    eventually(lambda: target.observe().outcomes.total == begin.outcomes.total + 25)
    eventually(lambda: len(seen_by(folder, "2", since=copied)) == 25)
    now = target.observe()
    assert now.versions["1"].attempts.total == begin.versions["1"].attempts.total + 25
    assert now.versions["1"].requests.total == begin.versions["1"].requests.total + 25
    assert now.versions["2"].attempts == begin.versions["2"].attempts
    assert now.versions["2"].requests == begin.versions["2"].requests
    # The records have them, under the name of their own cluster.
    recorded = [line["cluster"] for line in read_json_lines(folder / "records" / "attempts.jsonl")]
    assert recorded.count("shadow-2") >= 25
    assert "version-2" not in recorded


@pytest.mark.parametrize("copied", [False, True])
def test_a_client_cannot_mark_its_requests(
    target: LocalTarget, folder: Path, shadow: ModelVersion, token: int, copied: bool
) -> None:
    if copied:
        target.set_shadow(shadow, share=1.0, token=token)
    for path in ("/v1/recommend", "/v2/models/recommender/infer"):
        post(target, 1, path, **{"x-endcap-compare": "evil", "x-endcap-shadow": "1"})
        arrived = seen_by(folder, "1")[-1]
        assert "x-endcap-shadow" not in arrived
        assert arrived.get("x-endcap-compare") == ("1" if copied and path == "/v1/recommend" else None)


def test_the_share_of_copies_is_kept_and_says_nothing_about_who_answers(
    target: LocalTarget, folder: Path, shadow: ModelVersion, token: int
) -> None:
    other, stable = ModelVersion("3", package(folder / "3", log=True)), stable_of(folder)
    target.ensure_capacity({other: 0.1}, token=token)
    target.set_shares({other: 0.5, stable: 0.5}, token=token)
    target.set_shadow(shadow, share=0.2, token=token)
    before = {label: len(seen_by(folder, label)) for label in ("1", "2", "3")}
    with httpx.Client(base_url=target.url) as client:
        for _ in range(1000):
            assert client.post("/v1/recommend", json={}).status_code == 200
    seen = {label: seen_by(folder, label, since=before[label]) for label in ("1", "3")}
    copied = {label: sum("x-endcap-compare" in one for one in found) for label, found in seen.items()}
    # Binomial: six standard deviations.
    assert abs(sum(copied.values()) - 200) <= 6 * (1000 * 0.2 * 0.8) ** 0.5
    for label, found in seen.items():
        assert abs(copied[label] - 0.2 * len(found)) <= 6 * (len(found) * 0.2 * 0.8) ** 0.5
    eventually(lambda: len(seen_by(folder, "2", since=before["2"])) == sum(copied.values()))
    target.set_shares({stable: 1.0}, token=token)
    target.retire("3", token=token)


def test_a_shadow_that_hangs_delays_and_fails_nobody(
    target: LocalTarget, shadow: ModelVersion, folder: Path, token: int
) -> None:
    package(folder / "1")
    pids = [replica.pid for replica in target.replicas() if replica.version == "2" and replica.pid is not None]
    target.set_shadow(shadow, share=1.0, token=token)
    try:
        with Load(target.url, rate=120, timeout_s=10) as load:
            load.more(60)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            hung = load.more(500)
            assert stat(target, "upstream_rq_active") <= 8
            assert stat(target, "upstream_rq_pending_active") <= 8
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert load.failed == []
    # A try at a replica that hangs would take half a second; who waits for a shadow would wait as long.
    assert sum(answer.done_s - answer.sent_s > 0.45 for answer in hung) < 0.02 * len(hung)
    assert stat(target, "upstream_rq_retry") == 0
    eventually(lambda: target.healthy() == {"1": 2, "2": 2})


def test_setting_it_again_changes_nothing_and_an_older_holder_cannot(
    target: LocalTarget, shadow: ModelVersion, folder: Path, token: int
) -> None:
    target.set_shadow(shadow, share=0.5, token=token)
    routes = (target.folder / "xds" / "rds" / "routes.json").read_bytes()
    target.set_shadow(shadow, share=0.5, token=token)
    assert (target.folder / "xds" / "rds" / "routes.json").read_bytes() == routes
    later = target.acquire("later")
    with pytest.raises(FencedError):
        target.set_shadow(shadow, share=0.1, token=token)
    with pytest.raises(FencedError):
        target.set_shadow(None, token=token)
    kept = target.state().shadow
    assert kept is not None
    assert (kept.label, kept.share) == ("2", 0.5)
    target.set_shares({stable_of(folder): 1.0}, token=later)
    assert target.state().shadow == kept, "shares leave the shadow as it is"
    for _ in range(2):
        target.set_shadow(None, token=later)
    assert target.state().shadow is None
    assert "shadow-2" not in (target.folder / "xds" / "cds" / "clusters.json").read_text()


def test_a_shadow_needs_capacity_and_a_share(target: LocalTarget, folder: Path, token: int) -> None:
    stranger = ModelVersion("9", package(folder / "9"))
    with pytest.raises(CapacityError, match="version 9 has no replicas"):
        target.set_shadow(stranger, share=0.1, token=token)
    with pytest.raises(InputError, match="needs a share"):
        target.set_shadow(stranger, token=token)
    assert target.state().shadow is None


def test_who_is_shadowed_goes_to_another_and_ends_with_the_version(
    target: LocalTarget, folder: Path, shadow: ModelVersion, token: int
) -> None:
    other = ModelVersion("4", package(folder / "4", log=True))
    target.ensure_capacity({other: 0.05}, token=token)
    target.set_shadow(shadow, share=1.0, token=token)
    target.set_shadow(other, share=1.0, token=token)
    before = len(seen_by(folder, "2"))
    post(target, 5)
    eventually(lambda: len(seen_by(folder, "4")) == 5)
    assert len(seen_by(folder, "2")) == before
    target.retire("4", token=token)
    assert target.state().shadow is None
    assert asyncio.run(hosts(target)) == {"version-1", "version-2"}
    post(target, 5)


async def hosts(target: LocalTarget) -> set[str]:
    admin = AdminClient(target.found.envoy_admin_url)
    try:
        return {host.cluster for host in await admin.hosts()}
    finally:
        await admin.close()


def test_a_supervisor_that_starts_again_goes_on_copying_and_counting(tmp_path: Path) -> None:
    wanted = config(tmp_path, replicas_full=1)
    shadow = ModelVersion("2", package(tmp_path / "2", log=True))
    with start_local_target(wanted) as target:
        token = target.acquire("test")
        target.ensure_capacity({shadow: 0.05}, token=token)
        target.set_shadow(shadow, share=1.0, token=token)
        post(target, 20)
        eventually((target.folder / "tally.json").exists, what="counts are kept")
        post(target, 20)
        eventually(lambda: target.observe().outcomes.total == 40)
        attempts = target.observe().versions["1"].attempts
        os.kill(target.found.pid, signal.SIGKILL)
        target.wait()
    with start_local_target(wanted) as again:
        assert again.observe().versions["1"].attempts == attempts
        eventually(
            lambda: "shadow-2" in (again.folder / "xds" / "rds" / "routes.json").read_text(), what="copies go on"
        )
        post(again, 10)
        eventually(lambda: again.observe().versions["1"].requests.total == 50)
        assert again.observe().outcomes.total == 50
        eventually(lambda: len(seen_by(tmp_path, "2")) == 50, what="copies go on")
        assert again.state().shadow is not None
    kept = json.loads((wanted.folder / "tally.json").read_text())
    assert kept["counts"]["outcomes_total"] == 50, "what was counted last is kept at the end"
