"""The rollout's decisions: pure functions of what is declared, where it stands and what was seen.

Everything that can happen to a rollout is one of three events: it looked, it acted as intended, or an act failed. So a
week of rollout is simulated in milliseconds and every crash point can be enumerated.
"""

from __future__ import annotations

from dataclasses import dataclass

from endcap.errors import EndcapError, PackageError
from endcap.evidence import Evidence, Verdict
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Action, EnsureCapacity, Outcome, Phase, Retire, SetShares, State

__all__ = ["ActFailed", "Acted", "Event", "Looked", "begin", "decide"]


@dataclass(frozen=True, slots=True)
class Looked:
    """``canary_attempts``: all attempts canary has served; ``*_new``: those since the look before."""

    evidence: Evidence
    canary_attempts: int
    canary_new: int
    control_new: int


@dataclass(frozen=True, slots=True)
class Acted:
    """All of the state's intent was done."""

    canary_attempts: int


@dataclass(frozen=True, slots=True)
class ActFailed:
    """Some of the state's intent was not done. ``canary_attempts``: as far as is known."""

    error: EndcapError
    canary_attempts: int = 0


Event = Looked | Acted | ActFailed


def begin(spec: RolloutSpec, *, stable: str, canary: str, canary_attempts: int = 0, now_s: float) -> State:
    """The state of a rollout that is about to give its candidate the first share.

    ``canary_attempts``: what the candidate had served before, in an earlier rollout.
    """
    start = State(
        phase=Phase.GROWING, step=0, stable=stable, canary=canary, started_at_s=now_s, step_at_s=now_s,
        step_attempts=canary_attempts, intent=(), reason="started",
    )  # fmt: skip
    return _grow(spec, start, step=0, reason=f"step 1 of {len(spec.steps)}: {spec.steps[0].share:.0%}")


def decide(spec: RolloutSpec, state: State, event: Event, now_s: float) -> State:
    """The next state; its ``intent`` is what to do now. The same state is returned when nothing changes."""
    if state.phase is Phase.DONE:
        return state
    match event:
        case Acted(canary_attempts):
            return _after_act(state, canary_attempts, now_s)
        case ActFailed():
            return _after_failure(state, event)
        case Looked():
            return _after_look(spec, state, event, now_s) if state.phase is Phase.OBSERVING else state


def _after_act(state: State, canary_attempts: int, now_s: float) -> State:
    match state.phase:
        case Phase.GROWING:
            return state.with_(phase=Phase.OBSERVING, intent=(), step_at_s=now_s, step_attempts=canary_attempts)
        case Phase.RETIRING | Phase.RETURNING:
            return state.with_(phase=Phase.DONE, intent=(), ended_at_s=now_s)
        case _:
            return state


def _after_failure(state: State, failed: ActFailed) -> State:
    error = failed.error
    if state.phase is Phase.RETURNING and state.outcome is not Outcome.HELD:
        # A canary that was shown to be worse must not keep its share because stable lacks a replica: next time the
        # traffic goes first (the target still wants one healthy replica), then capacity first again.
        return state.with_(intent=_way_back(state, capacity_first=not isinstance(state.intent[0], EnsureCapacity)))
    if state.phase in (Phase.RETURNING, Phase.RETIRING):
        return state  # the same intent again: giving traffic back, once decided, is never given up
    if state.step > 0 or failed.canary_attempts > state.step_attempts:
        return _return_to_stable(state, Outcome.ROLLED_BACK, f"could not grow to the next share: {_line(error)}")
    if isinstance(error, PackageError):
        return _return_to_stable(state, Outcome.REFUSED, f"refused before any traffic: {_line(error)}")
    return _return_to_stable(state, Outcome.REFUSED, f"never became ready: {_line(error)}")


def _after_look(spec: RolloutSpec, state: State, look: Looked, now_s: float) -> State:
    step = spec.steps[state.step]
    evidence = look.evidence
    if evidence.verdict is Verdict.FAIL:
        return _return_to_stable(state, Outcome.ROLLED_BACK, evidence.reason)
    elapsed_s = now_s - state.step_at_s
    enough = look.canary_attempts - state.step_attempts >= step.min_requests and elapsed_s >= step.min_s
    if step.share == 1:
        # Observed, not wished: the old version goes only when it was seen to receive nothing any more.
        if enough and look.canary_new > 0 and look.control_new == 0:
            return state.with_(
                phase=Phase.RETIRING, intent=(Retire(state.stable),), outcome=Outcome.PROMOTED,
                reason=evidence.reason,
            )  # fmt: skip
    elif enough:
        following = spec.steps[state.step + 1]
        if following.share < 1 or evidence.verdict is Verdict.PASS:
            reason = f"step {state.step + 2} of {len(spec.steps)}: {following.share:.0%}"
            return _grow(spec, state, step=state.step + 1, reason=reason)
    if elapsed_s >= step.max_s:
        got = look.canary_attempts - state.step_attempts
        detail = "no data" if got == 0 else evidence.reason
        return _return_to_stable(
            state, Outcome.HELD, f"inconclusive after {elapsed_s:.0f} s at {step.share:.0%}: {detail}"
        )
    return state


def _grow(spec: RolloutSpec, state: State, *, step: int, reason: str) -> State:
    share = spec.steps[step].share
    # Canary first: with a total kept constant, a growing share then moves shoppers only from stable to canary.
    shares = {state.canary: share} if share == 1 else {state.canary: share, state.stable: 1 - share}
    return state.with_(
        phase=Phase.GROWING, step=step, intent=(EnsureCapacity(shares), SetShares(shares)), reason=reason
    )


def _return_to_stable(state: State, outcome: Outcome, reason: str) -> State:
    # Capacity before traffic, on the way back too.
    return state.with_(phase=Phase.RETURNING, intent=_way_back(state), outcome=outcome, reason=reason)


def _way_back(state: State, *, capacity_first: bool = True) -> tuple[Action, ...]:
    back = {state.stable: 1.0}
    capacity, traffic = EnsureCapacity(back), SetShares(back)
    return (*((capacity, traffic) if capacity_first else (traffic, capacity)), Retire(state.canary))


def _line(error: EndcapError) -> str:
    """What a replica said crosses processes as one line, `what; next: ...`: the next step is not a reason."""
    what = error.what.split("; next: ")[0]
    return what if error.where is None else f"{what} ({error.where.rsplit('/', 1)[-1]})"
