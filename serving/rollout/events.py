"""What can happen to a rollout, as values that are kept in its audit log and read back from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from endcap.evidence import Verdict

__all__ = [
    "NOTHING_RECEIVED", "ActFailed", "Acted", "Command", "Commanded", "Event", "Gated", "Looked", "Received",
    "ShadowSeen", "event_from_json", "event_to_json",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Received:
    """What versions have received so far, cumulative: canary's attempts, its requests, and everybody's requests."""

    canary_attempts: int = 0
    canary_requests: int = 0
    requests: int = 0


NOTHING_RECEIVED = Received()


@dataclass(frozen=True, slots=True)
class ShadowSeen:
    """What the shadow's answers were worth: its own verdict against the goals, and how alike they are to stable's."""

    verdict: Verdict
    reason: str
    pairs: int
    overlap: float


@dataclass(frozen=True, slots=True)
class Looked:
    """One look. ``canary_new``, ``control_new``: requests since the look before.

    ``follows``: False when what canary received since its share was set was shown not to be that share.
    ``mismatch``: why the split of shoppers cannot be the one that was set; None while it can.
    ``troubled``: which goal canary misses by far in these looks, whoever's fault that is; None while it misses none.
    """

    verdict: Verdict
    reason: str
    received: Received = NOTHING_RECEIVED
    canary_new: int = 0
    control_new: int = 0
    follows: bool = True
    mismatch: str | None = None
    troubled: str | None = None
    shadow: ShadowSeen | None = None


@dataclass(frozen=True, slots=True)
class Gated:
    """The checks before any traffic have ended."""

    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Acted:
    """All of the state's intent was done."""

    received: Received = NOTHING_RECEIVED


@dataclass(frozen=True, slots=True)
class ActFailed:
    """Some of the state's intent was not done. ``package``: the candidate's package is at fault."""

    reason: str
    package: bool = False
    received: Received = NOTHING_RECEIVED


class Command(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    APPROVE = "approve"
    PROMOTE = "promote"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Commanded:
    """A person asked for something. ``number``: its place among the rollout's commands, from 1.

    ``step``: for an approval, the step (from 1) that may begin: so that asking twice approves no later one.
    """

    command: Command
    by: str
    number: int
    step: int | None = None


Event = Looked | Gated | Acted | ActFailed | Commanded
_KINDS: Mapping[str, type[Event]] = {
    "looked": Looked, "gated": Gated, "acted": Acted, "act_failed": ActFailed, "commanded": Commanded,
}  # fmt: skip
_NAMES = {kind: name for name, kind in _KINDS.items()}


def event_to_json(event: Event) -> dict[str, Any]:
    return {"kind": _NAMES[type(event)], **asdict(event)}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """The inverse of :func:`event_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    fields = dict(document)
    kind = _KINDS[fields.pop("kind")]
    if "received" in fields:
        fields["received"] = Received(**fields["received"])
    if "verdict" in fields:
        fields["verdict"] = Verdict(fields["verdict"])
    if fields.get("shadow") is not None:
        seen = fields["shadow"]
        fields["shadow"] = ShadowSeen(**{**seen, "verdict": Verdict(seen["verdict"])})
    if "command" in fields:
        fields["command"] = Command(fields["command"])
    return kind(**fields)
