"""Every model is one graph: own history masked, padding never returned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from components.models.graph import (
    BlendScorer,
    ItemKnnScorer,
    PopularityScorer,
    RecommenderGraph,
    TransformerScorer,
)
from components.models.histories import pad_left
from components.models.item_knn import ItemKnnConfig, fit_item_knn
from components.models.popularity import fit_popularity
from components.models.transformer import Transformer, TransformerConfig
from components.models.warm_start import warm_start_vectors

N_ITEMS = 60
TOP_K = 8
MAX_HISTORY = 10


def shop() -> list[NDArray[np.int32]]:
    random = np.random.default_rng(3)
    return [(random.permutation(N_ITEMS)[: random.integers(2, 12)] + 1).astype(np.int32) for _ in range(200)]


def transformer() -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(dimensions=16, blocks=2, max_history=MAX_HISTORY)
    vectors = torch.from_numpy(warm_start_vectors(shop(), N_ITEMS, 16, seed=1))
    model = Transformer(N_ITEMS, config, vectors).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def scorers() -> dict[str, torch.nn.Module]:
    train = shop()
    popularity = fit_popularity(train, N_ITEMS)
    knn = ItemKnnScorer(fit_item_knn(train, N_ITEMS, ItemKnnConfig(neighbours=20, max_history=MAX_HISTORY)), popularity)
    causal = TransformerScorer(transformer())
    return {
        "popularity": PopularityScorer(popularity),
        "item-knn": knn,
        "transformer": causal,
        "blend": BlendScorer(causal, knn, 0.3),
    }


def histories() -> list[NDArray[np.int64]]:
    """Different batches and lengths, longer than the model looks at, of one item, and with padding."""
    train = shop()
    return [pad_left(train[:1]), pad_left(train[:5]), pad_left([np.array([7])]), pad_left([np.arange(1, 31)] * 2)]


@pytest.mark.parametrize("name", ["popularity", "item-knn", "transformer", "blend"])
def test_a_graph_never_returns_padding_or_what_was_bought(name: str) -> None:
    graph = RecommenderGraph(scorers()[name], TOP_K).eval()
    for history in histories():
        with torch.inference_mode():
            items, scores = graph(torch.from_numpy(history))
        assert items.shape == scores.shape == (len(history), TOP_K)
        assert items.dtype == torch.int64 and scores.dtype == torch.float32
        assert (scores.diff(dim=1) <= 0).all()
        for row, recommended in zip(history, items.numpy(), strict=True):
            assert len(set(recommended.tolist())) == TOP_K
            assert not set(recommended.tolist()) & {0, *row.tolist()}


def test_the_blend_is_the_transformer_at_share_0_and_item_knn_at_share_1() -> None:
    parts = scorers()
    history = torch.from_numpy(pad_left(shop()[:6]))
    knn = parts["item-knn"]
    assert isinstance(knn, ItemKnnScorer)
    for share, alone in ((0.0, parts["transformer"]), (1.0, knn)):
        blended = RecommenderGraph(BlendScorer(parts["transformer"], knn, share), TOP_K)(history)[0]
        assert torch.equal(blended, RecommenderGraph(alone, TOP_K)(history)[0])


def test_the_transformer_sees_no_future_and_no_padding() -> None:
    model = transformer()
    history = torch.tensor([[3, 9, 4, 7]])
    with torch.inference_mode():
        states = model.encode(history)
        longer = model.encode(torch.tensor([[3, 9, 4, 7, 50]]))
        padded = model.encode(torch.tensor([[0, 0, 3, 9, 4, 7]]))
        newest = model.encode(history, newest_only=True)
    torch.testing.assert_close(longer[:, :4], states)
    torch.testing.assert_close(padded[:, 2:], states)
    torch.testing.assert_close(newest, states[:, -1:])
    torch.testing.assert_close(states.norm(dim=-1), torch.ones(1, 4))


def test_warm_start_vectors_put_items_bought_together_together() -> None:
    # Two halves of a shop that never mix.
    random = np.random.default_rng(0)
    train = [(random.permutation(10)[:4] + 1 + 10 * (shopper % 2)).astype(np.int32) for shopper in range(300)]
    vectors = warm_start_vectors(train, 22, 8, seed=1)
    assert vectors.dtype == np.float32 and vectors.shape == (23, 8)
    assert not vectors[0].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 1.0, rtol=1e-5)
    cosines = vectors @ vectors.T
    assert cosines[1:11, 1:11].mean() > 0.5 > abs(cosines[1:11, 11:21].mean()) + 0.3
    np.testing.assert_array_equal(vectors, warm_start_vectors(train, 22, 8, seed=1))


def test_warm_start_of_a_shop_where_nothing_was_bought_together_is_random() -> None:
    vectors = warm_start_vectors([np.array([1], dtype=np.int32)], 3, 8, seed=1)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1)[0], 0.0)
    assert np.isfinite(vectors).all() and vectors[1:].any(axis=1).all()
