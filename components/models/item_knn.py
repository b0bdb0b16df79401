"""Sequential item-kNN: "shoppers who bought this soon after that". What shops have today, and not easy to beat.

Similarity of two items is the cosine of their co-occurrence in shoppers' sequences, where a pair counts less the
further apart it is, and less when read backwards; rare items are shrunk, since one shared shopper proves little. A
shopper's score for an item is the sum over the history of the similarities, newer items counting more.

After Sarwar et al., "Item-based collaborative filtering recommendation algorithms" (WWW 2001) and the sequential
variants in Ludewig and Jannach, "Evaluation of session-based recommendation algorithms" (UMUAI 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]
from numpy.typing import NDArray

__all__ = ["ItemKnn", "ItemKnnConfig", "co_occurrence", "fit_item_knn"]


@dataclass(frozen=True)
class ItemKnnConfig:
    """What counts as similar, and how much of it is kept."""

    neighbours: int = 100
    """Most similar items kept an item."""
    distance_power: float = 1.0
    """A pair that is ``d`` purchases apart counts ``d ** -distance_power``."""
    backward: float = 0.8
    """Weight of the pair (later, earlier) where (earlier, later) has 1."""
    shrinkage: float = 8.0
    """Added to both items' purchase counts in the cosine's denominator."""
    history_decay: float = 0.7
    """Weight of a history's item relative to the next newer one."""
    max_history: int = 50
    """Newest purchases of a sequence that are looked at."""


@dataclass(frozen=True)
class ItemKnn:
    """The fitted table, dense so that one graph can gather and scatter-add it.

    Row ``i`` lists item ``i``'s neighbours, most similar first; rows with fewer are filled with item 0 at weight 0.
    """

    neighbours: NDArray[np.int32]
    """``[n_items + 1, neighbours]`` item indices."""
    weights: NDArray[np.float32]
    """``[n_items + 1, neighbours]``, zero where there is no neighbour."""
    config: ItemKnnConfig

    @property
    def n_items(self) -> int:
        return len(self.neighbours) - 1


def co_occurrence(
    train: Sequence[NDArray[np.integer]],
    n_items: int,
    *,
    distance_power: float,
    backward: float,
    max_history: int,
) -> scipy.sparse.csr_matrix:
    """``[n_items + 1, n_items + 1]``: at (a, b), how often b was bought in the same sequence as a, near pairs more.

    Raises nothing; sequences shorter than two add nothing.
    """
    rows: list[NDArray[np.integer]] = []
    columns: list[NDArray[np.integer]] = []
    values: list[NDArray[np.float64]] = []
    pairs: dict[int, tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]] = {}
    for sequence in train:
        newest = sequence[-max_history:]
        length = len(newest)
        if length < 2:
            continue
        if length not in pairs:
            earlier, later = np.triu_indices(length, 1)
            pairs[length] = (earlier, later, (later - earlier).astype(np.float64) ** -distance_power)
        earlier, later, near = pairs[length]
        rows += [newest[earlier], newest[later]]
        columns += [newest[later], newest[earlier]]
        values += [near, near * backward]
    shape = (n_items + 1, n_items + 1)
    if not rows:
        return scipy.sparse.csr_matrix(shape, dtype=np.float64)
    table = scipy.sparse.coo_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=shape
    ).tocsr()
    table.setdiag(0)
    table.eliminate_zeros()
    return table


def fit_item_knn(train: Sequence[NDArray[np.integer]], n_items: int, config: ItemKnnConfig | None = None) -> ItemKnn:
    """Find each item's neighbours in ``train``."""
    config = config or ItemKnnConfig()
    table = co_occurrence(
        train,
        n_items,
        distance_power=config.distance_power,
        backward=config.backward,
        max_history=config.max_history,
    ).tocoo()
    bought = np.zeros(n_items + 1, dtype=np.float64)
    for sequence in train:
        np.add.at(bought, sequence, 1.0)
    scale = 1.0 / np.sqrt(np.maximum(bought + config.shrinkage, 1e-9))
    similar = scipy.sparse.csr_matrix(
        (table.data * scale[table.row] * scale[table.col], (table.row, table.col)), shape=table.shape
    )
    similar.sort_indices()
    neighbours = np.zeros((n_items + 1, config.neighbours), dtype=np.int32)
    weights = np.zeros((n_items + 1, config.neighbours), dtype=np.float32)
    for item in range(1, n_items + 1):
        begin, end = similar.indptr[item], similar.indptr[item + 1]
        best = np.argsort(-similar.data[begin:end], kind="stable")[: config.neighbours]
        neighbours[item, : len(best)] = similar.indices[begin:end][best]
        weights[item, : len(best)] = similar.data[begin:end][best]
    return ItemKnn(neighbours, weights, config)
