"""The candidates of the local benchmark: item-kNN models of one shop, better or worse in a way that is known before."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.data import Dataset, IntArray, LeaveOneOut, Shop, Source, leave_one_out, obtain, write_shoppers
from components.export.graph import export_graph
from components.export.session import rank_by_graph
from components.models.graph import ItemKnnScorer, RecommenderGraph
from components.models.item_knn import ItemKnnConfig, fit_item_knn
from components.models.popularity import fit_popularity
from components.packaging import PackageParts, build_package
from components.packaging.defects import Defect, make_defective
from endcap.errors import OutcomeError
from endcap.files import read_json, write_json
from endcap.package import ensure_signing_key
from serving.rollout.state import Outcome

__all__ = ["KINDS", "SEQUENCE", "Kind", "Prepared", "find_old_part", "oldest", "plan", "prepare"]

STABLE = "stable"
OLD_DATA = "old-data"
WORSE_AT_LEAST, WORSE_AT_MOST = 0.235, 0.27
_SYNTHETIC = Shop(shoppers=12_000, items=3_000, loyalty=0.6, taste=0.6)
_STALL_S = 0.4
"""Long enough to be late, short enough that two cores carry a few of them a second."""
_MEASURED_SHOPPERS = 6000
_POPULAR_KEPT = 200

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of candidate and what has to become of it. ``by``: objectives one of which has to have failed.

    ``own_failures``: requests may fail because of what is wrong with it.
    """

    name: str
    about: str
    expected: Outcome
    by: tuple[str, ...] = ()
    own_failures: bool = False


KINDS = {
    kind.name: kind
    for kind in (
        Kind("again", "the same model trained again", Outcome.PROMOTED),
        Kind("other-shoppers", "trained on 95 % of the shoppers, drawn anew", Outcome.PROMOTED),
        Kind("other-settings", "trained with other settings", Outcome.PROMOTED),
        Kind(OLD_DATA, "trained on old data only: about a quarter fewer clicks", Outcome.ROLLED_BACK,
             ("click-through",)),
        Kind("permuted", "item table permuted: fast, healthy and wrong", Outcome.ROLLED_BACK, ("click-through",)),
        Kind("failing", "fails for some of the histories", Outcome.ROLLED_BACK, ("availability",), own_failures=True),
        Kind("stalling", "stalls for some of the histories", Outcome.ROLLED_BACK, ("latency", "availability"),
             own_failures=True),
        Kind("tampered", "one byte changed after signing", Outcome.REFUSED),
    )
}  # fmt: skip

SEQUENCE = (
    "again", OLD_DATA, "tampered", "other-settings", "failing", "other-shoppers", "permuted", OLD_DATA, "stalling",
    "again",
)  # fmt: skip
"""The order of the rollouts; after the last it begins again."""


def plan(rollouts: int) -> tuple[Kind, ...]:
    """What is rolled out, in order."""
    return tuple(KINDS[SEQUENCE[number % len(SEQUENCE)]] for number in range(rollouts))


@dataclass(frozen=True, slots=True)
class Prepared:
    """``packages``: by kind, and stable's. ``hits``: by model, the share of held-out shoppers whose next purchase is
    among the ``k`` items that it answers: the click-through to come, but for clicks that come too late.

    ``old_part``: the oldest part of each shopper's purchases that the model of old data learnt from.
    """

    packages: Mapping[str, Path]
    hits: Mapping[str, float]
    old_part: float
    k: int
    shoppers: Path
    public_key: Path
    data: Mapping[str, Any]


def prepare(folder: Path, *, k: int, seed: int, say: Say) -> Prepared:
    """Get the data and make all packages in ``folder``; what an earlier call made there is taken as it is.

    Raises:
        DataError: data was named and is not there. OutcomeError: no part of the data is old enough.
    """
    path = folder / "prepared.json"
    if path.exists():
        return _from_json(read_json(path), folder)
    got = obtain(Source(shop=_SYNTHETIC, seed=seed))
    dataset, split = got.dataset, leave_one_out(got.dataset)
    source = Path(got.origin).name if not dataset.synthetic and Path(got.origin).exists() else got.origin
    say(f"data: {source}, {len(dataset.sequences):,} shoppers" + (" (SYNTHETIC)" if dataset.synthetic else ""))
    folder.mkdir(parents=True, exist_ok=True)
    write_shoppers(folder / "shoppers.jsonl", dataset)
    maker = _Maker(folder, dataset, split, k, seed)
    stable = maker.make(STABLE, split.train)
    maker.make("again", split.train)
    drawn = np.random.default_rng(seed).random(len(split.train)) < 0.95
    maker.make("other-shoppers", [row for row, kept in zip(split.train, drawn, strict=True) if kept])
    maker.make("other-settings", split.train, ItemKnnConfig(neighbours=150, shrinkage=10.0))
    before = maker.hits[STABLE]
    old_part = find_old_part(lambda part: 1 - maker.make(OLD_DATA, oldest(split.train, part)) / before)
    private_key, public_key = ensure_signing_key(folder / "keys")
    for defect in Defect:
        make_defective(maker.packages[STABLE], folder / defect.value, defect, private_key=private_key,
                       public_key=public_key, seed=seed, stall_s=_STALL_S)  # fmt: skip
        maker.packages[defect.value] = folder / defect.value
    say(f"offline, the next purchase among {k} items: " + ", ".join(f"{n} {h:.1%}" for n, h in maker.hits.items())
        + f"; old data: the oldest {old_part:.0%}, {1 - maker.hits[OLD_DATA] / stable:.0%} worse")  # fmt: skip
    made = Prepared(maker.packages, maker.hits, old_part, k, folder / "shoppers.jsonl", public_key,
                    {**dataset.describe(), "origin": source})  # fmt: skip
    write_json(
        path,
        {
            "packages": sorted(made.packages),
            "hits": made.hits,
            "old_part": old_part,
            "k": k,
            "data": made.data,
        },
    )
    return made


def _from_json(document: Mapping[str, Any], folder: Path) -> Prepared:
    return Prepared(
        {name: folder / name for name in document["packages"]}, document["hits"], document["old_part"], document["k"],
        folder / "shoppers.jsonl", folder / "keys" / "signing.pub", document["data"],
    )  # fmt: skip


def oldest(train: Sequence[IntArray], part: float) -> list[IntArray]:
    """The oldest ``part`` of each shopper's purchases, at least one."""
    return [row[: max(1, int(len(row) * part))] for row in train]


def find_old_part(worse_by: Callable[[float], float]) -> float:
    """The part of the data, oldest first, that makes a model about a quarter worse, by bisection.

    ``worse_by``: how much worse, as a part of stable's own, a model of that part of the data is; the last call is the
    one of the answer.

    Raises:
        OutcomeError: none was found.
    """
    low, high = 0.1, 1.0
    for _ in range(8):
        part = (low + high) / 2
        worse = worse_by(part)
        if WORSE_AT_LEAST <= worse <= WORSE_AT_MOST:
            return part
        low, high = (part, high) if worse > WORSE_AT_MOST else (low, part)
    raise OutcomeError("no part of the data makes a model a quarter worse")


class _Maker:
    """Trains, exports, packages and measures; packages lie in ``folder`` by name."""

    def __init__(self, folder: Path, dataset: Dataset, split: LeaveOneOut, k: int, seed: int) -> None:
        self._folder, self._dataset, self._split, self._k = folder, dataset, split, k
        everybody = split.histories("test")
        count = min(len(everybody), _MEASURED_SHOPPERS)
        rows = np.sort(np.random.default_rng(seed).choice(len(everybody), count, replace=False))
        self._histories, self._targets = [everybody[int(row)] for row in rows], split.test_target[rows]
        self.packages: dict[str, Path] = {}
        self.hits: dict[str, float] = {}

    def make(self, name: str, train: Sequence[IntArray], config: ItemKnnConfig | None = None) -> float:
        """The share of held-out shoppers whose next purchase the model answers."""
        dataset, n_items = self._dataset, self._split.n_items
        knn, popularity = fit_item_knn(train, n_items, config), fit_popularity(train, n_items)
        graph = self._folder / "graph.onnx"
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        export_graph(RecommenderGraph(ItemKnnScorer(knn, popularity), self._k), graph)
        torch.set_num_threads(threads)
        package = self._folder / name
        build_package(
            package,
            PackageParts(
                name="recommender", model="item-knn", float32=graph, int8=None, items=dataset.item_ids,
                popular=[dataset.item_ids[int(index) - 1] for index in popularity.ranking(_POPULAR_KEPT)],
                card=f"# item-kNN\nOf the local rollout benchmark: {name}.\n", top_k=self._k,
                max_history=knn.config.max_history,
                created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                lineage={"synthetic": str(dataset.synthetic).lower(), "data_sha256": dataset.sha256},
            ),
            ensure_signing_key(self._folder / "keys")[0],
        )  # fmt: skip
        ranked = rank_by_graph(name, graph, self._histories, self._targets, max_history=knn.config.max_history)
        self.packages[name] = package
        self.hits[name] = float((ranked.ranks <= self._k).mean())
        return self.hits[name]
