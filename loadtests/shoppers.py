"""Recorded shoppers, replayed in a seeded order."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from endcap.shoppers import Shopper, read_shoppers

__all__ = ["Shopper", "read_shoppers", "replay"]


def replay(shoppers: Sequence[Shopper], seed: int) -> Iterator[Shopper]:
    """All shoppers in a seeded order, and then again as other shoppers with the same histories, without end.

    From the second round on each is called ``<shopper>~<round>``: what counts a shopper once (click-through in a
    rollout) would learn nothing from a person who comes again, and a file of recorded people is smaller than a shop.
    """
    order = list(range(len(shoppers)))
    random.Random(f"shoppers-{seed}").shuffle(order)  # noqa: S311 - an order, not a secret
    for number in itertools.count(1):
        for index in order:
            shopper = shoppers[index]
            yield shopper if number == 1 else replace(shopper, shopper=f"{shopper.shopper}~{number}")
        if not order:
            return
