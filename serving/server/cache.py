"""Answers kept for a while: keys that give nothing away, expiry, and no stampede when an answer expires.

What is kept is bytes (no pickle), found by a digest of everything that the answer depends on: model version, package,
variant, stock, history, context, k and filters, so that a new version never serves an old one's answers. Neither the
shopper nor the history is in the store, in clear; with a secret nobody can even try histories against its keys.

* Single flight: of equal requests at the same time one asks the store and the graph, the others wait for it.
* Early recompute: before an answer expires one of its readers finds it expired, by chance, the sooner the longer the
  answer takes to make (Vattani, Chierichetti, Lowenstein: Optimal Probabilistic Cache Stampede Prevention, VLDB 2015);
  meanwhile the others are served the old one. So servers that share a store do not all recompute at once.
* Jitter: an answer lives 90 to 100 % of the time to live.
* A store that is slow, gone or damaged costs its strict timeout and no error: the answer is made anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import random
import struct
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import cachetools
import numpy as np
import orjson
from numpy.typing import NDArray

from endcap.errors import InputError
from serving.server.recommend import FALLBACK_FILLED, FALLBACK_POPULAR, Asked, Recommendation
from serving.tracing import CURRENT

__all__ = [
    "MAX_VALUE_BYTES", "AnswerCache", "Codec", "Counted", "Counts", "DamagedError", "Identity", "MemoryStore",
    "Outputs", "Store", "open_cache", "open_store", "outputs_codec", "recommendation_codec",
]  # fmt: skip

T = TypeVar("T")

MAX_VALUE_BYTES = 256 * 1024
JITTER = 0.1
_FORM = b"endcap answer 1\n"
_HEAD = struct.Struct("!dd")
Outputs = dict[str, NDArray[Any]]


class Counted(Protocol):
    """A counter."""

    def inc(self) -> None: ...


class _Uncounted:
    def inc(self) -> None:
        """Nobody looks."""


Counts = Mapping[str, Counted]
"""By what came of a request (hit, miss, joined, renewed, bypassed) or what went wrong with the store."""


def uncounted() -> Counts:
    """Counts that nobody looks at."""
    return defaultdict(_Uncounted)


class DamagedError(Exception):
    """Bytes that are no answer of ours."""


class Store(Protocol):
    """Where bytes are kept. Neither method raises; both count what goes wrong."""

    async def get(self, key: bytes) -> bytes | None:
        """The value; None where there is none or the store did not say in time."""
        ...

    def put(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        """Begin to keep a value; nobody waits for it."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """In this process; the least recently used go when there are too many, or too many bytes."""

    def __init__(self, *, max_entries: int, max_bytes: int = 64 << 20, now_s: Callable[[], float] = time.time) -> None:
        self._max_entries = max_entries
        self._kept: cachetools.TLRUCache[bytes, tuple[bytes, float]] = cachetools.TLRUCache(
            max_bytes, ttu=lambda _key, kept, now: now + kept[1], timer=now_s,
            getsizeof=lambda kept: len(kept[0]) + _ENTRY_BYTES,
        )  # fmt: skip

    async def get(self, key: bytes) -> bytes | None:
        kept = self._kept.get(key)
        return None if kept is None else kept[0]

    def put(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        if len(value) + _ENTRY_BYTES > self._kept.maxsize:
            return
        while len(self._kept) >= self._max_entries and key not in self._kept:
            self._kept.popitem()
        self._kept[key] = (value, ttl_s)

    async def close(self) -> None:
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)


_ENTRY_BYTES = 400
"""What an entry takes beside its value: its key and cachetools' own records."""


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """An answer to bytes and back. ``encode``: None for what cannot be kept. ``decode`` raises DamagedError."""

    encode: Callable[[T], bytes | None]
    decode: Callable[[bytes], T]


class AnswerCache:
    """Answers by key, from the store where it has them, else made and kept. Use on one event loop.

    Args:
        ttl_s: how long an answer is served at most.
        counts: ``hit``, ``miss``, ``joined``, ``renewed``.
        troubles: ``damaged``, ``too_large``.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: float,
        counts: Counts | None = None,
        troubles: Counts | None = None,
        now_s: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._counts = uncounted() if counts is None else counts
        self._troubles = uncounted() if troubles is None else troubles
        self._now_s = now_s
        self._chance = chance
        self._flights: dict[bytes, asyncio.Future[Any]] = {}
        self._renewing: set[bytes] = set()

    async def answer(self, key: bytes, make: Callable[[], Awaitable[T]], codec: Codec[T], *,
                     within_s: float = math.inf) -> T:  # fmt: skip
        """The answer of ``key``. Raises what ``make`` raises, and TimeoutError when another's took too long."""
        trace = CURRENT.get()
        begun_s = 0.0 if trace is None else time.perf_counter()
        flight = self._flights.get(key)
        if flight is not None:
            self._counts["joined"].inc()
            async with asyncio.timeout(within_s if within_s < math.inf else None):
                await asyncio.wait([flight])
            if trace is not None:
                trace.add("cache", begun_s, time.perf_counter(), result="joined")
            if not flight.cancelled() and flight.exception() is None:
                joined: T = flight.result()
                return joined
            # Whoever was waited for failed, perhaps by a deadline of its own: nobody waits for another a second time.
            return await make()
        flight = asyncio.get_running_loop().create_future()
        self._flights[key] = flight
        try:
            found, renew = await self._find(key, codec)
            if trace is not None:
                trace.add("cache", begun_s, time.perf_counter(), result="miss" if found is None else "hit")
            if found is None:
                self._counts["miss"].inc()
                value = await self._make(key, make, codec)
            else:
                value = found[0]
            flight.set_result(value)
        except BaseException as error:
            if isinstance(error, Exception):
                flight.set_exception(error)
                flight.exception()  # seen: no warning where nobody waits
            else:
                flight.cancel()
            raise
        finally:
            del self._flights[key]
        if renew:
            return await self._renew(key, make, codec, value)
        return value

    async def _find(self, key: bytes, codec: Codec[T]) -> tuple[tuple[T] | None, bool]:
        """(What is kept, whether the one who found it should make it anew)."""
        raw = await self._store.get(key)
        if raw is None:
            return None, False
        try:
            expires_at_s, took_s, payload = _unframed(key, raw)
            value = codec.decode(payload)
        except DamagedError:
            self._troubles["damaged"].inc()
            return None, False
        now_s = self._now_s()
        if not now_s < expires_at_s <= now_s + self._ttl_s * 1.1:  # a clock that is wrong, here or there, keeps nothing
            return None, False
        self._counts["hit"].inc()
        early_s = -took_s * math.log(1.0 - self._chance())
        return (value,), now_s + early_s >= expires_at_s and key not in self._renewing

    async def _make(self, key: bytes, make: Callable[[], Awaitable[T]], codec: Codec[T]) -> T:
        begun_s = self._now_s()
        value = await make()
        payload = codec.encode(value)
        if payload is None:
            return value
        if len(payload) > MAX_VALUE_BYTES:
            self._troubles["too_large"].inc()
            return value
        now_s = self._now_s()
        ttl_s = self._ttl_s * (1.0 - JITTER * self._chance())
        self._store.put(key, _framed(key, now_s + ttl_s, max(0.0, now_s - begun_s), payload), ttl_s=ttl_s)
        return value

    async def _renew(self, key: bytes, make: Callable[[], Awaitable[T]], codec: Codec[T], old: T) -> T:
        """A fresh answer; ``old``, which has not expired, where that fails."""
        self._renewing.add(key)
        self._counts["renewed"].inc()
        try:
            return await self._make(key, make, codec)
        except Exception:  # noqa: BLE001 - whatever it is, there is a good answer
            return old
        finally:
            self._renewing.discard(key)

    async def close(self) -> None:
        """Let go of the store."""
        await self._store.close()


def _framed(key: bytes, expires_at_s: float, took_s: float, payload: bytes) -> bytes:
    """The key goes along: bytes that come back for another key, or are cut or changed, are seen to be none of it."""
    body = _FORM + _HEAD.pack(expires_at_s, took_s) + payload
    return body + hashlib.blake2b(body, key=key[:64], digest_size=8).digest()


def _unframed(key: bytes, raw: bytes) -> tuple[float, float, bytes]:
    body, check = raw[:-8], raw[-8:]
    start = len(_FORM) + _HEAD.size
    if len(body) < start or len(body) > start + MAX_VALUE_BYTES or not body.startswith(_FORM):
        raise DamagedError
    if hashlib.blake2b(body, key=key[:64], digest_size=8).digest() != check:
        raise DamagedError
    expires_at_s, took_s = _HEAD.unpack_from(body, len(_FORM))
    return expires_at_s, took_s, body[start:]


class Identity:
    """What all keys of one served package have in common, and how keys are made.

    Args:
        version: the model version's label.
        package: a digest of the package's manifest, which holds the digests of all its files.
        secret: with it (the impression key, say) nobody who reads the store can try histories against its keys.
    """

    def __init__(self, *, version: str, package: str, variant: str, secret: bytes = b"") -> None:
        common = orjson.dumps([_FORM.decode(), version, package, variant])
        self._start = hashlib.blake2b(common, key=hashlib.blake2b(secret).digest(), digest_size=32)

    def of_recommendation(self, asked: Asked) -> bytes:
        """The key of a recommendation."""
        request = asked.request
        return self._key(b"recommend", orjson.dumps([
            asked.bought, request.k, request.scene, sorted(set(request.exclude)), request.candidates,
            None if asked.stock is None else asked.stock.token, request.max_per_category,
        ]))  # fmt: skip

    def of_inputs(self, inputs: Mapping[str, NDArray[Any]]) -> bytes | None:
        """The key of a run of the graph; None where the inputs hold objects, or too much to be looked at each time."""
        if sum(value.nbytes for value in inputs.values()) > MAX_VALUE_BYTES:
            return None
        head: list[Any] = []
        parts: list[bytes] = []
        for name in sorted(inputs):
            value = inputs[name]
            if value.dtype.hasobject:
                return None
            head.append([name, value.dtype.str, list(value.shape)])
            parts.append(value.tobytes())
        return self._key(b"infer", orjson.dumps(head) + b"\n" + b"".join(parts))

    def _key(self, kind: bytes, content: bytes) -> bytes:
        digest = self._start.copy()
        digest.update(kind + b"\n")
        digest.update(content)
        return digest.digest()


_FALLBACKS = (None, FALLBACK_POPULAR, FALLBACK_FILLED)


def _encode_recommendation(answer: Recommendation) -> bytes | None:
    if answer.steps is not None:
        return None
    return orjson.dumps([answer.items, answer.scores, answer.fallback])


def _decode_recommendation(raw: bytes) -> Recommendation:
    try:
        items, scores, fallback = orjson.loads(raw)
        answer = Recommendation([str(item) for item in items], [float(score) for score in scores], fallback)
    except (ValueError, TypeError) as error:
        raise DamagedError from error
    if fallback not in _FALLBACKS or len(answer.items) != len(answer.scores):
        raise DamagedError
    return answer


recommendation_codec: Codec[Recommendation] = Codec(_encode_recommendation, _decode_recommendation)
"""Items, scores and fallback; what is explained is not kept."""


def _encode_outputs(outputs: Outputs) -> bytes | None:
    if any(value.dtype.hasobject for value in outputs.values()):
        return None
    if sum(value.nbytes for value in outputs.values()) > MAX_VALUE_BYTES:
        return None  # not even copied
    head = [[name, value.dtype.str, list(value.shape)] for name, value in outputs.items()]
    return orjson.dumps(head) + b"\n" + b"".join(value.tobytes() for value in outputs.values())


def _decode_outputs(raw: bytes) -> Outputs:
    head, _, body = raw.partition(b"\n")
    outputs: Outputs = {}
    try:
        place = 0
        for name, dtype, shape in orjson.loads(head):
            kind = np.dtype(dtype)
            size = kind.itemsize * math.prod(shape)
            outputs[name] = np.frombuffer(body[place : place + size], kind).reshape(shape)
            place += size
    except (ValueError, TypeError) as error:
        raise DamagedError from error
    if not outputs or place != len(body):
        raise DamagedError
    return outputs


outputs_codec: Codec[Outputs] = Codec(_encode_outputs, _decode_outputs)
"""Tensors by name, as they are in memory; outputs that hold objects, or are too large, are not kept."""


def open_cache(text: str, *, ttl_s: float, counts: Counts, troubles: Counts) -> AnswerCache:
    """A cache on the store that ``--cache`` names. Raises as :func:`open_store` does."""
    store = open_store(text, counts=counts, troubles=troubles)
    return AnswerCache(store, ttl_s=ttl_s, counts=counts, troubles=troubles)


def open_store(text: str, *, counts: Counts | None = None, troubles: Counts | None = None) -> Store:
    """The store that ``--cache`` names: ``memory:ENTRIES`` (and at most 64 MiB) or a Redis address.

    Its user and password come from ENDCAP_REDIS_USERNAME and ENDCAP_REDIS_PASSWORD.

    Raises:
        InputError: it names none.
    """
    kind, _, rest = text.partition(":")
    if kind == "memory":
        if not (rest.isascii() and rest.isdigit() and 0 < len(rest) < 9 and int(rest)):
            raise InputError("not a number of entries", where="--cache", next_step="memory:10000")
        return MemoryStore(max_entries=int(rest))
    if kind in ("redis", "rediss", "unix"):
        from serving.server.cache_redis import RedisStore, check_url

        check_url(text)
        return RedisStore(
            text, username=os.environ.get("ENDCAP_REDIS_USERNAME"), password=os.environ.get("ENDCAP_REDIS_PASSWORD"),
            counts=counts, troubles=troubles,
        )  # fmt: skip
    raise InputError("no such cache", where="--cache", next_step="memory:10000 or redis://host:port/0")
