"""Bootstrap intervals over shoppers, the same resamples for every model, so that differences are paired.

The percentile bootstrap of Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. A shopper is
drawn with all that every model did for them, so what makes a shopper hard for all models cancels in a difference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "estimate", "resampled_means", "standard_interval"]


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap interval."""

    value: float
    low: float
    high: float


def resampled_means(values: NDArray[np.float64], weights: NDArray[np.float64] | None = None, *, resamples: int,
                    seed: int) -> NDArray[np.float64]:  # fmt: skip
    """Means of each column over shoppers drawn with replacement.

    Args:
        values: ``[shoppers, columns]``.
        weights: ``[shoppers, columns]`` of 0 and 1: which shoppers count for a column; None for all.
        resamples: how many draws of all shoppers.

    Returns:
        ``[resamples, columns]``; NaN where a draw had no shopper that counts.
    """
    shoppers = len(values)
    random = np.random.default_rng(seed)
    numerators = values if weights is None else values * weights
    means = np.empty((resamples, values.shape[1]))
    chunk = max(1, min(resamples, 4_000_000 // max(shoppers, 1)))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = random.integers(shoppers, size=(rows, shoppers))
        counts = np.stack([np.bincount(draw, minlength=shoppers) for draw in drawn]).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start : start + rows] = counts @ numerators / (shoppers if weights is None else counts @ weights)
    return means


def standard_interval(value: float, draws: NDArray[np.float64], *, z: float = 1.96) -> Estimate:
    """``value`` with its bootstrap standard error to either side (Efron and Tibshirani, chapters 6 and 12; 200 draws
    do). For a count of distinct things, where a resample repeats shoppers and so sees fewer: the percentiles of its
    draws lie below the value that they should surround.
    """
    half = z * float(np.std(draws, ddof=1))
    return Estimate(value, value - half, value + half)


def estimate(value: float, draws: NDArray[np.float64], *, level: float = 0.95) -> Estimate:
    """``value`` with the percentile interval of ``draws [resamples]``; a point where nothing could be drawn."""
    finite = draws[np.isfinite(draws)]
    if len(finite) == 0:
        return Estimate(value, value, value)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(finite, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))
