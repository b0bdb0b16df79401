"""The audit log: every decision as one JSON line, with what it stood on; and the log read back into a state.

The log is the truth and is written before anything else; ``state.json`` is a checkpoint of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from endcap.errors import StateError
from endcap.evidence import Evidence
from serving.rollout.decide import begin, decide
from serving.rollout.events import Commanded, Event, event_from_json, event_to_json
from serving.rollout.freeze import DateFreeze, frozen
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Outcome, Phase, State

__all__ = ["LOOK", "START", "Decision", "decision_record", "replay"]

LOOK = "look"
"""The action of a line that changed nothing."""
START = "start"


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided. At the start ``before`` and ``event`` are None; where nothing changed ``after is before``."""

    before: State | None
    event: Event | None
    after: State
    at_s: float
    evidence: Evidence

    @property
    def action(self) -> str:
        if self.before is None:
            return START
        if self.after is self.before:
            return LOOK
        if self.after.phase is Phase.DONE:
            return "end"
        if isinstance(self.event, Commanded) and self.after.phase is self.before.phase:
            return str(self.event.command)
        return str(self.after.phase)


def decision_record(spec: RolloutSpec, decided: Decision, *, shadow: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One line of decisions.jsonl."""
    state, evidence = decided.after, decided.evidence
    event = None if decided.event is None else event_to_json(decided.event)
    record = {
        "seq": state.seq, "at_s": decided.at_s, "rollout": spec.name, "from": state.stable, "to": state.canary,
        "step": state.step + 1, "share": share_now(spec, state), "phase": state.phase, "action": decided.action,
        "verdict": evidence.verdict, "outcome": state.outcome, "reason": state.reason, "waiting": state.waiting,
        "event": event, "frozen": _frozen(spec, decided.at_s), "evidence": _evidence(evidence, lift_of=spec.primary),
    }  # fmt: skip
    return record if shadow is None else {**record, "shadow": shadow}


def _frozen(spec: RolloutSpec, at_s: float) -> dict[str, Any] | None:
    """The freeze that a decision was taken in. It may be declared while a rollout runs, so the log has to hold it."""
    window = frozen(spec.freeze, at_s)
    return None if window is None else {"until_s": window.until_s, "reason": window.reason}


def _as_frozen_then(spec: RolloutSpec, line: Mapping[str, Any], at_s: float) -> RolloutSpec:
    if "frozen" not in line:
        return spec
    window = line["frozen"]
    freeze = () if window is None else (DateFreeze(at_s, float(window["until_s"]), str(window["reason"])),)
    return replace(spec, freeze=freeze)


def share_now(spec: RolloutSpec, state: State) -> float | None:
    """The share that canary has or is about to get; None before it gets any."""
    if state.outcome is not None:
        return 1.0 if state.outcome is Outcome.PROMOTED else 0.0
    return spec.steps[state.step].share if state.phase in (Phase.GROWING, Phase.OBSERVING, Phase.HOLDING) else None


def _evidence(evidence: Evidence, *, lift_of: str | None) -> dict[str, Any]:
    """``lift_of``: the objective that an A/B rollout is about; its lift is told too."""
    objectives: dict[str, Any] = {}
    for name, seen in evidence.by_objective.items():
        low, high = seen.difference.interval
        canary, control = seen.canary.share, seen.control.share
        objectives[name] = {
            "canary": {"good": seen.canary.good, "total": seen.canary.total},
            "control": {"good": seen.control.good, "total": seen.control.total},
            "difference": None if canary is None or control is None else canary - control,
            "low": low, "high": high, "margin": seen.margin, "verdict": evidence.verdict_of(name),
        }  # fmt: skip
    if lift_of is not None and evidence.intervals is not None:
        interval = evidence.intervals.lift_interval_of(lift_of)
        objectives[lift_of]["lift"] = {
            "value": evidence.intervals.lift_of(lift_of), "low": interval.low, "high": interval.high,
        }  # fmt: skip
    return objectives


def replay(
    spec: RolloutSpec, lines: Iterable[Mapping[str, Any]], *, where: Path, checkpoint: State | None = None
) -> State | None:
    """The state that a log leads to, from ``checkpoint`` on; None for an empty one.

    Raises:
        StateError: a line is damaged, or is not what the line before it leads to; or the log, which is always written
            first, does not hold the decision that ``checkpoint`` is of.
    """
    state, is_known = checkpoint, checkpoint is None
    for number, line in enumerate(lines, 1):
        try:
            seq, action, at_s = int(line["seq"]), line["action"], float(line["at_s"])
            if state is None and action == START:
                state = begin(spec, stable=str(line["from"]), canary=str(line["to"]), now_s=at_s)
            elif checkpoint is not None and action != LOOK and seq == checkpoint.seq:
                is_known = _is_of(line, checkpoint)
                continue
            elif state is not None and action != LOOK and seq > state.seq:
                state = decide(_as_frozen_then(spec, line, at_s), state, event_from_json(line["event"]), at_s)
            else:
                continue
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"line {number} is damaged ({error!r})", where=where) from error
        if state.seq != seq:
            raise StateError(f"line {number} does not follow from the lines before it", where=where,
                             next_step="restore the file, or move the rollout's folder away")  # fmt: skip
    if not is_known and checkpoint is not None:
        raise StateError(f"the log does not hold decision {checkpoint.seq}, which the state that was kept is of",
                         where=where, next_step="one of the two files is damaged or another rollout's: restore it; "
                         "the log alone suffices, a state alone does not")  # fmt: skip
    return state


def _is_of(line: Mapping[str, Any], state: State) -> bool:
    """Whether a line of the log tells of ``state``."""
    told = (line["from"], line["to"], line["step"], line["phase"], line["outcome"], line["waiting"], line["reason"])
    return told == (state.stable, state.canary, state.step + 1, state.phase, state.outcome, state.waiting,
                    state.reason)  # fmt: skip
