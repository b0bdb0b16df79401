"""Where a rollout stands, and what it is about to do. Frozen; written before every act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from endcap.errors import StateError

__all__ = ["Action", "EnsureCapacity", "Outcome", "Phase", "Retire", "SetShares", "State"]


class Phase(StrEnum):
    GROWING = "growing"
    """Capacity, then the step's share."""
    OBSERVING = "observing"
    RETIRING = "retiring"
    """Promoted: canary has everything and was seen to; the old version goes."""
    RETURNING = "returning"
    """Stable's capacity, then all traffic back to it, then canary goes."""
    DONE = "done"


class Outcome(StrEnum):
    """How a rollout ends: the ``verdict`` of summary.json."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    """It never got any traffic."""
    HELD = "held"
    """Inconclusive: the evidence did not suffice in time; all traffic was returned to stable."""


@dataclass(frozen=True, slots=True)
class EnsureCapacity:
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SetShares:
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retire:
    label: str


Action = EnsureCapacity | SetShares | Retire


@dataclass(frozen=True, slots=True)
class State:
    """``intent`` is what is being done: written first, each action safe to repeat, so a crash at any point resumes.

    ``outcome`` is decided when the rollout turns to RETIRING or RETURNING, and holds at DONE.
    ``step_attempts`` is how many attempts canary had served when the step's share was set.
    """

    phase: Phase
    step: int
    stable: str
    canary: str
    started_at_s: float
    step_at_s: float
    step_attempts: int
    intent: tuple[Action, ...]
    outcome: Outcome | None = None
    reason: str = ""
    ended_at_s: float | None = None

    def with_(self, **changes: Any) -> State:
        return replace(self, **changes)

    def to_json(self) -> dict[str, object]:
        return {
            "phase": self.phase, "step": self.step, "stable": self.stable, "canary": self.canary,
            "started_at_s": self.started_at_s, "step_at_s": self.step_at_s, "step_attempts": self.step_attempts,
            "intent": [_action_to_json(action) for action in self.intent],
            "verdict": self.outcome, "reason": self.reason, "ended_at_s": self.ended_at_s,
        }  # fmt: skip

    @staticmethod
    def from_json(document: Any, *, where: Path) -> State:
        """The inverse of :meth:`to_json`.

        Raises:
            StateError: a field is missing or of the wrong kind; the message names the file.
        """
        try:
            outcome, ended = document["verdict"], document["ended_at_s"]
            return State(
                phase=Phase(document["phase"]), step=int(document["step"]),
                stable=str(document["stable"]), canary=str(document["canary"]),
                started_at_s=float(document["started_at_s"]), step_at_s=float(document["step_at_s"]),
                step_attempts=int(document["step_attempts"]),
                intent=tuple(_action_from_json(action) for action in document["intent"]),
                outcome=None if outcome is None else Outcome(outcome), reason=str(document["reason"]),
                ended_at_s=None if ended is None else float(ended),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                f"damaged, not a rollout's state ({error!r})",
                where=where,
                next_step="restore the file, or move the rollout's folder away and start a new one",
            ) from error


def _action_to_json(action: Action) -> dict[str, object]:
    match action:
        case EnsureCapacity(shares):
            return {"action": "ensure_capacity", "shares": dict(shares)}
        case SetShares(shares):
            return {"action": "set_shares", "shares": dict(shares)}
        case Retire(label):
            return {"action": "retire", "version": label}


def _action_from_json(document: Mapping[str, Any]) -> Action:
    match document["action"]:
        case "ensure_capacity":
            return EnsureCapacity({str(k): float(v) for k, v in document["shares"].items()})
        case "set_shares":
            return SetShares({str(k): float(v) for k, v in document["shares"].items()})
        case "retire":
            return Retire(str(document["version"]))
        case other:
            raise ValueError(f"unknown action {other!r}")
