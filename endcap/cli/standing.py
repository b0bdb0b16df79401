"""Where a rollout stands, read from its folder alone: with or without an engine, at any moment of one's work."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from endcap.cli.console import Page
from endcap.errors import StateError
from serving.rollout.audit import share_now
from serving.rollout.commands import engine_runs, open_rollout, step_waiting
from serving.rollout.declared import Declared, read_declared
from serving.rollout.state import Outcome, Phase, State
from serving.rollout.store import DECISIONS_FILE, STATE_FILE

__all__ = ["Standing", "evidence_lines", "read_standing", "said"]

REACH = 0.25
"""How far the evidence's intervals reach to either side."""
_BLOCK_BYTES = 1 << 16
_LATE_S = 10.0
"""A look may take a while on a busy machine."""
_LOOKING = (Phase.SHADOWING, Phase.OBSERVING, Phase.HOLDING)


def said(outcome: Outcome | None) -> str:
    return "running" if outcome is None else outcome.value.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Standing:
    """``line``: the last line of the audit log, None before there is one. ``share``: canary's, set or about to be."""

    folder: Path
    state: State
    declared: Declared
    line: Mapping[str, Any] | None
    engine: bool

    @property
    def share(self) -> float | None:
        return share_now(self.declared.spec, self.state)

    @property
    def headline(self) -> str:
        """Such as ``recommender: version 3 is observed at 25% (step 2 of 4)``."""
        spec, state = self.declared.spec, self.state
        who = f"{spec.name}: version {state.canary}"
        if state.ended:
            return f"{who} ended: {said(state.outcome)}"
        place = state.phase.place
        if state.phase in (Phase.GROWING, Phase.OBSERVING, Phase.HOLDING):
            place = f"{place} {spec.steps[state.step].share:.0%} (step {state.step + 1} of {len(spec.steps)})"
        return f"{who} {place}" + (", paused" if state.paused_at_s is not None else "")

    @property
    def objectives(self) -> Mapping[str, Mapping[str, Any]]:
        found = None if self.line is None else self.line.get("evidence")
        return found if isinstance(found, dict) else {}

    @property
    def looked_at_s(self) -> float | None:
        at_s = None if self.line is None else self.line.get("at_s")
        return float(at_s) if isinstance(at_s, int | float) else None

    @property
    def approval(self) -> int | None:
        """The step, from 1, that waits for a person."""
        return step_waiting(self.declared.spec, self.state)

    @property
    def what_next(self) -> str | None:
        """What a person may do; None where there is nothing to do."""
        state, folder = self.state, self.folder
        if state.ended:
            return None
        if not self.engine:
            return "no engine runs, and nobody watches it: the endcap rollout start that began it goes on with it; " \
                   f"endcap rollout abort {folder} returns its traffic"  # fmt: skip
        if state.paused_at_s is not None:
            return f"endcap rollout resume {folder}"
        if self.approval is not None:
            return f"endcap rollout approve {folder} (or abort)"
        if state.phase is Phase.HOLDING:
            return f"more evidence may still decide; endcap rollout promote or abort {folder} decides by hand"
        return None

    def page(self, now_s: float) -> Page:
        """All of it, for people. ``now_s``: Unix time."""
        state, spec = self.state, self.declared.spec
        lines: list[tuple[str, str | None]] = [(self.headline, "bold")]
        since_s = (state.ended_at_s or now_s) - state.started_at_s
        lines.append((f"  version {state.stable} -> {state.canary}, {_duration(since_s)} "
                      f"{'in all' if state.ended else 'so far'}", "dim"))  # fmt: skip
        if state.reason:
            lines.append((f"  {state.reason}", None))
        if state.waiting is not None:
            lines.append((f"  waits: {state.waiting}", "yellow"))
        if state.phase in (Phase.OBSERVING, Phase.HOLDING):
            lines.append((f"  {self._progress(now_s)}", "dim"))
        shadow = None if self.line is None else self.line.get("shadow")
        lift = _lift(self.objectives.get(spec.primary or "", {}))
        if lift is not None:
            lines.append((f"  {spec.primary}: {lift}", None))
        if state.phase is Phase.SHADOWING and spec.shadow is not None and isinstance(shadow, dict):
            lines.append((f"  {shadow['pairs']} of {spec.shadow.min_requests} answers compared, "
                          f"{shadow['overlap']:.0%} of the items alike", "dim"))  # fmt: skip
        if self.looked_at_s is not None and not state.ended:
            at = datetime.fromtimestamp(self.looked_at_s, UTC).strftime("%H:%M:%S UTC")
            age_s = now_s - self.looked_at_s
            blind = self.engine and state.phase in _LOOKING and age_s > _LATE_S + 3 * spec.look_s
            lines.append((f"  last look {_duration(age_s)} ago ({at})"
                          f"{': the target or the disk does not answer, or the engine hangs' if blind else ''}",
                          "yellow" if blind else "dim"))  # fmt: skip
        if self.what_next is not None:
            lines.append((f"  next: {self.what_next}", "yellow"))
        columns = ("objective", "verdict", "canary", "control", "points", "interval", "margin")
        return Page(tuple(lines), columns, tuple(_row(name, seen) for name, seen in self.objectives.items()))

    def _progress(self, now_s: float) -> str:
        step = self.declared.spec.steps[self.state.step]
        elapsed_s = (self.state.paused_at_s or now_s) - self.state.step_at_s
        words = f"{_duration(elapsed_s)} of at least {_duration(step.min_s)}, at most {_duration(step.max_s)}"
        event = None if self.line is None else self.line.get("event")
        received = event.get("received") if isinstance(event, dict) else None
        if not isinstance(received, dict):
            return words
        since = self.state.step_from
        attempts = max(0, int(received["canary_attempts"]) - since.canary_attempts)
        canary, requests = int(received["canary_requests"]) - since.canary_requests, int(received["requests"])
        came = f", {canary / (requests - since.requests):.1%} of all" if requests > since.requests else ""
        return f"{attempts:,} of at least {step.min_requests:,} requests came{came}; {words}"

    @property
    def change(self) -> str:
        """One line that differs from the one before when something happened."""
        verdicts = ", ".join(f"{name} {seen.get('verdict')}" for name, seen in self.objectives.items())
        waiting = "" if self.state.waiting is None else f"; waits: {self.state.waiting}"
        engine = "" if self.engine or self.state.ended else "; no engine runs"
        reason = f": {self.state.reason}" if self.state.outcome is not None else f" [{verdicts}]" if verdicts else ""
        return f"{self.headline}{reason}{waiting}{engine}"

    def to_json(self) -> dict[str, object]:
        state, spec = self.state, self.declared.spec
        return {
            "rollout": spec.name, "service": spec.service, "from": state.stable, "to": state.canary,
            "phase": state.phase, "step": state.step + 1, "steps": len(spec.steps), "share": self.share,
            "next_step": None if state.ended else state.next_step + 1, "outcome": state.outcome,
            "verdict": None if self.line is None else self.line.get("verdict"), "reason": state.reason,
            "waiting": state.waiting, "waits_for_approval": self.approval, "paused": state.paused_at_s is not None,
            "started_at_s": state.started_at_s, "ended_at_s": state.ended_at_s, "looked_at_s": self.looked_at_s,
            "engine_runs": self.engine, "seq": state.seq, "commands": state.commands, "objectives": self.objectives,
        }  # fmt: skip


def read_standing(folder: Path) -> Standing:
    """Read a rollout's folder.

    Raises:
        InputError: there is no rollout. StateError: a file of it is damaged; the message names it.
    """
    state = open_rollout(folder)
    declared = read_declared(folder)
    if state.step >= len(declared.spec.steps):
        raise StateError(f"it is at step {state.step + 1}, and {len(declared.spec.steps)} are declared", where=folder)
    line = _last_line(folder / DECISIONS_FILE)
    if line is not None and not _leads_to(line, state):
        raise StateError(f"it is not of the log beside it ({DECISIONS_FILE})", where=folder / STATE_FILE,
                         next_step="restore the one that was damaged or exchanged; endcap rollout history tells "
                         "what was decided")  # fmt: skip
    return Standing(folder, state, declared, line, engine_runs(folder))


def _leads_to(line: Mapping[str, Any], state: State) -> bool:
    """Whether a log that ends in ``line``, which was written before ``state`` was, may be the state's own."""
    seq = line.get("seq")
    versions = (line.get("from"), line.get("to"))
    return isinstance(seq, int) and seq >= state.seq and versions == (state.stable, state.canary)


def _last_line(path: Path) -> Mapping[str, Any] | None:
    """The last whole line, from the file's end however long it is: a line that is being written is not there yet."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        end = start = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, start - _BLOCK_BYTES)
            file.seek(start)
            held = file.read(end - start)
            whole = held[: held.rfind(b"\n") + 1]
            before = whole.rstrip(b"\n").rfind(b"\n")
            if start == 0 or before >= 0:
                break
    if not whole.strip():
        return None
    try:
        line = json.loads(whole[before + 1 :])
    except ValueError as error:
        raise StateError("its last line is damaged, not JSON", where=path) from error
    if not isinstance(line, dict):
        raise StateError("its last line is not a JSON object", where=path)
    return line


def _row(name: str, seen: Mapping[str, Any]) -> tuple[object, ...]:
    margin = seen.get("margin")
    return (name, seen.get("verdict"), _counts(seen.get("canary")), _counts(seen.get("control")),
            _points(seen.get("difference")), _interval(seen.get("low"), seen.get("high")),
            None if margin is None else _points(-margin))  # fmt: skip


def _interval(low: float | None, high: float | None) -> str | None:
    """Of a difference, in points. An end at the evidence's reach is open: nothing beyond it was ruled out."""
    if low is None or high is None or (low <= -REACH and high >= REACH):
        return None
    if low <= -REACH:
        return f"<{_points(high)}"
    return f">{_points(low)}" if high >= REACH else f"{_points(low)}..{_points(high)}"


def evidence_lines(evidence: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What a decision stood on, a line an objective: verdict, canary less control in points, the interval."""
    lines = []
    for name, seen in evidence.items():
        if seen.get("difference") is None:
            continue
        figures = (_points(seen.get("difference")), _interval(seen.get("low"), seen.get("high")))
        lines.append(" ".join([name, str(seen.get("verdict")), *(figure for figure in figures if figure is not None)]))
    return "\n".join(lines) or None


def _lift(seen: Mapping[str, Any]) -> str | None:
    lift = seen.get("lift")
    if not isinstance(lift, dict) or lift.get("value") is None:
        return None
    low, high = lift.get("low"), lift.get("high")
    reaches = "" if low is None or high is None else f", interval {low:+.1%} to {high:+.1%}"
    return f"lift {lift['value']:+.1%}{reaches}"


def _counts(counts: Any) -> str | None:
    if not isinstance(counts, dict) or not counts.get("total"):
        return None
    return f"{counts['good'] / counts['total']:.2%} of {counts['total']:,}"


def _points(value: Any) -> str | None:
    return None if value is None else f"{100 * value:+.2f}"


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
