"""Trained models between the steps: one ``.npz`` without pickle, so that loading one can run no code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from components.data.storage import read_arrays, write_arrays
from components.models.graph import BlendScorer, ItemKnnScorer, PopularityScorer, TransformerScorer
from components.models.item_knn import ItemKnn, ItemKnnConfig
from components.models.popularity import Popularity
from components.models.transformer import Transformer, TransformerConfig
from endcap.errors import InputError

__all__ = ["BLEND", "ITEM_KNN", "POPULARITY", "TRANSFORMER", "StoredModels", "load_models", "save_models", "scorer"]

POPULARITY, ITEM_KNN, TRANSFORMER, BLEND = "popularity", "item-knn", "transformer", "transformer+item-knn"
"""Names that models are reported under."""


@dataclass(frozen=True)
class StoredModels:
    """What the training step made; ``transformer`` is None where only item-kNN was asked for."""

    popularity: Popularity
    knn: ItemKnn
    transformer: Transformer | None

    @property
    def max_history(self) -> int:
        """Newest purchases that any of the models looks at."""
        own = self.knn.config.max_history
        return max(own, self.transformer.config.max_history) if self.transformer is not None else own


def save_models(path: Path, models: StoredModels) -> None:
    """Write ``models``, whole or not at all."""
    arrays = {
        "popularity": models.popularity.weights,
        "knn_neighbours": models.knn.neighbours,
        "knn_weights": models.knn.weights,
    }
    about: dict[str, object] = {"knn": asdict(models.knn.config), "transformer": None}
    if models.transformer is not None:
        about["transformer"] = asdict(models.transformer.config)
        about["n_items"] = models.transformer.n_items
        arrays |= {f"transformer/{name}": tensor.numpy() for name, tensor in models.transformer.state_dict().items()}
    write_arrays(path, arrays, about)


def load_models(path: Path) -> StoredModels:
    """The inverse of :func:`save_models`; the transformer comes in evaluation mode.

    Raises:
        StateError: missing or damaged.
    """
    arrays, about = read_arrays(path)
    transformer = None
    if about["transformer"] is not None:
        transformer = Transformer(int(about["n_items"]), TransformerConfig(**about["transformer"]))
        weights = {
            name.removeprefix("transformer/"): torch.from_numpy(np.asarray(values))
            for name, values in arrays.items()
            if name.startswith("transformer/")
        }
        transformer.load_state_dict(weights)
        transformer.eval()
    return StoredModels(
        popularity=Popularity(arrays["popularity"]),
        knn=ItemKnn(arrays["knn_neighbours"], arrays["knn_weights"], ItemKnnConfig(**about["knn"])),
        transformer=transformer,
    )


def scorer(models: StoredModels, name: str, knn_share: float = 0.0) -> nn.Module:
    """The module that scores all items as model ``name``.

    Raises:
        InputError: no such model was trained.
    """
    if name == POPULARITY:
        return PopularityScorer(models.popularity)
    if name == ITEM_KNN:
        return ItemKnnScorer(models.knn)
    if models.transformer is not None and name == TRANSFORMER:
        return TransformerScorer(models.transformer)
    if models.transformer is not None and name == BLEND:
        return BlendScorer(TransformerScorer(models.transformer), ItemKnnScorer(models.knn), knn_share)
    raise InputError(f"no model {name!r} was trained")
