"""What PyTorch models do for every shopper: the target's rank among all items, and the list they would show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluation.evaluation import Ranked
from components.evaluation.ranking import ranks_in_scores
from components.models.histories import batches_by_length

__all__ = ["rank_and_list"]


def rank_and_list(score: Callable[[Tensor], Mapping[str, Tensor]], histories: Sequence[NDArray[np.integer]],
                  targets: NDArray[np.integer], *, top_k: int = 20, rows: int = 256) -> dict[str, Ranked]:  # fmt: skip
    """Score all items for every shopper in one pass, the shopper's own history masked.

    Args:
        score: ``history int64 [b, l]`` -> ``scores [b, n_items + 1]`` by model name, the same models each time.
        histories: what each shopper had bought, oldest first.
        targets: ``[shoppers]``, what each bought next.
    """
    ranks: dict[str, NDArray[np.int64]] = {}
    top: dict[str, NDArray[np.int32]] = {}
    with torch.inference_mode():
        for index, batch in batches_by_length(histories, rows):
            history, target = torch.from_numpy(batch), torch.from_numpy(targets[index].astype(np.int64))
            for model, scores in score(history).items():
                if model not in ranks:
                    ranks[model] = np.empty(len(histories), np.int64)
                    top[model] = np.zeros((len(histories), top_k), np.int32)
                ranks[model][index] = ranks_in_scores(scores, history, target).numpy()
                best, items = torch.topk(scores, min(top_k, scores.shape[1]), dim=1)
                top[model][index, : items.shape[1]] = torch.where(torch.isfinite(best), items, 0).numpy()
    return {model: Ranked(model, ranks[model] + 1, top[model]) for model in ranks}
