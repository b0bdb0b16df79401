"""Every model as one graph of the same form: a history in, the best items and their scores out.

What a package serves (``endcap.package``): own history masked and top-k taken inside, so that the server needs to know
nothing of the model. All of these export to ONNX with any batch and length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from components.models.item_knn import ItemKnn
from components.models.popularity import Popularity
from components.models.transformer import Transformer

__all__ = ["BlendScorer", "ItemKnnScorer", "PopularityScorer", "RecommenderGraph", "TransformerScorer"]

_NEVER = -1e9
"""Score of what must not be shown. Finite, so that JSON and every runtime can carry it."""
_TIE_BREAK = 1e-6
"""The most that popularity adds to an item-kNN score: far below any similarity that matters."""


class PopularityScorer(nn.Module):
    """The same scores for everybody."""

    weights: Tensor

    def __init__(self, popularity: Popularity) -> None:
        super().__init__()
        self.register_buffer("weights", torch.from_numpy(popularity.weights.copy()))

    def forward(self, history: Tensor) -> Tensor:
        """``int64 [b, l]`` -> ``float32 [b, n_items + 1]``."""
        nothing = (history[:, :1] * 0).to(self.weights.dtype)
        return nothing + self.weights[None, :]


class ItemKnnScorer(nn.Module):
    """Sum over the history of its items' similarities, newer items counting more.

    Args:
        knn: the fitted table.
        popularity: decides between items of the same score, above all between those similar to nothing, as a shop
            fills up a short list with bestsellers. None: all the same.
    """

    neighbours: Tensor
    weights: Tensor
    popular: Tensor

    def __init__(self, knn: ItemKnn, popularity: Popularity | None = None) -> None:
        super().__init__()
        popular = torch.zeros(knn.n_items + 1)
        if popularity is not None:
            popular = torch.from_numpy(popularity.weights / max(float(popularity.weights.max()), 1e-9)) * _TIE_BREAK
        self.register_buffer("popular", popular)
        self.register_buffer("neighbours", torch.from_numpy(knn.neighbours.copy()))
        self.register_buffer("weights", torch.from_numpy(knn.weights.copy()))
        self.decay = knn.config.history_decay
        self.max_history = knn.config.max_history

    def forward(self, history: Tensor) -> Tensor:
        """``int64 [b, l]`` -> ``float32 [b, n_items + 1]``, (almost) zero where nothing in the history is similar."""
        newest = history[:, -self.max_history :]
        length = newest.shape[1]
        age = length - 1 - torch.arange(length, device=history.device)
        fade = torch.pow(torch.full((), self.decay, device=history.device), age.to(self.weights.dtype))
        # Padding's row has weight 0 throughout, so it adds nothing (to item 0).
        similar = self.weights[newest] * fade[None, :, None]
        where = self.neighbours[newest].to(torch.int64)
        scores = self.popular[None, :] + (history[:, :1] * 0).to(self.weights.dtype)
        return scores.scatter_add(1, where.flatten(1), similar.flatten(1))


class TransformerScorer(nn.Module):
    """The transformer's cosines over its temperature."""

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        # Unit vectors once, instead of at every request.
        self.register_buffer("candidates", transformer.item_vectors().detach().clone())

    candidates: Tensor

    def forward(self, history: Tensor) -> Tensor:
        """``int64 [b, l]`` -> ``float32 [b, n_items + 1]``."""
        newest = history[:, -self.transformer.config.max_history :]
        state = self.transformer.encode(newest, newest_only=True)[:, 0]
        return state @ self.candidates.T / self.transformer.config.temperature


class BlendScorer(nn.Module):
    """A mixture of two opinions on the next purchase: the transformer's probabilities and item-kNN's, as shares.

    ``score = (1 - knn_share) * softmax(transformer) + knn_share * kNN / sum(kNN)``. A shopper whose history is similar
    to nothing gets the transformer's alone.

    Args:
        transformer: any scorer of logits.
        knn: the item-kNN scorer.
        knn_share: between 0 and 1, to be chosen on validation.
    """

    def __init__(self, transformer: nn.Module, knn: ItemKnnScorer, knn_share: float) -> None:
        super().__init__()
        if not 0.0 <= knn_share <= 1.0:
            raise ValueError(f"knn_share must be between 0 and 1, not {knn_share}")
        self.transformer = transformer
        self.knn = knn
        self.knn_share = knn_share

    def forward(self, history: Tensor) -> Tensor:
        """``int64 [b, l]`` -> ``float32 [b, n_items + 1]``, non-negative."""
        likely = torch.softmax(self.transformer(history), dim=-1)
        similar: Tensor = self.knn(history)
        similar = similar / similar.sum(dim=-1, keepdim=True).clamp(min=1e-9)
        return (1.0 - self.knn_share) * likely + self.knn_share * similar


class RecommenderGraph(nn.Module):
    """``history int64 [b, l]`` (left-padded with 0, newest last) -> ``items int64 [b, k]``, ``scores float32 [b, k]``.

    Best first. Padding and the shopper's own history are never among the items while ``n_items`` less the history's
    length is at least ``k``.
    """

    def __init__(self, scorer: nn.Module, top_k: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.top_k = top_k

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scorer(history)
        # Where the history is shorter than the batch its padding masks item 0; a column of zeros masks it for the rest.
        seen = torch.cat([history, history[:, :1] * 0], dim=1)
        scores = scores.scatter(1, seen, torch.full_like(seen, _NEVER, dtype=scores.dtype))
        best, items = torch.topk(scores, self.top_k, dim=1)
        return items, best
