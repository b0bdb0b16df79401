"""Requests and attempts folded into equal slices of time, so that a plot's size does not grow with the load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endcap.outcomes import exact_percentile
from endcap.report.run import Attempts, Requests

__all__ = ["MAX_SLICES", "Slices", "fold", "rolling_share"]

MAX_SLICES = 600
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slices:
    """One value a slice; slice ``i`` covers ``start_s + i * width_s`` to ``start_s + (i + 1) * width_s``.

    By version label: ``answered``, ``attempts_failed`` and ``attempts`` (counts), ``shown`` and ``clicked``
    (counts, by when the request was meant to be sent). For all: ``asked``, ``failed`` (counts), ``p50_ms``,
    ``p99_ms`` (NaN in empty slices).
    """

    start_s: float
    width_s: float
    asked: Floats
    failed: Floats
    p50_ms: Floats
    p99_ms: Floats
    answered: dict[str, Floats]
    attempts: dict[str, Floats]
    attempts_failed: dict[str, Floats]
    shown: dict[str, Floats]
    clicked: dict[str, Floats]

    def __len__(self) -> int:
        return len(self.asked)

    @property
    def end_s(self) -> float:
        return self.start_s + self.width_s * len(self)

    @property
    def edges_s(self) -> Floats:
        """Starts of the slices in seconds after the first."""
        edges: Floats = np.arange(len(self), dtype=np.float64) * self.width_s
        return edges

    @property
    def middles_s(self) -> Floats:
        middles: Floats = self.edges_s + self.width_s / 2
        return middles


def fold(requests: Requests, attempts: Attempts | None, versions: Sequence[str]) -> Slices:
    """Fold a run's requests (at least one) into slices of a whole second, or longer for long runs."""
    start = math.floor(float(requests.intended_s[0]))
    length = float(requests.intended_s[-1]) - start
    width = float(max(1, math.ceil((length + 1e-9) / MAX_SLICES)))
    count = int(length // width) + 1
    place = ((requests.intended_s - start) // width).astype(np.int64)

    def tally(where: NDArray[np.int64]) -> Floats:
        return np.bincount(where, minlength=count)[:count].astype(np.float64)

    bounds = np.searchsorted(place, np.arange(count + 1))
    latency_ms = requests.latency_s * 1000
    p50, p99 = np.full(count, np.nan), np.full(count, np.nan)
    for index in range(count):
        part = latency_ms[bounds[index] : bounds[index + 1]]
        if len(part):
            p50[index], p99[index] = exact_percentile(part, 50) or 0.0, exact_percentile(part, 99) or 0.0
    answered, shown, clicked, tried, broken = {}, {}, {}, {}, {}
    if attempts is not None:
        at = ((attempts.at_s - start) // width).astype(np.int64)
        inside = (at >= 0) & (at < count)
    for label in versions:
        mine = requests.version == label
        answered[label] = tally(place[mine & ~requests.failed])
        shown[label] = tally(place[mine & requests.shown])
        clicked[label] = tally(place[mine & requests.shown & requests.clicked])
        if attempts is not None:
            sent = inside & (attempts.version == label)
            tried[label] = tally(at[sent])
            broken[label] = tally(at[sent & attempts.failed])
    return Slices(start, width, tally(place), tally(place[requests.failed]), p50, p99, answered, tried, broken,
                  shown, clicked)  # fmt: skip


def rolling_share(good: Floats, total: Floats, *, slices: int, at_least: int, quiet: int) -> Floats:
    """The share of good events over the last ``slices`` slices.

    NaN where they hold fewer than ``at_least`` events, and where the last ``quiet`` of them hold none: what is said
    of a version ends when its events do.
    """
    part, whole = _last(good, slices), _last(total, slices)
    share = np.full(len(good), np.nan)
    enough = (whole >= max(1, at_least)) & (_last(total, quiet) > 0)
    share[enough] = part[enough] / whole[enough]
    return share


def _last(values: Floats, slices: int) -> Floats:
    """Sums over the last ``slices`` values, up to and with each."""
    summed = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    sums: Floats = summed[ends] - summed[np.maximum(0, ends - slices)]
    return sums
