"""Where a rollout stands, and what it is about to do. Frozen; written before every act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from endcap.errors import StateError
from serving.rollout.events import NOTHING_RECEIVED, Received

__all__ = [
    "Action", "EnsureCapacity", "Outcome", "Phase", "Retire", "RunGates", "SetShadow", "SetShares", "State",
]  # fmt: skip


class Phase(StrEnum):
    GATING = "gating"
    """The checks before any traffic."""
    PENDING = "pending"
    """Ready for what is next, and waiting: paused, frozen, or for a person's approval."""
    SHADOWING = "shadowing"
    """Requests are copied to the candidate; shoppers get nothing of it."""
    GROWING = "growing"
    """Capacity, then the step's share."""
    OBSERVING = "observing"
    HOLDING = "holding"
    """Inconclusive: the share stays for a while, for evidence or a person, before the traffic is returned."""
    RETIRING = "retiring"
    """Promoted: canary has everything and was seen to; the old version goes."""
    RETURNING = "returning"
    """Stable's capacity, then all traffic back to it, then canary goes."""
    DONE = "done"

    @property
    def place(self) -> str:
        """What people are told that the canary does meanwhile; a rollout that is done has its outcome instead."""
        return _PLACES[self]


_PLACES = {
    Phase.GATING: "is checked before any traffic",
    Phase.PENDING: "waits before any traffic",
    Phase.SHADOWING: "answers copies of requests",
    Phase.GROWING: "gets ready for",
    Phase.OBSERVING: "is observed at",
    Phase.HOLDING: "is held at",
    Phase.RETIRING: "has all traffic; the old version is retired",
    Phase.RETURNING: "gives its traffic back",
}


class Outcome(StrEnum):
    """How a rollout ends: the ``verdict`` of summary.json."""

    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    """It never got any traffic."""
    HELD = "held"
    """Inconclusive: the evidence did not suffice in time, or could not be trusted; all traffic was returned."""
    ABORTED = "aborted"
    """A person ended it; all traffic was returned to stable."""


@dataclass(frozen=True, slots=True)
class RunGates:
    """Check the candidate before anything else."""


@dataclass(frozen=True, slots=True)
class SetShadow:
    """Copy this share of the requests to the version; no version: copy none."""

    label: str | None
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class EnsureCapacity:
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class SetShares:
    shares: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Retire:
    label: str


Action = RunGates | SetShadow | EnsureCapacity | SetShares | Retire


@dataclass(frozen=True, slots=True)
class State:
    """``intent`` is what is being done: written first, each action safe to repeat, so a crash at any point resumes.

    ``outcome`` is decided when the rollout turns to RETIRING or RETURNING, and holds at DONE.
    ``step_at_s``: when the step's share was set (when the phase began, before the first one); the time that a rollout
    was paused is taken out. ``step_from``: what had been received by then. ``held_at_s``: when holding began.
    ``traffic_at_s``: when canary first got a share; None before.
    ``waiting``: why it does not go on although it could; None while it may.
    ``approved``: the last step (from 1) that a person let begin. ``by_hand``: who promoted it without the evidence.
    ``compared_again``: how often it went back from all the traffic to the step before, to be compared again.
    ``seq``: decisions taken so far. ``commands``: commands of people consumed so far.
    """

    phase: Phase
    step: int
    stable: str
    canary: str
    started_at_s: float
    step_at_s: float
    intent: tuple[Action, ...]
    traffic_at_s: float | None = None
    step_from: Received = NOTHING_RECEIVED
    outcome: Outcome | None = None
    reason: str = ""
    ended_at_s: float | None = None
    held_at_s: float | None = None
    paused_at_s: float | None = None
    waiting: str | None = None
    approved: int = 0
    by_hand: str | None = None
    compared_again: int = 0
    seq: int = 0
    commands: int = 0

    def with_(self, **changes: Any) -> State:
        return replace(self, **changes)

    @property
    def ended(self) -> bool:
        return self.phase is Phase.DONE

    @property
    def before_traffic(self) -> bool:
        """Canary has not been given its first share yet."""
        return self.phase in (Phase.GATING, Phase.PENDING, Phase.SHADOWING)

    @property
    def next_step(self) -> int:
        """The index of the step that is next; that of no step while the last one is under way."""
        return 0 if self.before_traffic else self.step + 1

    @property
    def baseline(self) -> str:
        """The label of the fresh copy of stable."""
        return f"{self.stable}-baseline"

    def to_json(self) -> dict[str, object]:
        return {
            "phase": self.phase, "step": self.step, "stable": self.stable, "canary": self.canary,
            "started_at_s": self.started_at_s, "step_at_s": self.step_at_s,
            "traffic_at_s": self.traffic_at_s, "step_from": asdict(self.step_from),
            "intent": [_action_to_json(action) for action in self.intent],
            "verdict": self.outcome, "reason": self.reason, "ended_at_s": self.ended_at_s,
            "held_at_s": self.held_at_s, "paused_at_s": self.paused_at_s, "waiting": self.waiting,
            "approved": self.approved, "by_hand": self.by_hand,
            "compared_again": self.compared_again, "seq": self.seq, "commands": self.commands,
        }  # fmt: skip

    @staticmethod
    def from_json(document: Any, *, where: object) -> State:
        """The inverse of :meth:`to_json`.

        Raises:
            StateError: a field is missing or of the wrong kind; the message names the file.
        """
        try:
            outcome, waiting, by_hand = document["verdict"], document["waiting"], document["by_hand"]
            return State(
                phase=Phase(document["phase"]), step=int(document["step"]),
                stable=str(document["stable"]), canary=str(document["canary"]),
                started_at_s=float(document["started_at_s"]), step_at_s=float(document["step_at_s"]),
                traffic_at_s=_time(document["traffic_at_s"]),
                step_from=Received(**{name: int(value) for name, value in document["step_from"].items()}),
                intent=tuple(_action_from_json(action) for action in document["intent"]),
                outcome=None if outcome is None else Outcome(outcome), reason=str(document["reason"]),
                ended_at_s=_time(document["ended_at_s"]), held_at_s=_time(document["held_at_s"]),
                paused_at_s=_time(document["paused_at_s"]), waiting=None if waiting is None else str(waiting),
                approved=int(document["approved"]), by_hand=None if by_hand is None else str(by_hand),
                compared_again=int(document["compared_again"]),
                seq=int(document["seq"]), commands=int(document["commands"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(
                f"damaged, not a rollout's state ({error!r})",
                where=where,
                next_step="restore the file, or move the rollout's folder away and start a new one",
            ) from error


def _time(value: Any) -> float | None:
    return None if value is None else float(value)


def _action_to_json(action: Action) -> dict[str, object]:
    match action:
        case RunGates():
            return {"action": "run_gates"}
        case SetShadow(label, share):
            return {"action": "set_shadow", "version": label, "share": share}
        case EnsureCapacity(shares):
            return {"action": "ensure_capacity", "shares": dict(shares)}
        case SetShares(shares):
            return {"action": "set_shares", "shares": dict(shares)}
        case Retire(label):
            return {"action": "retire", "version": label}


def _action_from_json(document: Mapping[str, Any]) -> Action:
    match document["action"]:
        case "run_gates":
            return RunGates()
        case "set_shadow":
            label = document["version"]
            return SetShadow(None if label is None else str(label), float(document["share"]))
        case "ensure_capacity":
            return EnsureCapacity({str(k): float(v) for k, v in document["shares"].items()})
        case "set_shares":
            return SetShares({str(k): float(v) for k, v in document["shares"].items()})
        case "retire":
            return Retire(str(document["version"]))
        case other:
            raise ValueError(f"unknown action {other!r}")
