"""Item vectors from co-occurrence alone, to start the transformer from: three seconds that save most of its epochs.

Positive pointwise mutual information of items bought near each other, factorised by a truncated SVD: Levy and Goldberg,
"Neural word embedding as implicit matrix factorization" (NeurIPS 2014), with their context smoothing of 0.75.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]
import scipy.sparse.linalg  # type: ignore[import-untyped]
from numpy.typing import NDArray

from components.models.item_knn import co_occurrence

__all__ = ["WarmStartConfig", "warm_start_vectors"]


@dataclass(frozen=True)
class WarmStartConfig:
    """How the co-occurrence matrix is made and factorised."""

    distance_power: float = 0.5
    """A pair that is ``d`` purchases apart counts ``d ** -distance_power``."""
    context_smoothing: float = 0.75
    """Power on the context's count, which keeps rare items from looking important."""
    singular_power: float = 0.5
    """Power on the singular values in the vectors."""
    max_history: int = 50
    """Newest purchases of a sequence that are looked at."""


def warm_start_vectors(
    train: Sequence[NDArray[np.integer]],
    n_items: int,
    dimensions: int,
    *,
    seed: int,
    config: WarmStartConfig | None = None,
) -> NDArray[np.float32]:
    """Unit vectors ``float32 [n_items + 1, dimensions]``; items bought together point the same way.

    Row 0 (padding) is zero. Items that co-occur with nothing, and dimensions beyond the matrix' rank, are random.
    """
    config = config or WarmStartConfig()
    random = np.random.default_rng([seed, 0x5EED])
    noise = random.standard_normal((n_items + 1, dimensions))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    table = co_occurrence(
        train, n_items, distance_power=config.distance_power, backward=1.0, max_history=config.max_history
    ).tocoo()
    vectors = np.zeros((n_items + 1, dimensions))
    rank = min(dimensions, n_items - 1)
    if table.nnz and rank >= 1:
        totals = np.asarray(table.sum(axis=1)).ravel()
        context = totals**config.context_smoothing
        information = np.log(table.data * context.sum() / (totals[table.row] * context[table.col]))
        positive = information > 0
        matrix = scipy.sparse.csr_matrix(
            (information[positive], (table.row[positive], table.col[positive])), shape=table.shape
        )
        if matrix.nnz:
            # A start vector of our own: ARPACK's is random, and the same seed must give the same bits.
            start = random.standard_normal(n_items + 1)
            left, singular, _ = scipy.sparse.linalg.svds(matrix, k=rank, v0=start)
            vectors[:, :rank] = left * np.maximum(singular, 0.0) ** config.singular_power
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.where(norms > 1e-6, vectors / np.maximum(norms, 1e-6), noise).astype(np.float32)
    unit[0] = 0.0
    return unit
