"""Requests judged on the client's own records: the one reading that load, drills and reports share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endcap.evidence import Counts
from endcap.objectives import Good, Objective, Objectives
from endcap.records import RequestRecord

__all__ = ["ObjectiveOutcome", "exact_percentile", "good_event", "judge_requests"]


def exact_percentile(values: NDArray[np.float64], percent: float) -> float | None:
    """The nearest-rank percentile: the smallest value that at least ``percent`` % of the values do not exceed.

    Always one of the values, never an interpolation. None where there are none.
    """
    if len(values) == 0:
        return None
    rank = max(1, math.ceil(round(len(values) * percent / 100, 9)))
    return float(np.partition(values, rank - 1)[rank - 1])


def good_event(objective: Objective, record: RequestRecord) -> bool | None:
    """Whether a request is a good event of ``objective``; None when it is no event of it at all.

    Answered: every request for recommendations is an event. With ``within_ms`` only answered ones are (as at the
    gateway: availability already counts the others), and their latency runs from the intended send.
    Clicked: every impression is an event. Counted: no client's records tell.
    """
    if record.kind != "recommend" or objective.good is Good.COUNTED:
        return None
    if objective.good is Good.CLICKED:
        return None if record.impression is None else record.clicked
    if objective.within_ms is None:
        return not record.failed
    return None if record.failed else record.latency_s * 1000 <= objective.within_ms


@dataclass(frozen=True, slots=True)
class ObjectiveOutcome:
    """One objective over a set of requests. No event at all is not ``held``: no data is never a pass."""

    name: str
    goal: float
    counts: Counts

    @property
    def held(self) -> bool:
        share = self.counts.share
        return share is not None and share >= self.goal

    def __str__(self) -> str:
        share = self.counts.share
        found = "no data" if share is None else f"{share:.4%} of {self.counts.total} good"
        return f"{self.name}: {found}, goal {self.goal:.4%}: {'held' if self.held else 'broken'}"


def judge_requests(objectives: Objectives, records: Iterable[RequestRecord]) -> tuple[ObjectiveOutcome, ...]:
    """Every objective that the records can tell of, in the order of the objectives file."""
    kept = list(records)
    outcomes = []
    for objective in objectives.objectives:
        if objective.good is Good.COUNTED:
            continue
        events = [good for record in kept if (good := good_event(objective, record)) is not None]
        outcomes.append(ObjectiveOutcome(objective.name, objective.goal, Counts(sum(events), len(events))))
    return tuple(outcomes)
