"""How much better or worse canary is, for people: always-valid intervals. They decide nothing.

For each difference d of a grid two hypotheses, "canary's good share is control's plus d or more" and "plus d or less",
each tested by the bets of :mod:`endcap.evidence.kernel` at ``alpha / 2``. The interval reaches from the end of the
unbroken run of grid points ruled out from below to that from above, so a true difference between two grid points is
left out only where the next point's own hypothesis, which is then true, was rejected: with a chance of at most
``alpha``, at all looks together (Howard et al. 2021; Turner, Grünwald, Stat. Prob. Letters 198, 2023). The level holds
per objective: all intervals of a rollout together miss with a chance of at most ``alpha`` times their number.

A lift is canary's share as a part of control's, less one; its interval is made in the same way, on the lines
``canary = (1 + lift) * control``.

Two bets a line: one on canary's own running estimate (which closes in), one a fixed step beyond the line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from endcap.evidence.kernel import Bets, BetsState
from endcap.evidence.strata import Stratum, counts_of
from endcap.objectives import Objective, Objectives

__all__ = ["Interval", "Intervals"]

Floats = NDArray[np.float64]

_REACH = 0.25
_LOG_LIFT_REACH = math.log(2)
_POINTS = 61
_STEP, _STEP_WEIGHT = 0.4, 0.3
_PRIOR_EVENTS = 20.0
_RATIO_KEEP = 0.9
_GREATEST_LOG = 300.0
_NONE = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """What was not ruled out, ends included. An end at the reach (±0.25; of a lift, -0.5 and 1) is open."""

    low: float = -_REACH
    high: float = _REACH

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high


class _Lines:
    """The bets of all intervals: a row an objective for its difference, then one an objective for its lift."""

    def __init__(self, objectives: tuple[Objective, ...]) -> None:
        m = len(objectives)
        self.objectives = objectives
        self.goals: Floats = np.array([1 - objective.goal for objective in objectives] * 2)
        self.grids = np.stack([_grid(_REACH)] * m + [np.expm1(_grid(_LOG_LIFT_REACH))] * m)
        # [rows, kinds of bet, sides, points], flattened but for the rows. In bad shares a difference d is the line
        # y = x - d, a lift l is y = (1 + l) x - l.
        constant = np.tile(-self.grids, (1, 4))
        slope = np.ones_like(constant)
        slope[m:] -= constant[m:]
        side = np.tile(np.repeat([1.0, -1.0], _POINTS), (2 * m, 2))
        self.bets = Bets(
            slope, constant, side,
            steps=np.full((2 * m, 2 * _POINTS), _STEP), fractions=np.ones(2 * _POINTS),
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """The intervals of all objectives, of constant size. Immutable; folds over looks."""

    lines: _Lines = field(repr=False)
    alpha: float
    bets: BetsState = field(repr=False)
    seen: Floats = field(repr=False)
    """[4, rows]: canary's bad and all events, control's bad and all events."""
    recent: Floats = field(repr=False)
    """[2, rows]: canary's and control's events, exponentially weighted over about ten looks."""
    ruled_out: NDArray[np.bool_] = field(repr=False)
    """[rows, 2, points]: whether "the difference is at least d" is, and whether "at most d"."""

    @staticmethod
    def start(objectives: Objectives, *, alpha: float) -> Intervals:
        lines = _Lines(objectives.objectives)
        rows = len(lines.goals)
        return Intervals(
            lines, alpha, lines.bets.start((), lines.goals), np.zeros((4, rows)), np.zeros((2, rows)),
            np.zeros((rows, 2, _POINTS), dtype=np.bool_),
        )  # fmt: skip

    def update(self, look: Mapping[str, Stratum]) -> Intervals:
        """The intervals after one more look. Objectives without a stratum saw nothing in it."""
        lines, seen = self.lines, self.seen
        counts = np.tile(counts_of([o.name for o in lines.objectives], look), (1, 2))
        canary_bad, canary_total, control_bad, control_total = counts
        prior = _PRIOR_EVENTS * lines.goals
        recent = self.recent * _RATIO_KEEP + counts[1::2]
        bets = self.bets.copy()
        gain = lines.bets.update(
            bets,
            (seen[2] + prior) / (seen[3] + _PRIOR_EVENTS),
            (seen[0] + prior) / (seen[1] + _PRIOR_EVENTS),
            recent[0] / (recent[1] + _NONE),
            canary_total / (control_total + _NONE),
            (canary_bad, canary_total - canary_bad),
            (control_bad, control_total - control_bad),
        )
        if not (seen[3] > 0).all():
            gain *= (seen[3] > 0)[:, None]  # before anything was seen of control there is nothing to bet on
        bets.log_e += gain
        np.minimum(bets.log_e, _GREATEST_LOG, out=bets.log_e)
        wealth = np.exp(bets.log_e, out=gain)
        half = 2 * _POINTS
        mean = _STEP_WEIGHT * wealth[:, :half] + (1 - _STEP_WEIGHT) * wealth[:, half:]
        ruled_out = self.ruled_out | (mean >= 2 / self.alpha).reshape(self.ruled_out.shape)
        return Intervals(lines, self.alpha, bets, seen + counts, recent, ruled_out)

    def interval_of(self, name: str) -> Interval:
        """Of the difference canary - control in good shares."""
        return self._interval(self._index(name))

    def lift_of(self, name: str) -> float | None:
        """Canary's good share as a part of control's, less one; None where either has none."""
        canary_bad, canary_total, control_bad, control_total = self.seen[:, self._index(name)].tolist()
        if canary_total == 0 or control_total == control_bad:
            return None
        return float((1 - canary_bad / canary_total) / (1 - control_bad / control_total) - 1)

    def lift_interval_of(self, name: str) -> Interval:
        """Of the lift, from -0.5 to 1."""
        return self._interval(len(self.lines.objectives) + self._index(name))

    def _index(self, name: str) -> int:
        return [objective.name for objective in self.lines.objectives].index(name)

    def _interval(self, row: int) -> Interval:
        grid, (at_least, at_most) = self.lines.grids[row], self.ruled_out[row]
        low = grid[max(0, int(np.logical_and.accumulate(at_most).sum()) - 1)]
        high = grid[min(0, 1 - int(np.logical_and.accumulate(at_least[::-1]).sum())) - 1]
        return Interval(float(min(low, high)), float(max(low, high)))


def _grid(reach: float) -> Floats:
    """From ``-reach`` to ``reach``, closer together near zero."""
    half = np.sinh(np.linspace(0, 4, _POINTS // 2 + 1)) / np.sinh(4) * reach
    return np.concatenate([-half[:0:-1], half])
