"""Sticky shares on a real Envoy: exact, and growth only moves shoppers from stable to canary."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest

from endcap.errors import InputError
from endcap.evidence import Counts
from serving.targets import LocalTarget, ModelVersion, StickyKey, start_local_target
from tests.local.load import eventually
from tests.local.test_local_target import config, package, stable_of

SHOPPERS = 3000
STEPS = (0.05, 0.25, 0.5, 1.0)
HEADER = StickyKey(header="x-endcap-shopper")
COOKIE = StickyKey(cookie="shopper")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sticky")


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[LocalTarget]:
    with start_local_target(config(folder, replicas_full=1)) as started:
        yield started


@pytest.fixture(scope="module")
def three(target: LocalTarget, folder: Path) -> tuple[ModelVersion, ModelVersion, ModelVersion, int]:
    """Canary, stable, baseline (the package of stable), and the token."""
    canary, baseline = ModelVersion("2", package(folder / "2")), ModelVersion("1-baseline", folder / "1")
    stable = stable_of(folder)
    token = target.acquire("test")
    target.ensure_capacity({canary: 0.1, stable: 0.8, baseline: 0.1}, token=token)
    return canary, stable, baseline, token


def versions(url: str, headers: list[dict[str, str]]) -> list[str]:
    """The version that answers each request, all answered 200; a client's library would cost more than the rest."""
    host, port = url.removeprefix("http://").split(":")
    found: dict[int, str] = {}
    todo = iter(enumerate(headers))

    async def ask() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for number, more in todo:
            lines = [f"{name}: {value}\r\n" for name, value in more.items()]
            writer.write(
                f"POST /v1/recommend HTTP/1.1\r\nhost: shop\r\ncontent-length: 2\r\n{''.join(lines)}\r\n{{}}".encode()
            )
            status, *answer = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            assert " 200 " in status
            given = dict(line.split(": ", 1) for line in answer if line)
            await reader.readexactly(int(given["content-length"]))
            found[number] = given["x-endcap-version"]
        writer.close()
        await writer.wait_closed()

    async def ask_all() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask())

    asyncio.run(ask_all())
    return [found[number] for number in range(len(headers))]


def by_header(count: int = SHOPPERS, *, begin: int = 0) -> list[dict[str, str]]:
    return [{"x-endcap-shopper": f"shopper-{number}"} for number in range(begin, begin + count)]


def by_cookie(count: int = SHOPPERS) -> list[dict[str, str]]:
    return [{"cookie": f"theme=dark; shopper=s{number}"} for number in range(count)]


def near(found: list[str], shares: Mapping[str, float]) -> bool:
    """Binomial: six standard deviations, so that a run in 10^8 fails by chance."""
    count = len(found)
    return all(
        abs(found.count(label) - share * count) <= 6 * (count * share * (1 - share)) ** 0.5
        for label, share in shares.items()
    )


def test_growing_steps_are_exact_and_only_move_shoppers_from_stable_to_canary(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    canary, stable, _, token = three
    before = ["1"] * SHOPPERS
    for share in STEPS:
        target.set_shares({canary: share, stable: 1 - share}, token=token, sticky=HEADER)
        now = versions(target.url, by_header())
        assert near(now, {"2": share, "1": 1 - share})
        assert {(was, then) for was, then in zip(before, now, strict=True) if was != then} <= {("1", "2")}
        assert versions(target.url, by_header(300)) == now[:300], "a shopper keeps their version"
        before = now
    assert set(before) == {"2"}


def test_a_baseline_last_takes_from_stable_alone_and_nobody_leaves_the_canary(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    canary, stable, baseline, token = three
    before = ["1"] * SHOPPERS
    for share in STEPS:
        fresh = share if share < 0.5 else 0.0
        shares = {canary: share, stable: 1 - share - fresh, baseline: fresh}
        target.set_shares(shares, token=token, sticky=HEADER)
        now = versions(target.url, by_header())
        assert near(now, {version.label: value for version, value in shares.items()})
        moves = {(was, then) for was, then in zip(before, now, strict=True) if was != then}
        assert not any(was == "2" for was, _ in moves)
        if fresh:
            assert moves <= {("1", "2"), ("1", "1-baseline")}
        before = now


def test_a_cookie_serves_as_well_and_who_has_none_gets_a_version_by_chance(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    canary, stable, _, token = three
    target.set_shares({canary: 0.25, stable: 0.75}, token=token, sticky=COOKIE)
    first = versions(target.url, by_cookie(1000))
    assert near(first, {"2": 0.25})
    assert versions(target.url, by_cookie(1000)) == first
    stranger = versions(target.url, [{"cookie": "theme=dark"}] * 400)
    assert near(stranger, {"2": 0.25})
    assert set(stranger) == {"1", "2"}
    target.set_shares({canary: 0.25, stable: 0.75}, token=token, sticky=HEADER)
    assert set(versions(target.url, [{}] * 200)) == {"1", "2"}
    target.set_shares({canary: 0.25, stable: 0.75}, token=token)
    assert set(versions(target.url, by_header(1) * 200)) == {"1", "2"}, "nothing is sticky any more"


@pytest.mark.parametrize("value", ["x" * 10_000, "a,b", '"', "naïve".encode().decode("latin-1")])
def test_any_value_is_hashed_and_keeps_its_version(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int], value: str
) -> None:
    canary, stable, _, token = three
    target.set_shares({canary: 0.5, stable: 0.5}, token=token, sticky=HEADER)

    async def ask() -> set[str]:
        async with httpx.AsyncClient(base_url=target.url, timeout=10, trust_env=False) as client:
            headers = {b"x-endcap-shopper": value.encode("latin-1")}
            answers = [await client.post("/v1/recommend", json={}, headers=headers) for _ in range(12)]
        assert {answer.status_code for answer in answers} == {200}
        return {answer.headers["x-endcap-version"] for answer in answers}

    assert len(asyncio.run(ask())) == 1


def test_a_header_beyond_the_gateway_s_limit_breaks_nobody_else(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    del three
    huge = httpx.post(target.url + "/v1/recommend", json={}, headers={"x-endcap-shopper": "x" * 200_000})
    assert huge.status_code == 431
    assert httpx.post(target.url + "/v1/recommend", json={}).status_code == 200


def test_retries_stay_with_the_shopper_s_version_and_each_request_counts_once(
    target: LocalTarget, folder: Path, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    _, stable, _, token = three
    failing = ModelVersion("failing", package(folder / "failing"))
    target.ensure_capacity({failing: 0.4, stable: 0.6}, token=token)
    target.set_shares({failing: 0.4, stable: 0.6}, token=token, sticky=HEADER)
    mine = [
        one
        for one, label in zip(by_header(200), versions(target.url, by_header(200)), strict=True)
        if label == "failing"
    ]
    package(folder / "failing", fail_every=1)

    def requests(label: str) -> tuple[int, int]:
        seen = target.observe().versions[label].requests
        return seen.good, seen.total

    eventually(lambda: sum(requests(label)[1] for label in ("1", "failing")) >= 200, what="all were counted")
    eventually(lambda: requests("failing")[1] == len(mine))
    healthy, before = requests("1"), target.observe().versions["failing"]
    answers = [httpx.post(target.url + "/v1/recommend", json={}, headers=one) for one in mine]
    assert {(answer.status_code, answer.headers["x-endcap-version"]) for answer in answers} == {(500, "failing")}
    eventually(lambda: requests("failing") == (len(mine), 2 * len(mine)), what="one a request, none of them good")
    assert requests("1") == healthy
    seen = target.observe().versions["failing"]
    assert seen.attempts.total - before.attempts.total > 2 * len(mine), "every attempt was the failing version's"
    first = seen.first_attempts.since(before.first_attempts)
    assert first == Counts(0, len(mine)), "and of its first attempts, one a request"
    package(folder / "failing")
    target.set_shares({stable: 1.0}, token=token)
    target.retire("failing", token=token)


def test_the_replicas_of_a_version_share_a_shopper_s_requests(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    # The hash chooses the version alone; within it the replica with the fewest open requests serves.
    canary, stable, _, token = three
    target.set_shares({canary: 0.5, stable: 0.5}, token=token, sticky=HEADER)
    zones = [
        httpx.post(target.url + "/v1/recommend", json={}, headers={"x-endcap-shopper": "one"}).headers["x-endcap-zone"]
        for _ in range(60)
    ]
    assert set(zones) == {"a", "b"}


def test_stickiness_is_kept_and_a_bad_key_is_refused(
    target: LocalTarget, three: tuple[ModelVersion, ModelVersion, ModelVersion, int]
) -> None:
    canary, stable, _, token = three
    target.set_shares({canary: 0.5, stable: 0.5}, token=token, sticky=COOKIE)
    kept = json.loads((target.folder / "state.json").read_text())
    assert kept["sticky"] == {"header": None, "cookie": "shopper"}
    assert target.state().sticky is not None
    for wrong in (StickyKey(), StickyKey(header="a", cookie="b"), StickyKey(header="no good")):
        with pytest.raises(InputError):
            target.set_shares({canary: 0.5, stable: 0.5}, token=token, sticky=wrong)
