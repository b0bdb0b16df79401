"""Attempts as the gateway's log has them, as Envoy counts them itself, and as the model servers count their own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from endcap.evidence import Counts
from endcap.objectives import CountedBy, EnvoyCounters, Good, Objective, Objectives, SeriesCounters
from endcap.selectors import parse_selector
from serving.gateway.logs import Attempt, parse_attempt, parse_outcome
from serving.gateway.settings import label_of
from serving.sources import EnvoySource, MetricsEndpoint, MetricsSource, Source, read_all
from serving.targets import LocalTarget, ModelVersion, StableVersion, SupervisorConfig, start_local_target
from tests.local.load import Load, eventually
from tests.local.test_local_target import config, package
from tests.packages import make_package

ATTEMPTS = "endcap_server_attempts_total"
LATENCY = "endcap_server_latency_seconds"


def series(good: str, total: str) -> SeriesCounters:
    return SeriesCounters(CountedBy.METRICS, parse_selector(good), parse_selector(total), "version", "", ())


def objective(name: str, counted: SeriesCounters | EnvoyCounters) -> Objective:
    return Objective(name, 0.99, Good.COUNTED, None, None, 0.01, None, counted)


OBJECTIVES = Objectives(
    "shop", "shop",
    (
        objective("envoy", EnvoyCounters("version-")),
        objective("servers", series(f'{ATTEMPTS}{{outcome=~"answered|refused"}}', ATTEMPTS)),
        objective("latency", series(f'{LATENCY}_bucket{{le="1.0"}}', f"{LATENCY}_count")),
    ),
)  # fmt: skip


def read(sources: list[Source], name: str) -> dict[str, Counts]:
    return dict(read_all(sources, time.time()).measured.get(name, {}))


def attempts(target: LocalTarget, before: dict[str, Counts]) -> dict[str, Counts]:
    return {
        label: seen.attempts.since(before.get(label, Counts())) for label, seen in target.observe().versions.items()
    }


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalTarget, Path]]:
    folder = tmp_path_factory.mktemp("sources")
    started = SupervisorConfig(
        folder=folder / "target", records=folder / "records", public_key=folder / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=make_package(folder / "1")), replicas_full=1, feedback_module=None,
    )  # fmt: skip
    with start_local_target(started) as target:
        yield target, folder


def test_log_envoy_and_servers_count_the_same_attempts(servers: tuple[LocalTarget, Path]) -> None:
    target, folder = servers
    canary = ModelVersion("2", make_package(folder / "2", fails_on=("105",)))
    token = target.acquire("test")
    target.ensure_capacity({canary: 0.5, ModelVersion("1", folder / "1"): 0.5}, token=token)
    target.set_shares({canary: 0.5, ModelVersion("1", folder / "1"): 0.5}, token=token)

    def endpoints() -> list[MetricsEndpoint]:
        return [MetricsEndpoint(f"http://127.0.0.1:{r.port}/metrics", version=r.version) for r in target.replicas()]

    sources: list[Source] = [
        EnvoySource(target.found.envoy_admin_url, OBJECTIVES),
        MetricsSource(endpoints, OBJECTIVES),
    ]
    assert read_all(sources, time.time()).notes == {}
    before = {label: seen.attempts for label, seen in target.observe().versions.items()}
    statuses = []
    with httpx.Client() as client:
        for number in range(120):
            history = ["105"] if number % 4 == 0 else ["103"] if number % 4 == 1 else ["not an item"]
            body: dict[str, object] = {"shopper": "1", "history": history, "k": 3 if number % 10 else -1}
            statuses.append(client.post(target.url + "/v1/recommend", json=body).status_code)
    assert {200, 400, 500} <= set(statuses)

    def same() -> bool:
        log = attempts(target, before)
        return log == read(sources, "envoy") == read(sources, "servers") and sum(c.total for c in log.values()) > 120

    eventually(same, what="the three counts are the same")
    log = attempts(target, before)
    assert log["1"].good == log["1"].total
    assert log["2"].total - log["2"].good >= 3  # an answer of 500 is three attempts
    latency = read(sources, "latency")
    assert {label: counts.total for label, counts in latency.items()} == {"1": log["1"].total, "2": log["2"].total}
    for source in sources:
        source.close()


def left_before_the_retry(records: Path) -> Counter[str]:
    """By version: failed attempts whose shopper went away before the retry began. Envoy charges a failed attempt
    with its retry or with its answer, and there was neither."""
    last: dict[str | None, Attempt] = {}
    for line in (records / "attempts.jsonl").read_bytes().splitlines():
        if (attempt := parse_attempt(line)) is not None:
            last[attempt.request_id] = attempt
    found: Counter[str] = Counter()
    for line in (records / "access.jsonl").read_bytes().splitlines():
        outcome = parse_outcome(line)
        if outcome is not None and outcome.attempt.cut_by_client:
            attempt = last.get(outcome.attempt.request_id)
            label = None if attempt is None else label_of(attempt.cluster)
            if attempt is not None and label is not None and not attempt.answered and not attempt.cut_by_client:
                found[label] += 1
    return found


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalTarget, Path]]:
    folder = tmp_path_factory.mktemp("fakes")
    with start_local_target(config(folder)) as target:
        yield target, folder


def test_envoy_counts_attempts_that_fail_hang_or_are_cut_as_the_log_does(fakes: tuple[LocalTarget, Path]) -> None:
    target, folder = fakes
    token = target.acquire("test")
    stable = ModelVersion("1", folder / "1")
    with closing(EnvoySource(target.found.envoy_admin_url, OBJECTIVES)) as source:
        source.read(time.time())
        sources: list[Source] = [source]
        ill = ModelVersion("ill", package(folder / "ill", fail_every=5, stall_every=11, reset_every=7))
        target.ensure_capacity({ill: 0.5, stable: 0.5}, token=token)
        assert read(sources, "envoy")["ill"] == Counts()
        target.set_shares({ill: 0.5, stable: 0.5}, token=token)
        # Shoppers who go away before a hanging replica's time is over count nowhere; the others see it tried again.
        with Load(target.url, rate=40, timeout_s=0.3) as hasty, Load(target.url, rate=40) as patient:
            hasty.more(120)
            patient.more(120)
        assert any(answer.status == 0 for answer in hasty.answers)

        def same() -> bool:
            log, unseen = attempts(target, {}), left_before_the_retry(folder / "records")
            seen = {label: Counts(counts.good, counts.total - unseen[label]) for label, counts in log.items()}
            return seen == read(sources, "envoy") and log["1"].total + log["ill"].total > 200

        eventually(same, what="Envoy and its log count the same")
        log = attempts(target, {})["ill"]
        assert 0.5 < log.good / log.total < 0.9
