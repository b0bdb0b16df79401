"""What a rollout relies on: evidence that may be looked at at any time keeps its word about errors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.evidence import Boundary, ConfidenceSequence, Counts, Evidence, SequentialTest, Stratum, Verdict
from endcap.evidence.sequential import _log_likelihood_ratios, _project
from endcap.objectives import Good, Objective, Objectives

AVAILABILITY = Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None)
CLICKS = Objective("click-through", 0.05, Good.CLICKED, None, 5.0, None, 0.2)
OBJECTIVES = Objectives("shop", "shop", (AVAILABILITY, CLICKS))

shares = st.floats(0.02, 0.98)
boundaries = st.one_of(
    st.floats(0.01, 0.3).map(Boundary.margin),
    st.floats(0.01, 0.5).map(Boundary.relative_margin),
    shares.map(Boundary.goal),
)


def binomial(n: int, good: int, share: float) -> float:
    return math.comb(n, good) * share**good * (1 - share) ** (n - good)


controls = st.floats(0.35, 0.98)
fractions = st.floats(0.0, 0.99)


def aside(line: float, direction: int, fraction: float) -> float:
    """A share that far from the line towards 0 (direction -1) or 1."""
    return line * (1 - fraction) if direction < 0 else line + (1 - line) * fraction


@given(boundaries, st.sampled_from([-1, 1]), controls, controls, fractions, fractions, st.integers(0, 5),
       st.integers(1, 5))  # fmt: skip
def test_the_expectation_of_an_e_value_is_at_most_one_wherever_the_hypothesis_holds(
    boundary: Boundary, direction: int, alt_control: float, control: float, alternative: float, truth: float,
    n_control: int, n_canary: int,
) -> None:  # fmt: skip
    """Exact, by enumerating every outcome of a look: the theorem in the module's docstring."""
    alt_canary = min(max(aside(boundary.at(alt_control), direction, alternative), 0.001), 0.999)
    canary = aside(boundary.at(control), -direction, truth)  # the truth is on the hypothesis' side
    expectation = 0.0
    for k, c in itertools.product(range(n_control + 1), range(n_canary + 1)):
        stratum = Stratum(Counts(c, n_canary), Counts(k, n_control))
        ratio = _log_likelihood_ratios(
            np.array([alt_control]), np.array([alt_canary]), np.array([boundary.slope]),
            np.array([boundary.offset]), stratum,
        )[0]  # fmt: skip
        expectation += binomial(n_control, k, control) * binomial(n_canary, c, canary) * math.exp(ratio)
    assert expectation <= 1 + 1e-6


@given(boundaries, st.sampled_from([-1, 1]), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.001, 0.999),
       st.integers(0, 3), st.integers(0, 400), st.integers(0, 4), st.integers(1, 4))  # fmt: skip
def test_no_bet_that_a_test_really_makes_has_an_expectation_above_one(
    boundary: Boundary, direction: int, control: float, truth: float, expected: float, bad: int, before: int,
    n_control: int, n_canary: int,
) -> None:  # fmt: skip
    """As above with the test's own alternatives, for any true shares: rare events, and margins wider than a share."""
    line = min(max(boundary.at(control), 0.0), 1.0)
    canary = line + (1 - line) * truth if direction < 0 else line * (1 - truth)
    if direction > 0 and boundary.at(control) < 0:
        return  # nothing is that much worse: the hypothesis is empty here
    test = SequentialTest(boundary, direction, expected, control=Counts(max(0, before - bad), before))
    expectations = np.zeros(len(test.log_e))
    for k, c in itertools.product(range(n_control + 1), range(n_canary + 1)):
        after = test.update(Stratum(Counts(c, n_canary), Counts(k, n_control)))
        expectations += binomial(n_control, k, control) * binomial(n_canary, c, canary) * np.exp(after.log_e)
    assert expectations.max() <= 1 + 1e-6


def test_a_margin_wider_than_control_s_own_share_fails_nobody() -> None:
    evidence = Evidence.start(Objectives("shop", "shop", (replace(CLICKS, margin=0.1, margin_relative=None),)))
    for _ in range(100):
        evidence = evidence.update({"click-through": Stratum(Counts(5, 100), Counts(5, 100))})
    assert evidence.verdict is not Verdict.FAIL


@given(shares, shares, boundaries, st.integers(1, 500), st.integers(1, 500))
def test_the_projection_is_on_the_line_and_no_point_of_it_is_closer(
    control: float, canary: float, boundary: Boundary, n_k: int, n_c: int
) -> None:
    def divergence(x: float) -> float:
        y = boundary.at(x)
        return n_k * kullback(control, x) + n_c * kullback(canary, y)

    def kullback(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    (x,) = _project(
        np.array([control]), np.array([canary]), np.array([boundary.slope]), np.array([boundary.offset]), n_k, n_c
    )
    for other in np.linspace(0.001, 0.999, 50):
        if 0.001 < boundary.at(other) < 0.999:
            assert divergence(float(x)) <= divergence(float(other)) + 1e-6


def first_crossing(direction: int, canary: float, *, alpha: float, seed: int) -> int | None:
    """Look after every look, as an engine does: the look at which the test first rejects, None if it never does."""
    rng = np.random.default_rng(seed)
    test = SequentialTest(Boundary.relative_margin(0.2), direction, 0.05)
    for look in range(1, 61):
        c, k = int(rng.poisson(20)), int(rng.poisson(40))
        test = test.update(Stratum(Counts(int(rng.binomial(c, canary)), c), Counts(int(rng.binomial(k, 0.1)), k)))
        if test.rejects(alpha):
            return look
    return None


def test_a_canary_just_within_the_margin_is_failed_no_more_often_than_alpha_however_often_it_is_looked_at() -> None:
    crossed = [first_crossing(-1, 0.08, alpha=0.1, seed=seed) for seed in range(200)]
    assert sum(look is not None for look in crossed) <= 0.1 * 200


def test_a_canary_just_beyond_the_margin_is_passed_no_more_often_than_beta() -> None:
    crossed = [first_crossing(+1, 0.08, alpha=0.1, seed=seed) for seed in range(200)]
    assert sum(look is not None for look in crossed) <= 0.1 * 200


def test_a_canary_that_nobody_clicks_is_failed_soon() -> None:
    assert all(first_crossing(-1, 0.002, alpha=0.01, seed=seed) is not None for seed in range(30))


def test_no_data_is_never_a_pass() -> None:
    evidence = Evidence.start(OBJECTIVES)
    for _ in range(10_000):
        evidence = evidence.update({})
    assert evidence.verdict is Verdict.INCONCLUSIVE
    assert "no data" in evidence.reason


def test_one_objective_without_data_keeps_the_whole_from_passing() -> None:
    evidence = Evidence.start(OBJECTIVES)
    for _ in range(50):
        evidence = evidence.update({"availability": Stratum(Counts(100, 100), Counts(100, 100))})
    assert evidence.verdict_of("availability") is Verdict.PASS
    assert evidence.verdict is Verdict.INCONCLUSIVE


def test_control_alone_is_no_evidence() -> None:
    evidence = Evidence.start(OBJECTIVES)
    for _ in range(50):
        evidence = evidence.update({"availability": Stratum(Counts(), Counts(100, 100))})
    assert evidence.verdict_of("availability") is Verdict.INCONCLUSIVE


def test_worse_than_its_own_goal_fails_even_when_control_is_as_bad() -> None:
    evidence = Evidence.start(Objectives("shop", "shop", (AVAILABILITY,)))
    for _ in range(60):
        evidence = evidence.update({"availability": Stratum(Counts(90, 100), Counts(90, 100))})
    assert evidence.verdict is Verdict.FAIL
    assert "worse than its goal of 0.99" in evidence.reason


def test_a_fail_once_shown_stays_shown() -> None:
    test = SequentialTest(Boundary.margin(0.01), -1, 0.99)
    for _ in range(5):
        test = test.update(Stratum(Counts(50, 100), Counts(100, 100)))
    assert test.rejects(0.001)
    for _ in range(200):
        test = test.update(Stratum(Counts(100, 100), Counts(100, 100)))
    assert test.rejects(0.001)


def test_the_confidence_sequence_closes_in_on_the_true_difference_and_keeps_it() -> None:
    rng = np.random.default_rng(11)
    sequence = ConfidenceSequence.start(0.1, alpha=0.05)
    widths = []
    for _ in range(60):
        stratum = Stratum(Counts(int(rng.binomial(60, 0.10)), 60), Counts(int(rng.binomial(60, 0.13)), 60))
        sequence = sequence.update(stratum)
        low, high = sequence.interval
        widths.append(high - low)
        assert low <= -0.03 <= high
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.08


def test_with_very_much_data_the_difference_lies_between_two_points_of_the_grid() -> None:
    sequence = ConfidenceSequence.start(0.9, alpha=0.05)
    for _ in range(100):
        sequence = sequence.update(Stratum(Counts(79_500, 100_000), Counts(90_000, 100_000)))
    low, high = sequence.interval
    assert -0.13 < low < -0.105 < high < -0.08


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_a_counter_that_was_restarted_loses_nothing_and_invents_nothing(a: int, b: int, c: int, d: int) -> None:
    before, now = Counts(min(a, b), b), Counts(min(c, d), d)
    new = now.since(before)
    assert 0 <= new.good <= new.total
    restarted = now.total < before.total or now.good < before.good
    assert new.total == (now.total if restarted else now.total - before.total)


@pytest.mark.parametrize("total", [0, 1])
def test_a_share_of_nothing_is_nothing(total: int) -> None:
    assert Counts(0, total).share == (None if total == 0 else 0.0)


@pytest.mark.parametrize(("canary", "control"), [(0, 100), (100, 0)])
def test_a_difference_beyond_the_grid_is_told_by_its_nearer_end(canary: int, control: int) -> None:
    sequence = ConfidenceSequence.start(0.5, alpha=0.05)
    for _ in range(20):
        sequence = sequence.update(Stratum(Counts(canary, 100), Counts(control, 100)))
    low, high = sequence.interval
    assert low == high == (-0.25 if canary < control else 0.25)
