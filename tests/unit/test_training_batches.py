"""Batches cover every sequence; the sampled softmax is the full one when everything is drawn."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.models.transformer import Transformer, TransformerConfig
from components.training.batches import epoch_batches
from components.training.loss import next_item_loss


@given(lengths=st.lists(st.integers(0, 60), max_size=60), tokens=st.integers(1, 200), seed=st.integers(0, 5))
def test_batches_hold_every_usable_sequence_once_and_no_more_than_asked(
    lengths: list[int], tokens: int, seed: int
) -> None:
    array = np.array(lengths, dtype=np.int64)
    batches = epoch_batches(array, tokens, np.random.default_rng(seed))
    assert sorted(int(row) for batch in batches for row in batch) == [row for row, n in enumerate(lengths) if n >= 2]
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (array[batch].max() - 1) <= tokens
    again = epoch_batches(array, tokens, np.random.default_rng(seed))
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


def test_the_sampled_softmax_over_all_items_is_the_full_softmax() -> None:
    torch.manual_seed(0)
    model = Transformer(12, TransformerConfig(dimensions=8, dropout=0.0, item_dropout=0.0))
    sequences = torch.tensor([[0, 0, 3, 5, 9], [1, 2, 3, 4, 12]])
    sampled = next_item_loss(model, sequences, torch.randperm(12) + 1)
    full = next_item_loss(model, sequences, None)
    torch.testing.assert_close(sampled, full)
    # Both pull the same way.
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (sampled, full)]
    for left, right in zip(*gradients, strict=True):
        if left is not None and right is not None:
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5)
