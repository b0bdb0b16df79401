"""The steps that need PyTorch: train, evaluate, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from components.data import LeaveOneOut
from components.evaluation import Evaluation, Ranked, evaluate, with_measured
from components.evaluation.listing import rank_and_list
from components.export.graph import Parity, check_parity, export_graph
from components.models.graph import RecommenderGraph
from components.models.item_knn import ItemKnnConfig, fit_item_knn
from components.models.popularity import fit_popularity
from components.steps.blend import choose_blend, shares_of
from components.steps.stored_models import BLEND, ITEM_KNN, POPULARITY, TRANSFORMER, StoredModels, scorer
from components.training.config import EpochRecord, TrainingConfig
from components.training.trainer import train_transformer
from endcap.errors import InputError, PackageError

__all__ = [
    "BEST", "TOP_K", "TrainingSummary", "evaluate_models", "export_model", "purchases", "train_models", "use_all_cores",
]  # fmt: skip

BEST = "best"
"""Ask for the best model on validation."""
TOP_K = 20
"""Items a graph lists."""


@dataclass(frozen=True)
class TrainingSummary:
    """The document ``training.json``; all zero where no transformer was trained.

    ``parameters``: how each model was configured, such as ``item-knn.neighbours``.
    """

    seconds: float
    epochs: int
    curve: tuple[EpochRecord, ...]
    stopped_early: bool
    parameters: Mapping[str, object]

    def to_json(self) -> dict[str, object]:
        """The document."""
        return {**asdict(self), "curve": [asdict(record) for record in self.curve]}


def train_models(split: LeaveOneOut, *, candidate: str, seed: int, epochs: int | None, max_seconds: float | None,
                 checkpoint: Path | None = None, on_epoch: Callable[[EpochRecord], None] | None = None,
                 ) -> tuple[StoredModels, TrainingSummary]:  # fmt: skip
    """Fit bestsellers and item-kNN and, where the candidate may need it, the transformer.

    Args:
        candidate: ``best`` or the name of a model.
        epochs: at most; None: as configured.
        max_seconds: of the transformer's training; None: no limit.
        checkpoint: written after every epoch and, where there is one, gone on from.
    """
    if candidate not in (BEST, POPULARITY, ITEM_KNN, TRANSFORMER, BLEND):
        raise InputError(f"no model is called {candidate!r}",
                         next_step=f"known: {', '.join((BEST, POPULARITY, ITEM_KNN, TRANSFORMER, BLEND))}")  # fmt: skip
    popularity = fit_popularity(split.train, split.n_items)
    knn = fit_item_knn(split.train, split.n_items)
    if candidate in (POPULARITY, ITEM_KNN):
        return StoredModels(popularity, knn, None), TrainingSummary(0.0, 0, (), False, _named(ITEM_KNN, knn.config))
    config = TrainingConfig(seed=seed, max_seconds=max_seconds)
    if epochs is not None:
        config = replace(config, epochs=epochs)
    trained = train_transformer(split.train, split.histories("valid"), split.valid_target, split.n_items, config,
                                checkpoint=checkpoint, on_epoch=on_epoch)  # fmt: skip
    parameters = _named(ITEM_KNN, knn.config) | _named(TRANSFORMER, config)
    summary = TrainingSummary(trained.seconds, trained.epochs, trained.curve, trained.stopped_early, parameters)
    return StoredModels(popularity, knn, trained.module), summary


def _named(prefix: str, config: ItemKnnConfig | TrainingConfig) -> dict[str, object]:
    """A configuration's settings by dotted name."""
    found: dict[str, object] = {}
    waiting: list[tuple[str, object]] = [(prefix, asdict(config))]
    for name, value in waiting:
        if isinstance(value, Mapping):
            waiting += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            found[name] = value
    return found


def purchases(train: Sequence[NDArray[np.integer]], n_items: int) -> NDArray[np.int64]:
    """``[n_items + 1]``: how often each item was bought in training."""
    return np.bincount(np.concatenate(list(train)), minlength=n_items + 1)


def evaluate_models(split: LeaveOneOut, models: StoredModels, *, candidate: str, seed: int
                    ) -> tuple[Evaluation, dict[str, Ranked]]:  # fmt: skip
    """All models side by side on the test split; what validation decides (blend, candidate) is decided first."""
    pairs = [(ITEM_KNN, POPULARITY)]
    blend: Mapping[str, float] = {}
    share, chosen = 0.0, candidate
    if models.transformer is not None:
        best = choose_blend(models, split.histories("valid"), split.valid_target, seed=seed)
        share, chosen = best.knn_share, best.candidate if candidate == BEST else candidate
        pairs += [(TRANSFORMER, ITEM_KNN), (BLEND, ITEM_KNN), (BLEND, TRANSFORMER)]
        blend = {"knn_share": share, **{f"valid_ndcg_at_10_at_{s:g}": q for s, q in best.valid_ndcg_at_10.items()}}
    histories = split.histories("test")
    ranked = rank_and_list(_all_scores(models, share), histories, split.test_target, top_k=TOP_K)
    evaluation = evaluate(list(ranked.values()), split="test", histories=histories,
                          purchases=purchases(split.train, split.n_items), pairs=pairs, seed=seed)  # fmt: skip
    return with_measured(evaluation, candidate=chosen, blend=blend), ranked


def _all_scores(models: StoredModels, knn_share: float) -> Callable[[Tensor], dict[str, Tensor]]:
    """The scores of all models; what the blend shares with the others is computed once."""
    popularity, knn = scorer(models, POPULARITY).eval(), scorer(models, ITEM_KNN).eval()
    transformer = scorer(models, TRANSFORMER).eval() if models.transformer is not None else None

    def score(history: Tensor) -> dict[str, Tensor]:
        scores = {POPULARITY: popularity(history), ITEM_KNN: knn(history)}
        if transformer is not None:
            logits = transformer(history)
            scores |= {TRANSFORMER: logits, BLEND: torch.lerp(*shares_of(logits, scores[ITEM_KNN]), knn_share)}
        return scores

    return score


def export_model(models: StoredModels, *, model: str, knn_share: float, path: Path,
                 histories: Sequence[NDArray[np.integer]], seed: int, shoppers: int = 2000) -> Parity:  # fmt: skip
    """Write the candidate's graph to ``path`` and compare it with PyTorch on a sample of shoppers.

    Raises:
        PackageError: it cannot be exported, or does not answer as PyTorch does.
    """
    n_items = models.knn.n_items
    graph = RecommenderGraph(scorer(models, model, knn_share), min(TOP_K, n_items)).eval()
    export_graph(graph, path)
    drawn = np.random.default_rng(seed).permutation(len(histories))[:shoppers]
    longest = models.max_history
    parity = check_parity(graph, path, [histories[int(row)][-longest:] for row in drawn])
    if not parity.holds:
        raise PackageError(
            f"the exported graph answers differently from PyTorch ({parity.identical_share:.1%} identical,"
            f" {parity.tied_share:.1%} tied, scores off by {parity.largest_score_difference:.2g})",
            where=path,
        )
    return parity


def use_all_cores() -> None:
    """As many threads as this process may run on."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
