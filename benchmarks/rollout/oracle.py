"""What a test that knew everything would need: the yardsticks for detection.

Wald's likelihood ratio test of one simple alternative against one simple hypothesis is the fastest sequential test of
its error (Wald, Wolfowitz, Ann. Math. Stat. 19, 1948). The oracle is told both versions' true shares: the alternative
is the truth, and the hypothesis "canary is no worse than control by more than the margin" is represented by its point
that is hardest to tell from the truth, the Kullback-Leibler projection under the traffic's allocation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.rollout.traffic import Seen

__all__ = ["Crossings", "LogRatio", "one_sample", "two_samples"]

_HALVINGS = 200


@dataclass(frozen=True, slots=True)
class LogRatio:
    """What each event adds to the logarithm of the likelihood ratio."""

    canary_bad: float
    canary_good: float
    control_bad: float = 0.0
    control_good: float = 0.0


def two_samples(control: float, canary: float, *, slope: float, constant: float, share: float) -> LogRatio:
    """Bad shares ``control`` and ``canary`` against "canary <= slope * control + constant"; canary gets ``share``."""

    def gradient(x: float) -> float:
        y = slope * x + constant
        return (1 - share) * (x - control) / (x * (1 - x)) + share * slope * (y - canary) / (y * (1 - y))

    low, high = 1e-12, min(1.0, (1 - constant) / slope) - 1e-12
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(middle) < 0 else (low, middle)
    x = (low + high) / 2
    return LogRatio(*_pair(canary, slope * x + constant), *_pair(control, x))


def one_sample(canary: float, hypothesis: float) -> LogRatio:
    """Wald's sequential probability ratio test of canary alone, control's share being known: no control is drawn."""
    return LogRatio(*_pair(canary, hypothesis))


def _pair(truth: float, hypothesis: float) -> tuple[float, float]:
    return math.log(truth / hypothesis), math.log((1 - truth) / (1 - hypothesis))


class Crossings:
    """At how many canary events each test of some first reaches 1/alpha, in every run. A watcher.

    ``column``: the objective that the tests are about.
    """

    def __init__(self, tests: Mapping[str, LogRatio], *, column: int, runs: int, alpha: float) -> None:
        self._names = tuple(tests)
        self._column, self._threshold = column, -math.log(alpha)
        fields = ("canary_bad", "canary_good", "control_bad", "control_good")
        self._weights = np.array([[getattr(test, name) for name in fields] for test in tests.values()])
        self._sums = np.zeros((runs, len(tests)))
        self._events = np.zeros(runs)
        self._samples = np.full((runs, len(tests)), np.inf)

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None:
        column = self._column
        canary_bad, control_bad = seen.canary_bad[:, column], seen.control_bad[:, column]
        canary, control = seen.canary_total[:, column], seen.control_total[:, column]
        counts = np.stack([canary_bad, canary - canary_bad, control_bad, control - control_bad], axis=1)
        self._sums[runs] += counts @ self._weights.T
        self._events[runs] += canary
        crossed = (self._sums[runs] >= self._threshold) & np.isinf(self._samples[runs])
        events = np.broadcast_to(self._events[runs][:, None], crossed.shape)
        self._samples[runs] = np.where(crossed, events, self._samples[runs])

    def samples(self, name: str) -> NDArray[np.float64]:
        """Canary events of each run until that test reached its level; infinite where it did not."""
        return np.asarray(self._samples[:, self._names.index(name)])
