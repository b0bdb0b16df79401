"""From a rollout's raw records to its figures: whose failures were whose, what was set and what came. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rollout.local_packages import Kind
from endcap.evidence import Verdict
from endcap.records import RequestRecord, TargetEvent

__all__ = [
    "Failures",
    "Span",
    "failing_objectives",
    "is_right",
    "samples",
    "share_spans",
    "shares_seen",
    "whose_failures",
]


@dataclass(frozen=True, slots=True)
class Span:
    """Unix time."""

    begin_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed requests. ``engine``: by the engine's doing; ``tried``: the candidate was asked and has such a defect;
    ``beside``: answered by others while such a candidate had a share of the requests and of the processors.
    """

    engine: int = 0
    tried: int = 0
    beside: int = 0


def whose_failures(
    kind: Kind, failed: Iterable[RequestRecord], tried: Collection[str], shares: Sequence[Span]
) -> Failures:  # fmt: skip
    """Tell failed requests of a rollout apart.

    With a candidate that neither fails nor stalls every failure is the engine's doing. With one that does, a failure is
    the candidate's own where it was asked (``tried`` holds the requests' ids) or where it had a share at any moment
    between the request's sending and its end (``shares``); all others are the engine's.
    """
    engine = own = beside = 0
    for record in failed:
        if not kind.own_failures:
            engine += 1
        elif record.request_id in tried:
            own += 1
        elif any(span.begin_s <= record.done_s and record.sent_s <= span.end_s for span in shares):
            beside += 1
        else:
            engine += 1
    return Failures(engine, own, beside)


def share_spans(events: Iterable[TargetEvent], label: str, *, until_s: float) -> list[Span]:
    """When version ``label`` had a share, by the target's own events in the order of time."""
    found: list[Span] = []
    since_s: float | None = None
    for event in events:
        if event.event != "shares_set":
            continue
        has = any(
            name == label and share != "0%"
            for name, _, share in (part.rpartition("=") for part in (event.detail or "").split())
        )
        if has and since_s is None:
            since_s = event.at_s
        elif not has and since_s is not None:
            found.append(Span(since_s, event.at_s))
            since_s = None
    return found if since_s is None else [*found, Span(since_s, until_s)]


def is_right(kind: Kind, outcome: str, failing: Collection[str]) -> bool:
    """Whether the rollout ended as it had to; where it had to be rolled back, also for what is wrong with it.

    ``failing``: the objectives that were shown to fail.
    """
    return outcome == kind.expected.value and (not kind.by or not set(kind.by).isdisjoint(failing))


def samples(last: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By objective, what a decision stood on: events of canary and of control, their shares, the verdict."""
    return {
        name: {
            "canary": seen["canary"]["total"], "control": seen["control"]["total"],
            "canary_share": _share(seen["canary"]), "control_share": _share(seen["control"]),
            "verdict": seen["verdict"],
        }
        for name, seen in last["evidence"].items()
    }  # fmt: skip


def failing_objectives(last: Mapping[str, Any]) -> list[str]:
    """The objectives that a decision found to fail."""
    return [name for name, seen in last["evidence"].items() if seen["verdict"] == Verdict.FAIL]


def shares_seen(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, float | int]]:
    """Of each step, in order: the share that was set, and canary's part of the requests that came while it was."""
    found: list[dict[str, float | int]] = []
    step: tuple[int, float] | None = None
    begin: Mapping[str, int] = {}
    latest = begin
    for line in lines:
        received = (line["event"] or {}).get("received")
        if received is None:
            continue
        if step is not None:
            latest = received
        watched = line["phase"] in ("observing", "holding")
        if step is not None and (not watched or line["step"] != step[0]):
            found.append(_seen(step, begin, latest))
            step = None
        if watched and step is None:
            step, begin, latest = (line["step"], line["share"]), received, received
    return found if step is None else [*found, _seen(step, begin, latest)]


def _seen(step: tuple[int, float], begin: Mapping[str, int], end: Mapping[str, int]) -> dict[str, float | int]:
    requests = end["requests"] - begin["requests"]
    canary = end["canary_requests"] - begin["canary_requests"]
    return {"step": step[0], "set": step[1], "seen": canary / max(requests, 1), "requests": requests}


def _share(counts: Mapping[str, int]) -> float | None:
    return counts["good"] / counts["total"] if counts["total"] else None
