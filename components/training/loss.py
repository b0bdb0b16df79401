"""The softmax over all items, or over a sample that stands for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from components.models.transformer import Transformer

__all__ = ["next_item_loss"]


def next_item_loss(model: Transformer, sequences: Tensor, negatives: Tensor | None) -> Tensor:
    """Mean cross-entropy of each item after those before it, in nats.

    Args:
        model: the transformer.
        sequences: ``int64 [b, l]``, left-padded with 0, ``l`` at least 2.
        negatives: ``int64 [n]`` distinct items drawn uniformly, shared by the batch; None: all items. The sampled
            sum is scaled up to all items, so that both losses aim at the same probabilities.
    """
    history, target = sequences[:, :-1], sequences[:, 1:]
    real = history > 0
    wanted = target[real]
    temperature = model.config.temperature
    if negatives is None:
        states = model.encode(history)[real] / temperature
        return functional.cross_entropy(states @ model.item_vectors()[1:].T, wanted - 1)
    # One look-up for all three uses: each look-up of its own would cost a gradient of the whole item table.
    rows = model.items(torch.cat([sequences.flatten(), negatives]))
    vectors = rows[: sequences.numel()].reshape(*sequences.shape, -1)
    states = model.encode_vectors(vectors[:, :-1], history == 0)[real] / temperature
    others = states @ functional.normalize(rows[sequences.numel() :], dim=-1).T
    aimed = (states * functional.normalize(vectors[:, 1:][real], dim=-1)).sum(dim=-1)
    # A target that was drawn does not count against itself.
    place = torch.full((model.n_items + 1,), -1).index_put((negatives,), torch.arange(len(negatives)))[wanted]
    drawn = place >= 0
    others[drawn, place[drawn]] = -torch.inf
    rest = others.logsumexp(dim=-1) + math.log(model.n_items / len(negatives))
    return (torch.logaddexp(rest, aimed) - aimed).mean()
