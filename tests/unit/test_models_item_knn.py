"""Item-kNN and popularity do what their descriptions say, by brute force."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.models.graph import ItemKnnScorer
from components.models.histories import batches_by_length, pad_left
from components.models.item_knn import ItemKnnConfig, fit_item_knn
from components.models.popularity import PopularityConfig, fit_popularity

N_ITEMS = 9
sequences = st.lists(
    st.lists(st.integers(1, N_ITEMS), min_size=0, max_size=7, unique=True).map(lambda s: np.array(s, dtype=np.int32)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(train=sequences, history=st.lists(st.integers(1, N_ITEMS), min_size=1, max_size=6, unique=True))
def test_scores_are_the_sum_of_decayed_cosines(train: list[np.ndarray], history: list[int]) -> None:
    config = ItemKnnConfig(neighbours=N_ITEMS, distance_power=0.5, backward=0.6, shrinkage=2.0, history_decay=0.7)
    together: Counter[tuple[int, int]] = Counter()
    bought: Counter[int] = Counter()
    for sequence in train:
        bought.update(sequence.tolist())
        for i, earlier in enumerate(sequence.tolist()):
            for j, later in enumerate(sequence.tolist()[i + 1 :], i + 1):
                together[earlier, later] += (j - i) ** -0.5
                together[later, earlier] += 0.6 * (j - i) ** -0.5
    expected = np.zeros(N_ITEMS + 1)
    for age, item in enumerate(reversed(history)):
        for other in range(1, N_ITEMS + 1):
            cosine = together[item, other] / np.sqrt((bought[item] + 2.0) * (bought[other] + 2.0))
            expected[other] += 0.7**age * cosine
    scorer = ItemKnnScorer(fit_item_knn(train, N_ITEMS, config))
    # Padding before the history changes nothing.
    for length in (len(history), len(history) + 3):
        scores = scorer(torch.from_numpy(pad_left([np.array(history)], length)))
        np.testing.assert_allclose(scores[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_only_the_most_similar_neighbours_are_kept() -> None:
    train = [np.array([1, 2, 3, 4], dtype=np.int32), np.array([1, 2], dtype=np.int32), np.array([1, 3], dtype=np.int32)]
    full = fit_item_knn(train, 4, ItemKnnConfig(neighbours=4))
    two = fit_item_knn(train, 4, ItemKnnConfig(neighbours=2))
    assert two.neighbours.shape == two.weights.shape == (5, 2)
    np.testing.assert_array_equal(two.neighbours, full.neighbours[:, :2])
    assert (np.diff(full.weights, axis=1) <= 0).all()


def test_popularity_decides_between_items_of_the_same_score() -> None:
    train = [np.array([1, 2], dtype=np.int32), *[np.array([5, 4], dtype=np.int32)] * 3]
    scorer = ItemKnnScorer(fit_item_knn(train, 5), fit_popularity(train, 5))
    order = torch.argsort(scorer(torch.tensor([[1]]))[0], descending=True).tolist()
    assert order[:3] == [2, 4, 5]


def test_newer_purchases_make_an_item_more_popular() -> None:
    train = [np.array([1, 2], dtype=np.int32), np.array([3, 2, 1], dtype=np.int32)]
    popularity = fit_popularity(train, 4, PopularityConfig(decay=0.5))
    np.testing.assert_allclose(popularity.weights, [0, 0.5 + 1, 1 + 0.5, 0.25, 0])
    assert popularity.ranking(3).tolist() == [1, 2, 3]


@given(sequences, st.integers(1, 4), st.none() | st.integers(1, 5))
def test_batches_by_length_cover_every_history_once(
    histories: list[np.ndarray],
    rows: int,
    longest: int | None,
) -> None:
    seen: list[int] = []
    for index, batch in batches_by_length(histories, rows, longest=longest):
        assert len(index) <= rows
        seen += index.tolist()
        for row, history in zip(index, batch, strict=True):
            newest = histories[row][-longest:] if longest else histories[row]
            assert history[history > 0].tolist() == newest.tolist()
            assert (history[: len(history) - len(newest)] == 0).all()
    assert sorted(seen) == list(range(len(histories)))


def test_padding_keeps_the_newest() -> None:
    batch = pad_left([np.array([1, 2, 3]), np.array([4]), np.array([], dtype=np.int32)], 2)
    assert batch.tolist() == [[2, 3], [0, 4], [0, 0]]
    assert pad_left([], None).shape == (0, 1)
