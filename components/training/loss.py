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
    states = model.encode(history)[real]
    wanted = target[real]
    temperature = model.config.temperature
    if negatives is None:
        logits = states @ model.item_vectors()[1:].T / temperature
        return functional.cross_entropy(logits, wanted - 1)
    others = states @ model.item_vectors(negatives).T / temperature + math.log(model.n_items / len(negatives))
    aimed = (states * model.item_vectors(wanted)).sum(dim=-1) / temperature
    others = others.masked_fill(negatives[None, :] == wanted[:, None], -torch.inf)
    everything = torch.logaddexp(others.logsumexp(dim=-1), aimed)
    return (everything - aimed).mean()
