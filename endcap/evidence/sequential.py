"""Always-valid tests on strata of good events out of all events.

The hypotheses are half-planes in (control's share, canary's share), bounded by a line ``canary = slope * control +
offset`` (:class:`Boundary`): worse than control by more than a margin, a relative margin, or worse than a fixed goal.
For one look with ``n_k`` control and ``n_c`` canary events let P* be an alternative chosen before the look and P° its
Kullback-Leibler projection onto the half-plane, weighted by ``n_k`` and ``n_c``. The likelihood ratio P*/P° of the
look is then an e-value: its expectation is ``A(x)^n_k * B(y)^n_c`` with A and B linear in the true shares, so its
logarithm is concave; it is 0 at P°, where its gradient is minus that of the divergence; by P°'s optimality in a convex
set it is at most 0 on all of the set. Products over looks, and averages over alternatives, stay e-processes, and by
Ville's inequality the chance that one ever reaches 1/alpha under its hypothesis is at most alpha, however often and
whenever it is looked at. Each look may have shares of its own, so drift that hits both sides costs no validity.

Sources: Turner, Ly, Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional
stopping", J. Stat. Plan. Inference 230 (2024); Turner, Grünwald, "Exact anytime-valid confidence intervals for
contingency tables and beyond", Stat. Prob. Letters 198 (2023); Howard et al., "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Ann. Stat. 49 (2021). Chosen over the mixture SPRT because it is exact for small
counts (a 5 % canary's first minute) and strata, where the SPRT's normal approximation is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from endcap.evidence.strata import Counts, Stratum

__all__ = ["Boundary", "ConfidenceSequence", "SequentialTest"]

Floats = NDArray[np.float64]

_EPSILON = 1e-6
_LOGIT_STEPS = np.array([0.15, 0.3, 0.6, 1.0, 1.7, 2.6, 4.0])
"""How far beyond the boundary the alternatives lie, in log-odds: from a hint to a catastrophe."""
_BISECTIONS = 32
"""Halvings of (0, 1): the projection is exact to 1e-9, far below what a look of any size can feel."""
_PRIOR_EVENTS = 20.0
"""Weight of the expected share in the running estimate of control's share, in events."""


@dataclass(frozen=True, slots=True)
class Boundary:
    """The line ``canary = slope * control + offset``."""

    slope: float
    offset: float

    @staticmethod
    def margin(margin: float) -> Boundary:
        """Worse than control by ``margin``, an absolute share."""
        return Boundary(1.0, -margin)

    @staticmethod
    def relative_margin(margin: float) -> Boundary:
        """Worse than control by ``margin`` as a part of control's own share."""
        return Boundary(1.0 - margin, 0.0)

    @staticmethod
    def goal(goal: float) -> Boundary:
        """Worse than a fixed share, whatever control does."""
        return Boundary(0.0, goal)

    def at(self, control: float) -> float:
        return self.slope * control + self.offset


@dataclass(frozen=True)
class SequentialTest:
    """An e-process against "canary is on the other side of ``boundary``".

    ``direction`` -1 gathers evidence that canary lies below the boundary, +1 that it lies above.
    ``expected`` is control's share as expected before any data (the objective's goal); it costs no validity.
    Immutable: :meth:`update` returns the test after one more look.
    """

    boundary: Boundary
    direction: int
    expected: float
    log_e: tuple[float, ...] = field(default=(0.0,) * len(_LOGIT_STEPS))
    control: Counts = Counts()
    peak_log_e: float = 0.0

    def update(self, stratum: Stratum) -> SequentialTest:
        control_seen = self.control + stratum.control
        if stratum.canary.total == 0:
            return replace(self, control=control_seen)
        control_alternative = _estimate(self.control, self.expected)
        canary_alternative = _beyond(self.boundary, control_alternative, self.direction)
        increments = _log_likelihood_ratios(
            np.full_like(canary_alternative, control_alternative), canary_alternative,
            np.full_like(canary_alternative, self.boundary.slope),
            np.full_like(canary_alternative, self.boundary.offset),
            stratum,
        )  # fmt: skip
        log_e = np.asarray(self.log_e) + increments
        return replace(
            self,
            log_e=tuple(float(value) for value in log_e),
            control=control_seen,
            peak_log_e=max(self.peak_log_e, _log_mean_exp(log_e)),
        )

    def rejects(self, alpha: float) -> bool:
        """Shown at level ``alpha``; once shown it stays shown (Ville's inequality is about the maximum)."""
        return self.peak_log_e >= -math.log(alpha)


@dataclass(frozen=True)
class ConfidenceSequence:
    """All differences canary - control that the looks so far have not ruled out, valid at every look at once.

    A grid of hypotheses "the difference is d", each with alternatives on both sides (a line is convex too).
    """

    grid: tuple[float, ...]
    expected: float
    log_e: Floats = field(repr=False)
    canary: Counts = Counts()
    control: Counts = Counts()
    ruled_out: NDArray[np.bool_] | None = field(default=None, repr=False)
    alpha: float = 0.05

    @staticmethod
    def start(expected: float, *, alpha: float, reach: float = 0.25, points: int = 61) -> ConfidenceSequence:
        """Differences from ``-reach`` to ``reach``, closer together near zero."""
        half = np.sinh(np.linspace(0, 4, points // 2 + 1)) / np.sinh(4) * reach
        grid = np.concatenate([-half[:0:-1], half])
        return ConfidenceSequence(
            tuple(float(d) for d in grid), expected,
            np.zeros((len(grid), 2 * len(_LOGIT_STEPS))), alpha=alpha,
            ruled_out=np.zeros(len(grid), dtype=np.bool_),
        )  # fmt: skip

    def update(self, stratum: Stratum) -> ConfidenceSequence:
        canary_seen, control_seen = self.canary + stratum.canary, self.control + stratum.control
        if stratum.canary.total == 0 or stratum.control.total == 0:
            return replace(self, canary=canary_seen, control=control_seen)
        control_alternative = _estimate(self.control, self.expected)
        offsets = np.repeat(np.asarray(self.grid)[:, None], 2 * len(_LOGIT_STEPS), axis=1)
        lines = np.clip(control_alternative + offsets, 1e-3, 1 - 1e-3)
        logits = np.log(lines / (1 - lines)) + np.concatenate([-_LOGIT_STEPS, _LOGIT_STEPS])
        alternatives = np.clip(1 / (1 + np.exp(-logits)), _EPSILON, 1 - _EPSILON)
        controls = np.full_like(alternatives, control_alternative)
        increments = _log_likelihood_ratios(controls, alternatives, np.ones_like(offsets), offsets, stratum)
        log_e = self.log_e + increments
        averaged = np.logaddexp.reduce(log_e, axis=1) - math.log(log_e.shape[1])
        before = np.zeros(len(self.grid), dtype=np.bool_) if self.ruled_out is None else self.ruled_out
        return replace(
            self,
            log_e=log_e,
            canary=canary_seen,
            control=control_seen,
            ruled_out=before | (averaged >= -np.log(self.alpha)),
        )

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the greatest difference not ruled out; the whole reach before there is evidence."""
        kept = np.asarray(self.grid) if self.ruled_out is None else np.asarray(self.grid)[~self.ruled_out]
        if len(kept) == 0:  # the difference is beyond the grid's reach: its nearer end is all that can be said
            end = self.grid[0] if (self.canary.share or 0.0) < (self.control.share or 0.0) else self.grid[-1]
            return (end, end)
        return (float(kept[0]), float(kept[-1]))


def _estimate(control: Counts, expected: float) -> float:
    share = (control.good + _PRIOR_EVENTS * expected) / (control.total + _PRIOR_EVENTS)
    return float(np.clip(share, 1e-3, 1 - 1e-3))


def _beyond(boundary: Boundary, control: float, direction: int) -> Floats:
    line = float(np.clip(boundary.at(control), 1e-3, 1 - 1e-3))
    logit = np.log(line / (1 - line)) + direction * _LOGIT_STEPS
    return np.asarray(np.clip(1 / (1 + np.exp(-logit)), _EPSILON, 1 - _EPSILON))


def _log_mean_exp(values: Floats) -> float:
    return float(np.logaddexp.reduce(values)) - math.log(len(values))


def _log_likelihood_ratios(
    control_alternative: Floats, canary_alternative: Floats, slope: Floats, offset: Floats, stratum: Stratum
) -> Floats:
    """Log of P*/P° of one look for arrays of alternatives and lines (all of the same shape)."""
    n_k, n_c = stratum.control.total, stratum.canary.total
    x = _project(control_alternative, canary_alternative, slope, offset, n_k, n_c)
    y = np.clip(slope * x + offset, _EPSILON, 1 - _EPSILON)
    k, c = stratum.control, stratum.canary
    return np.asarray(
        k.good * np.log(control_alternative / x)
        + (k.total - k.good) * np.log((1 - control_alternative) / (1 - x))
        + c.good * np.log(canary_alternative / y)
        + (c.total - c.good) * np.log((1 - canary_alternative) / (1 - y))
    )


def _project(
    control_alternative: Floats, canary_alternative: Floats, slope: Floats, offset: Floats, n_k: int, n_c: int
) -> Floats:
    """Control's share at the weighted Kullback-Leibler projection onto the line, by bisection of a convex function."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(slope > 0, np.maximum(_EPSILON, (_EPSILON - offset) / np.where(slope > 0, slope, 1)), _EPSILON)
        high = np.where(
            slope > 0,
            np.minimum(1 - _EPSILON, (1 - _EPSILON - offset) / np.where(slope > 0, slope, 1)),
            1 - _EPSILON,
        )
    if n_k == 0:
        # Control says nothing in this look: the projection may put it anywhere, so it meets the alternative exactly
        # where the line allows, and for a fixed goal (slope 0) control plays no part at all.
        wanted = np.where(slope > 0, (canary_alternative - offset) / np.where(slope > 0, slope, 1), control_alternative)
        return np.asarray(np.clip(wanted, low, high))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        y = np.clip(slope * middle + offset, _EPSILON, 1 - _EPSILON)
        gradient = n_k * (middle - control_alternative) / (middle * (1 - middle)) + slope * n_c * (
            y - canary_alternative
        ) / (y * (1 - y))
        low = np.where(gradient < 0, middle, low)
        high = np.where(gradient < 0, high, middle)
    return np.asarray((low + high) / 2)
