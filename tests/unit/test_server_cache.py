"""Kept answers: never another's, never too old, made once, and a store that fails costs no error."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from endcap.package.attributes import Scene
from serving.server import cache
from serving.server.cache import AnswerCache, Codec, DamagedError, Identity, MemoryStore, open_store
from serving.server.cache_redis import Breaker, RedisStore
from serving.server.recommend import Catalogue, Recommendation, RecommendRequest
from serving.server.steps import Step

TEXT: Codec[str] = Codec(lambda text: text.encode() if text else None, lambda raw: raw.decode())
KEY = b"k" * 32


class Tally:
    """Counts by name."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Any:
        return _Count(self.of, name)

    def __iter__(self) -> Any:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


@dataclasses.dataclass
class _Count:
    of: Counter[str]
    name: str

    def inc(self) -> None:
        self.of[self.name] += 1


class World:
    """A cache on a clock of its own, and what was made."""

    def __init__(self, store: cache.Store | None = None) -> None:
        self.now_s, self.chance = 1000.0, 0.0
        self.store = store or MemoryStore(max_entries=100, now_s=lambda: self.now_s)
        self.tally, self.troubles, self.made = Tally(), Tally(), 0
        self.cache = AnswerCache(
            self.store, ttl_s=10.0, counts=self.tally, troubles=self.troubles, now_s=lambda: self.now_s,  # type: ignore[arg-type]
            chance=lambda: self.chance,
        )  # fmt: skip
        self.takes_s = 0.0
        self.gate: asyncio.Event | None = None
        self.fails: Exception | None = None

    async def make(self) -> str:
        self.made += 1
        made = self.made
        if self.gate is not None:
            await self.gate.wait()
        self.now_s += self.takes_s
        if self.fails is not None:
            raise self.fails
        return f"answer {made}"

    def ask(self, key: bytes = KEY, **more: Any) -> Coroutine[Any, Any, str]:
        return self.cache.answer(key, self.make, TEXT, **more)


def test_an_answer_is_made_once_and_expires() -> None:
    async def work() -> None:
        world = World()
        assert [await world.ask() for _ in range(3)] == ["answer 1"] * 3
        assert await world.ask(b"other" * 8) == "answer 2"
        world.now_s += 9.99
        assert await world.ask() == "answer 1"
        world.now_s += 0.02
        assert await world.ask() == "answer 3"
        assert world.tally.of == {"miss": 3, "hit": 3}

    asyncio.run(work())


def test_equal_requests_at_once_are_one() -> None:
    async def work() -> None:
        world = World()
        world.gate = asyncio.Event()
        asked = [asyncio.create_task(world.ask()) for _ in range(50)]
        while not world.made:
            await asyncio.sleep(0)
        late = asyncio.create_task(world.ask(within_s=0.001))
        with pytest.raises(TimeoutError):
            await late
        world.gate.set()
        assert set(await asyncio.gather(*asked)) == {"answer 1"}
        assert (world.made, world.tally.of) == (1, {"miss": 1, "joined": 50})

    asyncio.run(work())


def test_who_waited_for_a_failure_asks_for_itself() -> None:
    async def work() -> None:
        world = World()
        world.gate, world.fails = asyncio.Event(), ValueError("mine")
        first = asyncio.create_task(world.ask())
        while not world.made:
            await asyncio.sleep(0)
        others = [asyncio.create_task(world.ask()) for _ in range(3)]
        await asyncio.sleep(0)
        world.gate.set()
        with pytest.raises(ValueError, match="mine"):
            await first
        world.fails = None
        assert {(await other)[:6] for other in others} == {"answer"}
        first = asyncio.create_task(world.ask(b"other"))
        world.gate = asyncio.Event()
        await asyncio.sleep(0)
        waiting = asyncio.create_task(world.ask(b"other"))
        await asyncio.sleep(0)
        first.cancel()
        world.gate.set()
        assert (await waiting).startswith("answer")
        assert not world.cache._flights

    asyncio.run(work())


def test_before_it_expires_one_reader_makes_it_anew_while_others_are_served_the_old_one() -> None:
    async def work() -> None:
        world = World()
        world.takes_s = 1.0
        assert await world.ask() == "answer 1"
        world.now_s += 5.0
        world.chance = 0.9  # 2.3 times what it took: not yet
        assert await world.ask() == "answer 1"
        world.now_s += 3.0
        world.gate = asyncio.Event()
        renewing = asyncio.create_task(world.ask())
        while world.made < 2:
            await asyncio.sleep(0)
        assert [await world.ask() for _ in range(5)] == ["answer 1"] * 5
        world.gate.set()
        assert await renewing == "answer 2" == await world.ask()
        assert (world.made, world.tally.of["renewed"]) == (2, 1)
        world.now_s += 7.5
        world.fails = ValueError("the graph is ill")
        assert await world.ask() == "answer 2"

    asyncio.run(work())


def test_what_is_another_keys_or_damaged_is_not_served() -> None:
    async def work() -> None:
        world = World()
        await world.ask()
        raw = await world.store.get(KEY)
        assert raw is not None
        for bad in (raw[:-1], raw[1:], b"", raw + b"x", raw.replace(b"answer", b"ANSWER"), b"\xff" * 100):
            world.store.put(KEY, bad, ttl_s=5.0)
            assert await world.ask() != "answer 1"
        world.store.put(b"other", raw, ttl_s=5.0)
        assert await world.ask(b"other") != "answer 1"
        assert world.troubles.of == {"damaged": 7}

    asyncio.run(work())


def test_a_store_whose_clock_is_wrong_serves_nothing_for_longer_than_it_may() -> None:
    async def work() -> None:
        world = World(MemoryStore(max_entries=9, now_s=lambda: 0.0))
        await world.ask()
        world.now_s -= 100.0
        assert await world.ask() == "answer 2"

    asyncio.run(work())


def test_what_cannot_be_kept_or_is_too_large_is_answered_all_the_same() -> None:
    async def work() -> None:
        world = World()
        huge: Callable[[], Awaitable[str]] = lambda: asyncio.sleep(0, "x" * (cache.MAX_VALUE_BYTES + 1))  # noqa: E731
        empty: Callable[[], Awaitable[str]] = lambda: asyncio.sleep(0, "")  # noqa: E731
        for _ in range(2):
            assert len(await world.cache.answer(KEY, huge, TEXT)) == cache.MAX_VALUE_BYTES + 1
            assert await world.cache.answer(KEY, empty, TEXT) == ""
        assert world.tally.of == {"miss": 4} and world.troubles.of == {"too_large": 2}

    asyncio.run(work())


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3000), st.floats(0, 3)), max_size=60))
def test_memory_is_bounded_in_entries_and_bytes(puts: list[tuple[int, int, float]]) -> None:
    async def work() -> None:
        now_s = 0.0
        store = MemoryStore(max_entries=5, max_bytes=4000, now_s=lambda: now_s)
        kept: dict[bytes, tuple[bytes, float]] = {}
        for number, size, later_s in puts:
            now_s += later_s
            key, value = bytes([number]), bytes([number]) * size
            store.put(key, value, ttl_s=2.0)
            kept[key] = (value, now_s + 2.0)
            assert len(store) <= 5
            total = 0
            for one, (wanted, until_s) in kept.items():
                found = await store.get(one)
                assert found is None or (found == wanted and now_s < until_s)
                total += len(found or b"")
            assert total <= 4000
        await store.close()
        assert len(store) == 0

    asyncio.run(work())


# ---- keys ------------------------------------------------------------------------------------------------------------

CATALOGUE = Catalogue([str(number) for number in range(30)], ["1", "2"], max_history=5)
BASE = RecommendRequest("shopper", ["3", "4"], 5)


def key(request: RecommendRequest = BASE, **identity: str | bytes) -> bytes:
    whole: dict[str, Any] = {"version": "7", "package": "abc", "variant": "float32"} | identity
    return Identity(**whole).of_recommendation(CATALOGUE.ask(request))


def test_everything_that_an_answer_depends_on_is_in_its_key() -> None:
    change = dataclasses.replace
    keys = [
        key(), key(version="8"), key(package="abd"), key(variant="int8"), key(secret=b"s"),
        key(change(BASE, history=["4", "3"])), key(change(BASE, history=["29"])), key(change(BASE, history=[])),
        key(change(BASE, k=6)), key(change(BASE, scene=Scene.HOME)), key(change(BASE, exclude=["5"])),
        key(change(BASE, candidates=["5"])), key(change(BASE, candidates=["5", "6"])),
        key(change(BASE, candidates=["6", "5"])),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys) and {len(one) for one in keys} == {32}


def test_stock_and_diversity_are_in_the_key(tmp_path: Any) -> None:
    catalogue = Catalogue(["1", "2"], [], max_history=5)
    path = tmp_path / "stock.json"
    identity = Identity(version="7", package="abc", variant="float32")
    keys = [identity.of_recommendation(catalogue.ask(BASE))]
    for out in ('["1"]', '["2"]', "[]"):
        path.write_text(f'{{"out_of_stock": {out}}}')
        catalogue.watch_stock(path)
        keys.append(identity.of_recommendation(catalogue.ask(BASE)))
    asked = catalogue.ask(BASE)
    keys.append(identity.of_recommendation(dataclasses.replace(asked, stock=None)))
    assert keys.pop() == keys[0] and len(set(keys)) == 4
    capped = dataclasses.replace(asked, request=dataclasses.replace(BASE, max_per_category=2))
    assert identity.of_recommendation(capped) not in keys


def test_what_an_answer_does_not_depend_on_is_not() -> None:
    change = dataclasses.replace
    assert key() == key(change(BASE, shopper="another")) == key(change(BASE, history=["unknown", "3", "4"]))
    assert key(change(BASE, exclude=["6", "5", "5"])) == key(change(BASE, exclude=["5", "6"]))


@given(shape=st.sampled_from([(1, 4), (2, 2), (4, 1)]), dtype=st.sampled_from(["int64", "uint64", "float64"]))
def test_tensors_of_other_names_shapes_or_types_have_other_keys(shape: tuple[int, int], dtype: str) -> None:
    identity = Identity(version="7", package="abc", variant="float32")
    base = {"ids": np.zeros((1, 4), np.int64)}
    other = {"ids": np.zeros(shape, dtype)}
    assert (identity.of_inputs(base) == identity.of_inputs(other)) == (shape == (1, 4) and dtype == "int64")
    assert identity.of_inputs(base) != identity.of_inputs({"mask": base["ids"]})
    assert identity.of_inputs({"text": np.array(["a"], object)}) is None
    assert identity.of_inputs({"ids": np.zeros((1, cache.MAX_VALUE_BYTES // 8 + 1), np.int64)}) is None


# ---- answers to bytes and back ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.floats(allow_nan=False, width=32))),
       st.sampled_from([None, "popular", "filled"]))  # fmt: skip
def test_a_recommendation_comes_back_as_it_was(ranked: list[tuple[str, float]], fallback: str | None) -> None:
    ranked = [(item, score) for item, score in ranked if abs(score) < 1e38]
    answer = Recommendation([item for item, _ in ranked], [score for _, score in ranked], fallback)
    raw = cache.recommendation_codec.encode(answer)
    assert raw is not None and cache.recommendation_codec.decode(raw) == answer
    explained = dataclasses.replace(answer, steps=(Step("k", 1, 1),))
    assert cache.recommendation_codec.encode(explained) is None


@given(st.lists(st.sampled_from(["int64", "float32", "bool", "float16"]), min_size=1, max_size=3), st.integers(0, 3))
def test_outputs_come_back_as_they_were(dtypes: list[str], rows: int) -> None:
    outputs = {f"o{place}": np.arange(rows * 4).reshape(rows, 4).astype(kind) for place, kind in enumerate(dtypes)}
    raw = cache.outputs_codec.encode(outputs)
    assert raw is not None
    found = cache.outputs_codec.decode(raw)
    assert list(found) == list(outputs)
    for name, value in outputs.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value)
    assert cache.outputs_codec.encode({"text": np.array(["a"], object)}) is None
    assert cache.outputs_codec.encode({"logits": np.zeros(cache.MAX_VALUE_BYTES // 8 + 1)}) is None


@given(
    st.binary(max_size=80) | st.sampled_from([
        b"[1]", b"[]", b'[["a"],[],null]', b'[["a"],[1],"x"]', b"[1,2,3]", b"{}", b'[["o","<i8",[2]]]\n1234',
        b'[["o","|O",[1]]]\n12345678', b'[["o","<i8",[-1]]]\n', b'[["o","<i8","x"]]\n', b'[[[],"<i8",[0]]]\nx',
        b'[["o",{},[1]]]\n1234', b'[["o","<i8",[-1]]]\n12345678',
    ])
)  # fmt: skip
def test_any_other_bytes_are_damaged(raw: bytes) -> None:
    for codec in (cache.recommendation_codec, cache.outputs_codec):
        with pytest.raises(DamagedError):
            codec.decode(raw)


# ---- the breaker and the switch --------------------------------------------------------------------------------------


def test_the_breaker_opens_after_three_failures_in_a_row_and_waits_longer_each_time() -> None:
    breaker = Breaker()
    assert not breaker.closed
    waits = []
    for _ in range(7):
        breaker.probed(True)
        assert breaker.closed
        breaker.failed()
        breaker.failed()
        breaker.succeeded()
        assert [breaker.failed() for _ in range(4)] == [False, False, True, False]
        assert not breaker.closed
        waits.append(breaker.wait_s)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    breaker.probed(False)
    assert not breaker.closed
    breaker.probed(True)
    for _ in range(100):
        breaker.succeeded()
    assert breaker.closed and breaker.wait_s == 0.0


def test_the_switch() -> None:
    assert isinstance(open_store("memory:10"), MemoryStore)
    assert isinstance(open_store("redis://localhost:6379/0"), RedisStore)
    assert isinstance(open_store("unix:///run/redis.sock"), RedisStore)


@pytest.mark.parametrize(
    "text",
    ["", "memory", "memory:", "memory:0", "memory:-1", "memory:ten", "memory:999999999", "disk:/tmp", "redis://",
     "redis://host:port", "redis://host:99999", "redis://host/main", "unix://", "redis:host"],
)  # fmt: skip
def test_a_switch_that_names_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(text)
    assert caught.value.where == "--cache" and caught.value.next_step


def test_a_password_in_an_argument_is_refused_and_not_repeated() -> None:
    with pytest.raises(InputError, match="seen by everybody") as caught:
        open_store("redis://me:hunter2@host:6379/0")
    assert "hunter2" not in str(caught.value)
