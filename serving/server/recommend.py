"""The recommender's request and answer, purely: JSON -> history -> (the graph) -> steps -> items.

The steps, in order; each can be seen in the answer to a request with ``"explain": true``:

1. ``history``: items that the graph does not know are dropped, and the newest that the package takes are kept.
2. ``graph``: its top-k, without padding, items twice and items of score minus infinity.
3. ``bought``: what is in the whole history, however long ago, is never recommended.
4. ``excluded``: ``filters.exclude``.
5. ``in_stock``: by ``--stock``, else by the package. ``filters.in_stock_only``: left out, it is done where stock is
   known; true, a server that does not know stock refuses the request; false, it is not done.
6. ``scene``: ``context.scene`` says where the answer is shown; a package that says nothing of scenes skips the step.
7. ``candidates``: ``filters.candidates``, only these.
8. ``diversity``: at most ``diversity.max_per_category`` of a category; a package without categories refuses.
9. ``k``: cut.
10. ``popular``: where fewer are left than were asked for, filled up with what is popular in the scene (of candidates:
    the rest of them, popular ones first) and passes the same filters.

The rule of 5, 6 and 8: what a request demands and cannot get is refused (400 with the field's name), for a shopper must
not be shown what was ruled out; a scene is context, which clients always send, and must not make a package that was
made before its items had scenes unusable in a rollback.

Documented fallback: ``"fallback"`` is null when all items are the graph's, ``"filled"`` when the last ones are popular
ones (their scores say the order only), and ``"popular"`` when all are: an unknown shopper, a history of which no item
is known, or filters that left nothing of the graph's answer; then the scores are 1/rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endcap.errors import InputError, PackageError
from endcap.package import ITEMS_FILE, POPULAR_FILE, Manifest
from endcap.package.attributes import ATTRIBUTES_FILE, EVERYDAY_SCENES, Attributes, Scene, parse_attributes
from serving.server.engine import GraphError, Verified
from serving.server.steps import Filter, Items, Step, Wanted, distinct, select, table_of
from serving.watched import Watched, read_bounded

__all__ = [
    "DEFAULT_K",
    "FALLBACK_FILLED",
    "FALLBACK_POPULAR",
    "MAX_HISTORY",
    "Asked",
    "Catalogue",
    "RecommendRequest",
    "Recommendation",
    "Stock",
    "history_tensor",
    "parse_request",
    "read_catalogue",
]  # fmt: skip

DEFAULT_K = 10
MAX_HISTORY = 1000
MAX_EXCLUDED = 1000
MAX_CANDIDATES = 1000
MAX_ID_CHARS = 256
FALLBACK_POPULAR = "popular"
FALLBACK_FILLED = "filled"
MAX_STOCK_BYTES = 64 << 20

_FIELDS = frozenset({"shopper", "history", "k", "context", "filters", "diversity", "explain"})
_SCENES = {scene.value: scene for scene in Scene}
_EXAMPLE = 'send {"shopper": "...", "history": ["..."], "k": 10}'


@dataclass(frozen=True, slots=True)
class RecommendRequest:
    """``history``: external item ids, oldest first. What is None or empty was not asked for."""

    shopper: str
    history: Sequence[str]
    k: int
    scene: Scene | None = None
    exclude: Sequence[str] = ()
    candidates: Sequence[str] | None = None
    in_stock_only: bool | None = None
    max_per_category: int | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True)
class Recommendation:
    """``items``: external ids, best first, at most k. ``fallback``: why it is not the graph's answer, or None.

    ``steps``: how it came about, where that was asked for.
    """

    items: list[str]
    scores: list[float]
    fallback: str | None = None
    steps: tuple[Step, ...] | None = None


def parse_request(body: bytes, *, max_k: int) -> RecommendRequest:
    """``{"shopper": str, "history": [str, ...], "k"?: int, "context"?: {"scene"?: scene}, "filters"?: {"exclude"?:
    [str, ...], "candidates"?: [str, ...], "in_stock_only"?: bool}, "diversity"?: {"max_per_category"?: int},
    "explain"?: bool}``.

    Raises:
        InputError: not JSON, a field missing, unknown, of a wrong type or out of range; ``where`` is its name.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error.msg})", where="body", next_step=_EXAMPLE) from error
    if type(document) is not dict:
        raise InputError("the body is not a JSON object", where="body", next_step=_EXAMPLE)
    if not document.keys() <= _FIELDS:
        raise _unknown("", document.keys() - _FIELDS, _FIELDS)
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
    _check_ids(history, "history")
    k = document.get("k", DEFAULT_K if max_k >= DEFAULT_K else max_k)
    if type(k) is not int or not 1 <= k <= max_k:
        raise InputError(f"k must be a whole number from 1 to {max_k}", where="k",
                         next_step=f"ask for at most {max_k} items")  # fmt: skip
    if len(document) == 2:  # the common request
        return RecommendRequest(shopper, history, k)
    context = _object(document, "context", ("scene",))
    filters = _object(document, "filters", ("exclude", "candidates", "in_stock_only"))
    diversity = _object(document, "diversity", ("max_per_category",))
    scene = context.get("scene")
    if scene is not None and (type(scene) is not str or scene not in _SCENES):
        raise InputError("no such scene", where="context.scene", next_step=f"send one of: {', '.join(_SCENES)}")
    limit = diversity.get("max_per_category")
    if limit is not None and (type(limit) is not int or not 1 <= limit <= max_k):
        raise InputError(f"max_per_category must be a whole number from 1 to {max_k}",
                         where="diversity.max_per_category", next_step="leave diversity out for no limit")  # fmt: skip
    candidates = _ids_of(filters, "candidates", MAX_CANDIDATES)
    if candidates is not None:
        if not candidates:
            raise InputError("candidates is empty", where="filters.candidates",
                             next_step="name at least one item, or leave it out")  # fmt: skip
        if len(set(candidates)) != len(candidates):
            raise InputError("candidates holds an item twice", where="filters.candidates", next_step="name each once")
    return RecommendRequest(
        shopper, history, k, None if scene is None else _SCENES[scene],
        _ids_of(filters, "exclude", MAX_EXCLUDED) or (), candidates,
        _flag(filters, "in_stock_only", "filters.in_stock_only"), limit, _flag(document, "explain", "explain") or False,
    )  # fmt: skip


def _unknown(prefix: str, names: Iterable[str], known: Iterable[str]) -> InputError:
    return InputError("unknown field", where=prefix + (min(names)[:64] or '""'),
                      next_step=f"these are known: {', '.join(sorted(known))}")  # fmt: skip


def _object(document: Mapping[str, Any], name: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    found = document.get(name, {})
    if type(found) is not dict:
        raise InputError(f"{name} must be a JSON object", where=name, next_step="leave it out, or send {}")
    if found and (others := found.keys() - set(known)):
        raise _unknown(f"{name}.", others, known)
    return found


def _ids_of(filters: Mapping[str, Any], name: str, limit: int) -> Sequence[str] | None:
    found = filters.get(name)
    if found is None:
        return None
    where = f"filters.{name}"
    if type(found) is not list:
        raise InputError(f"{name} must be a list of item ids", where=where, next_step="leave it out for none")
    if len(found) > limit:
        raise InputError(f"{name} has {len(found)} items, more than {limit}", where=where, next_step="send fewer")
    _check_ids(found, where)
    return found


def _check_ids(ids: Sequence[Any], where: str) -> None:
    for place, item in enumerate(ids):
        if type(item) is not str:
            raise InputError("an item id must be a string", where=f"{where}.{place}", next_step='send "59", not 59')
        if len(item) > MAX_ID_CHARS:
            raise InputError(f"an item id has at most {MAX_ID_CHARS} characters", where=f"{where}.{place}",
                             next_step="send the item's id")  # fmt: skip


def _flag(document: Mapping[str, Any], name: str, where: str) -> bool | None:
    found = document.get(name)
    if found is not None and type(found) is not bool:
        raise InputError(f"{name} must be true or false", where=where, next_step="leave it out for the default")
    return found


@dataclass(frozen=True, slots=True)
class Stock:
    """What is in stock now, by item number. ``token``: differs where what is in stock may differ."""

    table: NDArray[np.bool_]
    token: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the catalogue's numbers.

    ``bought``: every item of the history that the catalogue has, oldest first. ``known``: those that the graph knows.
    ``stock``: as it was when the request came, so that an answer and its key in a cache agree.
    """

    request: RecommendRequest
    bought: list[int]
    known: list[int]
    stock: Stock | None


class Catalogue:
    """The items both ways, what is popular, and what is known of items.

    Item ``i`` of the graph is ``items[i - 1]``; popular items that the graph does not know have the numbers after.
    ``watched``: the stock file, where there is one, to be kept fresh.
    """

    def __init__(self, items: Sequence[str], popular: Sequence[str], *, max_history: int,
                 attributes: Attributes | None = None) -> None:  # fmt: skip
        self.items = list(items)
        self.max_history = max_history
        said = attributes or Attributes(items={})
        more = dict.fromkeys(popular)
        for scene_popular in said.popular.values():
            more.update(dict.fromkeys(scene_popular))
        self._indices = {item: index for index, item in enumerate(self.items, 1)}
        if len(self._indices) != len(self.items):
            raise PackageError("the item table names an item twice", where=ITEMS_FILE)
        self._ids = ["", *self.items]
        for item in more:
            if item not in self._indices:
                self._indices[item] = len(self._ids)
                self._ids.append(item)
        self._read(said, popular)

    def _read(self, said: Attributes, popular: Sequence[str]) -> None:
        """Turn what is said of items into tables."""
        size = len(self._ids)
        numbered = [(self._indices[item], of) for item, of in said.items.items() if item in self._indices]
        names = sorted({of.category for _, of in numbered if of.category is not None})
        self._categories: NDArray[np.int32] | None = None
        if names:
            code = {name: number for number, name in enumerate(names)}
            self._categories = np.full(size, -1, np.int32)
            for number, of in numbered:
                if of.category is not None:
                    self._categories[number] = code[of.category]
        self._says_scenes = any(of.scenes is not None for _, of in numbered)
        self._scenes: dict[Scene, NDArray[np.bool_]] = {}
        self._popular = self._numbers(popular)
        self._popular_in: dict[Scene, Items] = {}
        for scene in Scene if self._says_scenes or said.popular else ():
            table = np.full(size, scene in EVERYDAY_SCENES, np.bool_)
            for number, of in numbered:
                if of.scenes is not None:
                    table[number] = scene in of.scenes
            first = self._numbers(said.popular.get(scene, ()))
            table[first] = True  # who is popular there belongs there
            in_order = distinct(np.concatenate([first, self._popular]))
            self._scenes[scene] = table
            self._popular_in[scene] = in_order[table[in_order]] if self._says_scenes else in_order
        self._popularity = np.full(size, size, np.int64)
        self._popularity[self._popular] = np.arange(len(self._popular))
        self.watched: Watched[Stock] | None = None
        self._stock: Stock | None = None
        if any(of.in_stock is not None for _, of in numbered):
            self._stock = Stock(~table_of(size, [number for number, of in numbered if of.in_stock is False]), "package")

    def _numbers(self, ids: Iterable[str]) -> Items:
        return np.array([self._indices[item] for item in dict.fromkeys(ids)], np.int64)

    @property
    def stock(self) -> Stock | None:
        """What is in stock now; None where nothing is known of it."""
        return self._stock if self.watched is None else self.watched.value

    def watch_stock(self, path: Path) -> Watched[Stock]:
        """Take the stock from a file from now on, instead of from the package. The caller refreshes it.

        The file is ``{"out_of_stock": ["<id>", ...]}``: all other items are in stock; unknown ids are left alone.

        Raises:
            InputError: the file cannot be read, or is of another form.
        """
        self.watched = Watched(path, self._read_stock)
        return self.watched

    def _read_stock(self, path: Path) -> Stock:
        raw = read_bounded(path, limit=MAX_STOCK_BYTES, what="stock file")
        try:
            document = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise InputError(f"the stock file is not JSON ({error.msg})", where=path) from error
        out = document.get("out_of_stock") if type(document) is dict and len(document) == 1 else None
        if type(out) is not list or not all(type(item) is str for item in out):
            raise InputError("not a stock file", where=path, next_step='write {"out_of_stock": ["<item id>", ...]}')
        numbers = [number for item in out if (number := self._indices.get(item)) is not None]
        return Stock(~table_of(len(self._ids), numbers), hashlib.blake2b(raw, digest_size=16).hexdigest())

    def ask(self, request: RecommendRequest) -> Asked:
        """The request in numbers.

        Raises:
            InputError: it demands a step for which neither the package nor the server's files have the data.
        """
        stock = self.stock
        if request.in_stock_only and stock is None:
            raise InputError("this server does not know what is in stock", where="filters.in_stock_only",
                             next_step="start it with --stock, or package attributes.json with in_stock")  # fmt: skip
        if request.max_per_category is not None and self._categories is None:
            raise InputError("this package has no categories", where="diversity.max_per_category",
                             next_step="package attributes.json with a category for each item")  # fmt: skip
        indices, last = self._indices, len(self.items)
        bought = [index for item in request.history if (index := indices.get(item)) is not None]
        known = bought if len(self._ids) == last + 1 else [index for index in bought if index <= last]
        return Asked(request, bought, known, None if request.in_stock_only is False else stock)

    def recommend(self, asked: Asked, items: NDArray[Any] | None = None,
                  scores: NDArray[Any] | None = None) -> Recommendation:  # fmt: skip
        """The graph's answer (one row: numbers best first, and their scores; None where it was not asked) through all
        steps, as external ids.

        Raises:
            GraphError: an index that the item table does not have, or a score that is no number.
        """
        request = asked.request
        if items is None or scores is None:
            items, scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        else:
            items, scores = self._sound(items, scores)
        wanted = Wanted(request.k, self._filters(asked), self._fill(request), self._categories,
                        request.max_per_category)  # fmt: skip
        chosen = select(items, scores, wanted)
        found = chosen.items.tolist()
        ids = self._ids
        fallback = None
        if chosen.ranked < len(found) or not chosen.ranked:
            fallback = FALLBACK_FILLED if chosen.ranked else FALLBACK_POPULAR
        steps = None
        if request.explain:
            before = (Step("history", len(request.history), len(asked.known)),
                      Step("graph", len(asked.known), len(items)))  # fmt: skip
            steps = (*before, *chosen.steps)
        return Recommendation([ids[number] for number in found], chosen.scores.tolist(), fallback, steps)

    def _sound(self, items: NDArray[Any], scores: NDArray[Any]) -> tuple[Items, NDArray[Any]]:
        """Without padding, masked items and repeats."""
        keep = (items > 0) & (items <= len(self.items)) & (scores > -np.inf)
        if not keep.all():
            out_of_table = (items < 0) | (items > len(self.items))
            if out_of_table.any() or np.isnan(scores).any():
                raise GraphError("the graph answered what the item table does not have")
            items, scores = items[keep], scores[keep]
        if len(set(items.tolist())) != len(items):
            _, first = np.unique(items, return_index=True)
            first.sort()
            items, scores = items[first], scores[first]
        return items, scores

    def _filters(self, asked: Asked) -> list[Filter]:
        request, size = asked.request, len(self._ids)
        found = [Filter("bought", table_of(size, asked.bought), keeps=False)]
        if request.exclude:
            numbers = [number for item in request.exclude if (number := self._indices.get(item)) is not None]
            found.append(Filter("excluded", table_of(size, numbers), keeps=False))
        if asked.stock is not None:
            found.append(Filter("in_stock", asked.stock.table))
        elif request.explain and request.in_stock_only is None:
            found.append(Filter("in_stock", None, skipped="stock is not known"))
        if request.scene is not None:
            if self._says_scenes:
                found.append(Filter("scene", self._scenes[request.scene]))
            else:
                found.append(Filter("scene", None, skipped="the package says nothing of scenes"))
        if request.candidates is not None:
            found.append(Filter("candidates", table_of(size, self._fill(request).tolist())))
        return found

    def _fill(self, request: RecommendRequest) -> Items:
        """What to fill up from, best first."""
        if request.candidates is not None:
            numbers = [number for item in request.candidates if (number := self._indices.get(item)) is not None]
            candidates = np.array(numbers, np.int64)
            return candidates[np.argsort(self._popularity[candidates], kind="stable")]
        if request.scene is not None:
            return self._popular_in.get(request.scene, self._popular)
        return self._popular

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
    attributes = None
    if ATTRIBUTES_FILE in package.manifest.digests:
        attributes = parse_attributes(package.read(ATTRIBUTES_FILE), where=package.folder / ATTRIBUTES_FILE)
    return Catalogue(_ids(package, ITEMS_FILE), _ids(package, POPULAR_FILE), max_history=package.manifest.max_history,
                     attributes=attributes)  # fmt: skip


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
