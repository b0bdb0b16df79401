"""What a user relies on: metrics are what the literature says, intervals are honest, the gate never passes on luck."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluation import (
    METRICS,
    Paired,
    Ranked,
    catalogue_coverage,
    decide_gate,
    estimate,
    estimate_difference,
    evaluate,
    mean_popularity,
    per_shopper,
    popularity_lift,
    read_evaluation,
    resampled_means,
    write_evaluation,
)
from endcap.errors import StateError


def test_metrics_of_known_ranks():
    table = dict(zip(METRICS, per_shopper(np.array([1, 3, 10, 11, 10**6])).T.tolist(), strict=True))
    assert table["hr_at_10"] == [1, 1, 1, 0, 0]
    assert table["ndcg_at_10"] == pytest.approx([1, 0.5, 1 / math.log2(11), 0, 0])
    assert table["mrr_at_5"] == pytest.approx([1, 1 / 3, 0, 0, 0])
    assert table["mrr_at_20"] == pytest.approx([1, 1 / 3, 0.1, 1 / 11, 0])


def test_coverage_and_popularity_lift():
    top = np.array([[1, 2], [1, 0]])
    assert catalogue_coverage(top, 4) == 0.5
    purchases = np.array([99, 8, 4, 2, 2])  # padding's count must not matter
    histories = [np.array([3, 4]), np.array([3])]
    assert mean_popularity(top, histories, purchases).tolist() == [[6, 2], [8, 2]]
    assert popularity_lift(7, 2) == pytest.approx((7 - 2) / 2)
    assert popularity_lift(2, 2) == 0 == popularity_lift(2, 0)


def test_what_is_shown_is_judged_with_intervals_too():
    """A model that shows everybody the same ten covers them for certain; one that shows anything has room to vary."""
    random = np.random.default_rng(5)
    histories = [random.integers(1, 300, size=6) for _ in range(400)]
    purchases = np.arange(300.0)
    same, anything = np.tile(np.arange(290, 300), (400, 1)), random.integers(1, 300, (400, 10))
    anything[200:] = anything[:200, ::-1]
    ranked = [Ranked("same", np.ones(400, np.int64), same), Ranked("anything", np.ones(400, np.int64), anything)]
    models = evaluate(ranked, split="test", histories=histories, purchases=purchases, resamples=200).models
    fixed = models["same"].coverage_at_10
    assert [fixed.low, fixed.high] == pytest.approx([10 / 299] * 2)
    varied = models["anything"].coverage_at_10
    assert varied.low < varied.value <= varied.high <= 1
    lift = models["same"].popularity_bias_at_10
    assert 0.8 < lift.low < lift.high < 1.2  # the ten bestsellers, against items drawn evenly


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    random = np.random.default_rng(1)
    held = 0
    for trial in range(100):
        sample = (random.random((300, 1)) < 0.3).astype(float)
        interval = estimate(float(sample.mean()), resampled_means(sample, resamples=200, seed=trial)[:, 0])
        held += interval.low <= 0.3 <= interval.high
    assert 88 <= held <= 100


def test_a_paired_difference_is_narrower_than_the_models_own_intervals():
    random = np.random.default_rng(2)
    hard = random.random(4000) < 0.9
    better = np.where(hard, 999, random.integers(1, 4, 4000))
    worse = np.where(hard, 999, random.integers(1, 6, 4000))
    top = np.ones((4000, 10), np.int64)
    a, b, difference = estimate_difference(Ranked("a", better, top), Ranked("b", worse, top))
    assert difference.value == pytest.approx(a - b)
    assert 0 < difference.low < difference.value < difference.high


def test_all_models_side_by_side_and_back_from_the_file(tmp_path: Path):
    random = np.random.default_rng(3)
    histories = [random.integers(1, 30, size=length) for length in random.integers(1, 25, size=200)]
    ranked = [Ranked(name, random.integers(1, 40, 200), random.integers(0, 30, (200, 20))) for name in ("x", "y")]
    evaluation = evaluate(ranked, split="test", histories=histories, purchases=np.arange(30),
                          pairs=[("x", "y")], resamples=50)  # fmt: skip
    for name in ("x", "y"):
        quality = evaluation.models[name]
        assert set(quality.metrics) == set(METRICS)
        assert all(value.low <= value.value <= value.high for value in quality.metrics.values())
        assert sum(group.users for group in quality.by_history_length) == 200
    assert evaluation.value("x") - evaluation.value("y") == pytest.approx(evaluation.paired[0].difference)
    write_evaluation(tmp_path / "evaluation.json", evaluation)
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    (tmp_path / "evaluation.json").write_text('{"split": "test"}')
    with pytest.raises(StateError, match=r"evaluation\.json"):
        read_evaluation(tmp_path / "evaluation.json")


numbers = st.floats(-1, 1, allow_nan=False)


@given(numbers, numbers, numbers)
def test_the_gate_passes_only_what_surely_beats_the_champion(low: float, value: float, high: float):
    low, value, high = sorted((low, value, high))
    decision = decide_gate("new", "version 1", Paired("new", "version 1", "ndcg_at_10", value, low, high))
    assert decision.passed == (low > 0)
    assert decision.reason


def test_the_gate_without_a_champion_and_without_evidence():
    assert decide_gate("new", None, None).passed
    assert not decide_gate("new", "version 1", None).passed
