"""What a fault did to shoppers and how long it lasted, measured on the load's own records. Pure.

Definitions (all times in seconds after the injection, requests placed by their *intended* time, so that a
request that had to wait counts for the moment in which its shopper asked):

- *Window*: one second, counted from the injection. It is bad when the share of good events of any answered
  objective (latency included) is below its goal among the requests intended in it. A window without an event says
  nothing, and so neither lengthens nor ends an outage.
- *Outage* of an event (the injection, or its reversal): the bad windows that follow it with never ``steady_s`` of
  windows free of bad ones between two of them, or between the event and the first. Bad windows later than that
  have another cause and are counted as ``other_bad_windows``.
- *Steady again*: the end of the outage's last bad window, once a good window has followed it.
- *RTO* (recovery time objective, here the measured time): from the injection until steady again; 0 when no window
  was bad; None when the drill ended before. *Failback*: the same for the reversal (a lost zone that returns), counted
  from the reversal.
- *Detected*: the first event after the injection in which the target noticed (a replica died or became unhealthy).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from endcap.objectives import Good, Objectives
from endcap.outcomes import good_event
from endcap.records import FaultRecord, RequestRecord, TargetEvent

__all__ = ["DETECTIONS", "STEADY_S", "Recovery", "Span", "held", "measure_recovery", "span_of"]

WINDOW_S = 1.0
STEADY_S = 5.0
DETECTIONS = frozenset({"replica_died", "replica_unhealthy"})


@dataclass(frozen=True, slots=True)
class Span:
    """When a drill ran and when its fault was in force. ``reverted_at_s`` None: it needs no reversal (a kill).

    ``fault_at_s`` None: nothing was injected.
    """

    started_at_s: float
    fault_at_s: float | None
    reverted_at_s: float | None
    ended_at_s: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """Times in seconds after the injection (``failback_s``: after the reversal); None where it did not come to that.

    ``requests`` and ``failed_requests``: those for recommendations intended within the drill.
    ``rto_s`` None: the service was not seen steady again within the drill, or nothing was injected or recorded.
    ``failback_s`` is None also where nothing was reverted.
    """

    requests: int
    failed_requests: int
    first_failure_s: float | None
    detected_s: float | None
    first_good_s: float | None
    rto_s: float | None
    failback_s: float | None
    bad_windows: int
    other_bad_windows: int


@dataclass(frozen=True, slots=True)
class _Outage:
    """Indices of windows. ``recovered`` False: no good window was seen after the last bad one."""

    bad: tuple[int, ...]
    recovered: bool


def span_of(drill: str, faults: Iterable[FaultRecord], *, started_at_s: float, ended_at_s: float) -> Span:
    """The span of a drill from ``faults.jsonl``: its first injection and its last reversal within those times."""
    mine = [one for one in faults if one.drill == drill and started_at_s <= one.at_s <= ended_at_s]
    injected = [one.at_s for one in mine if one.phase == "injected"]
    reverted = [one.at_s for one in mine if one.phase == "reverted"]
    return Span(started_at_s, min(injected, default=None), max(reverted, default=None), ended_at_s)


def measure_recovery(
    objectives: Objectives,
    requests: Iterable[RequestRecord],
    events: Iterable[TargetEvent],
    span: Span,
    *,
    steady_s: float = STEADY_S,
) -> Recovery:
    """Measure one drill. Records from outside its span are left out; their order does not matter."""
    mine = [
        one for one in requests
        if one.kind == "recommend" and span.started_at_s <= one.intended_s <= span.ended_at_s
    ]  # fmt: skip
    mine.sort(key=lambda one: one.intended_s)
    failed = sum(one.failed for one in mine)
    fault_at_s = span.fault_at_s
    if fault_at_s is None:
        return Recovery(len(mine), failed, None, None, None, None, None, 0, 0)

    after = [one for one in mine if one.intended_s >= fault_at_s]
    windows = _judge_windows(objectives, after, fault_at_s)
    steady_windows = max(1, math.ceil(steady_s / WINDOW_S))
    outage = _outage_after(windows, 0, steady_windows)
    reverted = None
    if span.reverted_at_s is not None and span.reverted_at_s >= fault_at_s:
        # Within the reversal's window, what came just before it cannot be told from what it caused.
        reverted = _outage_after(windows, int((span.reverted_at_s - fault_at_s) // WINDOW_S), steady_windows)
    bad = {index for index, good in windows.items() if not good}
    explained = set(outage.bad) | set(reverted.bad if reverted else ())
    first_failure_s = next((one.intended_s for one in after if one.failed), None)
    first_good_s = None
    if first_failure_s is not None:
        first_good_s = next(
            (one.intended_s for one in after if one.intended_s > first_failure_s and not one.failed), None
        )
    return Recovery(
        requests=len(mine),
        failed_requests=failed,
        first_failure_s=_since(first_failure_s, fault_at_s),
        detected_s=_since(_first_detection(events, fault_at_s, span.ended_at_s), fault_at_s),
        first_good_s=_since(first_good_s, fault_at_s),
        rto_s=_length(outage, 0.0) if windows else None,
        failback_s=None if reverted is None or span.reverted_at_s is None or not windows
        else _length(reverted, span.reverted_at_s - fault_at_s),
        bad_windows=len(bad),
        other_bad_windows=len(bad - explained),
    )  # fmt: skip


def held(recovery: Recovery, *, failed_requests_allowed: int | None = None) -> bool:
    """Whether steady state held, or came back within the drill, with no more failures than the drill promises.

    ``failed_requests_allowed`` None: the drill promises nothing about them. No request, or no fault, is not held.
    """
    if recovery.requests == 0 or recovery.rto_s is None:
        return False
    return failed_requests_allowed is None or recovery.failed_requests <= failed_requests_allowed


def _judge_windows(objectives: Objectives, after: Sequence[RequestRecord], fault_at_s: float) -> Mapping[int, bool]:
    """By index of a window since the injection: whether every answered objective was at its goal in it."""
    answered = [one for one in objectives.objectives if one.good is Good.ANSWERED]
    counts: dict[int, list[list[int]]] = {}
    for record in after:
        index = int((record.intended_s - fault_at_s) // WINDOW_S)
        window = counts.setdefault(index, [[0, 0] for _ in answered])
        for tally, objective in zip(window, answered, strict=True):
            good = good_event(objective, record)
            if good is not None:
                tally[0] += good
                tally[1] += 1
    return {
        index: all(total == 0 or good / total >= objective.goal
                   for (good, total), objective in zip(window, answered, strict=True))
        for index, window in counts.items()
    }  # fmt: skip


def _outage_after(windows: Mapping[int, bool], start: int, steady_windows: int) -> _Outage:
    bad: list[int] = []
    border = start
    for index in sorted(windows):
        if index < start or windows[index]:
            continue
        if index - border >= steady_windows:
            break
        bad.append(index)
        border = index + 1
    recovered = not bad or any(good and index > bad[-1] for index, good in windows.items())
    return _Outage(tuple(bad), recovered)


def _length(outage: _Outage, origin_s: float) -> float | None:
    if not outage.recovered:
        return None
    return (outage.bad[-1] + 1) * WINDOW_S - origin_s if outage.bad else 0.0


def _first_detection(events: Iterable[TargetEvent], from_s: float, to_s: float) -> float | None:
    return min((one.at_s for one in events if one.event in DETECTIONS and from_s <= one.at_s <= to_s), default=None)


def _since(at_s: float | None, origin_s: float) -> float | None:
    return None if at_s is None else at_s - origin_s
