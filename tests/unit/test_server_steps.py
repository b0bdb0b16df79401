"""The recommender's steps: on plain numbers, and as a client of the server sees them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.package import Attributes, ItemAttributes, Scene
from serving.server.app import Replica, ServerApp
from serving.server.cache import AnswerCache, MemoryStore
from serving.server.service import load_service
from serving.server.steps import Filter, Step, Wanted, capped, distinct, select, table_of
from tests.asgi_client import Answer, AsgiClient
from tests.packages import ITEMS, make_package

CODES = st.lists(st.integers(-1, 4), max_size=40)


@given(codes=CODES, limit=st.integers(1, 5))
def test_a_cap_keeps_the_first_of_each_category_and_all_without_one(codes: list[int], limit: int) -> None:
    kept = capped(np.array(codes, np.int32), limit)
    seen: Counter[int] = Counter()
    for code, keep in zip(codes, kept.tolist(), strict=True):
        assert keep == (code == -1 or seen[code] < limit)
        seen[code] += 1


@given(st.lists(st.integers(0, 9)))
def test_distinct_keeps_the_first_of_each(numbers: list[int]) -> None:
    assert distinct(np.array(numbers, np.int64)).tolist() == list(dict.fromkeys(numbers))


@given(
    ranked=st.lists(st.integers(1, 999), max_size=30, unique=True), popular=st.permutations(range(1, 1000)),
    out=st.sets(st.integers(0, 999)), k=st.integers(1, 40), limit=st.none() | st.integers(1, 3),
)  # fmt: skip
def test_an_answer_is_as_long_as_can_be_and_no_longer(
    ranked: list[int], popular: list[int], out: set[int], k: int, limit: int | None
) -> None:
    """However far down the popular list it must look: 1,000 items, of which most may be ruled out."""
    categories = (np.arange(1000) % 7).astype(np.int32)
    gone = out | set(range(40, 980))
    filters = [Filter("gone", table_of(1000, sorted(gone)), keeps=False)]
    wanted = Wanted(k, filters, np.array(popular, np.int64), categories, limit)
    chosen = select(np.array(ranked, np.int64), np.linspace(1, 0, len(ranked)), wanted)
    plain: list[int] = []
    for item in [*ranked, *popular]:
        among = sum(other % 7 == item % 7 for other in plain)
        if item not in gone and item not in plain and (limit is None or among < limit):
            plain.append(item)
    assert chosen.items.tolist() == plain[:k]
    assert chosen.ranked == sum(item in ranked for item in plain[:k])
    assert (np.diff(chosen.scores) <= 0).all()


def test_steps_say_what_they_did() -> None:
    wanted = Wanted(2, [Filter("a", table_of(5, [1, 2])), Filter("b", None, skipped="no data")], np.array([2, 4]))
    chosen = select(np.array([3, 1]), np.array([0.5, 0.25]), wanted)
    assert chosen.items.tolist() == [1, 2] and chosen.scores.tolist() == [0.25, -0.75]
    assert chosen.steps == [
        Step("a", 2, 1),
        Step("b", 1, 1, skipped="no data"),
        Step("k", 1, 1),
        Step("popular", 1, 2, 1),
    ]


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "cached"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiClient]:
    """A package whose items ending in 0 or 1 are coupons, those ending in 5 are sold out, with a category a decade."""
    items = {
        item: ItemAttributes(
            category=item[:2],
            scenes=frozenset({Scene.COUPON, Scene.HOME}) if item[2] in "01" else None,
            in_stock=item[2] != "5",
        )
        for item in ITEMS
    }
    said = Attributes(items=items, popular={Scene.COUPON: ("141", "999", "111")})
    package = make_package(tmp_path_factory.mktemp("packages") / "good", attributes=said)
    cache = AnswerCache(MemoryStore(max_entries=100), ttl_s=60.0) if request.param == "cached" else None
    service = load_service(package, package.parent / "keys" / "signing.pub", cache=cache, version="7")
    app = ServerApp(Replica("7", "a"), impression_key=None)
    app.open(service)
    with AsgiClient(app) as client:
        yield client
    service.close()


def ask(client: AsgiClient, *history: str, **more: Any) -> Answer:
    return client.post("/v1/recommend", {"shopper": "1", "history": history, "k": 4} | more)


def test_a_client_gets_what_the_scene_the_stock_and_its_filters_allow(client: AsgiClient) -> None:
    for _ in range(2):  # the second time perhaps from a cache
        assert ask(client, "103").json["items"] == ["104", "106", "107", "108"]
        assert ask(client, "103", filters={"exclude": ["104"], "in_stock_only": False}).json["items"][0] == "105"
        assert ask(client, "103", context={"scene": "coupon"}, k=3).json["items"] == ["110", "111", "120"]
        assert ask(client, "103", context={"scene": "coupon"}, diversity={"max_per_category": 1}).json["items"] == [
            "110", "120", "141", "999",
        ]  # fmt: skip
        answer = ask(client, "103", filters={"candidates": ["149", "107", "104"]}).json
        assert (answer["items"], answer["fallback"]) == (["104", "107", "149"], "filled")
        unknown = ask(client, "nobody", context={"scene": "coupon"}).json
        assert (unknown["items"], unknown["fallback"]) == (["141", "999", "111", "140"], "popular")
        assert "explain" not in unknown


def test_a_client_that_asks_is_told_each_step(client: AsgiClient) -> None:
    for _ in range(2):
        answer = ask(client, "103", "104", "no", context={"scene": "coupon"}, explain=True).json
        assert answer["explain"] == [
            {"step": "history", "in": 3, "out": 2},
            {"step": "graph", "in": 2, "out": 20},
            {"step": "bought", "in": 20, "out": 20},
            {"step": "in_stock", "in": 20, "out": 18},
            {"step": "scene", "in": 18, "out": 4},
            {"step": "k", "in": 4, "out": 4},
        ]


@pytest.mark.parametrize(
    ("more", "where"),
    [({"filters": {"colour": "red"}}, "filters.colour"), ({"explain": "yes"}, "explain"), ({"scene": "home"}, "scene")],
)
def test_a_client_that_asks_for_what_there_is_not_is_told_the_field(
    client: AsgiClient, more: dict[str, Any], where: str
) -> None:
    answer = ask(client, "103", **more)
    assert answer.status == 400 and f'"{where}"'.encode() in answer.body
