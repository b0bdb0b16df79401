"""How much item-kNN to blend into the transformer: chosen on validation, where the test split is never seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.evaluation.ranking import ndcg_at
from components.models.histories import batches_by_length
from components.steps.stored_models import BLEND, ITEM_KNN, TRANSFORMER, StoredModels, scorer

__all__ = ["SHARES", "ChosenBlend", "choose_blend", "shares_of"]

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
"""Of item-kNN; 0 is the transformer alone and 1 is item-kNN alone."""


@dataclass(frozen=True)
class ChosenBlend:
    """Validation's choice."""

    knn_share: float
    """The best share strictly between 0 and 1: what the blend is reported with."""
    candidate: str
    """The best model of all: the transformer, the blend or item-kNN."""
    valid_ndcg_at_10: dict[float, float]
    """By share."""


def shares_of(logits: Tensor, similar: Tensor) -> tuple[Tensor, Tensor]:
    """Both opinions as shares that sum to one a row, as :class:`~components.models.graph.BlendScorer` mixes them."""
    return torch.softmax(logits, dim=-1), similar / similar.sum(dim=-1, keepdim=True).clamp(min=1e-9)


def choose_blend(models: StoredModels, histories: Sequence[NDArray[np.integer]], targets: NDArray[np.integer], *,
                 seed: int, shoppers: int = 5000) -> ChosenBlend:  # fmt: skip
    """Rank validation's targets under every share of :data:`SHARES`.

    Args:
        shoppers: how many are drawn (by ``seed``) where there are more.
    """
    if models.transformer is None:
        raise ValueError("there is no transformer to blend")
    count = len(histories)
    chosen = np.arange(count)
    if count > shoppers:
        chosen = np.sort(np.random.default_rng(seed).choice(count, shoppers, replace=False))
    picked = [histories[int(row)] for row in chosen]
    wanted = np.asarray(targets)[chosen].astype(np.int64)
    transformer, knn = scorer(models, TRANSFORMER), scorer(models, ITEM_KNN)
    transformer.eval()
    ranks = {share: np.empty(len(picked), np.int64) for share in SHARES}
    with torch.inference_mode():
        for index, batch in batches_by_length(picked, 256):
            history, target = torch.from_numpy(batch), torch.from_numpy(wanted[index])
            opinions = []
            for scores in shares_of(transformer(history), knn(history)):
                # Below every share, which are zero or more: masked once for all mixtures.
                masked = scores.scatter(1, history, -1.0)
                masked[:, 0] = -1.0
                opinions.append(masked)
            for share in SHARES:
                mixed = torch.lerp(opinions[0], opinions[1], share)
                aimed = mixed.gather(1, target[:, None])
                ranks[share][index] = (mixed.shape[1] - 1 - torch.count_nonzero(mixed < aimed, dim=1)).numpy()
    quality = {share: float(ndcg_at(ranks[share], 10).mean()) for share in SHARES}
    best = max(SHARES, key=lambda share: quality[share])
    inner = max((share for share in SHARES if 0.0 < share < 1.0), key=lambda share: quality[share])
    candidate = TRANSFORMER if best == 0.0 else ITEM_KNN if best == 1.0 else BLEND
    return ChosenBlend(inner, candidate, quality)
