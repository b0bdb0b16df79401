"""Loads without a network: schedules, shoppers, figures and thresholds."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import EndcapError, InputError, StorageError
from endcap.evidence import Counts
from endcap.objectives import Good, Objective, Objectives
from endcap.outcomes import ObjectiveOutcome, exact_percentile, judge_requests
from endcap.records import RequestRecord
from loadtests.config import LoadConfig, gateway_url
from loadtests.run import LoadProcess, config_from_argv
from loadtests.schedule import Stage, arrivals
from loadtests.shoppers import read_shoppers, replay
from loadtests.summary import SATURATED, summarise

OBJECTIVES = Objectives(
    "recommender",
    "recommender",
    (
        Objective("availability", 0.9, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.9, Good.ANSWERED, 100, None, 0.01, None),
        Objective("click-through", 0.05, Good.CLICKED, None, 5.0, None, 0.1),
    ),
)


def request(number: int, *, latency_s: float = 0.01, status: int = 200, **changes: object) -> RequestRecord:
    values = {"impression": "aa", **changes}
    return RequestRecord(f"r-{number}", "recommend", "7", 100.0, 100.0, 100.0 + latency_s, status, **values)  # type: ignore[arg-type]


# ---- schedules ---------------------------------------------------------------------------------------


@given(seed=st.integers(), rate=st.floats(1, 500), duration_s=st.floats(0.5, 5))
def test_a_schedule_is_fixed_by_its_seed_and_stays_inside_its_stage(seed: int, rate: float, duration_s: float) -> None:
    stages = [Stage(rate, duration_s)]
    times = list(arrivals(stages, seed))
    assert times == list(arrivals(stages, seed))
    assert times == sorted(times)
    assert all(0 < at_s < duration_s for at_s in times)


def test_arrivals_are_poisson_at_the_rate_asked_for() -> None:
    times = list(arrivals([Stage(150, 200)], seed=7))
    expected = 150 * 200
    assert abs(len(times) - expected) < 5 * math.sqrt(expected)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    # The share of exponential gaps beyond their mean is 1/e; of regular ones it would be a half or none.
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.02)


def test_stages_follow_each_other_and_the_last_may_have_no_end() -> None:
    times = list(itertools.takewhile(lambda at_s: at_s < 30, arrivals([Stage(0, 10), Stage(10, 10), Stage(100)], 1)))
    assert min(times) > 10
    assert 50 < sum(at_s < 20 for at_s in times) < 150 < 700 < sum(at_s >= 20 for at_s in times)


@pytest.mark.parametrize(
    "stages", [[], [Stage(-1, 5)], [Stage(5, 0)], [Stage(5), Stage(5, 1)], [Stage(math.nan, 1)], [Stage(5, math.nan)]]
)
def test_a_schedule_that_cannot_be_is_refused(stages: list[Stage]) -> None:
    with pytest.raises(InputError):
        next(arrivals(stages, 1))


# ---- shoppers ----------------------------------------------------------------------------------------


def test_every_shopper_is_replayed_once_a_round_in_a_seeded_order(tmp_path: Path) -> None:
    path = tmp_path / "shoppers.jsonl"
    path.write_text("".join(json.dumps({"shopper": str(n), "history": ["4"], "next": None}) + "\n" for n in range(20)))
    shoppers = read_shoppers(path)
    two_rounds = [one.shopper for one in itertools.islice(replay(shoppers, 3), 40)]
    assert sorted(two_rounds[:20]) == sorted(one.shopper for one in shoppers)
    assert two_rounds[20:] == [f"{shopper}~2" for shopper in two_rounds[:20]], "other people with the same histories"
    assert two_rounds[:20] != [one.shopper for one in itertools.islice(replay(shoppers, 4), 20)]


@pytest.mark.parametrize(
    "line", ["", "[]", "{", '{"shopper": 1, "history": []}', '{"shopper": "1", "history": "4"}',
             '{"shopper": "1", "history": [4]}', '{"shopper": "1", "history": [], "next": 4}', '{"history": []}'],
)  # fmt: skip
def test_a_shoppers_file_of_another_form_is_refused_by_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "shoppers.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"shoppers\.jsonl(, line 1|: no shoppers)"):
        read_shoppers(path)
    with pytest.raises(InputError, match="no such file"):
        read_shoppers(tmp_path / "missing.jsonl")


# ---- figures -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1))
def test_a_percentile_is_a_value_seen_that_its_share_does_not_exceed(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = exact_percentile(np.array(values), share * 100)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-9
    assert sum(value < found for value in ordered) < share * len(ordered)


def test_a_summary_counts_shoppers_requests_and_tells_what_the_generator_lost() -> None:
    records = [
        *(request(number, latency_s=number / 1000) for number in range(1, 100)),
        request(100, latency_s=3.0, status=0, error="timeout", impression=None),
        request(101, latency_s=0.0, status=0, error=SATURATED, impression=None),
        RequestRecord("b-1", "feedback", "", 100.0, 100.0, 109.0, 503),
    ]
    summary = summarise(records, span_s=10.0, objectives=OBJECTIVES)
    assert (summary.requests, summary.failed, summary.saturated) == (101, 2, 1)
    assert (summary.offered_rps, summary.achieved_rps) == (10.1, 9.9)
    assert summary.p50_ms == pytest.approx(50)
    assert summary.p99_ms == pytest.approx(99)
    assert (summary.feedback, summary.feedback_failed) == (1, 1)
    assert {one.name: one.held for one in summary.thresholds} == {
        "availability": True, "latency": True, "click-through": False,
    }  # fmt: skip
    assert not summary.thresholds_held


def test_no_data_holds_no_objective() -> None:
    assert not any(outcome.held for outcome in judge_requests(OBJECTIVES, []))
    assert not ObjectiveOutcome("availability", 0.001, Counts(0, 0)).held
    assert summarise([], span_s=0.0).p50_ms is None


def test_an_unanswered_request_counts_against_availability_once() -> None:
    records = [request(1), request(2, status=503, impression=None), request(3, latency_s=0.2)]
    availability, latency, _ = judge_requests(OBJECTIVES, records)
    assert availability.counts == Counts(2, 3)
    assert latency.counts == Counts(1, 2)


# ---- settings ----------------------------------------------------------------------------------------


@given(
    st.builds(
        LoadConfig,
        shoppers=st.just(Path("shoppers.jsonl")),
        out=st.just(Path("records")),
        target=st.none() | st.just(Path("target")),
        url=st.none() | st.just("http://127.0.0.1:1"),
        rate_rps=st.floats(0.1, 1000),
        duration_s=st.none() | st.floats(0.1, 1000),
        seed=st.integers(0, 9),
        timeout_s=st.floats(0.1, 10),
        k=st.integers(1, 50),
        objectives=st.none() | st.just(Path("objectives.yaml")),
        thresholds=st.booleans(),
        feedback=st.booleans(),
        max_in_flight=st.integers(1, 9999),
    )
)
def test_settings_reach_the_loads_own_process_unchanged(config: LoadConfig) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ENDCAP_TARGET", raising=False)
        assert config_from_argv(config.to_argv()) == config


def test_the_gateway_is_found_by_the_targets_folder(tmp_path: Path) -> None:
    config = LoadConfig(shoppers=tmp_path, out=tmp_path, target=tmp_path)
    with pytest.raises(Exception, match="no target runs here"):
        gateway_url(config)
    (tmp_path / "target.json").write_text('{"gateway_url": "http://127.0.0.1:8080/"}')
    assert gateway_url(config) == "http://127.0.0.1:8080"
    with pytest.raises(InputError, match="no target given"):
        gateway_url(LoadConfig(shoppers=tmp_path, out=tmp_path))


def test_a_load_that_a_full_disk_ended_without_a_word_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with subprocess.Popen(["false"]) as process:
        process.wait()
        config = LoadConfig(shoppers=tmp_path / "shoppers.jsonl", out=tmp_path)
        load = LoadProcess(config, process, tmp_path / "load-summary.json", tmp_path / "load.log")
        with pytest.raises(EndcapError, match="ended with code 1 and no summary"):
            load.summary()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
        with pytest.raises(StorageError, match="no space left"):
            load.summary()
