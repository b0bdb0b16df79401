"""Held-out shoppers, replayed in a seeded order: who asks, with which history, and what they really bought next."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError

__all__ = ["Shopper", "read_shoppers", "replay"]


@dataclass(frozen=True, slots=True)
class Shopper:
    """``history``: item IDs, oldest first. ``next_item``: the purchase that followed, None where unknown."""

    shopper: str
    history: tuple[str, ...]
    next_item: str | None


def read_shoppers(path: Path) -> list[Shopper]:
    """The shoppers file: JSON lines ``{"shopper": "12", "history": ["4", "59"], "next": "77"}``.

    Raises:
        InputError: missing, empty, or a line that is not of that form; the message names the line.
    """
    shoppers: list[Shopper] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    shoppers.append(_shopper(line, f"{path}, line {number}"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("no such file", where=path,
                         next_step="run the pipeline first; its split step writes it") from error  # fmt: skip
    if not shoppers:
        raise InputError("no shoppers in the file", where=path)
    return shoppers


def _shopper(line: bytes, where: str) -> Shopper:
    try:
        raw = json.loads(line)
        shopper, history, following = raw["shopper"], raw["history"], raw.get("next")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError("not a JSON object with shopper, history and next", where=where) from error
    ids = [shopper, *history] if isinstance(history, list) else [None]
    if not all(isinstance(one, str) for one in ids) or not isinstance(following, str | None):
        raise InputError("shopper and next are strings, history is a list of strings", where=where)
    return Shopper(shopper, tuple(history), following)


def replay(shoppers: Sequence[Shopper], seed: int) -> Iterator[Shopper]:
    """All shoppers in a seeded order, again and again in the same order, without end."""
    order = list(range(len(shoppers)))
    random.Random(f"shoppers-{seed}").shuffle(order)  # noqa: S311 - an order, not a secret
    while order:
        for index in order:
            yield shoppers[index]
