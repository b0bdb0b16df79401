"""What counts, purely: which events are accepted, repeated or late, and when an impression's window has closed.

Times are whole microseconds since the Unix epoch, so that "inside the window" and "closed" can never disagree by a
rounding. The rules:

* an impression counts once it was reported shown inside its window; a click inside it implies shown;
* the window runs from the token's time of issue and includes its end;
* an event after the window is kept as late and changes no count; so the counts of closed impressions are final;
* of each type one event an impression, the first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["NEW", "EventType", "ImpressionState", "Outcome", "attribute", "closed_before_us", "to_us"]


class EventType(StrEnum):
    SHOWN = "shown"
    CLICKED = "clicked"


class Outcome(StrEnum):
    ACCEPTED = "accepted"
    REPEATED = "repeated"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class ImpressionState:
    """``shown`` and ``clicked`` are what counts; ``recorded`` is every type that was kept, late or not."""

    shown: bool = False
    clicked: bool = False
    recorded: frozenset[EventType] = frozenset()


NEW = ImpressionState()


def attribute(state: ImpressionState, kind: EventType, *, issued_at_us: int, received_at_us: int,
              window_us: int) -> tuple[Outcome, ImpressionState]:  # fmt: skip
    """What becomes of one event, and of its impression."""
    if kind in state.recorded:
        return Outcome.REPEATED, state
    state = replace(state, recorded=state.recorded | {kind})
    if received_at_us - issued_at_us > window_us:
        return Outcome.LATE, state
    return Outcome.ACCEPTED, replace(state, shown=True, clicked=state.clicked or kind is EventType.CLICKED)


def closed_before_us(now_us: int, window_us: int) -> int:
    """Impressions issued before this time are closed at ``now_us``: no event to come can be inside their window."""
    return now_us - window_us


def to_us(seconds: float) -> int:
    """Seconds as whole microseconds."""
    return round(seconds * 1e6)
