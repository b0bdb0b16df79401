"""What a PyTorch model does for every shopper: the target's rank among all items, and the list it would show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from components.evaluation.evaluation import Ranked
from components.evaluation.ranking import ranks_in_scores
from components.models.histories import batches_by_length

__all__ = ["rank_and_list"]


def rank_and_list(model: str, scorer: nn.Module, histories: Sequence[NDArray[np.integer]],
                  targets: NDArray[np.integer], *, top_k: int = 20, rows: int = 256) -> Ranked:  # fmt: skip
    """Score all items for every shopper, the shopper's own history masked.

    Args:
        model: the name it is reported under.
        scorer: ``history int64 [b, l]`` -> ``scores [b, n_items + 1]``.
        histories: what each shopper had bought, oldest first.
        targets: ``[shoppers]``, what each bought next.
    """
    ranks = np.empty(len(histories), np.int64)
    top = np.zeros((len(histories), top_k), np.int32)
    scorer.eval()
    with torch.inference_mode():
        for index, batch in batches_by_length(histories, rows):
            history = torch.from_numpy(batch)
            scores = scorer(history).clone()
            ranks[index] = ranks_in_scores(scores, history, torch.from_numpy(targets[index].astype(np.int64))).numpy()
            best, items = torch.topk(scores, min(top_k, scores.shape[1]), dim=1)
            top[index, : items.shape[1]] = torch.where(torch.isfinite(best), items, 0).numpy()
    return Ranked(model, ranks + 1, top)
