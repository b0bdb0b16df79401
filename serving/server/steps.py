"""The recommender's steps, purely: arrays of item numbers in, arrays out. No ids, no requests, no clock.

An item is a number of the catalogue: the graph's 1..n, then popular items that the graph does not know; 0 is padding.
Every filter is one lookup in a table of booleans over all items, so a step costs the same whatever it leaves out.

Diversity is a cap, at most n items of a category: it keeps the order, needs no weight to be tuned, and can be told to
people in one sentence. Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998) trades relevance for distance
and would need distances of items; of topic diversification (Ziegler et al., WWW 2005) the cap is the simplest form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Filter", "Items", "Selection", "Step", "Wanted", "capped", "distinct", "select", "table_of"]

Items = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did. ``added``: items that were not there before. ``skipped``: why it did nothing, or None."""

    name: str
    items_in: int
    items_out: int
    added: int = 0
    skipped: str | None = None

    def to_json(self) -> dict[str, str | int]:
        """``{"step", "in", "out", "added"?, "skipped"?}``."""
        said: dict[str, str | int] = {"step": self.name, "in": self.items_in, "out": self.items_out}
        if self.added:
            said["added"] = self.added
        if self.skipped is not None:
            said["skipped"] = self.skipped
        return said


@dataclass(frozen=True, slots=True)
class Filter:
    """Lets item ``i`` through where ``table[i]`` is ``keeps``; without a table it is skipped, for that reason."""

    name: str
    table: NDArray[np.bool_] | None
    keeps: bool = True
    skipped: str = ""

    def of(self, items: Items) -> NDArray[np.bool_] | None:
        """Which of ``items`` go through; None: all."""
        if self.table is None:
            return None
        return self.table[items] if self.keeps else ~self.table[items]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer may hold.

    Attributes:
        filters: in the order in which they are applied.
        popular: what to fill up from, best first.
        categories: by item, -1 for none; with ``max_per_category`` None they are not looked at.
    """

    k: int
    filters: Sequence[Filter]
    popular: Items
    categories: NDArray[np.int32] | None = None
    max_per_category: int | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """``items``: best first, none twice. ``ranked``: how many of them, the first ones, are the graph's."""

    items: Items
    scores: NDArray[np.float64]
    ranked: int
    steps: list[Step] = field(default_factory=list)


def select(items: Items, scores: NDArray[Any], wanted: Wanted) -> Selection:
    """The graph's ``items`` (best first, with their ``scores``) through all steps, filled up from the popular ones.

    Scores of popular items say their order only: 1, 1/2, 1/3, ... where nothing of the graph's is left, else one less
    each than the last of the graph's.
    """
    steps: list[Step] = []
    for one in wanted.filters:
        before = len(items)
        keep = one.of(items)
        if keep is not None:
            items, scores = items[keep], scores[keep]
            steps.append(Step(one.name, before, len(items)))
        else:
            steps.append(Step(one.name, before, before, skipped=one.skipped))
    if wanted.max_per_category is not None and wanted.categories is not None:
        before = len(items)
        keep = capped(wanted.categories[items], wanted.max_per_category)
        items, scores = items[keep], scores[keep]
        steps.append(Step("diversity", before, len(items)))
    before = len(items)
    items, scores = items[: wanted.k], scores[: wanted.k]
    steps.append(Step("k", before, len(items)))
    ranked = len(items)
    all_scores = scores.astype(np.float64)
    if ranked < wanted.k:
        items = _filled(items, wanted)
        added = len(items) - ranked
        places = np.arange(1, added + 1)
        all_scores = np.concatenate([all_scores, all_scores[-1] - places]) if ranked else 1.0 / places
        steps.append(Step("popular", ranked, len(items), added=added))
    return Selection(items, all_scores, ranked, steps)


def _filled(items: Items, wanted: Wanted) -> Items:
    """``items``, then popular ones that pass the filters, up to k. Looks no further down the list than it must."""
    start, size = 0, 256
    while len(items) < wanted.k and start < len(wanted.popular):
        more = wanted.popular[start : start + size]
        start, size = start + size, 2 * size
        for one in wanted.filters:
            keep = one.of(more)
            if keep is not None:
                more = more[keep]
        items = distinct(np.concatenate([items, more]))
        if wanted.max_per_category is not None and wanted.categories is not None:
            items = items[capped(wanted.categories[items], wanted.max_per_category)]
        items = items[: wanted.k]
    return items


def capped(categories: NDArray[np.int32], limit: int) -> NDArray[np.bool_]:
    """Which places to keep so that no category has more than ``limit``, the first ones staying; -1 is never capped."""
    order = np.argsort(categories, kind="stable")
    ordered = categories[order]
    places = np.arange(len(ordered))
    begins = np.ones(len(ordered), np.bool_)
    begins[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(begins, places, 0))
    keep = np.empty(len(ordered), np.bool_)
    keep[order] = places - first < limit
    keep |= categories < 0
    return keep


def distinct(items: Items) -> Items:
    """Every item once, where it is first."""
    numbers = items.tolist()
    unique = dict.fromkeys(numbers)
    return items if len(unique) == len(numbers) else np.fromiter(unique, np.int64, len(unique))


def table_of(size: int, members: Sequence[int]) -> NDArray[np.bool_]:
    """A table over ``size`` items that is true for ``members``. Costs their number, not ``size``: zeros come free."""
    table = np.zeros(size, np.bool_)
    if members:
        table[members] = True
    return table
