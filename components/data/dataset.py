"""Purchase sequences as read from ``user item item ...`` lines, oldest purchase first.

Items and shoppers are known outside by strings and inside by numbers: item ``i`` of a sequence is
``item_ids[i - 1]``, and 0 is padding everywhere.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.data.storage import read_arrays, write_arrays
from endcap.errors import DataError

__all__ = ["MIN_SEQUENCE", "Dataset", "Dropped", "Limits", "load_dataset", "parse_sequences", "save_dataset"]

MIN_SEQUENCE = 3
"""The last two purchases are held out, and one must be left to learn from."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\-]{0,63}")


@dataclass(frozen=True)
class Dropped:
    """What was read and not used."""

    malformed_lines: int = 0
    duplicates: int = 0
    """Second lines of a shopper, and a purchase that only repeats the one before it."""
    short_users: int = 0


@dataclass(frozen=True)
class Limits:
    """From which share of the lines on a file is not what it claims to be."""

    malformed_share: float = 0.01
    duplicate_share: float = 0.05
    repeat_share: float = 0.2
    """Of purchases that only repeat the one before: beyond it the file lists views or clicks."""
    short_share: float = 0.5


@dataclass(frozen=True)
class Dataset:
    """All sequences of a shop.

    Attributes:
        sha256: of the bytes that were read (for a synthetic shop: of the lines it would write).
        item_ids: external ids; item ``i`` of a sequence is ``item_ids[i - 1]``.
        shopper_ids: external ids, one a sequence.
        sequences: int32, values 1..len(item_ids), oldest first.
        caveats: what a reader of results must know of the data.
    """

    name: str
    synthetic: bool
    sha256: str
    item_ids: tuple[str, ...]
    shopper_ids: tuple[str, ...]
    sequences: tuple[NDArray[np.int32], ...]
    dropped: Dropped
    caveats: tuple[str, ...] = ()

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def interactions(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    def describe(self) -> dict[str, object]:
        """The document ``data.json`` of a run folder."""
        return {
            "name": self.name,
            "users": len(self.sequences),
            "items": self.n_items,
            "interactions": self.interactions,
            "synthetic": self.synthetic,
            "sha256": self.sha256,
            "dropped": asdict(self.dropped),
            "caveats": list(self.caveats),
        }


def parse_sequences(raw: bytes, *, name: str, where: object, synthetic: bool = False,
                    limits: Limits = Limits()) -> Dataset:  # fmt: skip
    """Read ``user item item ...`` lines.

    A line that is no such line, a second line of the same shopper, a purchase that repeats the one before it and a
    shopper with fewer than three purchases are left out and counted.

    Args:
        raw: the file's bytes (UTF-8; blank-separated ids of letters, digits and ``._:-``, at most 64 characters).
        where: named in errors.

    Raises:
        DataError: nothing usable, or more left out than ``limits`` allow; names the first offending line.
    """
    lines = raw.splitlines()
    malformed: list[tuple[int, str]] = []
    repeated: list[int] = []
    short: list[int] = []
    purchases = repeats = 0
    kept: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        ids = _ids_of(line)
        if isinstance(ids, str):
            malformed.append((number, ids))
            continue
        shopper, *items = ids
        if shopper in kept:
            repeated.append(number)
            continue
        once = [item for place, item in enumerate(items) if place == 0 or item != items[place - 1]]
        purchases += len(items)
        repeats += len(items) - len(once)
        if len(once) < MIN_SEQUENCE:
            short.append(number)
            continue
        kept[shopper] = once
    if not lines:
        raise DataError("the file is empty", where=where, next_step=_FORM)
    if len(malformed) > limits.malformed_share * len(lines):
        number, problem = malformed[0]
        raise DataError(f"{len(malformed)} of {len(lines)} lines are malformed; the first: {problem}",
                        where=f"{where}, line {number}", next_step=_FORM)  # fmt: skip
    if len(repeated) > limits.duplicate_share * len(lines):
        raise DataError(f"{len(repeated)} of {len(lines)} lines are second lines of a shopper seen before",
                        where=f"{where}, line {repeated[0]}", next_step="write one line a shopper")  # fmt: skip
    if repeats > limits.repeat_share * purchases:
        raise DataError(f"{repeats} of {purchases} purchases only repeat the one before", where=where,
                        next_step="write purchases, each once")  # fmt: skip
    if len(short) > limits.short_share * len(lines) or not kept:
        raise DataError(f"{len(short)} of {len(lines)} shoppers have fewer than {MIN_SEQUENCE} purchases",
                        where=f"{where}, line {short[0]}" if short else where,
                        next_step=f"give sequences of {MIN_SEQUENCE} purchases and more")  # fmt: skip
    item_ids = _in_order({item for items in kept.values() for item in items})
    index = {item: place for place, item in enumerate(item_ids, 1)}
    return Dataset(
        name=name,
        synthetic=synthetic,
        sha256=hashlib.sha256(raw).hexdigest(),
        item_ids=tuple(item_ids),
        shopper_ids=tuple(kept),
        sequences=tuple(np.array([index[item] for item in items], np.int32) for items in kept.values()),
        dropped=Dropped(len(malformed), len(repeated) + repeats, len(short)),
    )


_FORM = "the form is one line a shopper: user item item ..., blank-separated, oldest purchase first"


def _ids_of(line: bytes) -> list[str] | str:
    """The ids of a line, or what is wrong with it."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return "not UTF-8 text"
    ids = text.split()
    if len(ids) < 2:
        return "no purchase on the line" if ids else "a blank line"
    for token in ids:
        if _ID.fullmatch(token) is None:
            return f"{token[:40]!r} is not an id"
    return ids


def _in_order(ids: set[str]) -> list[str]:
    """Numbers by value, else by text: the same for every order of the lines."""
    if all(item.isascii() and item.isdigit() for item in ids):
        return sorted(ids, key=lambda item: (int(item), item))
    return sorted(ids)


def save_dataset(path: Path, dataset: Dataset) -> None:
    """Write ``dataset`` to one ``.npz`` file, whole or not at all."""
    flat, offsets = flatten(dataset.sequences)
    write_arrays(
        path,
        {"items": flat, "offsets": offsets, "item_ids": np.array(dataset.item_ids, np.str_),
         "shopper_ids": np.array(dataset.shopper_ids, np.str_)},
        dataset.describe(),
    )  # fmt: skip


def load_dataset(path: Path) -> Dataset:
    """The inverse of :func:`save_dataset`.

    Raises:
        StateError: missing or damaged.
    """
    arrays, about = read_arrays(path)
    return Dataset(
        name=about["name"],
        synthetic=about["synthetic"],
        sha256=about["sha256"],
        item_ids=tuple(arrays["item_ids"].tolist()),
        shopper_ids=tuple(arrays["shopper_ids"].tolist()),
        sequences=unflatten(arrays["items"], arrays["offsets"]),
        dropped=Dropped(**about["dropped"]),
        caveats=tuple(about["caveats"]),
    )


def flatten(sequences: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Ragged rows as one array and where each row starts (one entry more than there are rows)."""
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    flat = np.concatenate(sequences).astype(np.int32) if sequences else np.zeros(0, np.int32)
    return flat, offsets


def unflatten(flat: NDArray[np.int32], offsets: NDArray[np.int64]) -> tuple[NDArray[np.int32], ...]:
    """The inverse of :func:`flatten` (views, not copies)."""
    return tuple(np.split(flat.astype(np.int32, copy=False), offsets[1:-1]))
