"""The file that declares a rollout: what it may say, what is refused, what it means when it says nothing."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from serving.rollout.freeze import DateFreeze, WeeklyFreeze, frozen
from serving.rollout.spec import Margin, Mode, RolloutSpec, ShadowSpec, load_rollout
from serving.targets.base import StickyKey
from tests.simulated import OBJECTIVES, SPEC


def load(path: Path, spec: str) -> RolloutSpec:
    path = path / "rollout.yaml"
    path.write_text(f"apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {{name: r}}\nspec: {spec}\n")
    return load_rollout(path)


def test_a_spec_of_three_lines_works(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {name: recommender}\n"
        'spec: {service: recommender, candidate: "models:/recommender/7"}\n'
    )
    spec = load_rollout(path)
    assert [step.share for step in spec.steps] == [0.05, 0.25, 0.5, 1.0]
    assert spec.objectives == "recommender"
    assert spec.alpha == 0.01
    assert spec.sticky == StickyKey(header="x-endcap-shopper")
    assert spec.hold_s == 600
    assert spec.shadow is None


def test_everything_that_can_be_said_is_understood(tmp_path: Path) -> None:
    spec = load(tmp_path, """
  service: shop
  candidate: models:/shop/7
  objectives: shop
  steps:
  - {share: 0.1, minRequests: 500, minSeconds: 60, maxSeconds: 900}
  - {share: 1, approval: true}
  margins: {click-through: {relative: 0.05}, latency: {absolute: 0.02}}
  inconclusive: {holdSeconds: 30}
  shadow: {share: 0.2, minRequests: 300, minOverlap: 0.4}
  gates: {requests: held-out.jsonl, offline: {marginRelative: 0.02}}
  sticky: {cookie: shopper}
  baseline: true
  freeze:
  - {from: 2026-12-24T00:00:00Z, until: 2026-12-27T00:00:00Z, reason: Christmas}
  - {days: [friday, saturday], from: 18:00, until: "08:00", timezone: Europe/Berlin}
  notify: {webhookFrom: SLACK}
  prometheus: {url: "http://prometheus:9090"}
""")  # fmt: skip
    assert spec.steps[1].approval
    assert spec.margins == {"click-through": Margin(relative=0.05), "latency": Margin(absolute=0.02)}
    assert spec.shadow == ShadowSpec(0.2, 300, 600, 0.4)
    assert spec.gates.requests == str(tmp_path / "held-out.jsonl")
    assert spec.sticky == StickyKey(cookie="shopper")
    assert spec.freeze[1] == WeeklyFreeze((4, 5), 18 * 60, 8 * 60, "Europe/Berlin", "a weekly freeze window")
    assert (spec.baseline, spec.webhook_from, spec.prometheus_url) == (True, "SLACK", "http://prometheus:9090")
    judged = spec.judged(OBJECTIVES)
    assert (judged.named("latency").margin, judged.named("latency").margin_relative) == (0.02, None)
    assert (judged.named("click-through").margin, judged.named("click-through").margin_relative) == (None, 0.05)


def test_an_ab_test_is_one_split_and_then_all(tmp_path: Path) -> None:
    spec = load(tmp_path, "{service: shop, candidate: b, mode: ab, primary: click-through}")
    assert spec.mode is Mode.AB
    assert [step.share for step in spec.steps] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("{service: a, candidate: b, steps: [{share: 0.5}]}", "last share must be 1"),
        ("{service: a, candidate: b, steps: [{share: 0.00001}, {share: 1}]}", "0.0001"),
        ("{service: a, candidate: b, steps: [{share: 1}]}", "nothing to compare with"),
        ("{service: a, candidate: b, steps: [{share: 0.5}, {share: 0.25}, {share: 1}]}", "greater"),
        ("{service: a, candidate: b, steps: [{share: 0.5}, {share: 0.5}, {share: 1}]}", "greater"),
        ("{service: a, candidate: b, steps: [{share: 0.5, minSeconds: 9, maxSeconds: 8}, {share: 1}]}", "maxSeconds"),
        ("{service: a, candidate: b, alhpa: 0.1}", "alhpa"),
        ("{service: a}", "candidate"),
        ("{service: On Sale, candidate: b}", "service"),
        ("{service: a, candidate: b, alpha: 0}", "alpha"),
        ("{service: a, candidate: b, margins: {latency: {absolute: 0}}}", "margins.latency.absolute"),
        ("{service: a, candidate: b, margins: {latency: {}}}", "absolute or relative"),
        ("{service: a, candidate: b, mode: ab}", "primary"),
        ("{service: a, candidate: b, primary: clicks}", "mode: ab"),
        ("{service: a, candidate: b, mode: ab, primary: c, sticky: null}", "sticky"),
        ("{service: a, candidate: b, sticky: {header: a, cookie: b}}", "header or cookie"),
        ("{service: a, candidate: b, sticky: {header: 'bad header'}}", "header"),
        ("{service: a, candidate: b, shadow: {share: 0}}", "shadow.share"),
        ("{service: a, candidate: b, freeze: [{from: 2026-12-24T00:00:00Z, until: 2026-12-01T00:00:00Z}]}", "until"),
        ("{service: a, candidate: b, freeze: [{from: 2026-12-24, until: 2026-12-25}]}", "freeze"),
        ("{service: a, candidate: b, freeze: [{days: [someday], from: 1:00, until: 2:00}]}", "days"),
        ("{service: a, candidate: b, freeze: [{days: [monday], from: 25:00, until: 2:00}]}", "from"),
        ("{service: a, candidate: b, freeze: [{days: [monday], from: 1:00, until: 2:00, timezone: Mars}]}", "Mars"),
        ("{service: a, candidate: b, notify: {webhookFrom: 'https://hooks.example/secret'}}", "webhookFrom"),
        ("{service: a, candidate: b, prometheus: {url: 'file:///etc/passwd'}}", "prometheus.url"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_field(spec: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        load(tmp_path, spec)


def test_objectives_of_another_name_or_service_are_refused() -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match="asks for objectives 'shop'"):
        SPEC.judged(replace(OBJECTIVES, name="other"))
    with pytest.raises(InputError, match="of service 'shop'"):
        SPEC.judged(replace(OBJECTIVES, service="other"))


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_a_weekly_window_goes_over_midnight_and_keeps_to_its_clock() -> None:
    friday = WeeklyFreeze((4,), 18 * 60, 8 * 60, "Europe/Berlin", "weekend")
    assert friday.end_s(at("2026-11-20T16:59")) is None  # 17:59 in Berlin
    assert friday.end_s(at("2026-11-20T17:00")) == at("2026-11-21T07:00")
    assert friday.end_s(at("2026-11-21T06:59")) == at("2026-11-21T07:00")
    assert friday.end_s(at("2026-11-21T07:00")) is None
    assert friday.end_s(at("2026-07-03T16:00")) == at("2026-07-04T06:00"), "an hour earlier in summer"


def test_of_windows_in_force_the_one_that_ends_last_counts() -> None:
    windows = (DateFreeze(0, 100, "short"), DateFreeze(50, 200, "long"), DateFreeze(300, 400, "later"))
    found = frozen(windows, 60)
    assert found is not None
    assert (found.until_s, found.reason) == (200, "long")
    assert frozen(windows, 250) is None


@given(st.lists(st.integers(0, 6), min_size=1, unique=True), st.integers(0, 1439), st.integers(0, 1439),
       st.floats(1.7e9, 1.9e9))  # fmt: skip
def test_a_window_ends_after_now_and_within_a_day(days: list[int], begins: int, ends: int, now_s: float) -> None:
    end_s = WeeklyFreeze(tuple(days), begins, ends, "America/New_York", "x").end_s(now_s)
    assert end_s is None or now_s < end_s <= now_s + 25 * 3600
