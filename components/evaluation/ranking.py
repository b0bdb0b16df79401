"""Where each shopper's real next purchase comes among all items: the standard protocol, full ranking, history masked.

Every model is ranked by this one function. Ties go against the model: an item is before the target unless its score
is lower, so a model which scores everything alike gains nothing, and neither does one whose scores are not numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.models.histories import batches_by_length

__all__ = ["Scorer", "hit_rate_at", "ndcg_at", "rank_targets", "ranks_in_scores"]

Scorer = Callable[[Tensor], Tensor] | nn.Module
"""``history int64 [b, l]`` (left-padded with 0) -> ``scores float [b, n_items + 1]``, column 0 being padding."""


def ranks_in_scores(scores: Tensor, history: Tensor, target: Tensor) -> Tensor:
    """The 0-based rank of each row's target among all items that are not in the row's history.

    Args:
        scores: ``float [b, n_items + 1]``; overwritten where masked.
        history: ``int64 [b, l]``, all of it, padded with 0 anywhere.
        target: ``int64 [b]``. A target that is in its own history ranks last.

    Returns:
        ``int64 [b]``.
    """
    scores.scatter_(1, history, -torch.inf)
    scores[:, 0] = -torch.inf
    aimed = scores.gather(1, target[:, None])
    return scores.shape[1] - 1 - (scores < aimed).sum(dim=1)


def rank_targets(
    scorer: Scorer,
    histories: Sequence[NDArray[np.integer]],
    targets: NDArray[np.integer],
    *,
    rows: int = 256,
    longest: int | None = None,
) -> NDArray[np.int64]:
    """Ranks of all ``targets``, 0 being the first place.

    Args:
        scorer: the model; a module is put into evaluation mode for the call.
        histories: what each shopper bought before, oldest first.
        targets: what each bought next, ``[len(histories)]``.
        rows: shoppers scored at once.
        longest: newest items of a history that the model is shown; all are masked. None shows all.

    Returns:
        ``int64 [len(histories)]``, in the order of ``histories``.
    """
    ranks = np.empty(len(histories), dtype=np.int64)
    was_training = isinstance(scorer, nn.Module) and scorer.training
    if isinstance(scorer, nn.Module):
        scorer.eval()
    try:
        with torch.inference_mode():
            for index, batch in batches_by_length(histories, rows):
                history = torch.from_numpy(batch)
                shown = history if longest is None else history[:, -longest:]
                target = torch.from_numpy(targets[index].astype(np.int64))
                ranks[index] = ranks_in_scores(scorer(shown), history, target).numpy()
    finally:
        if isinstance(scorer, nn.Module):
            scorer.train(was_training)
    return ranks


def ndcg_at(ranks: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    """Each shopper's NDCG at ``k`` with one relevant item: ``1 / log2(rank + 2)`` within the first ``k``, else 0."""
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def hit_rate_at(ranks: NDArray[np.integer], k: int) -> NDArray[np.float64]:
    """1 for each shopper whose target is within the first ``k``, else 0."""
    return (ranks < k).astype(np.float64)
