"""What an operator relies on when a rollout runs, fails, is starved, or is cut off anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import (
    BusyError,
    CapacityError,
    FencedError,
    InputError,
    StateError,
    TargetError,
    VerificationError,
)
from endcap.evidence import Counts, Evidence
from endcap.files import FolderLock, read_json_lines
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.decide import Acted, ActFailed, Event, Looked, begin, decide
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.looks import observation_from_json, observation_to_json
from serving.rollout.spec import RolloutSpec, Step, load_rollout
from serving.rollout.state import EnsureCapacity, Outcome, Phase, Retire, SetShares, State
from serving.targets.base import ModelVersion, Observation, VersionObservation

OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.95, Good.ANSWERED, 100, None, 0.05, None),
        Objective("click-through", 0.05, Good.CLICKED, None, 5.0, None, 0.2),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "shop", "shop", "models:/shop/2", "shop",
    tuple(Step(share, 100, 5, 120) for share in (0.05, 0.25, 0.5, 1.0)), 0.05, 0.05, 1.0,
)  # fmt: skip
CANARY = ModelVersion("2", Path("two"))


class Killed(BaseException):
    """The process dies here (not an Exception: nothing may catch it)."""


@dataclass
class Behaviour:
    """Of one version: the share of attempts answered, of answers in time, of impressions clicked."""

    answered: float = 1.0
    fast: float = 1.0
    clicked: float = 0.08


@dataclass
class SimulatedTarget:
    """A stand-in for a target, so that hours of rollout take milliseconds: counts grow by exact shares.

    No kinder than the real one: tokens are checked, traffic without capacity is refused, ``die_at`` cuts any call
    off before or after its effect.
    """

    behaviours: Mapping[str, Behaviour]
    clock: SimulatedClock
    rate: float = 200.0
    shares: dict[str, float] = field(default_factory=lambda: {"1": 1.0})
    capacity: set[str] = field(default_factory=lambda: {"1"})
    counts: dict[str, list[float]] = field(default_factory=dict)
    token: int = 0
    calls: int = 0
    die_at: tuple[int, str] | None = None
    refuse: Exception | None = None
    refuse_from_share: float = 0.0
    short_of_stable: bool = False
    away_at: range = range(0)
    """Calls, by number, that find nobody."""

    def _call(self, when: str) -> None:
        if when == "before":
            self.calls += 1
        if self.die_at == (self.calls, when):
            raise Killed
        if self.calls in self.away_at:
            raise TargetError("the target does not answer")

    def _fence(self, token: int) -> None:
        if token < self.token:
            raise FencedError("another engine has taken over")

    def acquire(self, holder: str) -> int:
        self.token += 1
        return self.token

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        self._call("before")
        self._fence(token)
        if self.refuse and any(v == CANARY and share >= self.refuse_from_share for v, share in shares.items()):
            raise self.refuse
        if self.short_of_stable and {version.label for version in shares} == {"1"}:
            raise CapacityError("a zone is lost")
        self.capacity |= {version.label for version in shares}
        self._call("after")

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        self._call("before")
        self._fence(token)
        assert abs(sum(shares.values()) - 1) < 1e-9
        assert {version.label for version in shares} <= self.capacity, "traffic without capacity"
        self.shares = {version.label: share for version, share in shares.items()}
        self._call("after")

    def retire(self, label: str, *, token: int) -> None:
        self._call("before")
        self._fence(token)
        assert not self.shares.get(label), "a version with traffic was retired"
        self.capacity.discard(label)
        self._call("after")

    def observe(self) -> Observation:
        self._call("before")
        elapsed = self.clock.take_elapsed()
        for label, share in self.shares.items():
            b = self.behaviours[label]
            c = self.counts.setdefault(label, [0.0] * 6)
            n = self.rate * share * elapsed
            for i, grown in enumerate((n * b.answered, n, n * b.answered * b.fast, n * b.answered,
                                       n * b.answered * b.clicked, n * b.answered)):  # fmt: skip
                c[i] += grown
        self._call("after")
        return Observation(
            self.clock.now_s(), dict(self.shares),
            {
                label: VersionObservation(
                    Counts(int(c[0]), int(c[1])), {100: Counts(int(c[2]), int(c[3]))}, Counts(int(c[4]), int(c[5]))
                )
                for label, c in self.counts.items()
            },
        )  # fmt: skip


class SimulatedClock:
    def __init__(self) -> None:
        self._now = 1_000.0
        self._taken = 1_000.0

    def now_s(self) -> float:
        return self._now

    def wait(self, seconds: float) -> None:
        self._now += seconds

    def take_elapsed(self) -> float:
        elapsed, self._taken = self._now - self._taken, self._now
        return elapsed


def roll(folder: Path, target: SimulatedTarget, clock: SimulatedClock, spec: RolloutSpec = SPEC) -> RolloutResult:
    return run_rollout(spec, OBJECTIVES, CANARY, target, folder, packages={"1": Path("one")}, clock=clock)


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
    assert given == [0.25, 0.5, 1.0]


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
    assert "2" not in target.counts


def test_a_version_that_cannot_grow_is_rolled_back_with_the_reason(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1))
    target.refuse, target.refuse_from_share = CapacityError("0 of 3 nodes are available"), 0.5
    result = roll(tmp_path, target, clock)
    assert result.outcome is Outcome.ROLLED_BACK
    assert "0 of 3 nodes" in result.reason
    assert target.shares == {"1": 1.0}


@pytest.mark.parametrize("canary", [Behaviour(clicked=0.1), Behaviour(clicked=0.001)], ids=["good", "wrong"])
def test_killed_at_any_call_it_resumes_to_the_same_end(canary: Behaviour, tmp_path: Path) -> None:
    spec = replace(SPEC, steps=tuple(Step(share, 100, 1, 120) for share in (0.25, 0.5, 1.0)))
    target, clock = start(canary, rate=1000.0)
    expected = roll(tmp_path / "whole", target, clock, spec).outcome
    for call in range(1, target.calls + 1):
        for when in ("before", "after"):
            target, clock = start(canary, rate=1000.0)
            target.die_at = (call, when)
            folder = tmp_path / f"{call}-{when}"
            with pytest.raises(Killed):
                roll(folder, target, clock, spec)
            target.die_at = None
            assert roll(folder, target, clock, spec).outcome is expected, f"killed {when} call {call}"
            assert target.capacity == set(target.shares), "tidied after"


def test_a_target_that_is_away_for_a_while_costs_looks_and_no_verdict(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.away_at = range(5, 10)
    assert roll(tmp_path, target, clock).outcome is Outcome.PROMOTED


def test_a_target_that_is_gone_ends_the_engine_and_the_rollout_is_gone_on_with(tmp_path: Path) -> None:
    target, clock = start(Behaviour(clicked=0.1), rate=1000.0)
    target.away_at = range(5, 1_000_000)
    with pytest.raises(TargetError, match="does not answer"):
        roll(tmp_path, target, clock)
    assert clock.now_s() < 1_500
    target.away_at = range(0)
    assert roll(tmp_path, target, clock).outcome is not None
    assert target.capacity == set(target.shares)


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
    target.die_at = (3, "after")  # it has its first share; the state still says that it is about to get it
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
    assert not (tmp_path / "state.json").exists()


def evidence_of(clicked: float) -> Evidence:
    from endcap.evidence import Stratum

    n = 4_000
    good = Stratum(Counts(n, n), Counts(n, n))
    clicks = Stratum(Counts(int(n * clicked), n), Counts(int(n * 0.08), n))
    return Evidence.start(OBJECTIVES).update({"availability": good, "latency": good}).update(
        {"availability": good, "latency": good, "click-through": clicks}
    ).update({"click-through": clicks})  # fmt: skip


EVIDENCES = [Evidence.start(OBJECTIVES), evidence_of(0.1), evidence_of(0.0)]

events = st.one_of(
    st.builds(Looked, st.sampled_from(EVIDENCES), st.integers(0, 5_000), st.integers(0, 500), st.integers(0, 500)),
    st.builds(Acted, st.integers(0, 5_000)),
    st.sampled_from([ActFailed(CapacityError("no room")), ActFailed(VerificationError("changed"))]),
)


@given(st.lists(st.tuples(events, st.floats(0, 60)), max_size=60))
def test_whatever_happens_shares_are_whole_and_promotion_stands_on_a_pass(
    happening: list[tuple[Event, float]],
) -> None:
    state, now = begin(SPEC, stable="1", canary="2", now_s=0), 0.0
    passed = False
    for event, later in happening:
        now += later
        passed |= isinstance(event, Looked) and event.evidence is EVIDENCES[1]
        before, state = state, decide(SPEC, state, event, now)
        for action in state.intent:
            match action:
                case EnsureCapacity(shares) | SetShares(shares):
                    assert abs(sum(shares.values()) - 1) < 1e-9
                case Retire("1"):
                    assert state.outcome is Outcome.PROMOTED
                    assert passed
        if state.phase is Phase.RETURNING:
            assert SetShares({"1": 1.0}) in state.intent
            assert state.intent[-1] == Retire("2"), "canary goes last"
        if before.phase is Phase.RETURNING:
            assert state.phase in (Phase.RETURNING, Phase.DONE), "a rollback is never turned round"
        if before.phase is Phase.DONE:
            assert state is before


@given(st.lists(st.tuples(events, st.floats(0, 60)), max_size=30))
def test_the_state_on_disk_is_the_state(happening: list[tuple[Event, float]]) -> None:
    import json

    state = begin(SPEC, stable="1", canary="2", now_s=0)
    for event, later in happening:
        state = decide(SPEC, state, event, later)
        assert State.from_json(json.loads(json.dumps(state.to_json())), where=Path("state.json")) == state


def test_a_look_on_disk_is_the_look() -> None:
    target, clock = start(Behaviour())
    clock.wait(3)
    seen = target.observe()
    assert observation_from_json(observation_to_json(seen)) == seen


def test_a_spec_of_three_lines_works(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {name: recommender}\n"
        'spec: {service: recommender, candidate: "models:/recommender/7"}\n'
    )
    spec = load_rollout(path)
    assert [step.share for step in spec.steps] == [0.05, 0.25, 0.5, 1.0]
    assert spec.objectives == "recommender"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("{service: a, candidate: b, steps: [{share: 0.5}]}", "last share must be 1"),
        ("{service: a, candidate: b, steps: [{share: 1}]}", "nothing to compare with"),
        ("{service: a, candidate: b, steps: [{share: 0.5}, {share: 0.25}, {share: 1}]}", "greater"),
        ("{service: a, candidate: b, alhpa: 0.1}", "alhpa"),
        ("{service: a}", "candidate"),
        ("{service: On Sale, candidate: b}", "service"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_field(spec: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(f"apiVersion: endcap.dev/v1alpha1\nkind: Rollout\nmetadata: {{name: r}}\nspec: {spec}\n")
    with pytest.raises(InputError, match=complaint):
        load_rollout(path)
