"""The recommender's request and answer, purely: JSON -> history indices -> (the graph) -> items.

Documented fallback: a shopper of whose history no item is known (or who has none) gets the package's most popular
items, ``"fallback": "popular"``, with ``1 / rank`` as score. A history longer than the package takes is cut to its
newest items; unknown items are dropped first. What was bought before, however long ago, is never recommended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endcap.errors import InputError, PackageError
from endcap.package import ITEMS_FILE, POPULAR_FILE, Manifest
from serving.server.engine import GraphError, Verified

__all__ = [
    "DEFAULT_K",
    "FALLBACK_POPULAR",
    "MAX_HISTORY",
    "Catalogue",
    "RecommendRequest",
    "Recommendation",
    "history_tensor",
    "parse_request",
    "read_catalogue",
]  # fmt: skip

DEFAULT_K = 10
MAX_HISTORY = 1000
MAX_ID_CHARS = 256
FALLBACK_POPULAR = "popular"


@dataclass(frozen=True, slots=True)
class RecommendRequest:
    """``history``: external item ids, oldest first."""

    shopper: str
    history: Sequence[str]
    k: int


@dataclass(frozen=True, slots=True)
class Recommendation:
    """``items``: external ids, best first, at most k. ``fallback``: why it is not the graph's answer, or None."""

    items: list[str]
    scores: list[float]
    fallback: str | None = None


def parse_request(body: bytes, *, max_k: int) -> RecommendRequest:
    """``{"shopper": str, "history": [str, ...], "k"?: int, "context"?: object}``; other fields are left alone.

    Raises:
        InputError: not JSON, a field missing, of a wrong type or out of range.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error.msg})", where="body",
                         next_step='send {"shopper": "...", "history": ["..."], "k": 10}') from error  # fmt: skip
    if type(document) is not dict:
        raise InputError("the body is not a JSON object", where="body",
                         next_step='send {"shopper": "...", "history": ["..."], "k": 10}')  # fmt: skip
    shopper, history = document.get("shopper"), document.get("history")
    if type(shopper) is not str or not 0 < len(shopper) <= MAX_ID_CHARS:
        raise InputError(f"shopper must be a string of 1 to {MAX_ID_CHARS} characters", where="shopper",
                         next_step="send the shopper's id as a string")  # fmt: skip
    if type(history) is not list:
        raise InputError("history must be a list of item ids", where="history",
                         next_step="send [] for a shopper without one")  # fmt: skip
    if len(history) > MAX_HISTORY:
        raise InputError(f"history has {len(history)} items, more than {MAX_HISTORY}", where="history",
                         next_step=f"send the newest {MAX_HISTORY}")  # fmt: skip
    for place, item in enumerate(history):
        if type(item) is not str:
            raise InputError("an item id must be a string", where=f"history.{place}",
                             next_step='send "59", not 59')  # fmt: skip
    k = document.get("k", DEFAULT_K if max_k >= DEFAULT_K else max_k)
    if type(k) is not int or not 1 <= k <= max_k:
        raise InputError(f"k must be a whole number from 1 to {max_k}", where="k",
                         next_step=f"ask for at most {max_k} items")  # fmt: skip
    if type(document.get("context", {})) is not dict:
        raise InputError("context must be a JSON object", where="context", next_step="leave it out, or send {}")
    return RecommendRequest(shopper, history, k)


class Catalogue:
    """The item table both ways, and the popular items. Item ``i`` of the graph is ``items[i - 1]``."""

    def __init__(self, items: Sequence[str], popular: Sequence[str], *, max_history: int) -> None:
        self.items = list(items)
        self.max_history = max_history
        self._indices = {item: index for index, item in enumerate(self.items, 1)}
        if len(self._indices) != len(self.items):
            raise PackageError("the item table names an item twice", where=ITEMS_FILE)
        self._popular = list(dict.fromkeys(popular))

    def known(self, history: Sequence[str]) -> list[int]:
        """The graph's indices of the known items, oldest first."""
        indices = self._indices
        return [index for item in history if (index := indices.get(item)) is not None]

    def popular(self, history: Sequence[str], k: int) -> Recommendation:
        """The fallback."""
        seen = set(history)
        items: list[str] = []
        for item in self._popular:
            if item not in seen:
                items.append(item)
                if len(items) == k:
                    break
        return Recommendation(items, [1.0 / rank for rank in range(1, len(items) + 1)], FALLBACK_POPULAR)

    def answer(self, known: Sequence[int], items: NDArray[Any], scores: NDArray[Any], k: int) -> Recommendation:
        """The graph's answer (one row: indices best first, and their scores) as external ids.

        Padding, minus infinity and anything of the whole known history are left out: the graph masks only what it
        was shown.

        Raises:
            GraphError: an index that the item table does not have, or a score that is no number.
        """
        seen = set(known)
        chosen: list[str] = []
        chosen_scores: list[float] = []
        for index, score in zip(items.tolist(), scores.tolist(), strict=True):
            if not 0 <= index <= len(self.items) or score != score:
                raise GraphError("the graph answered what the item table does not have")
            if index == 0 or index in seen or score == float("-inf"):
                continue
            chosen.append(self.items[index - 1])
            chosen_scores.append(score)
            if len(chosen) == k:
                break
        return Recommendation(chosen, chosen_scores)

    def check_indices(self, inputs: Mapping[str, NDArray[Any]], name: str) -> None:
        """Refuse history tensors that the graph was not made for.

        Raises:
            InputError: an index outside the item table, or more items or rows than the package takes.
        """
        history = inputs[name]
        rows, length = history.shape
        if rows < 1 or rows > MAX_ROWS or length < 1 or length > self.max_history:
            raise InputError(
                f"{name} has shape [{rows}, {length}]", where=f"inputs.{name}.shape",
                next_step=f"send 1 to {MAX_ROWS} rows of 1 to {self.max_history} items, padded with 0 on the left",
            )  # fmt: skip
        if int(history.min()) < 0 or int(history.max()) > len(self.items):
            raise InputError(f"{name} holds an item index outside 0 to {len(self.items)}", where=f"inputs.{name}.data",
                             next_step="use the package's item table: item i is entry i - 1, 0 is padding")  # fmt: skip


MAX_ROWS = 64


def read_catalogue(package: Verified) -> Catalogue:
    """The catalogue of a verified package.

    Raises:
        PackageError: its files are not of the contract's form.
    """
    return Catalogue(_ids(package, ITEMS_FILE), _ids(package, POPULAR_FILE), max_history=package.manifest.max_history)


def _ids(package: Verified, name: str) -> list[str]:
    try:
        ids = orjson.loads(package.read(name))
    except orjson.JSONDecodeError as error:
        raise PackageError("not a JSON list of item ids", where=package.folder / name) from error
    if type(ids) is not list or not all(type(item) is str for item in ids):
        raise PackageError("not a JSON list of item ids", where=package.folder / name)
    return ids


def history_tensor(known: Sequence[int], manifest: Manifest) -> NDArray[np.int64]:
    """int64 [1, length]: the newest ``max_history`` indices, left-padded where the graph's length is fixed."""
    newest = known[-manifest.max_history :]
    length = manifest.inputs[0].shape[1]
    if length > 0:
        newest = newest[-length:]
        newest = [0] * (length - len(newest)) + list(newest)
    return np.array([newest], dtype=np.int64)
