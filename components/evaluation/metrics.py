"""Offline quality of one model on held-out purchases: from the rank of each shopper's target, and from the top ten.

Each shopper has one target, so HR@k is 1 where the target is among the first k, NDCG@k is ``1 / log2(1 + rank)`` there,
MRR@k is ``1 / rank`` there, and all are 0 elsewhere; a model's value is the mean over shoppers. The rank is among all
items but those of the shopper's own history (the standard protocol; sampled rankings mislead: Krichene and Rendle,
"On Sampled Metrics for Item Recommendation", KDD 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CUTOFFS", "METRICS", "catalogue_coverage", "mean_popularity", "per_shopper", "popularity_lift"]

CUTOFFS = (5, 10, 20)
METRICS = tuple(f"{kind}_at_{k}" for kind in ("hr", "ndcg", "mrr") for k in CUTOFFS)
"""Columns of :func:`per_shopper`, in order."""


def per_shopper(ranks: NDArray[np.integer]) -> NDArray[np.float64]:
    """``ranks [shoppers]`` (1 is best; anything beyond 20 may be any larger number) -> ``[shoppers, len(METRICS)]``.

    Raises:
        ValueError: a rank below 1.
    """
    best = ranks.astype(np.float64)
    if len(best) and best.min() < 1:
        raise ValueError("ranks count from 1")
    gains = {"hr": np.ones_like(best), "ndcg": 1.0 / np.log2(1.0 + best), "mrr": 1.0 / best}
    return np.stack([np.where(best <= k, gains[kind], 0.0) for kind in ("hr", "ndcg", "mrr") for k in CUTOFFS], axis=1)


def catalogue_coverage(top: NDArray[np.integer], n_items: int) -> float:
    """Share of the catalogue that is in at least one shopper's list ``top [shoppers, k]`` (0 is padding).

    Ge, Delgado-Battenfeld and Jannach, "Beyond Accuracy: Evaluating Recommender Systems by Coverage and Serendipity",
    RecSys 2010.
    """
    shown = np.zeros(n_items + 1, np.bool_)
    shown[top] = True
    return float(np.count_nonzero(shown[1:]) / n_items)


def popularity_lift(shown: float, owned: float) -> float:
    """How much more popular than their own purchases the items are that shoppers are shown.

    Both are the mean popularity of a list's items (a history's), averaged over shoppers (:func:`mean_popularity`); the
    lift is ``(shown - owned) / owned``. 0 is no bias, 1 is twice as popular, below 0 is less popular. This is the group
    average popularity's change of Abdollahpouri et al., "The Unfairness of Popularity Bias in Recommendation" (RMSE
    workshop at RecSys 2019), over all shoppers as one group.
    """
    return (shown - owned) / owned if owned > 0 else 0.0


def mean_popularity(top: NDArray[np.integer], histories: Sequence[NDArray[np.integer]],
                    purchases: NDArray[np.number]) -> NDArray[np.float64]:  # fmt: skip
    """``[shoppers, 2]``: the mean popularity of what each shopper is shown, and of what each had bought.

    Args:
        top: ``[shoppers, k]``, 0 where a list is shorter.
        histories: what each shopper had bought, none of it empty.
        purchases: ``[n_items + 1]``, how often each item was bought in training, 0 for padding.
    """
    popularity = purchases.astype(np.float64)
    popularity[0] = 0.0
    shown = popularity[top].sum(axis=1) / np.maximum(np.count_nonzero(top, axis=1), 1)
    lengths = np.array([len(history) for history in histories], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    owned = np.add.reduceat(popularity[np.concatenate(list(histories))], starts) / lengths
    return np.stack([shown, owned], axis=1)
