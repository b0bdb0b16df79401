"""Recent bestsellers: the simplest thing a shop can show, and its fallback for a shopper it knows nothing of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Popularity", "PopularityConfig", "fit_popularity"]


@dataclass(frozen=True)
class PopularityConfig:
    """How purchases are counted."""

    decay: float = 0.9
    """Weight of a purchase relative to the same shopper's next one; 1 counts all alike. Sequences carry no dates, so
    the place from the end of a shopper's own sequence is what there is of recency."""


@dataclass(frozen=True)
class Popularity:
    """How much each item sells: ``weights`` is ``float32 [n_items + 1]``, 0 for padding."""

    weights: NDArray[np.float32]

    def ranking(self, count: int) -> NDArray[np.int64]:
        """The ``count`` most popular item indices, best first; ties go to the lower index."""
        order = np.argsort(-self.weights[1:], kind="stable")[:count]
        return (order + 1).astype(np.int64)


def fit_popularity(
    train: Sequence[NDArray[np.integer]], n_items: int, config: PopularityConfig | None = None
) -> Popularity:
    """Count ``train``'s purchases, newer ones more."""
    config = config or PopularityConfig()
    totals = np.zeros(n_items + 1, dtype=np.float64)
    for sequence in train:
        ages = np.arange(len(sequence) - 1, -1, -1, dtype=np.float64)
        np.add.at(totals, sequence, config.decay**ages)
    totals[0] = 0.0
    return Popularity(totals.astype(np.float32))
