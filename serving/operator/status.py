"""What a Rollout's status says: a pure function of its checkpoint. It explains itself in ``kubectl describe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serving.operator.checkpoint import Checkpoint, checkpoint_name
from serving.operator.objects import Json
from serving.rollout.audit import share_now
from serving.rollout.commands import step_waiting
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Outcome, Phase, State

__all__ = ["Condition", "conditions_of", "merged_conditions", "next_step", "stamp", "status_of"]

_ENDED = {
    Outcome.PROMOTED: "was promoted: all traffic is its own",
    Outcome.ROLLED_BACK: "was rolled back",
    Outcome.REFUSED: "was refused before any traffic",
    Outcome.HELD: "was inconclusive, and its traffic was returned",
    Outcome.ABORTED: "was aborted",
}


@dataclass(frozen=True, slots=True)
class Condition:
    """``status`` is "True", "False" or "Unknown"; ``reason`` one word in CamelCase."""

    type: str
    status: str
    reason: str
    message: str


def stamp(at_s: float) -> str:
    """Unix time as Kubernetes writes it."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_of(checkpoint: Checkpoint, rollout: str) -> Json:
    """All of the status but its conditions. None takes a field away."""
    state, spec, seen = checkpoint.state, checkpoint.spec, checkpoint.seen
    share = share_now(spec, state)
    return {
        "message": headline(spec, state), "next": next_step(spec, state, rollout), "phase": state.phase.value,
        "step": f"{state.step + 1}/{len(spec.steps)}", "share": "0%" if share is None else f"{share:.0%}",
        "verdict": str(state.outcome or seen.get("verdict") or "inconclusive"),
        "outcome": None if state.outcome is None else state.outcome.value, "reason": state.reason,
        "waiting": state.waiting, "approval": step_waiting(spec, state), "stable": state.stable, "canary": state.canary,
        "startedAt": stamp(state.started_at_s),
        "endedAt": None if state.ended_at_s is None else stamp(state.ended_at_s),
        "lastLookAt": _time(checkpoint.sight.get("looked_at_s")), "looks": _looks(checkpoint.sight),
        "checkpoint": checkpoint_name(rollout), "seq": state.seq,
        "objectives": [_objective(name, figures) for name, figures in (seen.get("evidence") or {}).items()],
        "history": [_decision(line) for line in checkpoint.history],
    }  # fmt: skip


def headline(spec: RolloutSpec, state: State) -> str:
    who = f"version {state.canary}"
    if state.ended and state.outcome is not None:
        return f"{who} {_ENDED[state.outcome]}"
    share = spec.steps[state.step].share
    with_share = state.phase in (Phase.GROWING, Phase.OBSERVING, Phase.HOLDING)
    paused = " (paused)" if state.paused_at_s is not None else ""
    return f"{who} {state.phase.place}{f' {share:.0%}' if with_share else ''}{paused}"


def next_step(spec: RolloutSpec, state: State, rollout: str) -> str | None:
    """What a person may do."""
    ask = f"kubectl annotate rollout {rollout} endcap.dev"
    if state.ended:
        return None if state.outcome is Outcome.PROMOTED else "correct the candidate, and name it in spec.candidate"
    if state.outcome is not None:
        return None
    if state.paused_at_s is not None:
        return f"{ask}/resume=YOU"
    step = step_waiting(spec, state)
    if step is not None:
        return f"{ask}/approve='step {step} YOU', or abort=YOU"
    if state.phase is Phase.HOLDING:
        return f"more evidence may still decide; {ask}/promote=YOU or abort=YOU decides by hand"
    return None


def conditions_of(checkpoint: Checkpoint) -> list[Condition]:
    """``Progressing``, and ``Promoted`` for ``kubectl wait``."""
    spec, state = checkpoint.spec, checkpoint.state
    told = headline(spec, state)
    reason = state.reason or told
    if state.ended:
        progressing = Condition("Progressing", "False", "Ended", told)
    elif state.waiting is not None:
        why = "Paused" if state.paused_at_s is not None else "Waiting"
        progressing = Condition("Progressing", "False", why, f"{told}; waits: {state.waiting}")
    else:
        progressing = Condition("Progressing", "True", _camel(state.phase.value), told)
    if state.outcome is None:
        return [progressing, Condition("Promoted", "Unknown", "Undecided", reason)]
    promoted = state.outcome is Outcome.PROMOTED
    if not state.ended:
        return [progressing, Condition("Promoted", "Unknown", _camel(state.outcome.value), reason)]
    return [progressing, Condition("Promoted", "True" if promoted else "False", _camel(state.outcome.value), reason)]


def merged_conditions(
    known: Sequence[Mapping[str, Any]], now: Sequence[Condition], *, at_s: float, generation: int
) -> list[Json]:
    """``known`` with ``now`` laid over; a condition's time is when its status last changed."""
    before = {str(one.get("type")): one for one in known}
    found = dict(before)
    for one in now:
        old = before.get(one.type)
        changed = old is None or old.get("status") != one.status
        since = stamp(at_s) if changed or old is None else str(old.get("lastTransitionTime"))
        found[one.type] = {
            "type": one.type, "status": one.status, "reason": one.reason, "message": one.message[:2000],
            "lastTransitionTime": since, "observedGeneration": generation,
        }  # fmt: skip
    return [dict(found[name]) for name in sorted(found)]


def _objective(name: str, seen: Mapping[str, Any]) -> Json:
    return {
        "name": name, "verdict": str(seen.get("verdict")), "canary": _counts(seen.get("canary")),
        "control": _counts(seen.get("control")), "difference": _points(seen.get("difference")),
        "margin": None if seen.get("margin") is None else _points(-seen["margin"]),
    }  # fmt: skip


def _counts(counts: Any) -> str:
    if not isinstance(counts, Mapping) or not counts.get("total"):
        return "no data"
    return f"{counts['good'] / counts['total']:.2%} of {counts['total']:,}"


def _points(value: Any) -> str | None:
    return None if value is None else f"{100 * value:+.2f} points"


def _decision(line: Mapping[str, Any]) -> Json:
    return {**{name: value for name, value in line.items() if name != "at_s"}, "at": stamp(float(line["at_s"]))}


def _looks(sight: Mapping[str, Any]) -> int | None:
    evidence = sight.get("evidence")
    return evidence.get("looks") if isinstance(evidence, Mapping) else None


def _time(at_s: Any) -> str | None:
    return stamp(at_s) if isinstance(at_s, int | float) else None


def _camel(name: str) -> str:
    return "".join(part.title() for part in name.split("_"))
