"""A bounded, seeded sample of the recorded shoppers, read once, each shopper at most once."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError
from endcap.shoppers import Shopper, iterate_shoppers
from serving.asgi import MAX_BODY_BYTES
from serving.server.recommend import MAX_HISTORY, MAX_ID_CHARS

__all__ = ["Recorded", "read_recorded"]

_MAX_FILE_BYTES = 1 << 30
_MAX_HISTORY_CHARS = MAX_BODY_BYTES // 8
"""Of one history's ids together: fits a request's body, whatever JSON makes of its characters."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """``purchases``: shoppers with a known next item. ``requests``: shoppers to replay, next item known or not."""

    purchases: tuple[Shopper, ...]
    requests: tuple[Shopper, ...]


def read_recorded(path: Path, *, purchases: int, requests: int, seed: int) -> Recorded:
    """A sample of the file. Every line is read, so a malformed one is found wherever it is.

    Raises:
        InputError: missing, empty, too large, a malformed line, or no shopper with a known next item.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"larger than {_MAX_FILE_BYTES >> 20} MiB", where=path,
                             next_step="give a part of it: the gates take a sample anyway")  # fmt: skip
    except OSError as error:
        raise InputError("no readable file of recorded requests", where=path,
                         next_step="correct spec.gates.requests, or leave it out") from error  # fmt: skip
    with_next, all_of_them = _Sample(purchases, f"purchases-{seed}"), _Sample(requests, f"requests-{seed}")
    for shopper in iterate_shoppers(path):
        cut = Shopper(shopper.shopper, shopper.history[-MAX_HISTORY:], shopper.next_item)
        _check(cut, path)
        all_of_them.add(cut)
        if cut.next_item is not None:
            with_next.add(cut)
    if not (chosen := with_next.taken()):
        raise InputError("no shopper in the file has a known next item", where=path,
                         next_step="record what shoppers bought next, or leave out spec.gates.requests")  # fmt: skip
    return Recorded(chosen, all_of_them.taken())


class _Sample:
    """The shoppers with the smallest seeded hashes; of a shopper's lines the first. Memory is that of the sample."""

    def __init__(self, size: int, salt: str) -> None:
        self._size = size
        self._salt = salt.encode()
        self._heap: list[tuple[int, str]] = []  # the largest hash first, as its negative
        self._kept: dict[str, Shopper] = {}

    def add(self, shopper: Shopper) -> None:
        if shopper.shopper in self._kept:
            return
        digest = hashlib.blake2b(shopper.shopper.encode(errors="surrogatepass"), key=self._salt[:64], digest_size=8)
        rank = -int.from_bytes(digest.digest())
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (rank, shopper.shopper))
        elif rank > self._heap[0][0]:
            _, dropped = heapq.heapreplace(self._heap, (rank, shopper.shopper))
            del self._kept[dropped]
        else:
            return
        self._kept[shopper.shopper] = shopper

    def taken(self) -> tuple[Shopper, ...]:
        """In the order of their hashes."""
        return tuple(self._kept[name] for _, name in sorted(self._heap, reverse=True))


def _check(shopper: Shopper, path: Path) -> None:
    """What the model server would refuse is no recorded request of it."""
    where = f"{path}, shopper {shopper.shopper[:40]!r}"
    if not 0 < len(shopper.shopper) <= MAX_ID_CHARS:
        raise InputError(f"a shopper's id has 1 to {MAX_ID_CHARS} characters", where=where)
    together = "".join((shopper.shopper, *shopper.history))
    if len(together) > _MAX_HISTORY_CHARS:
        raise InputError("the history is too long for a request", where=where)
    try:
        together.encode()
    except UnicodeEncodeError as error:
        raise InputError("an id is not Unicode text", where=where) from error
