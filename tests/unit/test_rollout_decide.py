"""Properties of the pure decisions, whatever happens in whatever order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from endcap.evidence import Verdict
from serving.rollout.decide import begin, decide
from serving.rollout.events import (
    Acted,
    ActFailed,
    Command,
    Commanded,
    Event,
    Gated,
    Looked,
    Received,
    ShadowSeen,
    event_from_json,
    event_to_json,
)
from serving.rollout.freeze import DateFreeze
from serving.rollout.spec import RolloutSpec, ShadowSpec, Step
from serving.rollout.state import EnsureCapacity, Outcome, Phase, Retire, SetShadow, SetShares, State
from tests.simulated import SPEC

counts = st.integers(0, 5_000)
received = st.builds(Received, counts, counts, counts)
shadows = st.none() | st.builds(
    ShadowSeen, st.sampled_from(Verdict), st.just("shadow"), st.integers(0, 500), st.floats(0, 1)
)
looks = st.builds(
    Looked, st.sampled_from(Verdict), st.just("because"), received, st.integers(0, 500), st.integers(0, 500),
    st.booleans() | st.just(True), st.none() | st.none() | st.just("mismatch"),
    st.none() | st.none() | st.just("troubled"), shadows,
)  # fmt: skip
acts = st.one_of(
    st.builds(Acted, received), st.builds(ActFailed, st.just("no room"), st.booleans(), received),
    st.builds(Gated, st.booleans() | st.just(True), st.just("gates")),
)  # fmt: skip
people = st.builds(
    Commanded, st.sampled_from(Command), st.just("someone"), st.integers(1, 100), st.none() | st.integers(0, 9)
)
happening = st.lists(st.tuples(looks | acts | people, st.floats(0, 60)), max_size=60)
unattended = st.lists(st.tuples(looks | acts, st.floats(0, 60)), max_size=80)

specs = st.builds(
    lambda shadow, baseline, hold_s, approval, freeze: replace(
        SPEC, baseline=baseline, hold_s=hold_s, shadow=ShadowSpec(0.1, 100, 60, 0.3) if shadow else None,
        steps=tuple(Step(share, 100, 5, 120, approval) for share in (0.05, 0.25, 0.5, 1.0)),
        freeze=(DateFreeze(200, 400, "sales"),) if freeze else (),
    ),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 100.0]), st.booleans(), st.booleans(),
)  # fmt: skip


def states(spec: RolloutSpec, events: list[tuple[Event, float]]) -> list[tuple[State, Event, float, State]]:
    """Every transition: before, what happened, when, after."""
    state, now_s, found = begin(spec, stable="1", canary="2", now_s=0.0), 0.0, []
    for event, later_s in events:
        now_s += later_s
        after = decide(spec, state, event, now_s)
        found.append((state, event, now_s, after))
        state = after
    return found


@given(specs, happening)
def test_shares_are_whole_never_above_the_step_s_and_the_order_never_moves_a_shopper_out_of_canary(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for _, _, _, state in states(spec, events):
        for action in state.intent:
            if not isinstance(action, EnsureCapacity | SetShares):
                continue
            shares = action.shares
            if state.phase is Phase.SHADOWING:
                assert "1" not in shares, "a shadow's capacity, and nobody's share"
                continue
            assert abs(sum(shares.values()) - 1) < 1e-9
            assert min(shares.values()) > 0
            if "2" in shares:
                assert shares["2"] == spec.steps[state.step].share
                assert next(iter(shares)) == "2", "canary first"
                assert "1-baseline" not in shares or list(shares)[-1] == "1-baseline", "baseline last"


@given(specs, unattended)
def test_nothing_but_a_pass_brings_canary_all_the_traffic_and_nothing_grows_by_a_fail(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, event, _, after in states(spec, events):
        grew = after.phase is Phase.GROWING and after.step > before.step
        if grew and spec.steps[after.step].share == 1:
            assert isinstance(event, Looked)
            assert event.verdict is Verdict.PASS
        if grew:
            assert isinstance(event, Looked)
            assert event.verdict is not Verdict.FAIL
        if after.outcome is Outcome.PROMOTED and before.outcome is None:
            assert isinstance(event, Looked)
            assert event.control_new == 0 < event.canary_new, "the observed share, not the wished one"
            assert before.step == len(spec.steps) - 1


@given(specs, happening)
def test_a_canary_that_fails_while_it_has_traffic_loses_it_at_that_look(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, event, _, after in states(spec, events):
        failed = isinstance(event, Looked) and event.verdict is Verdict.FAIL
        if failed and before.phase in (Phase.OBSERVING, Phase.HOLDING) and not before.intent:
            assert after.outcome is Outcome.ROLLED_BACK
            assert SetShares({"1": 1.0}) in after.intent


def test_a_pause_that_a_step_began_in_takes_no_more_from_it_than_it_had() -> None:
    state = begin(SPEC, stable="1", canary="2", now_s=0.0)
    for event, now_s in (
        (Gated(True, "checked"), 1.0), (Commanded(Command.PAUSE, "someone", 1), 2.0), (Acted(), 50.0),
        (Commanded(Command.RESUME, "someone", 2), 60.0),
    ):  # fmt: skip
        state = decide(SPEC, state, event, now_s)
    assert state.phase is Phase.OBSERVING
    assert state.step_at_s == 60.0


@given(specs, happening)
def test_a_canary_that_fails_before_it_gets_more_gets_no_more(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, event, _, after in states(spec, events):
        if before.phase is Phase.GROWING and isinstance(event, Looked):
            failed = event.verdict is Verdict.FAIL
            assert (after.outcome is Outcome.ROLLED_BACK) if failed else after is before


@given(specs, happening)
def test_an_abort_from_any_state_returns_stable_to_everything(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for number, (_, _, now_s, state) in enumerate(states(spec, events), 200):
        if state.ended:
            break
        aborted = decide(spec, state, Commanded(Command.ABORT, "someone", number), now_s)
        assert aborted.phase is Phase.RETURNING
        assert SetShares({"1": 1.0}) in aborted.intent
        assert EnsureCapacity({"1": 1.0}) in aborted.intent
        assert aborted.intent[0] == SetShadow(None) or spec.shadow is None
        ended = decide(spec, aborted, Acted(), now_s)
        assert ended.ended
        assert ended.outcome in (Outcome.ABORTED, state.outcome)


@given(specs, happening)
def test_a_way_back_is_never_turned_round_and_canary_is_retired_after_its_traffic_is_gone(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, _, _, after in states(spec, events):
        if before.phase is Phase.RETURNING:
            assert after.phase in (Phase.RETURNING, Phase.DONE)
        if after.phase is Phase.RETURNING:
            assert after.intent.index(Retire("2")) > after.intent.index(SetShares({"1": 1.0}))
        if Retire("1") in after.intent:
            assert after.phase is Phase.RETIRING
            assert after.outcome is Outcome.PROMOTED
        if before.ended:
            assert after is before


@given(specs, happening)
def test_nothing_grows_in_a_freeze_or_while_paused_unless_a_person_promotes(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, _, now_s, after in states(spec, events):
        first = before.phase in (Phase.GATING, Phase.PENDING, Phase.SHADOWING)
        grew = after.phase is Phase.GROWING and (first or after.step > before.step)
        if grew and after.by_hand is None:
            assert before.paused_at_s is None
            assert not (spec.freeze and 200 <= now_s < 400)
            assert not spec.steps[after.step].approval or after.approved > after.step


@given(specs, happening)
def test_what_cannot_be_compared_goes_back_a_step_at_most_twice(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    found = states(spec, events)
    back = [after for before, _, _, after in found if after.step < before.step]
    assert len(back) <= 2
    for state in back:
        assert state.step == len(spec.steps) - 2
        assert state.intent == (EnsureCapacity(state.intent[0].shares), SetShares(state.intent[0].shares))  # type: ignore[union-attr]


@given(specs, happening)
def test_saying_a_command_twice_changes_nothing_more(spec: RolloutSpec, events: list[tuple[Event, float]]) -> None:
    for _, event, now_s, after in states(spec, events):
        if isinstance(event, Commanded):
            again = decide(spec, after, replace(event, number=event.number + 1), now_s)
            assert replace(again, seq=0, commands=0) == replace(after, seq=0, commands=0)


@given(specs, happening)
def test_the_state_and_what_happened_survive_the_way_to_disk_and_back(
    spec: RolloutSpec, events: list[tuple[Event, float]]
) -> None:
    for before, event, now_s, after in states(spec, events):
        kept = json.loads(json.dumps({"state": before.to_json(), "event": event_to_json(event)}))
        state, happened = State.from_json(kept["state"], where=Path("state.json")), event_from_json(kept["event"])
        assert (state, happened) == (before, event)
        assert decide(spec, state, happened, now_s) == after


@given(specs, happening)
def test_decisions_are_numbered_one_by_one(spec: RolloutSpec, events: list[tuple[Event, float]]) -> None:
    for before, _, _, after in states(spec, events):
        assert after.seq == before.seq + (after is not before)
