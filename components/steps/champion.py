"""Compare the candidate with the champion: its own signed package, asked about the same shoppers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from components.data import Dataset, IntArray, LeaveOneOut
from components.evaluation import GateDecision, Paired, Ranked, decide_gate, estimate_difference
from components.export.session import rank_by_graph
from endcap.package import read_items, verify_package
from endcap.registry import CHAMPION, Registry

__all__ = ["compare_with_champion", "rank_by_package"]

METRIC = "ndcg_at_10"


def rank_by_package(label: str, package: Path, public_key: Path, dataset: Dataset, split: LeaveOneOut) -> Ranked:
    """What a package would show the test split's shoppers; item ids are matched through its own item table.

    Items that it does not know are left out of histories, and a target that it does not know is a miss.

    Raises:
        VerificationError: the package does not verify; nothing of it was loaded.
    """
    manifest = verify_package(package, public_key)
    known = {item: index for index, item in enumerate(read_items(package), 1)}
    table = np.array([0, *(known.get(item, 0) for item in dataset.item_ids)], np.int32)
    histories: list[IntArray] = []
    for history in split.histories("test"):
        translated = table[history]
        histories.append(translated[translated > 0])
    targets = np.where(table[split.test_target] > 0, table[split.test_target], -1)
    return rank_by_graph(label, package / manifest.variants["float32"].file, histories, targets,
                         max_history=manifest.max_history)  # fmt: skip


def compare_with_champion(candidate: Ranked, *, registry: Registry, name: str, public_key: Path, dataset: Dataset,
                          split: LeaveOneOut, seed: int) -> GateDecision:  # fmt: skip
    """The gate's decision on the test split, by the paired bootstrap over shoppers.

    Raises:
        RegistryError: the registry cannot be read.
        VerificationError: the champion's package does not verify.
    """
    champion = registry.champion(name)
    if champion is None:
        return decide_gate(candidate.model, None, None)
    label = f"version {champion.version}"
    package = registry.resolve(f"models:/{name}@{CHAMPION}").package
    served = rank_by_package(label, package, public_key, dataset, split)
    _, _, difference = estimate_difference(candidate, served, metric=METRIC, seed=seed)
    paired = Paired(candidate.model, label, METRIC, difference.value, difference.low, difference.high)
    return decide_gate(candidate.model, label, paired)
