"""A synthetic shop: purchase sequences with an order that can be learnt, for where no real data can be had.

Each item has a group (what it is for) and a style. A shopper has one taste in styles and mostly buys what follows
the last purchase (a fixed chain of groups) in that style, the more popular items first; some purchases are whatever
sells best. So co-purchases tell much (item-kNN), and order and taste together tell more (a transformer).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from components.data.dataset import Dataset, parse_sequences

__all__ = ["Shop", "synthetic_dataset", "synthetic_lines"]


@dataclass(frozen=True)
class Shop:
    """Size and habits of a synthetic shop."""

    shoppers: int = 2000
    items: int = 800
    groups: int = 40
    styles: int = 4
    mean_length: float = 9.0
    """Purchases a shopper, at least five (as in 5-core data) and at most fifty."""
    loyalty: float = 0.8
    """Share of purchases that follow the last one; the others are bestsellers."""
    taste: float = 0.8
    """Share of those that are in the shopper's own style."""
    skew: float = 0.8
    """Exponent of the popularity of items (Zipf)."""

    def __post_init__(self) -> None:
        if self.shoppers < 1 or self.items < 60:
            raise ValueError("a synthetic shop has at least one shopper and sixty items")


def synthetic_lines(shop: Shop, seed: int) -> bytes:
    """The shop's purchases as ``user item item ...`` lines; the same bytes for the same arguments."""
    random = np.random.default_rng(seed)
    groups = max(2, min(shop.groups, shop.items // (2 * shop.styles)))
    place = random.permutation(shop.items)
    group, style = place % groups, (place // groups) % shop.styles
    weight = 1.0 / (1.0 + random.permutation(shop.items)) ** shop.skew
    bestsellers = np.cumsum(weight)
    chain = np.stack([random.permutation(groups), random.permutation(groups)])
    cells: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for g in range(groups):
        for s in range(-1, shop.styles):
            members = np.flatnonzero((group == g) & ((style == s) | (s < 0)))
            cells[g, s] = members, np.cumsum(weight[members] ** 2)

    def draw(members: np.ndarray | None, heights: np.ndarray) -> int:
        at = int(np.searchsorted(heights, random.random() * heights[-1], side="right"))
        at = min(at, len(heights) - 1)
        return at if members is None else int(members[at])

    lines = []
    for shopper in range(1, shop.shoppers + 1):
        length = min(50, shop.items // 2, 5 + int(random.geometric(1.0 / max(1.0, shop.mean_length - 4.0))) - 1)
        own = int(random.integers(shop.styles))
        bought: list[int] = [draw(None, bestsellers)]
        seen = set(bought)
        while len(bought) < length:
            last = bought[-1]
            if random.random() < shop.loyalty:
                following = int(chain[0 if random.random() < 0.7 else 1, group[last]])
                item = draw(*cells[following, own if random.random() < shop.taste else -1])
            else:
                item = draw(None, bestsellers)
            if item in seen:
                item = draw(None, bestsellers)
            if item not in seen:
                seen.add(item)
                bought.append(item)
        lines.append(" ".join(str(number) for number in (shopper, *(item + 1 for item in bought))))
    return ("\n".join(lines) + "\n").encode()


def synthetic_dataset(shop: Shop, seed: int) -> Dataset:
    """The shop as a :class:`~components.data.dataset.Dataset`, marked synthetic."""
    return parse_sequences(synthetic_lines(shop, seed), name="synthetic-shop", where="synthetic shop", synthetic=True)
