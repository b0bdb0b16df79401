"""Leave-one-out: of each sequence the last purchase is the test target and the one before it validation's.

The standard protocol of sequential recommendation (Kang and McAuley, "Self-Attentive Sequential Recommendation",
ICDM 2018): validation sees the training part, the test sees the training part and the validation target.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from components.data.dataset import Dataset, flatten, unflatten
from components.data.storage import read_arrays, write_arrays
from endcap.files import write_atomic

__all__ = ["IntArray", "LeaveOneOut", "leave_one_out", "load_split", "save_split", "write_shoppers"]

IntArray: TypeAlias = NDArray[np.int32]
"""Item numbers: 1..n_items, 0 for padding."""


@dataclass(frozen=True)
class LeaveOneOut:
    """A split shop; row ``u`` of everything is the same shopper.

    Attributes:
        n_items: items are 1..n_items.
        train: for each shopper all purchases but the last two, oldest first (at least one).
        valid_target: int32 [shoppers], the last but one purchase.
        test_target: int32 [shoppers], the last purchase.
    """

    n_items: int
    train: tuple[IntArray, ...]
    valid_target: IntArray
    test_target: IntArray

    def histories(self, split: Literal["valid", "test"]) -> tuple[IntArray, ...]:
        """What a model may see before it is asked for the target of ``split``."""
        if split == "valid":
            return self.train
        return tuple(np.append(row, item) for row, item in zip(self.train, self.valid_target, strict=True))

    def targets(self, split: Literal["valid", "test"]) -> IntArray:
        """int32 [shoppers], the purchase to be found."""
        return self.valid_target if split == "valid" else self.test_target


def leave_one_out(dataset: Dataset) -> LeaveOneOut:
    """Split ``dataset``; each of its sequences has at least three purchases."""
    sequences = dataset.sequences
    return LeaveOneOut(
        n_items=dataset.n_items,
        train=tuple(sequence[:-2] for sequence in sequences),
        valid_target=np.array([sequence[-2] for sequence in sequences], np.int32),
        test_target=np.array([sequence[-1] for sequence in sequences], np.int32),
    )


def save_split(path: Path, split: LeaveOneOut) -> None:
    """Write ``split`` to one ``.npz`` file, whole or not at all."""
    flat, offsets = flatten(split.train)
    write_arrays(
        path,
        {"items": flat, "offsets": offsets, "valid": split.valid_target, "test": split.test_target},
        {"n_items": split.n_items},
    )


def load_split(path: Path) -> LeaveOneOut:
    """The inverse of :func:`save_split`.

    Raises:
        StateError: missing or damaged.
    """
    arrays, about = read_arrays(path)
    return LeaveOneOut(
        n_items=int(about["n_items"]),
        train=unflatten(arrays["items"], arrays["offsets"]),
        valid_target=arrays["valid"],
        test_target=arrays["test"],
    )


def write_shoppers(path: Path, dataset: Dataset) -> None:
    """Write the shoppers that the load test replays, JSON lines of ``{"shopper", "history", "next"}``.

    The history is all but the last purchase and ``next`` is the last (the test split), by external ids.
    """
    ids = ("", *dataset.item_ids)
    lines = []
    for shopper, sequence in zip(dataset.shopper_ids, dataset.sequences, strict=True):
        *history, following = [ids[item] for item in sequence.tolist()]
        lines.append(json.dumps({"shopper": shopper, "history": history, "next": following}))
    write_atomic(path, "\n".join(lines) + "\n")
