"""Always-valid tests on strata of good events out of all events.

The hypotheses are half-planes in (control's share, canary's share), bounded by a line ``canary = slope * control +
offset`` (:class:`Boundary`): worse than control by more than a margin, a relative margin, or worse than a fixed goal.
For one look with ``n_k`` control and ``n_c`` canary events let P* be an alternative chosen before the look, outside of
the half-plane, and P° its Kullback-Leibler projection onto the half-plane (so onto its line), weighted by ``n_k`` and
``n_c``. The likelihood ratio P*/P° of the look is then an e-value: its expectation is ``A(x)^n_k * B(y)^n_c`` with A
and B linear in the true shares, so its logarithm is concave; it is 0 at P°, where its gradient is minus that of the
divergence; by P°'s optimality in a convex set it is at most 0 on all of the set. An alternative that lies inside the
half-plane (a margin wider than control's share leaves nothing outside) makes no bet. Products over looks, and averages
over alternatives, stay e-processes, and by Ville's inequality the chance that one ever reaches 1/alpha under its
hypothesis is at most alpha, however often and whenever it is looked at. Each look may have shares of its own, so drift
that hits both sides costs no validity.

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

_EPSILON = 1e-9
_FLOOR = 1e-5
"""Estimates and lines are kept this far from 0 and 1: rarer events than these no rollout sees."""
_LOGIT_STEPS = np.array([0.15, 0.3, 0.6, 1.0, 1.7, 2.6, 4.0])
"""How far beyond the boundary the alternatives lie, in log-odds: from a hint to a catastrophe."""
_BISECTIONS = 40
"""Halvings of (0, 1): the projection is exact to 1e-12, far below what a look of any size can feel."""
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
        boundary, expected_control = self.boundary, _estimate(self.control, self.expected)
        slope, offset = np.full(len(_LOGIT_STEPS), boundary.slope), np.full(len(_LOGIT_STEPS), boundary.offset)
        log_e = np.asarray(self.log_e) + _bets(expected_control, slope, offset, self.direction * _LOGIT_STEPS, stratum)
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
    """Which differences canary - control the looks so far have ruled out, valid at every look at once.

    For each ``d`` of a grid two hypotheses, "the difference is at least d" and "at most d", each tested at
    ``alpha / 2``. The interval reaches from the end of the unbroken run of grid points ruled out from below to that
    from above, so a true difference between two grid points is left out only where the next point's own hypothesis,
    which is then true, was rejected: with a chance of at most ``alpha``.
    """

    grid: Floats = field(repr=False)
    expected: float
    alpha: float
    log_e: Floats = field(repr=False)
    """[2, grid, alternatives]: of "at least d" (alternatives below the line) and of "at most d" (above)."""
    ruled_out: NDArray[np.bool_] = field(repr=False)
    """[2, grid]"""
    control: Counts = Counts()

    @staticmethod
    def start(expected: float, *, alpha: float, reach: float = 0.25, points: int = 61) -> ConfidenceSequence:
        """Differences from ``-reach`` to ``reach``, closer together near zero."""
        half = np.sinh(np.linspace(0, 4, points // 2 + 1)) / np.sinh(4) * reach
        grid = np.concatenate([-half[:0:-1], half])
        return ConfidenceSequence(
            grid, expected, alpha,
            log_e=np.zeros((2, len(grid), len(_LOGIT_STEPS))), ruled_out=np.zeros((2, len(grid)), dtype=np.bool_),
        )  # fmt: skip

    def update(self, stratum: Stratum) -> ConfidenceSequence:
        control_seen = self.control + stratum.control
        if stratum.canary.total == 0 or stratum.control.total == 0:
            return replace(self, control=control_seen)
        offset = np.broadcast_to(self.grid[None, :, None], self.log_e.shape)
        steps = np.stack([-_LOGIT_STEPS, _LOGIT_STEPS])[:, None, :]
        bets = _bets(_estimate(self.control, self.expected), np.ones(self.log_e.shape), offset, steps, stratum)
        log_e = self.log_e + bets
        averaged = np.logaddexp.reduce(log_e, axis=2) - math.log(len(_LOGIT_STEPS))
        ruled_out = self.ruled_out | (averaged >= math.log(2 / self.alpha))
        return replace(self, log_e=log_e, control=control_seen, ruled_out=ruled_out)

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the greatest difference not ruled out, in [-reach, reach]: an end at the reach is open."""
        at_least, at_most = self.ruled_out
        low = self.grid[max(0, int(np.logical_and.accumulate(at_most).sum()) - 1)]
        high = self.grid[min(0, 1 - int(np.logical_and.accumulate(at_least[::-1]).sum())) - 1]
        return (float(min(low, high)), float(max(low, high)))


def _estimate(control: Counts, expected: float) -> float:
    share = (control.good + _PRIOR_EVENTS * expected) / (control.total + _PRIOR_EVENTS)
    return float(np.clip(share, _FLOOR, 1 - _FLOOR))


def _bets(control: float, slope: Floats, offset: Floats, steps: Floats, stratum: Stratum) -> Floats:
    """Log e-values of one look: for each line, alternatives ``steps`` log-odds beyond it, at control's ``control``.

    0 where the alternative is not beyond the line: it lies inside the hypothesis, and the theorem does not hold.
    """
    line = slope * control + offset
    kept = np.clip(line, _FLOOR, 1 - _FLOOR)
    alternatives = np.asarray(1 / (1 + np.exp(-(np.log(kept / (1 - kept)) + steps))))
    beyond = (alternatives - line) * steps > 0
    ratios = _log_likelihood_ratios(np.full_like(alternatives, control), alternatives, slope, offset, stratum)
    return np.where(beyond, ratios, 0.0)


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
