"""The rollout's decisions: pure functions of what is declared, where it stands and what happened.

So a week of rollout is simulated in milliseconds, every crash point can be enumerated, and the audit log, read through
:func:`decide` again, gives the same state.
"""

from __future__ import annotations

from endcap.evidence import Verdict
from serving.rollout.events import Acted, ActFailed, Command, Commanded, Event, Gated, Looked, Received
from serving.rollout.freeze import frozen
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import (
    Action,
    EnsureCapacity,
    Outcome,
    Phase,
    Retire,
    RunGates,
    SetShadow,
    SetShares,
    State,
)

__all__ = ["COMPARISONS", "begin", "decide", "shares_of"]

COMPARISONS = 2
"""How often a rollout goes back from all the traffic to compare again: outages end, a broken version does not."""


def begin(spec: RolloutSpec, *, stable: str, canary: str, now_s: float) -> State:
    """The state of a rollout whose candidate is about to be checked."""
    return State(
        phase=Phase.GATING, step=0, stable=stable, canary=canary, started_at_s=now_s, step_at_s=now_s,
        intent=(RunGates(),), reason=f"version {canary} of {spec.service} is checked before any traffic", seq=1,
    )  # fmt: skip


def decide(spec: RolloutSpec, state: State, event: Event, now_s: float) -> State:
    """The next state; its ``intent`` is what to do now. The same state is returned when nothing changes.

    Total: every event is allowed in every state, and one that does not fit changes nothing.
    """
    if state.ended:
        return state
    match event:
        case Commanded():
            after = _obey(spec, state, event, now_s).with_(commands=event.number)
        case Gated():
            after = _after_gates(spec, state, event, now_s) if state.phase is Phase.GATING else state
        case Acted():
            after = _after_act(state, event.received, now_s) if state.intent else state
        case ActFailed():
            after = _after_failure(spec, state, event) if state.intent else state
        case Looked():
            after = _after_look(spec, state, event, now_s)
    return state if after == state else after.with_(seq=state.seq + 1)


def shares_of(spec: RolloutSpec, state: State, step: int) -> dict[str, float]:
    """The shares of a step. Canary first and baseline last: growing shares then only move shoppers from stable."""
    share, beside = spec.steps[step].share, spec.baseline_share(step)
    if share == 1:
        return {state.canary: 1.0}
    shares = {state.canary: share, state.stable: 1 - share - beside}
    return {**shares, state.baseline: beside} if beside else shares


# ---- after the checks, and after acts ----------------------------------------------------------------


def _after_gates(spec: RolloutSpec, state: State, gated: Gated, now_s: float) -> State:
    if not gated.passed:
        return _back(spec, state, Outcome.REFUSED, f"refused before any traffic: {gated.reason}")
    if state.by_hand is not None:
        return _promote(spec, state, now_s)
    if spec.shadow is None:
        return _grow(spec, state, 0, now_s)
    share = spec.shadow.share
    return state.with_(
        phase=Phase.SHADOWING, step_at_s=now_s, reason=f"{share:.0%} of the requests are copied to it first",
        intent=(EnsureCapacity({state.canary: share}), SetShadow(state.canary, share)),
    )  # fmt: skip


def _after_act(state: State, received: Received, now_s: float) -> State:
    match state.phase:
        case Phase.GROWING:
            begun_at_s = now_s if state.traffic_at_s is None else state.traffic_at_s
            return state.with_(
                phase=Phase.OBSERVING, intent=(), step_at_s=now_s, traffic_at_s=begun_at_s, step_from=received
            )  # fmt: skip
        case Phase.SHADOWING:
            return state.with_(intent=(), step_at_s=now_s, step_from=received)
        case Phase.RETIRING | Phase.RETURNING:
            return state.with_(phase=Phase.DONE, intent=(), ended_at_s=now_s, waiting=None, paused_at_s=None)
        case _:
            return state.with_(intent=())


def _after_failure(spec: RolloutSpec, state: State, failed: ActFailed) -> State:
    if state.phase is Phase.RETURNING and state.outcome is not Outcome.HELD:
        # A canary that was shown to be worse must not keep its share because stable lacks a replica: next time the
        # traffic goes first (the target still wants one healthy replica), then capacity first again.
        return state.with_(intent=_way_back(spec, state, capacity_first=not _is_capacity_first(state)))
    if state.phase in (Phase.RETURNING, Phase.RETIRING):
        return state  # the same intent again: giving traffic back, once decided, is never given up
    got_traffic = state.step > 0 or failed.received.canary_requests > state.step_from.canary_requests
    if state.phase is Phase.GROWING and got_traffic:
        return _back(spec, state, Outcome.ROLLED_BACK, f"could not grow to the next share: {failed.reason}")
    why = "refused before any traffic" if failed.package else "never became ready"
    return _back(spec, state, Outcome.REFUSED, f"{why}: {failed.reason}")


# ---- after a look ------------------------------------------------------------------------------------


def _after_look(spec: RolloutSpec, state: State, look: Looked, now_s: float) -> State:
    if state.intent:  # nothing turns what is being done but a canary that fails before it gets more
        failed = state.phase is Phase.GROWING and look.verdict is Verdict.FAIL
        return _back(spec, state, Outcome.ROLLED_BACK, look.reason) if failed else state
    match state.phase:
        case Phase.PENDING:
            return _grow(spec, state, 0, now_s)
        case Phase.SHADOWING:
            return _after_shadow_look(spec, state, look, now_s)
        case Phase.OBSERVING | Phase.HOLDING:
            return _after_traffic_look(spec, state, look, now_s)
        case _:
            return state


def _after_shadow_look(spec: RolloutSpec, state: State, look: Looked, now_s: float) -> State:
    asked, seen = spec.shadow, look.shadow
    if asked is None:
        return state
    if seen is not None and seen.verdict is Verdict.FAIL:
        return _back(spec, state, Outcome.REFUSED, f"refused by its shadow: {seen.reason}")
    if state.paused_at_s is not None:
        return state
    if seen is not None and seen.pairs >= asked.min_requests:
        if asked.min_overlap is not None and seen.overlap < asked.min_overlap:
            reason = (
                f"its answers share {seen.overlap:.0%} of the items with stable's, and {asked.min_overlap:.0%} is least"
            )
            return _back(spec, state, Outcome.REFUSED, f"refused by its shadow: {reason}")
        return _grow(spec, state, 0, now_s)
    elapsed_s = now_s - state.step_at_s
    if elapsed_s >= asked.max_s:
        got = 0 if seen is None else seen.pairs
        reason = f"inconclusive: {got} of {asked.min_requests} answers were compared in {elapsed_s:.0f} s of shadow"
        return _back(spec, state, Outcome.HELD, reason)
    return state


def _after_traffic_look(spec: RolloutSpec, state: State, look: Looked, now_s: float) -> State:
    step = spec.steps[state.step]
    if look.verdict is Verdict.FAIL:
        return _back(spec, state, Outcome.ROLLED_BACK, look.reason)
    attempts = look.received.canary_attempts - state.step_from.canary_attempts
    if not look.follows:
        requests = look.received.requests - state.step_from.requests
        canary = look.received.canary_requests - state.step_from.canary_requests
        reason = f"{step.share:.0%} was set and {canary} of {requests} requests came: the traffic does not follow"
        return _back(spec, state, Outcome.HELD, reason)
    if look.mismatch is not None:
        return _back(spec, state, Outcome.HELD, f"the analysis cannot be trusted: {look.mismatch}")
    if step.share == 1 and look.troubled is not None:
        return _compare_again(spec, state, look.troubled)
    if state.paused_at_s is not None:
        return state
    elapsed_s = now_s - state.step_at_s
    enough = attempts >= step.min_requests and elapsed_s >= step.min_s
    if step.share == 1:
        # Observed, not wished: the old version goes only when it was seen to receive nothing any more.
        if enough and look.canary_new > 0 and look.control_new == 0:
            return _retire(spec, state, look.reason)
    elif enough and (spec.steps[state.step + 1].share < 1 or look.verdict is Verdict.PASS or state.by_hand):
        if state.compared_again and look.troubled is not None and not state.by_hand:
            return state.with_(waiting=f"not all the traffic again while {look.troubled}")
        return _grow(spec, state, state.step + 1, now_s)
    state = state.with_(waiting=None)  # what it waited for is not due any more
    if state.held_at_s is not None:
        held_s = now_s - state.held_at_s
        return _back(spec, state, Outcome.HELD, state.reason) if held_s >= spec.hold_s else state
    if elapsed_s < step.max_s:
        return state
    detail = "no data" if attempts <= 0 else look.reason
    reason = f"inconclusive after {elapsed_s:.0f} s at {step.share:.0%}: {detail}"
    if spec.hold_s == 0:
        return _back(spec, state, Outcome.HELD, reason)
    return state.with_(phase=Phase.HOLDING, held_at_s=now_s, reason=reason)


# ---- what people ask for -----------------------------------------------------------------------------


def _obey(spec: RolloutSpec, state: State, asked: Commanded, now_s: float) -> State:
    turning = state.phase in (Phase.RETURNING, Phase.RETIRING)
    match asked.command:
        case Command.ABORT if state.phase is not Phase.RETURNING:
            return _back(spec, state, Outcome.ABORTED, f"aborted by {asked.by}")
        case Command.PAUSE if not turning and state.paused_at_s is None:
            return state.with_(paused_at_s=now_s, waiting=f"paused by {asked.by}")
        case Command.RESUME if state.paused_at_s is not None:
            paused_s = max(0.0, now_s - max(state.paused_at_s, state.step_at_s))  # a step may begin in a pause
            held_at_s = None if state.held_at_s is None else state.held_at_s + paused_s
            return state.with_(
                paused_at_s=None, waiting=None, step_at_s=state.step_at_s + paused_s, held_at_s=held_at_s
            )  # fmt: skip
        case Command.APPROVE if not turning and asked.step is not None:
            # Not beyond what is next: nobody approves what they have not seen the step before of.
            following = state.next_step
            approved = max(state.approved, min(asked.step, following + 1))
            waits = following < len(spec.steps) and state.waiting == _for_approval(spec, following)
            return state.with_(approved=approved, waiting=None if waits and approved > following else state.waiting)
        case Command.PROMOTE if not turning and state.by_hand is None:
            state = state.with_(by_hand=asked.by)
            return state if state.phase is Phase.GATING else _promote(spec, state, now_s)
        case _:
            return state


def _promote(spec: RolloutSpec, state: State, now_s: float) -> State:
    last = len(spec.steps) - 1
    if not state.before_traffic and state.step == last:
        return state
    return _grow(spec, state, last, now_s)


# ---- the ways on and back ----------------------------------------------------------------------------


def _grow(spec: RolloutSpec, state: State, step: int, now_s: float) -> State:
    blocked = _blocked(spec, state, step, now_s)
    if blocked is not None and state.before_traffic:
        ending: tuple[Action, ...] = (SetShadow(None),) if state.phase is Phase.SHADOWING else ()
        return state.with_(phase=Phase.PENDING, intent=ending, waiting=blocked)
    if blocked is not None:
        return state.with_(waiting=blocked)
    shares = shares_of(spec, state, step)
    intent: list[Action] = [EnsureCapacity(shares), SetShares(shares)]
    if spec.shadow is not None:
        intent.insert(0, SetShadow(None))
    if spec.baseline and state.baseline not in shares:
        intent.append(Retire(state.baseline))
    by = f", promoted by {state.by_hand}" if state.by_hand is not None else ""
    return state.with_(
        phase=Phase.GROWING, step=step, intent=tuple(intent), waiting=None, held_at_s=None, paused_at_s=None,
        reason=f"step {step + 1} of {len(spec.steps)}: {spec.steps[step].share:.0%}{by}",
    )  # fmt: skip


def _compare_again(spec: RolloutSpec, state: State, troubled: str) -> State:
    """Canary misses a goal with nothing beside it: it is broken under all the traffic, or everything is broken.

    Only traffic to the old version tells which, so it gets its part back, and the evidence decides again.
    """
    if state.compared_again >= COMPARISONS:
        return _back(spec, state, Outcome.HELD, f"again at 100%, with nothing to compare it with: {troubled}")
    before = state.step - 1
    shares = shares_of(spec, state, before)
    return state.with_(
        phase=Phase.GROWING, step=before, intent=(EnsureCapacity(shares), SetShares(shares)),
        held_at_s=None, compared_again=state.compared_again + 1,
        reason=f"back to {spec.steps[before].share:.0%}, to be compared again: {troubled}",
    )  # fmt: skip


def _blocked(spec: RolloutSpec, state: State, step: int, now_s: float) -> str | None:
    if state.by_hand is not None:
        return None
    if state.paused_at_s is not None:
        return state.waiting or "paused"
    window = frozen(spec.freeze, now_s)
    if window is not None:
        return str(window)
    if spec.steps[step].approval and state.approved <= step:
        return _for_approval(spec, step)
    return None


def _for_approval(spec: RolloutSpec, step: int) -> str:
    return f"step {step + 1} ({spec.steps[step].share:.0%}) waits for approval"


def _retire(spec: RolloutSpec, state: State, reason: str) -> State:
    leaving: tuple[Action, ...] = (Retire(state.stable),)
    if spec.baseline:
        leaving = (*leaving, Retire(state.baseline))
    if state.by_hand is not None:
        reason = f"promoted by {state.by_hand}: {reason}"
    return state.with_(phase=Phase.RETIRING, intent=leaving, outcome=Outcome.PROMOTED, reason=reason, waiting=None)


def _back(spec: RolloutSpec, state: State, outcome: Outcome, reason: str) -> State:
    # Capacity before traffic, on the way back too.
    back = state.with_(phase=Phase.RETURNING, outcome=outcome, reason=reason, waiting=None)
    return back.with_(intent=_way_back(spec, back))


def _way_back(spec: RolloutSpec, state: State, *, capacity_first: bool = True) -> tuple[Action, ...]:
    back = {state.stable: 1.0}
    turn: list[Action] = [EnsureCapacity(back), SetShares(back)]
    if not capacity_first:
        turn.reverse()
    if spec.shadow is not None:
        turn.insert(0, SetShadow(None))
    turn.append(Retire(state.canary))
    if spec.baseline:
        turn.append(Retire(state.baseline))
    return tuple(turn)


def _is_capacity_first(state: State) -> bool:
    turn = [action for action in state.intent if isinstance(action, EnsureCapacity | SetShares)]
    return not turn or isinstance(turn[0], EnsureCapacity)
