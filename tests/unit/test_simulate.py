"""What an engineer who chooses steps and margins relies on: simulated rollouts are rollouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks.rollout.replay import judged_again
from endcap.cli.simulate import simulate as simulate_command
from endcap.errors import InputError
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.simulate import SimulatedRuns, simulate, upper_limit, watch
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.traffic import Clicks, Drift, Outage, Population, Seen, Stream, Traffic

OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.95, Good.ANSWERED, 100, None, 0.03, None),
        Objective("click-through", 0.05, Good.CLICKED, None, 20.0, None, 0.3),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "shop", "shop", "models:/shop/2", "shop",
    (Step(0.1, 200, 10, 300), Step(0.5, 200, 10, 300), Step(1.0, 100, 5, 60)), 0.05, 0.05, 1.0, hold_s=30,
)  # fmt: skip
GOOD = {"availability": 0.999, "latency": 0.98, "click-through": 0.1}
PLAIN = Traffic(GOOD, clicks=Clicks(window_s=20))
KINDS = {
    "plain": PLAIN,
    "worse clicks": replace(PLAIN, canary={"click-through": 0.04}),
    "errors": replace(PLAIN, canary={"availability": 0.9}),
    "late answers": replace(PLAIN, canary={"latency": 0.9}),
    "repeat shoppers": replace(PLAIN, population=Population(shoppers=5_000), canary={"click-through": 0.085}),
    "drift": replace(PLAIN, drift=Drift(period_s=60)),
    "outage": replace(PLAIN, outage=Outage(duration_s=20, latest_s=30)),
    "late clicks": replace(PLAIN, clicks=Clicks(30, late_part=0.5, late_mean_s=20, closing_every_s=5)),
}


def run(traffic: Traffic, *, runs: int = 12, seed: int = 1, spec: RolloutSpec = SPEC, record: int = 0) -> SimulatedRuns:
    return simulate(OBJECTIVES, spec, traffic, runs=runs, seed=seed, horizon_s=400, record=record)


@pytest.mark.parametrize("kind", KINDS)
def test_evidence_and_decide_come_to_the_same_verdict_at_the_same_look(kind: str) -> None:
    done = run(KINDS[kind], record=6)
    assert len(done.recorded) == 6
    for recorded in done.recorded:
        assert judged_again(OBJECTIVES, SPEC, recorded) == (recorded.outcome, recorded.seconds)


def judged_alike(done: SimulatedRuns, spec: RolloutSpec) -> bool:
    return [judged_again(OBJECTIVES, spec, one) for one in done.recorded] == [
        (one.outcome, one.seconds) for one in done.recorded
    ]


def test_an_outage_under_all_the_traffic_is_compared_again_and_ends_in_a_promotion() -> None:
    # The step before takes ten seconds at least, and the outage lasts longer: growth waits until it is over.
    spec = replace(SPEC, steps=(*SPEC.steps[:2], Step(1.0, 100, 60, 120)))
    traffic = replace(PLAIN, outage=Outage(failed=0.2, late=0.0, duration_s=25, latest_s=120))
    done = run(traffic, runs=40, spec=spec, record=20)
    again = done.compared_again > 0
    assert 5 < again.sum() < 35
    assert (done.outcome[again] == SimulatedRuns.OUTCOMES.index("promoted")).mean() > 0.8
    waited = min(one.seconds for one, went_back in zip(done.recorded, again, strict=False) if went_back)
    assert waited > 2 * 60, "back, and once more all of the last step"
    assert judged_alike(done, spec)


def test_the_first_look_of_an_outage_of_both_versions_costs_canary_nothing() -> None:
    # One look with 30 % late of a hundred answers is enough for a bet put in lately, unless control's is seen too.
    goals = (0.999, 0.98, 0.05)
    judged = tuple(replace(o, goal=goal) for o, goal in zip(OBJECTIVES.objectives, goals, strict=True))
    spec = replace(SPEC, alpha=0.01, steps=(Step(0.5, 10**9, 300, 400), SPEC.steps[-1]))
    good = {"availability": 0.9995, "latency": 0.99, "click-through": 0.1}
    traffic = replace(PLAIN, good=good, outage=Outage(duration_s=20, latest_s=150))
    objectives = replace(OBJECTIVES, objectives=judged)
    assert simulate(objectives, spec, traffic, runs=100, seed=1, horizon_s=180).share("rolled_back") <= 0.01


def test_who_misses_a_goal_three_times_under_all_the_traffic_is_held() -> None:
    spec = replace(SPEC, steps=(*SPEC.steps[:2], Step(1.0, 100, 90, 300)))
    good = {**GOOD, "availability": 0.98}
    done = run(replace(PLAIN, good=good, drift=Drift(part=1.0, period_s=60)), runs=20, spec=spec, record=20)
    held = done.ended("held")
    assert held.sum() > 5
    assert (done.compared_again[held] == 2).all()
    assert (done.step[held] == 2).all()
    assert judged_alike(done, spec)


@pytest.mark.parametrize("requests_per_s", [0.5, 3.0])
def test_events_of_canary_wait_for_controls_as_those_of_a_rollout_do(requests_per_s: float) -> None:
    spec = replace(SPEC, steps=(Step(0.9, 20, 10, 300), Step(1.0, 20, 5, 60)))
    quiet = replace(PLAIN, requests_per_s=requests_per_s, new_shoppers_per_s=requests_per_s / 2)
    for traffic in (quiet, replace(quiet, canary={"availability": 0.5})):
        assert judged_alike(run(traffic, spec=spec, record=6), spec)


def test_inconclusive_rollouts_are_held_after_the_step_and_the_hold() -> None:
    slow = replace(SPEC, steps=(Step(0.1, 10**9, 10, 40), Step(1.0, 100, 5, 60)))
    done = run(PLAIN, spec=slow, record=3)
    assert done.share("held") == 1
    assert set(done.seconds) == {40.0 + 30.0}
    assert [judged_again(OBJECTIVES, slow, one) for one in done.recorded] == [("held", 70.0)] * 3
    assert set(run(PLAIN, spec=replace(slow, hold_s=0)).seconds) == {40.0}


def test_a_good_candidate_is_promoted_and_each_kind_of_bad_one_is_rolled_back_for_what_is_bad() -> None:
    assert run(PLAIN).share("promoted") == 1
    for column, kind in enumerate(("errors", "late answers", "worse clicks")):
        done = run(KINDS[kind])
        assert done.share("rolled_back") == 1, kind
        assert done.failing[:, column].all(), kind
        assert (done.step < 2).all(), "never with all of the traffic"


def test_the_same_seed_gives_the_same_runs_and_another_one_others() -> None:
    one, same, other = run(PLAIN), run(PLAIN), run(PLAIN, seed=2)
    assert (one.seconds == same.seconds).all()
    assert (one.attempts == same.attempts).all()
    assert (one.attempts != other.attempts).any()


def test_who_is_hurt_is_counted_up_to_the_verdict() -> None:
    done = run(KINDS["errors"], record=4)
    for number, recorded in enumerate(done.recorded):
        assert done.failed[number] == recorded.counts[:, 0, 0].sum()
        assert done.attempts[number] == recorded.attempts[:, 0].sum()
        assert done.events[number].tolist() == recorded.counts[:, 1].sum(axis=0).tolist()


class Sums:
    """Adds up what a watcher is shown."""

    def __init__(self, runs: int) -> None:
        self.looks = np.zeros(runs)
        self.attempts, self.impressions, self.shoppers = np.zeros((runs, 2)), np.zeros((runs, 4)), np.zeros((runs, 4))

    def look(self, runs: np.ndarray, at_s: float, seen: Seen) -> None:
        self.looks[runs] += 1
        self.attempts[runs] += np.stack([seen.canary_attempts, seen.control_attempts], axis=1)
        assert seen.impressions is not None
        self.impressions[runs] += seen.impressions
        self.shoppers[runs] += np.stack(
            [seen.canary_bad[:, 2], seen.canary_total[:, 2], seen.control_bad[:, 2], seen.control_total[:, 2]], axis=1
        )


@pytest.mark.parametrize("kind", ["plain", "repeat shoppers"])
def test_requests_clicks_and_shares_are_what_was_asked_for(kind: str) -> None:
    sums = Sums(20)
    traffic = replace(KINDS[kind], canary={})
    watch(OBJECTIVES, traffic, sums, share=0.25, seconds=200, runs=20, seed=3)
    assert (sums.looks == 200).all()
    attempts = sums.attempts.sum(axis=0)
    # 20 * 200 s * 200/s = 800,000 requests; a heavy shopper's place on the hash moves a whole run's share.
    assert attempts.sum() == pytest.approx(800_000, rel=0.05)
    assert attempts[0] / attempts.sum() == pytest.approx(0.25, rel=0.02 if kind == "plain" else 0.2)
    canary_bad, canary, control_bad, control = sums.shoppers.sum(axis=0)
    assert canary / (canary + control) == pytest.approx(0.25, rel=0.05)
    assert canary_bad / canary == pytest.approx(control_bad / control, rel=0.02)
    expected = 20 * 180 * 60  # the last windows are still open
    if kind == "plain":
        assert canary + control == pytest.approx(expected, rel=0.02)
        assert 1 - control_bad / control == pytest.approx(0.1, rel=0.05)
    else:
        assert canary + control <= 20 * 5_000, "a shopper counts once"
        assert canary + control > 20 * 2_500
    seen = sums.impressions[:, [1, 3]].sum()
    assert seen == pytest.approx(attempts.sum() * 0.9, rel=0.05), "naive counts have every impression"


def test_click_evidence_waits_for_its_window_and_late_clicks_are_lost() -> None:
    clicks = Clicks(window_s=30, late_part=0.5, late_mean_s=30, closing_every_s=10)
    traffic = replace(PLAIN, clicks=clicks)
    stream = Stream(OBJECTIVES, traffic, shares=(0.5,), runs=50, looks=100, look_s=1.0, seed=np.random.SeedSequence(1))
    steps = np.zeros(50, dtype=np.int64)
    seen = [stream.look(steps) for _ in range(91)]
    closed = np.array([look.control_total[:, 2].sum() for look in seen])
    assert np.flatnonzero(closed).tolist() == [30, 40, 50, 60, 70, 80, 90]
    bad = sum(look.control_bad[:, 2].sum() for look in seen)
    assert 1 - bad / closed.sum() == pytest.approx(0.1 * clicks.in_time, rel=0.1)
    assert clicks.in_time == pytest.approx(1 - 0.5 * np.exp(-1))


def test_an_outage_hits_both_versions_alike() -> None:
    traffic = replace(PLAIN, outage=Outage(failed=0.5, late=0.0, duration_s=10, latest_s=1e-9))
    stream = Stream(OBJECTIVES, traffic, shares=(0.5,), runs=20, looks=20, look_s=1.0, seed=np.random.SeedSequence(1))
    steps = np.zeros(20, dtype=np.int64)
    shares = []
    for _ in range(20):
        look = stream.look(steps)
        shares.append((look.canary_bad[:, 0].sum() / look.canary_total[:, 0].sum(),
                       look.control_bad[:, 0].sum() / look.control_total[:, 0].sum()))  # fmt: skip
    assert all(canary == pytest.approx(0.5, abs=0.1) == control for canary, control in shares[:10])
    assert all(max(pair) < 0.05 for pair in shares[10:])


def test_the_upper_limit_is_clopper_and_pearsons() -> None:
    stats = pytest.importorskip("scipy.stats")
    for events, runs in ((0, 10_000), (1, 10), (9, 10), (88, 10_000), (5_000, 10_000)):
        assert upper_limit(events, runs) == pytest.approx(float(stats.beta.ppf(0.95, events + 1, runs - events)))
    assert upper_limit(10, 10) == 1


@pytest.mark.parametrize(
    "traffic",
    [
        Traffic({"availability": 0.99}),
        Traffic({**GOOD, "speed": 0.9}),
        Traffic({**GOOD, "latency": 1.2}),
        Traffic(GOOD, canary={"speed": 0.9}),
        Traffic(GOOD, requests_per_s=0),
        Traffic(GOOD, requests_per_s=10, new_shoppers_per_s=60),
    ],
)
def test_traffic_that_does_not_fit_the_objectives_is_refused(traffic: Traffic) -> None:
    with pytest.raises(InputError):
        run(traffic)


# ---- endcap rollout simulate -------------------------------------------------------------------------


def command(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(simulate_command)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_says_what_steps_and_margins_are_worth_and_plots_it(tmp_path: Path) -> None:
    quick = ["--runs", "20", "--seconds", "300", "--seed", "3", "--worse", "availability=0.9", "--json"]
    done = command(*quick, "--out", str(tmp_path / "power.png"))
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    same, worse = document["candidates"]
    assert same["effect"] == {"objective": None, "canary": None}
    assert same["rolled_back_share"] == 0
    assert 0 < same["rolled_back_at_most"] < 0.2
    assert worse["effect"] == {"objective": "availability", "canary": 0.9}
    assert worse["rolled_back_share"] == 1
    assert worse["median_s"] < 60
    assert 0 < worse["shoppers_hurt"] <= worse["shoppers_hurt_p90"] < worse["canary_requests"]
    assert (tmp_path / "power.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(command(*quick).stdout) == document, "the same seed, the same answer"
    assert command(*quick, "--out", str(tmp_path / "power.html")).exit_code == 0
    assert "<svg" in (tmp_path / "power.html").read_text()


def test_the_command_takes_the_files_that_the_rollout_will_be_started_with(tmp_path: Path) -> None:
    (tmp_path / "objectives.yaml").write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Objectives\nmetadata: {name: search}\nspec:\n  service: search\n"
        "  objectives:\n  - {name: answers, goal: 0.99, good: answered}\n"
    )
    (tmp_path / "rollout.yaml").write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {name: search}\nspec:\n  service: search\n"
        "  candidate: models:/search/2\n  margins: {answers: {absolute: 0.02}}\n"
        "  steps: [{share: 0.2, minSeconds: 5}, {share: 1, minSeconds: 5}]\n"
    )
    files = ["--objectives", str(tmp_path / "objectives.yaml"), "--rollout", str(tmp_path / "rollout.yaml")]
    done = command(*files, "--base", "answers=0.998", "--runs", "20", "--seconds", "120", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["stable"] == {"answers": 0.998}
    assert [step["share"] for step in document["steps"]] == [0.2, 1.0]
    tried = [one["effect"]["canary"] for one in document["candidates"]]
    assert tried == [None, 0.988, 0.978, 0.968, 0.958, 0.938, 0.898], "multiples of the rollout's own margin"


@pytest.mark.parametrize(
    "wrong",
    [["--worse", "speed=0.9"], ["--worse", "latency=fast"], ["--base", "latency=2"], ["--out", "power.txt"],
     ["--requests-per-second", "0"]],
)  # fmt: skip
def test_the_command_refuses_what_it_cannot_simulate(wrong: list[str]) -> None:
    done = command("--runs", "20", *wrong)
    assert isinstance(done.exception, InputError)
