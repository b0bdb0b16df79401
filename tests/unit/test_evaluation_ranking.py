"""Full ranking: history masked, ties against the model, the same whatever the batches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluation.ranking import hit_rate_at, ndcg_at, rank_targets

N_ITEMS = 8


@settings(max_examples=50, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4))
def test_ranks_are_those_of_a_plain_count(data: st.DataObject, rows: int) -> None:
    people = data.draw(st.integers(1, 6))
    scores = np.array(data.draw(st.lists(st.integers(0, 3), min_size=N_ITEMS + 1, max_size=N_ITEMS + 1)))
    histories = [
        np.array(data.draw(st.lists(st.integers(1, N_ITEMS), max_size=5, unique=True)), dtype=np.int32)
        for _ in range(people)
    ]
    targets = np.array([data.draw(st.integers(1, N_ITEMS)) for _ in range(people)], dtype=np.int32)

    def scorer(history: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(scores).float().repeat(len(history), 1)

    ranks = rank_targets(scorer, histories, targets, rows=rows)
    for history, target, rank in zip(histories, targets.tolist(), ranks.tolist(), strict=True):
        if target in history:
            assert rank >= N_ITEMS
            continue
        rivals = [item for item in range(1, N_ITEMS + 1) if item not in history and item != target]
        assert rank == sum(scores[item] >= scores[target] for item in rivals)


def test_scores_that_are_not_numbers_gain_nothing() -> None:
    histories, targets = [np.array([1, 2], dtype=np.int32)] * 2, np.array([3, 4], dtype=np.int32)
    scores = torch.arange(N_ITEMS + 1.0).repeat(2, 1)
    scores[0] = torch.nan
    scores[1, 3] = torch.nan  # a rival's
    ranks = rank_targets(lambda _: scores.clone(), histories, targets)
    assert ranks.tolist() == [N_ITEMS, N_ITEMS - 4 + 1]


def test_metrics_of_ranks() -> None:
    ranks = np.array([0, 1, 9, 10])
    np.testing.assert_allclose(ndcg_at(ranks, 10), [1.0, 1 / np.log2(3), 1 / np.log2(11), 0.0])
    np.testing.assert_allclose(hit_rate_at(ranks, 10), [1, 1, 1, 0])
