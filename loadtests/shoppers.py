"""Recorded shoppers, replayed in a seeded order."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from endcap.shoppers import Shopper, read_shoppers

__all__ = ["Shopper", "read_shoppers", "replay"]


def replay(shoppers: Sequence[Shopper], seed: int) -> Iterator[Shopper]:
    """All shoppers in a seeded order, again and again in the same order, without end.

    Nobody comes a second time before everybody came once, so the file is drawn as widely as it can be. What counts
    each shopper once (click-through in a rollout) learns nothing more from the second round on: at ``rate`` arrivals
    a second a file of N shoppers feeds it for N / rate seconds.
    """
    order = list(range(len(shoppers)))
    random.Random(f"shoppers-{seed}").shuffle(order)  # noqa: S311 - an order, not a secret
    while order:
        for index in order:
            yield shoppers[index]
