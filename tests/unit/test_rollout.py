"""What an operator relies on when a rollout runs, fails, is starved, is steered by hand, or is cut off anywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from endcap.errors import (
    BusyError,
    CapacityError,
    FencedError,
    InputError,
    StateError,
    TargetError,
    VerificationError,
)
from endcap.evidence import Counts
from endcap.files import FolderLock, JsonLines, read_json_lines
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.audit import replay
from serving.rollout.engine import CountSource, Gatekeeper, RolloutResult, SystemClock, run_rollout
from serving.rollout.events import Gated
from serving.rollout.freeze import DateFreeze
from serving.rollout.spec import Mode, RolloutSpec, ShadowSpec, Step
from serving.rollout.state import Outcome
from serving.rollout.store import load_state
from serving.sources.base import Reading
from serving.targets.base import ModelVersion, Observation, StickyKey
from tests.simulated import CANARY, OBJECTIVES, SPEC, WINDOW_S, Behaviour, Killed, SimulatedClock, SimulatedTarget


def roll(
    folder: Path, target: SimulatedTarget, clock: SimulatedClock, spec: RolloutSpec = SPEC, *,
    objectives: Objectives = OBJECTIVES, gates: Gatekeeper | None = None, source: CountSource | None = None,
) -> RolloutResult:  # fmt: skip
    return run_rollout(
        spec, objectives, CANARY, target, folder, packages={"1": Path("one")}, clock=clock, gates=gates,
        source=source,
    )  # fmt: skip


def start(canary: Behaviour, *, rate: float = 200.0) -> tuple[SimulatedTarget, SimulatedClock]:
    clock = SimulatedClock()
    return SimulatedTarget({"1": Behaviour(), "2": canary}, clock, rate), clock


def test_a_better_version_is_promoted_and_the_old_one_retired(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.PROMOTED
    assert target.shares == {"2": 1.0}
    assert target.capacity == {"2"}
    given = [r["share"] for r in read_json_lines(tmp_path / "decisions.jsonl") if r["action"] == "growing"]
    assert given == [0.05, 0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("canary", "because"),
    [
        (Behaviour(clicked=0.001), "click-through"),
        (Behaviour(answered=0.8), "availability"),
        (Behaviour(fast=0.5), "latency"),
    ],
)
def test_a_version_that_is_wrong_broken_or_slow_is_rolled_back_for_that_reason(
    canary: Behaviour, because: str, tmp_path: Path
) -> None:
    target, clock = start(canary)
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.ROLLED_BACK
    assert because in result.reason
    assert target.shares == {"1": 1.0}
    assert target.capacity == {"1"}


def test_without_traffic_nothing_is_promoted(tmp_path: Path) -> None:
    target, clock = start(Behaviour(), rate=0.0)
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.HELD
    assert "no data" in result.reason
    assert target.shares == {"1": 1.0}


def test_too_little_evidence_in_time_is_held_and_not_promoted(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.0635), rate=120.0)  # at the margin, neither better nor shown worse
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.HELD
    assert "inconclusive" in result.reason


def test_a_package_that_does_not_verify_never_gets_traffic(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    target.refuse = VerificationError("the signature does not verify")
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.REFUSED
    assert "does not verify" in result.reason
    assert "2" not in target.served


def test_a_version_that_cannot_grow_is_rolled_back_with_the_reason(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.refuse, target.refuse_from_share = CapacityError("0 of 3 nodes are available"), 0.5
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.ROLLED_BACK
    assert "0 of 3 nodes" in result.reason
    assert target.shares == {"1": 1.0}


def test_a_target_that_is_away_for_a_while_costs_looks_and_no_verdict(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.away_at = range(5, 10)
    assert roll(tmp_path, target, clock).outcome is Outcome.PROMOTED


@pytest.mark.parametrize("away_from", [*range(2, 24), 30, 50])
def test_whenever_a_target_is_away_for_a_moment_no_canary_is_blamed_for_it(away_from: int, tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.away_at = range(away_from, away_from + 4)
    assert roll(tmp_path, target, clock).outcome is Outcome.PROMOTED


def test_a_share_that_a_target_never_takes_ends_the_rollout(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))

    def refuse(shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        if shares.get(CANARY, 0.0) >= 0.25:
            raise TargetError("the gateway did not take the new routes")
        SimulatedTarget.set_shares(target, shares, token=token, sticky=sticky)

    target.set_shares = refuse
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.ROLLED_BACK
    assert "did not take the new routes" in result.reason
    assert target.shares == {"1": 1.0}


def test_what_broke_while_nobody_looked_gets_no_more_traffic_by_an_engine_that_goes_on(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))

    def die(shares: Mapping[ModelVersion, float], *, token: int) -> None:
        if shares.get(CANARY, 0.0) >= 0.25:
            raise Killed
        SimulatedTarget.ensure_capacity(target, shares, token=token)

    target.ensure_capacity = die
    with pytest.raises(Killed):
        roll(tmp_path, target, clock)
    del target.ensure_capacity
    target.behaviours["2"].answered = 0.5
    clock.wait(60)
    assert roll(tmp_path, target, clock).outcome is Outcome.ROLLED_BACK
    assert not [line for line in target.log if line.startswith("shares 2=0.25")]


def test_a_target_that_is_gone_ends_the_engine_and_the_rollout_is_gone_on_with(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.away_at = range(5, 1_000_000)
    with pytest.raises(TargetError, match="does not answer"):
        roll(tmp_path, target, clock)
    assert clock.now_s() < 2_500
    target.away_at = range(0)
    assert roll(tmp_path, target, clock).outcome is not None
    assert target.capacity == set(target.shares)


def test_a_way_back_is_tried_for_longer_than_anything_else(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.001), rate=1000.0)

    class Away(SimulatedTarget):
        def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
            if set(shares) == {ModelVersion("1", Path("one"))} and clock.now_s() < 1_600:
                raise TargetError("the target does not answer")
            super().ensure_capacity(shares, token=token)

    away = Away(target.behaviours, clock, 1000.0)
    assert roll(tmp_path, away, clock).outcome is Outcome.ROLLED_BACK
    assert away.shares == {"1": 1.0}
    assert clock.now_s() >= 1_600


def test_a_rollout_does_not_begin_while_another_one_s_shadow_is_there(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    target.capacity.add("2")
    target.shadow = ("2", 0.1)
    with pytest.raises(InputError, match="requests are copied to version 2"):
        roll(tmp_path, target, clock)


def test_a_wrong_version_loses_its_traffic_even_where_stable_lacks_a_replica(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.001))
    target.short_of_stable = True
    with pytest.raises(CapacityError, match="a zone is lost"):
        roll(tmp_path, target, clock)
    assert target.shares == {"1": 1.0}
    target.short_of_stable = False
    assert roll(tmp_path, target, clock).outcome is Outcome.ROLLED_BACK
    assert target.capacity == {"1"}


def test_one_that_got_traffic_before_it_failed_was_rolled_back_and_not_refused(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.die_at = (5, "after")  # it has its first share; the state still says that it is about to get it
    with pytest.raises(Killed):
        roll(tmp_path, target, clock)
    target.die_at, target.refuse = None, CapacityError("0 of 3 nodes are available")
    clock.wait(10)
    target.observe()
    assert "2" in target.shares
    assert roll(tmp_path, target, clock).outcome is Outcome.ROLLED_BACK


def test_one_engine_a_folder(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    with FolderLock(tmp_path), pytest.raises(BusyError):
        roll(tmp_path, target, clock)
    assert target.calls == 0


def test_a_rollout_is_not_gone_on_with_by_other_rules(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.die_at = (8, "before")
    with pytest.raises(Killed):
        roll(tmp_path, target, clock)
    target.die_at = None
    with pytest.raises(InputError, match="begun with other alpha"):
        roll(tmp_path, target, clock, replace(SPEC, alpha=0.4))


def test_time_that_the_machine_was_suspended_passes_and_a_clock_that_is_set_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    since_boot = {time.CLOCK_BOOTTIME: 50.0, time.CLOCK_MONOTONIC: 40.0}
    monkeypatch.setattr(time, "clock_gettime", since_boot.__getitem__)
    monkeypatch.setattr(time, "monotonic", lambda: since_boot[time.CLOCK_MONOTONIC])
    monkeypatch.setattr(time, "time", lambda: 1_000.0)
    clock = SystemClock()
    since_boot[time.CLOCK_BOOTTIME] += 3_600
    monkeypatch.setattr(time, "time", lambda: 9.0)
    assert clock.now_s() == 4_600


def test_an_engine_that_slept_and_woke_cannot_act(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.die_at = (5, "before")
    with pytest.raises(Killed):
        roll(tmp_path, target, clock)
    target.die_at = None
    slept = target.token
    target.acquire("another engine")
    with pytest.raises(FencedError):
        target.set_shares({CANARY: 1.0}, token=slept)


def test_a_rollout_that_has_ended_stays_ended(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    first = roll(tmp_path, target, clock)
    calls = target.calls
    assert roll(tmp_path, target, clock) == first
    assert target.calls == calls


@pytest.mark.parametrize("damage", ["{", "[]", '{"phase": "growing"}', ""])
def test_a_damaged_state_is_an_error_that_names_the_file_and_no_fresh_start(damage: str, tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    (tmp_path / "state.json").write_text(damage)
    with pytest.raises(StateError, match=r"state\.json"):
        roll(tmp_path, target, clock)
    assert target.shares == {"1": 1.0}


def test_what_is_served_already_is_not_rolled_out(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    target.shares = {"2": 1.0}
    with pytest.raises(InputError, match="served already"):
        roll(tmp_path, target, clock)


def test_an_objective_that_the_target_does_not_count_is_said_before_anything_is_done(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    slower = Objectives("shop", "shop", (replace(OBJECTIVES.named("latency"), within_ms=250),))
    with pytest.raises(InputError, match="latency: the target does not count answers within 250 ms"):
        run_rollout(SPEC, slower, CANARY, target, tmp_path, packages={"1": Path("one")}, clock=clock)
    target.unready = frozenset({"1"})
    with pytest.raises(TargetError, match="no ready replica yet") as passing:
        run_rollout(SPEC, slower, CANARY, target, tmp_path, packages={"1": Path("one")}, clock=clock)
    assert not isinstance(passing.value, InputError)
    assert not (tmp_path / "state.json").exists()


# ---- what is checked before traffic, and the shadow -----------------------------------------------


def test_a_candidate_that_its_gates_refuse_never_gets_capacity(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    asked = []

    def gates(candidate: Path, stable: Path) -> Gated:
        asked.append((candidate, stable))
        return Gated(False, "offline: worse than stable by 12 %")

    result = roll(tmp_path, target, clock, gates=gates)
    assert result.outcome is Outcome.REFUSED
    assert result.reason == "refused before any traffic: offline: worse than stable by 12 %"
    assert asked == [(Path("two"), Path("one"))]
    assert "2" not in target.served
    assert not any("capacity 2" in line for line in target.log)


SHADOWED = replace(SPEC, shadow=ShadowSpec(0.1, 50, 60, 0.5))


def test_a_shadow_comes_before_any_share_and_ends_when_traffic_begins(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    assert roll(tmp_path, target, clock, SHADOWED).outcome is Outcome.PROMOTED
    first_share = next(i for i, line in enumerate(target.log) if line.startswith("shares 2"))
    assert target.log[:3] == ["capacity 2", "shadow 2=0.1", "shadow off"]
    assert first_share > target.log.index("shadow off")
    assert target.shadow is None


@pytest.mark.parametrize(
    ("canary", "overlap", "because"),
    [(Behaviour(answered=0.5), 0.9, "availability"), (Behaviour(), 0.2, "share 20% of the items")],
)
def test_a_candidate_that_its_shadow_shows_to_be_wrong_is_refused_without_a_shopper(
    canary: Behaviour, overlap: float, because: str, tmp_path: Path
) -> None:
    target, clock = start(canary)
    target.shadow_overlap = overlap
    result = roll(tmp_path, target, clock, SHADOWED)
    assert result.outcome is Outcome.REFUSED
    assert because in result.reason
    assert "2" not in target.served
    assert target.capacity == {"1"}
    assert target.shadow is None


def test_a_shadow_without_requests_is_held(tmp_path: Path) -> None:
    target, clock = start(Behaviour(), rate=0.0)
    result = roll(tmp_path, target, clock, SHADOWED)
    assert result.outcome is Outcome.HELD
    assert "0 of 50 answers were compared" in result.reason


# ---- stickiness, baseline, A/B ------------------------------------------------------------------------


def test_the_baseline_is_as_large_as_canary_lies_last_and_goes_when_the_share_is_half(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    spec = replace(SPEC, baseline=True, sticky=StickyKey(header="x-endcap-shopper"))
    assert roll(tmp_path, target, clock, spec).outcome is Outcome.PROMOTED
    shares = [line for line in target.log if line.startswith("shares")]
    assert shares == [
        "shares 2=0.05 1=0.9 1-baseline=0.05", "shares 2=0.25 1=0.5 1-baseline=0.25", "shares 2=0.5 1=0.5",
        "shares 2=1",
    ]  # fmt: skip
    assert target.log.index("retire 1-baseline") < target.log.index("shares 2=1")
    assert target.capacity == {"2"}
    assert target.sticky == StickyKey(header="x-endcap-shopper")


def test_with_a_baseline_a_canary_is_not_blamed_for_being_as_slow_as_anything_young(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1, fast=0.965))
    target.behaviours = {**target.behaviours, "1": Behaviour()}
    objectives = replace(
        OBJECTIVES,
        objectives=tuple(
            replace(o, margin=0.02, goal=0.9) if o.name == "latency" else o for o in OBJECTIVES.objectives
        ),
    )  # fmt: skip
    alone = roll(tmp_path / "alone", target, clock, objectives=objectives)
    assert alone.outcome is Outcome.ROLLED_BACK
    assert alone.reason.startswith("latency")

    class Young(SimulatedTarget):
        def _behaviour(self, label: str) -> Behaviour:
            return Behaviour(fast=0.965) if label == "1-baseline" else self.behaviours[label]

    clock = SimulatedClock()
    spec = replace(SPEC, baseline=True, steps=tuple(Step(share, 2000, 60, 120) for share in (0.05, 0.25, 0.5, 1.0)))
    young = Young(target.behaviours, clock, rate=1000.0)
    result = roll(tmp_path / "beside", young, clock, spec, objectives=objectives)
    decisions = list(read_json_lines(tmp_path / "beside" / "decisions.jsonl"))
    at_half = next(line["at_s"] for line in decisions if line["action"] == "growing" and line["share"] == 0.5)
    assert all(line["verdict"] != "fail" for line in decisions if line["at_s"] <= at_half), result.reason


AB = replace(
    SPEC, mode=Mode.AB, primary="click-through", sticky=StickyKey(header="x-endcap-shopper"),
    steps=(Step(0.5, 100, 5, 300), Step(1.0, 100, 1, 60)),
)  # fmt: skip


def test_an_ab_test_promotes_what_is_better_and_only_that(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.12), rate=500)
    assert roll(tmp_path / "better", target, clock, AB).outcome is Outcome.PROMOTED
    *_, last = read_json_lines(tmp_path / "better" / "decisions.jsonl")
    lift = last["evidence"]["click-through"]["lift"]
    assert 0 < lift["low"] <= lift["value"] <= lift["high"]
    assert lift["value"] == pytest.approx(0.5, abs=0.02)
    target, clock = start(Behaviour(clicked=0.08), rate=500)
    result = roll(tmp_path / "same", target, clock, AB)
    assert result.outcome is Outcome.HELD
    target, clock = start(Behaviour(clicked=0.03), rate=500)
    assert roll(tmp_path / "worse", target, clock, AB).outcome is Outcome.ROLLED_BACK


# ---- observed, not wished ------------------------------------------------------------------------


@pytest.mark.parametrize("sticky", [None, StickyKey(header="x-endcap-shopper")])
def test_a_share_that_the_traffic_does_not_follow_ends_the_rollout_with_that_reason(
    sticky: StickyKey | None, tmp_path: Path
) -> None:
    target, clock = start(Behaviour())
    target.followed = lambda shares: {"1": 1.0} if "1" in shares else shares
    result = roll(tmp_path, target, clock, replace(SPEC, sticky=sticky))
    assert result.outcome is Outcome.HELD
    assert "the traffic does not follow" in result.reason
    assert target.shares == {"1": 1.0}
    assert clock.now_s() < 1_100, "said long before the step's time is over"


def test_the_old_version_stays_while_it_still_receives_anything(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.followed = lambda shares: {"1": 0.02, "2": 0.98} if shares == {"2": 1.0} else shares
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.HELD
    assert "1" in target.capacity
    assert target.shares == {"1": 1.0}


class Overloaded(SimulatedTarget):
    """``breaks``: which versions fail, given the shares that are set."""

    breaks = staticmethod(lambda shares, label: label == "2" and shares == {"2": 1.0})

    def _behaviour(self, label: str) -> Behaviour:
        broken = self.breaks(self.shares, label)
        return replace(self.behaviours[label], answered=0.7) if broken else self.behaviours[label]


def test_a_version_that_breaks_only_under_all_the_traffic_is_never_left_with_it(tmp_path: Path) -> None:
    clock = SimulatedClock()
    filled: list[float] = []

    class Filled(Overloaded):
        """It takes twenty seconds of all the traffic until its queue is full."""

        def breaks(self, shares: Mapping[str, float], label: str) -> bool:  # type: ignore[override]
            if shares != {"2": 1.0}:
                filled.clear()
                return False
            filled.append(clock.now_s())
            return clock.now_s() - filled[0] > 20

    target = Filled({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, clock, 200.0)
    result = roll(tmp_path, target, clock, replace(SPEC, steps=(*SPEC.steps[:3], Step(1.0, 100, 100, 600))))
    assert result.outcome is Outcome.HELD
    assert "again at 100%, with nothing to compare it with: availability" in result.reason
    assert target.shares == {"1": 1.0}
    assert target.log.count("shares 2=1") == 3


def test_a_version_that_breaks_at_the_end_for_good_is_rolled_back_once_it_is_compared_again(tmp_path: Path) -> None:
    clock = SimulatedClock()

    class Broken(Overloaded):
        breaks = staticmethod(lambda shares, label: label == "2" and clock.now_s() > 1_060)

    target = Broken({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, clock, 200.0)
    steps = (*SPEC.steps[:3], Step(1.0, 100, 200, 600))
    result = roll(tmp_path, target, clock, replace(SPEC, steps=steps))
    assert result.outcome is Outcome.ROLLED_BACK
    assert "shares 2=1" in target.log
    assert target.shares == {"1": 1.0}


def test_an_outage_of_everything_while_canary_has_everything_costs_it_nothing(tmp_path: Path) -> None:
    clock = SimulatedClock()

    class Outage(Overloaded):
        breaks = staticmethod(lambda shares, label: 1_060 < clock.now_s() < 1_100)

    target = Outage({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, clock, 200.0)
    steps = (*SPEC.steps[:3], Step(1.0, 100, 100, 600))
    result = roll(tmp_path, target, clock, replace(SPEC, steps=steps))
    assert result.outcome is Outcome.PROMOTED
    assert any(line["reason"].startswith("back to 50%") for line in read_json_lines(tmp_path / "decisions.jsonl"))


def test_a_split_of_shoppers_that_cannot_be_the_one_that_was_set_stops_the_analysis(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.shoppers_follow = lambda shares: {**shares, "2": shares.get("2", 0.0) * 0.5}
    result = roll(tmp_path, target, clock, replace(SPEC, steps=(Step(0.25, 100, 60, 120), *SPEC.steps[2:])))
    assert result.outcome is Outcome.HELD
    assert "sample-ratio mismatch" in result.reason


def test_a_canary_that_lost_its_readiness_fails_though_others_answer_for_it(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.unready = frozenset({"2"})
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("availability")


# ---- inconclusive: hold, then return ------------------------------------------------------------------------


def test_an_inconclusive_rollout_holds_its_share_and_then_returns_the_traffic(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.0635), rate=120.0)
    result = roll(tmp_path, target, clock, replace(SPEC, hold_s=200))
    assert result.outcome is Outcome.HELD
    assert "inconclusive after" in result.reason
    lines = list(read_json_lines(tmp_path / "decisions.jsonl"))
    held = next(line for line in lines if line["action"] == "holding")
    returned = next(line for line in lines if line["action"] == "returning")
    assert returned["at_s"] - held["at_s"] == pytest.approx(200, abs=2)
    assert target.shares == {"1": 1.0}


def test_evidence_that_comes_while_it_holds_lets_it_go_on(tmp_path: Path) -> None:
    steps = (*SPEC.steps[:2], Step(0.5, 100, 5, 6), SPEC.steps[3])
    target, clock = start(Behaviour(clicked=0.09), rate=120.0)
    result = roll(tmp_path, target, clock, replace(SPEC, steps=steps, hold_s=2000))
    assert result.outcome is Outcome.PROMOTED
    assert "holding" in {line["action"] for line in read_json_lines(tmp_path / "decisions.jsonl")}


# ---- people ------------------------------------------------------------------------


class Scripted(SimulatedClock):
    """A clock at whose hours people ask for something, as another process would."""

    def __init__(self, folder: Path, asks: Mapping[float, Mapping[str, object]]) -> None:
        super().__init__()
        self._folder, self._asks = folder, dict(asks)

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        for at_s in sorted(at_s for at_s in self._asks if at_s <= self.now_s()):
            with JsonLines(self._folder / "commands.jsonl") as commands:
                commands.append({"by": "someone", **self._asks.pop(at_s)})


def steered(
    folder: Path, asks: Mapping[float, Mapping[str, object]], canary: Behaviour, spec: RolloutSpec = SPEC,
    *, rate: float = 200.0,
) -> tuple[RolloutResult, SimulatedTarget]:  # fmt: skip
    clock = Scripted(folder, asks)
    target = SimulatedTarget({"1": Behaviour(), "2": canary}, clock, rate)
    return roll(folder, target, clock, spec), target


def actions(folder: Path) -> list[tuple[str, float]]:
    lines = read_json_lines(folder / "decisions.jsonl")
    return [(line["action"], line["at_s"]) for line in lines if line["action"] != "look"]


def test_a_paused_rollout_keeps_its_share_until_it_is_resumed(tmp_path: Path) -> None:
    result, _ = steered(
        tmp_path, {1003: {"command": "pause"}, 1500: {"command": "resume"}, 1501: {"command": "resume"}},
        Behaviour(clicked=0.1),
    )  # fmt: skip
    assert result.outcome is Outcome.PROMOTED
    grown = [at_s for action, at_s in actions(tmp_path) if action == "growing"]
    assert grown[0] < 1003
    assert grown[1] > 1500


def test_a_paused_rollout_is_still_rolled_back_when_it_fails(tmp_path: Path) -> None:
    result, target = steered(tmp_path, {1001: {"command": "pause"}}, Behaviour(clicked=0.001))
    assert result.outcome is Outcome.ROLLED_BACK
    assert target.shares == {"1": 1.0}


def test_a_pause_leaves_no_version_with_all_the_traffic_that_breaks_under_it(tmp_path: Path) -> None:
    clock = Scripted(tmp_path, {1_060: {"command": "pause"}, 1_300: {"command": "abort"}})

    class Broken(Overloaded):
        breaks = staticmethod(lambda shares, label: label == "2" and clock.now_s() > 1_065)

    target = Broken({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, clock, 200.0)
    steps = (*SPEC.steps[:3], Step(1.0, 100, 500, 600))
    result = roll(tmp_path, target, clock, replace(SPEC, steps=steps))
    assert "shares 2=1" in target.log
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.seconds < 120


def test_a_step_that_needs_approval_waits_for_it_and_says_so(tmp_path: Path) -> None:
    steps = (SPEC.steps[0], replace(SPEC.steps[1], approval=True), *SPEC.steps[2:])
    asks = {1400: {"command": "approve", "step": 2}, 1401: {"command": "approve", "step": 2}}
    result, _ = steered(tmp_path, asks, Behaviour(clicked=0.1), replace(SPEC, steps=steps))
    assert result.outcome is Outcome.PROMOTED
    lines = list(read_json_lines(tmp_path / "decisions.jsonl"))
    assert "step 2 (25%) waits for approval" in {line["waiting"] for line in lines}
    second = next(line["at_s"] for line in lines if line["action"] == "growing" and line["step"] == 2)
    assert second >= 1400


def test_shoppers_who_came_while_it_waited_for_a_person_still_count(tmp_path: Path) -> None:
    steps = (replace(SPEC.steps[0], approval=True), *SPEC.steps[1:])
    clock = Scripted(tmp_path, {5_000: {"command": "approve", "step": 1}})
    since: list[float | None] = []

    class Asked(SimulatedTarget):
        def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
            since.append(shoppers_since_s)
            return super().observe(shoppers_since_s=shoppers_since_s)

    target = Asked({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, clock, 200.0)
    assert roll(tmp_path, target, clock, replace(SPEC, steps=steps)).outcome is Outcome.PROMOTED
    assert since[-1] is not None
    assert 5_000 <= since[-1] < 5_010
    assert set(since[1:]) == {1_000.0, since[-1]}, "and from then on it is the same time"


def test_approving_twice_approves_no_later_step(tmp_path: Path) -> None:
    steps = tuple(replace(step, approval=True) for step in SPEC.steps)
    asks = {1010 + i: {"command": "approve", "step": 1} for i in range(5)}
    asks |= {1900: {"command": "abort"}}
    result, _ = steered(tmp_path, asks, Behaviour(clicked=0.1), replace(SPEC, steps=steps))
    assert result.outcome is Outcome.ABORTED
    assert [action for action, _ in actions(tmp_path)].count("growing") == 1


@pytest.mark.parametrize("at_s", [1000.5, 1004, 1030, 1050])
def test_an_abort_returns_everything_from_wherever_it_stands(at_s: float, tmp_path: Path) -> None:
    result, target = steered(
        tmp_path, {at_s: {"command": "abort"}}, Behaviour(), replace(SPEC, shadow=ShadowSpec(0.1, 300, 100, None))
    )  # fmt: skip
    assert result.outcome is Outcome.ABORTED
    assert result.reason == "aborted by someone"
    assert target.shares == {"1": 1.0}
    assert target.capacity == {"1"}
    assert target.shadow is None


def test_a_promotion_by_hand_still_waits_for_capacity_and_for_what_is_observed(tmp_path: Path) -> None:
    asks = {1020: {"command": "promote"}, 1021: {"command": "promote"}}
    result, target = steered(tmp_path, asks, Behaviour(clicked=0.07))
    assert result.outcome is Outcome.PROMOTED
    assert result.reason.startswith("promoted by someone")
    shares = [line for line in target.log if line.startswith("shares")]
    assert shares[-1] == "shares 2=1"
    assert target.log.index("capacity 2") < target.log.index("shares 2=1") < target.log.index("retire 1")


def test_nothing_grows_in_a_freeze_and_what_fails_is_rolled_back_in_it(tmp_path: Path) -> None:
    spec = replace(SPEC, freeze=(DateFreeze(1_000, 1_600, "the sales"),))
    result, _ = steered(tmp_path / "good", {}, Behaviour(clicked=0.1), spec)
    assert result.outcome is Outcome.PROMOTED
    assert min(at_s for action, at_s in actions(tmp_path / "good") if action == "growing") >= 1_600
    waiting = {line["waiting"] for line in read_json_lines(tmp_path / "good" / "decisions.jsonl")}
    assert any(why and why.endswith("the sales") for why in waiting)
    later = replace(SPEC, freeze=(DateFreeze(1_005, 9_000, "the sales"),))
    result, _ = steered(tmp_path / "wrong", {}, Behaviour(clicked=0.001), later)
    assert result.outcome is Outcome.ROLLED_BACK


def test_a_damaged_command_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"commands\.jsonl"):
        steered(tmp_path, {1005: {"command": "explode"}}, Behaviour())


# ---- the audit log ------------------------------------------------------------------------


@pytest.mark.parametrize("canary", [Behaviour(clicked=0.1), Behaviour(clicked=0.001), Behaviour(clicked=0.0635)])
def test_the_audit_log_read_again_leads_to_the_same_state(canary: Behaviour, tmp_path: Path) -> None:
    spec = replace(SPEC, shadow=ShadowSpec(0.1, 50, 60, None), hold_s=20)
    steered(tmp_path, {1030: {"command": "pause"}, 1050: {"command": "resume"}}, canary, spec, rate=120)
    path = tmp_path / "decisions.jsonl"
    assert replay(spec, read_json_lines(path), where=path) == load_state(tmp_path)


def test_every_decision_names_the_evidence_it_stood_on(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.001))
    roll(tmp_path, target, clock)
    (back,) = [line for line in read_json_lines(tmp_path / "decisions.jsonl") if line["action"] == "returning"]
    seen = back["evidence"]["click-through"]
    assert seen["verdict"] == "fail"
    assert seen["canary"]["total"] > 0
    assert seen["low"] <= seen["difference"] <= seen["high"] < 0
    assert back["event"]["verdict"] == "fail"


def test_a_checkpoint_that_is_lost_is_made_again_from_the_log(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.die_at = (20, "before")
    with pytest.raises(Killed):
        roll(tmp_path, target, clock)
    (tmp_path / "state.json").unlink()
    target.die_at = None
    assert roll(tmp_path, target, clock).outcome is Outcome.PROMOTED


def test_a_log_that_was_tampered_with_is_an_error(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    roll(tmp_path, target, clock)
    path = tmp_path / "decisions.jsonl"
    lines = [line for line in read_json_lines(path) if not (line["action"] == "growing" and line["step"] == 2)]
    with pytest.raises(StateError, match="does not follow"):
        replay(SPEC, lines, where=path)


# ---- sources ------------------------------------------------------------------------

BASKETS = replace(
    OBJECTIVES, objectives=(*OBJECTIVES.objectives, Objective("baskets", 0.3, Good.COUNTED, None, None, None, 0.2))
)


class Baskets:
    """Counts beside the target, at the same pace."""

    def __init__(self, target: SimulatedTarget, canary: float, *, failing: bool = False) -> None:
        self._target, self._canary, self._failing = target, canary, failing

    def read(self, now_s: float) -> Reading:
        if self._failing:
            return Reading({}, {"baskets": "Prometheus answered 500"})
        shares = {"1": 0.4, "2": self._canary}
        counted = {
            label: Counts(int(served.attempts * shares[label]), int(served.attempts))
            for label, served in self._target.served.items()
        }
        return Reading({"baskets": counted}, {})


def test_what_a_source_counts_decides_like_anything_else(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    result = roll(tmp_path, target, clock, objectives=BASKETS, source=Baskets(target, 0.2))
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("baskets")
    target, clock = start(Behaviour(clicked=0.1))
    assert roll(tmp_path / "good", target, clock, objectives=BASKETS, source=Baskets(target, 0.42)).outcome is (
        Outcome.PROMOTED
    )


def test_a_source_that_fails_is_a_hold_with_its_reason_and_never_a_promotion(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    result = roll(tmp_path, target, clock, objectives=BASKETS, source=Baskets(target, 0.42, failing=True))
    assert result.outcome is Outcome.HELD
    assert "Prometheus answered 500" in result.reason


def test_an_engine_killed_anywhere_counts_a_source_s_events_neither_twice_nor_anew(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.die_at = (25, "after")
    with pytest.raises(Killed):
        roll(tmp_path, target, clock, objectives=BASKETS, source=Baskets(target, 0.42))
    target.die_at = None
    target.served = {}  # a source made anew counts from nothing
    roll(tmp_path, target, clock, objectives=BASKETS, source=Baskets(target, 0.42))
    looks = list(read_json_lines(tmp_path / "looks.jsonl"))
    counted = [look["versions"].get("1", {}).get("measured", {}).get("baskets", [0, 0])[1] for look in looks]
    assert counted == sorted(counted)


def test_a_source_that_was_silent_when_the_engine_died_is_gone_on_with_from_what_it_had_counted(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))

    class FallsSilent(Baskets):
        def read(self, now_s: float) -> Reading:
            return super().read(now_s) if clock.now_s() < 1_005 else Reading({}, {})

    target.die_at = (25, "after")
    with pytest.raises(Killed):
        roll(tmp_path, target, clock, objectives=BASKETS, source=FallsSilent(target, 0.42))
    before = [look["versions"]["1"]["measured"] for look in read_json_lines(tmp_path / "looks.jsonl")]
    assert before[-1] == {}
    target.die_at, target.served = None, {}
    roll(tmp_path, target, clock, objectives=BASKETS, source=Baskets(target, 0.42))
    looks = [look["versions"].get("1", {}).get("measured", {}) for look in read_json_lines(tmp_path / "looks.jsonl")]
    counted = [measured["baskets"][1] for measured in looks if measured]
    assert counted == sorted(counted)


def test_margins_of_the_rollout_stand_over_those_of_the_objectives(tmp_path: Path) -> None:
    from serving.rollout.spec import Margin

    target, clock = start(Behaviour(clicked=0.06))
    assert roll(tmp_path / "narrow", target, clock).outcome is not Outcome.PROMOTED
    target, clock = start(Behaviour(clicked=0.06))
    wide = replace(SPEC, margins={"click-through": Margin(relative=0.5)})
    assert roll(tmp_path / "wide", target, clock, wide).outcome is Outcome.PROMOTED
    with pytest.raises(InputError, match="no objective is called 'clicks'"):
        roll(tmp_path / "none", target, clock, replace(SPEC, margins={"clicks": Margin(relative=0.5)}))


def test_the_target_s_attribution_window_has_to_be_the_objective_s(tmp_path: Path) -> None:
    target, clock = start(Behaviour())
    longer = replace(
        OBJECTIVES, objectives=tuple(
            replace(o, window_s=2 * WINDOW_S) if o.window_s else o for o in OBJECTIVES.objectives
        ),
    )  # fmt: skip
    with pytest.raises(InputError, match="attributes clicks within 5 s"):
        roll(tmp_path, target, clock, objectives=longer)
