"""What a rollout relies on: evidence that may be looked at at any time keeps its word about errors."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from endcap.evidence import Counts, Evidence, Intervals, Judgement, Kernel, SplitTest, Stratum, Verdict, share_follows
from endcap.evidence.kernel import BETTER, CONTROL, FAIL, GOAL, PASS, State, put_in
from endcap.objectives import Good, Objective, Objectives

AVAILABILITY = Objective("availability", 0.999, Good.ANSWERED, None, None, 0.01, None)
LATENCY = Objective("latency", 0.99, Good.ANSWERED, 100, None, 0.01, None)
CLICKS = Objective("click-through", 0.05, Good.CLICKED, None, 5.0, None, 0.1)
OBJECTIVES = Objectives("shop", "shop", (AVAILABILITY, LATENCY, CLICKS))
BAD = np.array([0.001, 0.01, 0.92])
"""Bad shares of a version that keeps all of its goals."""

shares = st.floats(0.001, 0.999)
margins = st.one_of(
    st.floats(0.001, 0.5).map(lambda margin: (margin, None)),
    st.floats(0.01, 0.9).map(lambda margin: (None, margin)),
)


def only(objective: Objective) -> Objectives:
    return Objectives("shop", "shop", (objective,))


def fed(kernel: Kernel, *looks: tuple[int, int, int, int]) -> State:
    """The state of a kernel of one objective after looks: canary's bad and all events, control's bad and all."""
    state = kernel.start()
    for look in looks:
        kernel.update(state, *(np.array([float(count)]) for count in look))
    return state


def binomial(n: int, bad: int, share: float) -> float:
    return math.comb(n, bad) * share**bad * (1 - share) ** (n - bad)


@given(
    shares, margins, shares, st.floats(0.0, 1.0), st.integers(0, 4), st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 200), st.integers(0, 9)), max_size=3),
)  # fmt: skip
def test_no_bet_has_an_expectation_above_one_wherever_its_hypothesis_holds(
    goal: float, margin: tuple[float | None, float | None], control: float, truth: float, n_control: int,
    n_canary: int, before: list[tuple[int, int, int, int]],
) -> None:  # fmt: skip
    """Exact, by enumerating every outcome of a look, for any shares and whatever was seen before."""
    objective = Objective("any", goal, Good.ANSWERED, None, None, *margin)
    kernel = Kernel([objective], primary="any")
    past = [(min(a, b), b, min(c, d), d) for b, a, d, c in before]
    start = fed(kernel, *past)
    slope = 1.0 if objective.margin is not None else 1 - (objective.margin_relative or 0)
    line = slope * control + (objective.margin or objective.margin_relative or 0)
    # The worst of each hypothesis' shares and one within it: no worse than the line; the line or worse; ...
    tests = {
        "control": (kernel.bets_of(CONTROL), min(line, 1.0) * truth),
        "goal": (kernel.bets_of(GOAL), (1 - goal) * truth),
        "pass": (kernel.bets_of(PASS), line + (1 - line) * truth if line < 1 else None),
        "better": (kernel.bets_of(BETTER), control + (1 - control) * truth),
    }
    staked = start.bets.log_e[0].copy()
    failing = kernel.bets_of(CONTROL) + kernel.bets_of(GOAL)
    staked[failing] = np.maximum(staked[failing], math.log(put_in(start.looks + 1)))
    for bets, canary in tests.values():
        if canary is None:
            continue  # nothing is that much worse: the hypothesis is empty here
        expectation = np.zeros(len(bets))
        for k, c in itertools.product(range(n_control + 1), range(n_canary + 1)):
            state = start.copy()
            kernel.update(state, *(np.array([float(v)]) for v in (c, n_canary, k, n_control)))
            gain = np.exp(state.bets.log_e[0, bets] - staked[bets])
            expectation += binomial(n_control, k, control) * binomial(n_canary, c, canary) * gain
        assert expectation.max() <= 1 + 1e-6


def test_one_rollout_and_thousands_at_once_get_the_same_numbers() -> None:
    rng = np.random.default_rng(5)
    kernel = Kernel(OBJECTIVES.objectives)
    batch = kernel.start((4, 5))
    single = Evidence.start(OBJECTIVES, alpha=0.01, intervals=False)
    names = [objective.name for objective in OBJECTIVES.objectives]
    for _ in range(50):
        canary_total = np.asarray(rng.poisson(20, (4, 5, 3)), dtype=np.float64)
        control_total = np.asarray(rng.poisson(180, (4, 5, 3)), dtype=np.float64)
        canary_bad = rng.binomial(canary_total.astype(int), BAD * 1.02).astype(np.float64)
        control_bad = rng.binomial(control_total.astype(int), BAD).astype(np.float64)
        kernel.update(batch, canary_bad, canary_total, control_bad, control_total)
        at = (2, 3)
        single = single.update({
            name: Stratum(
                Counts(int(canary_total[at][i] - canary_bad[at][i]), int(canary_total[at][i])),
                Counts(int(control_total[at][i] - control_bad[at][i]), int(control_total[at][i])),
            )
            for i, name in enumerate(names)
        })  # fmt: skip
    np.testing.assert_allclose(single.state.peak, batch.peak[2, 3], rtol=1e-12)
    assert kernel.failed(batch, 0.01).shape == (4, 5, 3)
    kept = batch.take(np.array([2]))
    np.testing.assert_array_equal(kept.peak[0], batch.peak[2])


def simulate(
    objectives: Objectives, canary: np.ndarray, control: np.ndarray, *, runs: int, looks: int, seed: int,
    primary: str | None = None,
) -> tuple[Kernel, State]:  # fmt: skip
    """Looks of 20 canary events beside 60 of control, bad with these shares."""
    rng = np.random.default_rng(seed)
    kernel = Kernel(objectives.objectives, primary=primary)
    state = kernel.start((runs,))
    shape = (runs, len(objectives.objectives))
    for _ in range(looks):
        kernel.update(
            state, rng.binomial(20, canary, shape).astype(np.float64), np.full(shape, 20.0, dtype=np.float64),
            rng.binomial(60, control, shape).astype(np.float64), np.full(shape, 60.0, dtype=np.float64),
        )  # fmt: skip
    return kernel, state


def test_a_canary_just_within_every_margin_is_failed_no_more_often_than_alpha_however_often_it_is_looked_at() -> None:
    loose = (replace(AVAILABILITY, goal=0.9), replace(LATENCY, goal=0.9), CLICKS)
    worst = np.array([0.011, 0.02, 0.928])
    kernel, state = simulate(replace(OBJECTIVES, objectives=loose), worst, BAD, runs=400, looks=300, seed=1)
    assert kernel.failed(state, 0.1).any(-1).mean() <= 0.1


def test_a_version_exactly_as_good_as_its_goals_is_failed_no_more_often_than_alpha() -> None:
    goals = np.array([0.001, 0.01, 0.95])
    kernel, state = simulate(OBJECTIVES, goals, goals, runs=400, looks=300, seed=2)
    assert kernel.failed(state, 0.1).any(-1).mean() <= 0.1


def test_a_canary_just_beyond_the_margin_is_passed_no_more_often_than_beta() -> None:
    kernel, state = simulate(only(CLICKS), np.array([0.928]), np.array([0.92]), runs=400, looks=300, seed=3)
    assert kernel.passed(state, 0.1).mean() <= 0.1


def test_a_version_no_better_is_promoted_by_an_a_b_rollout_no_more_often_than_beta() -> None:
    same, primary = np.array([0.92]), "click-through"
    kernel, state = simulate(only(CLICKS), same, same, runs=400, looks=300, seed=4, primary=primary)
    assert kernel.passed(state, 0.1).mean() <= 0.1
    kernel, state = simulate(only(CLICKS), np.array([0.88]), same, runs=100, looks=300, seed=4, primary=primary)
    assert kernel.passed(state, 0.05).mean() >= 0.95


@pytest.mark.parametrize(
    ("canary", "samples"),
    [([0.01, 0.01, 0.92], 1000), ([0.05, 0.01, 0.92], 400), ([0.001, 0.03, 0.92], 1200), ([0.001, 0.01, 0.94], 12_000)],
)
def test_a_canary_that_is_worse_in_one_thing_is_found_within_so_many_of_its_events(
    canary: list[float], samples: int
) -> None:
    kernel, state = simulate(OBJECTIVES, np.array(canary), BAD, runs=60, looks=samples // 20, seed=6)
    assert kernel.failed(state, 0.01).any(-1).mean() > 0.5


def test_four_errors_in_ten_seconds_of_a_tenth_of_the_traffic_break_a_goal_of_three_nines() -> None:
    looks = [
        {"availability": Stratum(Counts(20 - bad, 20), Counts(180, 180))} for bad in (0, 1, 0, 0, 1, 0, 1, 0, 0, 1)
    ]
    evidence = Evidence.start(OBJECTIVES, alpha=0.01)
    for look in looks:
        evidence = evidence.update(look)
    assert evidence.verdict is Verdict.FAIL


@pytest.mark.parametrize("canary_events", [20, 100, 180])
def test_an_outage_that_both_versions_share_fails_nobody(canary_events: int) -> None:
    total, control_events = np.full((200, 1), float(canary_events)), 200 - canary_events
    rng = np.random.default_rng(7)
    kernel = Kernel([AVAILABILITY])
    state = kernel.start((200,))
    for look in range(400):
        share = 0.2 if 30 <= look < 150 else 0.001
        canary, control = rng.binomial(canary_events, share, (200, 1)), rng.binomial(control_events, share, (200, 1))
        kernel.update(state, canary.astype(np.float64), total, control.astype(np.float64), 200 - total)
    assert not kernel.failed(state, 0.01).any()


def test_a_canary_that_breaks_its_goal_after_an_outage_is_still_failed() -> None:
    outage, after = (4, 20, 36, 180), (2, 20, 0, 180)
    state = fed(Kernel([replace(AVAILABILITY, margin=0.5)]), *[outage] * 20, *[after] * 60)
    assert state.peak[0, GOAL] > 1e4


def test_what_lasts_is_no_outage_worse_than_its_goal_fails_even_when_control_is_as_bad() -> None:
    evidence = Evidence.start(only(replace(AVAILABILITY, goal=0.99)), intervals=False)
    look = {"availability": Stratum(Counts(90, 100), Counts(90, 100))}
    for _ in range(300):
        evidence = evidence.update(look)
    assert evidence.verdict is not Verdict.FAIL
    for _ in range(900):
        evidence = evidence.update(look)
    assert evidence.verdict is Verdict.FAIL
    assert "worse than its goal of 0.99" in evidence.reason


def test_a_goal_needs_no_control() -> None:
    state = fed(Kernel([AVAILABILITY]), *[(2, 20, 0, 0)] * 10)
    assert state.peak[0, GOAL] > 1e3
    assert state.peak[0, FAIL] < state.peak[0, GOAL]
    assert state.peak[0, PASS] <= 1 + 1e-9


def test_a_first_look_that_holds_more_than_all_that_is_known_is_learnt_from_and_not_bet_on() -> None:
    kernel = Kernel([replace(CLICKS, goal=0.5)])
    state = fed(kernel, (9_200, 10_000, 92_000, 100_000))
    assert state.peak[0, PASS] == pytest.approx(1)
    kernel.update(state, *(np.array([count]) for count in (9_200.0, 10_000.0, 92_000.0, 100_000.0)))
    assert state.peak[0, PASS] > 20


def test_a_margin_wider_than_control_s_own_share_fails_nobody() -> None:
    evidence = Evidence.start(only(replace(CLICKS, margin=0.1, margin_relative=None)))
    for _ in range(100):
        evidence = evidence.update({"click-through": Stratum(Counts(5, 100), Counts(5, 100))})
    assert evidence.verdict is Verdict.PASS


def test_what_is_put_into_a_bet_over_all_looks_is_one_stake() -> None:
    assert sum(put_in(look) for look in range(1, 100_000)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("healthy_looks", [10, 600, 3600])
def test_a_canary_that_breaks_after_a_long_healthy_time_is_found_nearly_as_soon_as_a_new_one(
    healthy_looks: int,
) -> None:
    good, broken = Stratum(Counts(100, 100), Counts(100, 100)), Stratum(Counts(80, 100), Counts(100, 100))
    evidence = Evidence.start(only(AVAILABILITY), alpha=0.01, intervals=False)
    for _ in range(healthy_looks):
        evidence = evidence.update({"availability": good})
    assert evidence.verdict is Verdict.PASS
    for _ in range(3):
        evidence = evidence.update({"availability": broken})
    assert evidence.verdict is Verdict.FAIL


def test_no_data_is_never_a_pass() -> None:
    evidence = Evidence.start(OBJECTIVES, intervals=False)
    for _ in range(5_000):
        evidence = evidence.update({})
    assert evidence.verdict is Verdict.INCONCLUSIVE
    assert "no data" in evidence.reason
    assert evidence.state.peak.max() <= 1 + 1e-9


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
    assert evidence.by_objective["availability"].control == Counts()


def test_what_is_shown_stays_shown_and_a_fail_outdoes_a_pass() -> None:
    evidence = Evidence.start(only(AVAILABILITY))
    for _ in range(5):
        evidence = evidence.update({"availability": Stratum(Counts(50, 100), Counts(100, 100))})
    assert evidence.verdict is Verdict.FAIL
    for _ in range(300):
        evidence = evidence.update({"availability": Stratum(Counts(100, 100), Counts(100, 100))})
    assert evidence.verdict is Verdict.FAIL
    assert "worse than" in evidence.reason


def test_the_evidence_of_ten_thousand_looks_is_no_bigger_than_that_of_ten() -> None:
    kernel = Kernel(OBJECTIVES.objectives)
    state = kernel.start()
    sizes = []
    arrays = [np.array([0.0, 1.0, 19.0]), np.full(3, 20.0), np.array([0.0, 2.0, 166.0]), np.full(3, 180.0)]
    for look in range(1, 10_001):
        kernel.update(state, *arrays)
        if look in (10, 10_000):
            sizes.append(state.nbytes)
    assert sizes[0] == sizes[1]
    assert np.isfinite(state.peak).all()


def test_evidence_is_not_changed_by_what_comes_after_it() -> None:
    before = Evidence.start(OBJECTIVES).update({"latency": Stratum(Counts(90, 100), Counts(99, 100))})
    said, peak = before.judgement, before.state.peak.copy()
    before.update({"latency": Stratum(Counts(0, 100), Counts(99, 100))})
    assert before.judgement == said
    np.testing.assert_array_equal(before.state.peak, peak)


def test_a_judgement_is_kept_as_json() -> None:
    evidence = Evidence.start(OBJECTIVES).update({"latency": Stratum(Counts(40, 100), Counts(99, 100))})
    judgement = evidence.judgement
    assert judgement.verdict is Verdict.FAIL
    assert judgement.reason == judgement.reasons["latency"]
    assert Judgement.from_json(json.loads(json.dumps(judgement.to_json()))) == judgement
    bad: tuple[object, ...] = (
        None, [], {}, {"verdict": "good", "reason": "", "objectives": {}},
        {"verdict": "pass", "reason": "", "objectives": {"latency": 1}},
    )  # fmt: skip
    for damaged in bad:
        with pytest.raises(ValueError, match=r"judgement|Verdict"):
            Judgement.from_json(damaged)


def test_an_objective_without_a_margin_and_a_primary_one_that_does_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="latency has no margin"):
        Evidence.start(only(replace(LATENCY, margin=None)))
    with pytest.raises(InputError, match="no objective named 'revenue'"):
        Evidence.start(OBJECTIVES, primary="revenue")


def test_the_primary_objective_passes_only_when_it_is_shown_to_be_better() -> None:
    same = Evidence.start(only(CLICKS), primary="click-through")
    better = same
    for _ in range(300):
        same = same.update({"click-through": Stratum(Counts(8, 100), Counts(8, 100))})
        better = better.update({"click-through": Stratum(Counts(12, 100), Counts(8, 100))})
    assert same.verdict is Verdict.INCONCLUSIVE
    assert same.state.peak[0, PASS] > 20
    assert better.verdict is Verdict.PASS
    assert better.state.peak[0, BETTER] > 20
    assert "better than control" in better.reason


def test_an_interval_closes_in_on_the_true_difference_and_keeps_it() -> None:
    rng = np.random.default_rng(11)
    intervals = Intervals.start(only(CLICKS), alpha=0.05)
    widths = []
    for _ in range(100):
        look = Stratum(Counts(int(rng.binomial(60, 0.10)), 60), Counts(int(rng.binomial(60, 0.13)), 60))
        intervals = intervals.update({"click-through": look})
        low, high = intervals.interval_of("click-through").interval
        widths.append(high - low)
        assert low <= -0.03 <= high
        lift = intervals.lift_interval_of("click-through")
        assert lift.low <= 0.10 / 0.13 - 1 <= lift.high
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.08
    seen = intervals.lift_of("click-through")
    assert seen is not None
    assert seen == pytest.approx(0.10 / 0.13 - 1, abs=0.1)


def test_intervals_miss_the_truth_no_more_often_than_alpha() -> None:
    rng = np.random.default_rng(12)
    names = [f"objective-{number}" for number in range(200)]
    many = Objectives("many", "many", tuple(replace(CLICKS, name=name, goal=0.1) for name in names))
    intervals = Intervals.start(many, alpha=0.1)
    for _ in range(80):
        canary, control = rng.binomial(40, 0.12, 200).tolist(), rng.binomial(80, 0.1, 200).tolist()
        looks = zip(names, canary, control, strict=True)
        intervals = intervals.update({name: Stratum(Counts(c, 40), Counts(k, 80)) for name, c, k in looks})
    # What was ruled out stays ruled out, so the last look tells of all of them.
    differences = [intervals.interval_of(name) for name in names]
    lifts = [intervals.lift_interval_of(name) for name in names]
    assert sum(not d.low <= 0.02 <= d.high for d in differences) <= 20
    assert sum(not lift.low <= 0.2 <= lift.high for lift in lifts) <= 20


@given(shares, st.integers(0, 3), st.integers(1, 3))
def test_no_bet_of_an_interval_has_an_expectation_above_one_where_its_line_is_the_truth(
    control: float, n_control: int, n_canary: int
) -> None:
    before = Intervals.start(only(CLICKS), alpha=0.1).update({"click-through": Stratum(Counts(1, 9), Counts(4, 30))})
    expectation = np.zeros((2, 2, 2, before.lines.grids.shape[1]))  # difference and lift, bets, sides, points
    canary = np.stack([control + before.lines.grids[0], control * (1 + before.lines.grids[1])])[:, None, None]
    for k, c in itertools.product(range(n_control + 1), range(n_canary + 1)):
        after = before.update({"click-through": Stratum(Counts(c, n_canary), Counts(k, n_control))})
        gain = np.exp(after.bets.log_e - before.bets.log_e).reshape(expectation.shape)
        chance = math.comb(n_canary, c) * canary**c * (1 - canary) ** (n_canary - c)
        expectation += binomial(n_control, k, control) * chance * gain
    assert np.where((canary >= 0) & (canary <= 1), expectation, 0).max() <= 1 + 1e-6


def test_with_very_much_data_the_difference_lies_between_two_points_of_the_grid() -> None:
    intervals = Intervals.start(only(AVAILABILITY), alpha=0.05)
    for _ in range(100):
        intervals = intervals.update({"availability": Stratum(Counts(79_500, 100_000), Counts(90_000, 100_000))})
    low, high = intervals.interval_of("availability").interval
    assert -0.13 < low < -0.105 < high < -0.08


@pytest.mark.parametrize(("canary", "control"), [(0, 100), (100, 0)])
def test_a_difference_beyond_the_grid_is_told_by_its_nearer_end(canary: int, control: int) -> None:
    intervals = Intervals.start(only(replace(CLICKS, goal=0.5)), alpha=0.05)
    for _ in range(30):
        intervals = intervals.update({"click-through": Stratum(Counts(canary, 100), Counts(control, 100))})
    low, high = intervals.interval_of("click-through").interval
    assert low == high == (-0.25 if canary < control else 0.25)


def test_before_any_event_an_interval_is_all_there_is() -> None:
    intervals = Intervals.start(OBJECTIVES, alpha=0.05).update({})
    assert intervals.interval_of("latency").interval == (-0.25, 0.25)
    assert intervals.lift_of("latency") is None


@given(st.floats(0.05, 0.95), st.integers(1, 12))
def test_the_split_test_s_expectation_is_one_under_the_share_in_force(share: float, shoppers: int) -> None:
    before = SplitTest().update(3, 20, 0.1)
    expectation = np.zeros(len(before.log_e))
    for canary in range(shoppers + 1):
        after = before.update(canary, shoppers, share)
        gain = np.exp(np.array(after.log_e) - np.array(before.log_e))
        expectation += binomial(shoppers, canary, share) * gain
    np.testing.assert_allclose(expectation, 1, rtol=1e-9)


def test_a_split_that_holds_is_seldom_rejected_and_one_that_is_off_is_found_over_changing_shares() -> None:
    rng = np.random.default_rng(13)
    found, wrongly = 0, 0
    for _ in range(100):
        right, wrong = SplitTest(), SplitTest()
        for look in range(200):
            share = 0.05 if look < 100 else 0.25
            right = right.update(int(rng.binomial(50, share)), 50, share)
            wrong = wrong.update(int(rng.binomial(50, share * 0.8)), 50, share)
        wrongly += right.rejects(0.05)
        found += wrong.rejects(0.001)
    assert wrongly <= 5
    assert found >= 90


def test_the_split_test_counts_what_was_due_and_shares_of_all_or_nothing_say_nothing() -> None:
    split = SplitTest().update(3, 20, 0.1).update(0, 0, 0.5).update(5, 5, 1.0)
    assert (split.canary, split.total, split.expected) == (3, 20, 2.0)


@pytest.mark.parametrize(
    ("canary", "total", "share", "follows"),
    [(0, 0, 0.1, True), (0, 20, 0.1, True), (0, 500, 0.1, False), (100, 1000, 0.1, True), (140, 1000, 0.1, True),
     (300, 1000, 0.1, False), (500, 500, 0.99, True), (400, 1000, 0.99, False), (900, 1000, 0.5, False),
     (5, 5, 0.05, True), (500, 500, 0.05, False), (7, 10, 1.0, True)],
)  # fmt: skip
def test_a_share_is_followed_until_it_is_shown_to_be_grossly_off(
    canary: int, total: int, share: float, follows: bool
) -> None:
    assert share_follows(canary, total, share) is follows


def test_more_tolerance_follows_further() -> None:
    assert not share_follows(300, 1000, 0.1)
    assert share_follows(300, 1000, 0.1, tolerance=4.0)


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
