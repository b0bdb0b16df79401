"""From a request to an answer, without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError, PackageError
from endcap.files import write_json
from endcap.package import Manifest, Task, TensorSpec, Variant
from endcap.package.attributes import EVERYDAY_SCENES, Attributes, ItemAttributes, Scene, parse_attributes
from serving.server.engine import GraphError
from serving.server.recommend import (
    Asked,
    Catalogue,
    Recommendation,
    RecommendRequest,
    history_tensor,
    parse_request,
)

GOOD: dict[str, Any] = {"shopper": "123", "history": ["4", "59"], "k": 5, "context": {}}


def parse(document: Any, max_k: int = 20) -> Any:
    return parse_request(orjson.dumps(document), max_k=max_k)


def test_a_good_request() -> None:
    request = parse(GOOD)
    assert (request.shopper, list(request.history), request.k) == ("123", ["4", "59"], 5)


def test_k_defaults_to_ten_or_to_what_the_package_gives() -> None:
    assert parse({"shopper": "1", "history": []}).k == 10
    assert parse({"shopper": "1", "history": []}, max_k=4).k == 4


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"shopper": 123}, "shopper"),
        ({"shopper": ""}, "shopper"),
        ({"shopper": "x" * 257}, "shopper"),
        ({"history": None}, "history"),
        ({"history": "4,59"}, "history"),
        ({"history": ["4", 59]}, "history.1"),
        ({"history": ["4"] * 1001}, "history"),
        ({"k": 0}, "k"),
        ({"k": 21}, "k"),
        ({"k": True}, "k"),
        ({"k": 5.0}, "k"),
        ({"k": "5"}, "k"),
        ({"k": None}, "k"),
        ({"context": []}, "context"),
        ({"context": {"scene": "attic"}}, "context.scene"),
        ({"context": {"scene": ["home"]}}, "context.scene"),
        ({"context": {"device": "phone"}}, "context.device"),
        ({"history": ["4", "x" * 257]}, "history.1"),
        ({"histroy": []}, "histroy"),
        ({"filters": []}, "filters"),
        ({"filters": {"only": []}}, "filters.only"),
        ({"filters": {"exclude": "4"}}, "filters.exclude"),
        ({"filters": {"exclude": [4]}}, "filters.exclude.0"),
        ({"filters": {"exclude": ["4"] * 1001}}, "filters.exclude"),
        ({"filters": {"candidates": []}}, "filters.candidates"),
        ({"filters": {"candidates": ["4", "5", "4"]}}, "filters.candidates"),
        ({"filters": {"candidates": [str(n) for n in range(1001)]}}, "filters.candidates"),
        ({"filters": {"candidates": ["4", None]}}, "filters.candidates.1"),
        ({"filters": {"in_stock_only": "yes"}}, "filters.in_stock_only"),
        ({"diversity": 2}, "diversity"),
        ({"diversity": {"lambda": 0.5}}, "diversity.lambda"),
        ({"diversity": {"max_per_category": 0}}, "diversity.max_per_category"),
        ({"diversity": {"max_per_category": True}}, "diversity.max_per_category"),
        ({"explain": 1}, "explain"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_what_to_do(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(GOOD | change)
    assert caught.value.where == where
    assert caught.value.next_step


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"shopper": NaN}', b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        parse_request(body, max_k=20)


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        parse_request(body, max_k=20)


def test_every_field_is_read() -> None:
    request = parse({
        "shopper": "1", "history": ["4"], "k": 3, "context": {"scene": "new-items"}, "explain": True,
        "filters": {"exclude": ["5", "5"], "candidates": ["6", "7"], "in_stock_only": True},
        "diversity": {"max_per_category": 2},
    })  # fmt: skip
    wanted = RecommendRequest("1", ["4"], 3, Scene.NEW_ITEMS, ["5", "5"], ["6", "7"], True, 2, True)
    assert request == wanted


def test_what_is_left_out_was_not_asked_for() -> None:
    whole = {"context": {}, "filters": {}, "diversity": {}, "explain": False}
    nulls = {"context": {"scene": None}, "filters": {"exclude": None, "candidates": None, "in_stock_only": None}}
    for more in ({}, whole, nulls, {"diversity": {"max_per_category": None}, "explain": None}):
        assert parse({"shopper": "1", "history": []} | more) == RecommendRequest("1", [], 10)


CATALOGUE = Catalogue([str(100 + number) for number in range(30)], ["129", "128", "129", "100"], max_history=5)
IDS = st.lists(st.integers(90, 140).map(str), max_size=40)


def ask(catalogue: Catalogue, *, history: Sequence[str] = (), k: int = 10, **more: Any) -> Asked:
    return catalogue.ask(RecommendRequest("1", history, k, **more))


def test_unknown_items_are_dropped_and_the_newest_known_are_kept() -> None:
    known = ask(CATALOGUE, history=["100", "nope", "101", "101"]).known
    assert known == [1, 2, 2]
    assert history_tensor(known, manifest()).tolist() == [[1, 2, 2]]
    assert history_tensor(list(range(1, 10)), manifest()).tolist() == [[5, 6, 7, 8, 9]]
    assert history_tensor([7], manifest(length=4)).tolist() == [[0, 0, 0, 7]]
    assert history_tensor([7, 8, 9, 10, 11], manifest(length=4)).tolist() == [[8, 9, 10, 11]]


@given(history=IDS, k=st.integers(1, 20))
def test_the_fallback_is_popular_without_repeats_and_without_the_history(history: list[str], k: int) -> None:
    answer = CATALOGUE.recommend(ask(CATALOGUE, history=history, k=k))
    assert answer.items == [item for item in ["129", "128", "100"] if item not in history][:k]
    assert answer.fallback == "popular"
    assert answer.scores == [1 / rank for rank in range(1, len(answer.items) + 1)]


@given(history=IDS, k=st.integers(1, 20), indices=st.lists(st.integers(0, 30), min_size=20, max_size=20))
def test_an_answer_keeps_the_order_and_leaves_out_padding_repeats_and_the_whole_history(
    history: list[str], k: int, indices: list[int]
) -> None:
    asked = ask(CATALOGUE, history=history, k=k)
    answer = CATALOGUE.recommend(asked, np.array(indices), np.linspace(1, 0, 20, dtype=np.float32))
    ranked = [str(99 + index) for index in dict.fromkeys(indices) if index and str(99 + index) not in history]
    filled = [item for item in ["129", "128", "100"] if item not in ranked[:k] and item not in history]
    assert answer.items == (ranked + filled)[:k]
    assert answer.scores == sorted(answer.scores, reverse=True) and len(answer.items) == len(answer.scores)
    assert answer.fallback == (
        "popular" if not ranked else "filled" if len(answer.items) > len(ranked[:k]) else None
    )  # fmt: skip


def test_masked_scores_are_left_out() -> None:
    answer = CATALOGUE.recommend(ask(CATALOGUE, k=1), np.array([3, 4]), np.array([1.0, -np.inf], np.float32))
    assert answer.items == ["102"]
    answer = CATALOGUE.recommend(ask(CATALOGUE, k=2), np.array([3, 4]), np.array([1.0, -np.inf], np.float32))
    assert (answer.items, answer.scores, answer.fallback) == (["102", "129"], [1.0, 0.0], "filled")


@pytest.mark.parametrize(("indices", "scores"), [([31], [1.0]), ([-1], [1.0]), ([1], [float("nan")])])
def test_a_graph_that_answers_nonsense_has_failed(indices: list[int], scores: list[float]) -> None:
    with pytest.raises(GraphError):
        CATALOGUE.recommend(ask(CATALOGUE), np.array(indices), np.array(scores, np.float32))


def test_an_item_table_with_repeats_is_refused() -> None:
    with pytest.raises(PackageError, match="twice"):
        Catalogue(["1", "2", "1"], [], max_history=5)


def manifest(*, length: int = -1) -> Manifest:
    return Manifest(
        name="recommender",
        task=Task.SESSION_RECOMMENDER,
        model="any",
        inputs=(TensorSpec(name="history", datatype="INT64", shape=(-1, length)),),
        outputs=(
            TensorSpec(name="items", datatype="INT64", shape=(-1, 20)),
            TensorSpec(name="scores", datatype="FP32", shape=(-1, 20)),
        ),
        variants={"float32": Variant(file="model.onnx")},
        top_k=20,
        max_history=5,
        created_at="2026-11-22T00:00:00Z",
    )


# ---- scenes, stock, categories ---------------------------------------------------------------------------------------

TABLE = [str(number) for number in range(12)]
CATEGORIES = ["hair", "skin", "nails"]


def attributes(popular: dict[str, list[str]] | None = None, **fields: Any) -> Attributes:
    """``fields``: by field, from item to value."""
    items: dict[str, dict[str, Any]] = {}
    for name, by_item in fields.items():
        for item, value in by_item.items():
            items.setdefault(item, {})[name] = value
    raw = orjson.dumps({"items": items, "popular": popular or {}})
    return parse_attributes(raw, where=Path("attributes.json"))


def shop(**more: Any) -> Catalogue:
    """Categories in turn; even items are coupons, 9 to 11 new and out of stock, popular is the table from its end."""
    said = attributes(
        category={item: CATEGORIES[int(item) % 3] for item in TABLE},
        scenes={"0": ["coupon", "home"], "2": ["coupon"], "4": ["coupon"], "9": ["new-items"], "10": ["new-items"]},
        in_stock={"9": False, "11": False, "1": True},
        **more,
    )
    return Catalogue(TABLE, TABLE[::-1], max_history=5, attributes=said)


def best(catalogue: Catalogue, **request: Any) -> Recommendation:
    """The graph ranks the table in order."""
    numbers = np.arange(1, len(TABLE) + 1)
    return catalogue.recommend(ask(catalogue, **request), numbers, np.linspace(1, 0.5, len(TABLE), dtype=np.float32))


def test_what_is_out_of_stock_is_left_out_unless_asked_for() -> None:
    assert best(shop(), k=12).items == [str(number) for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10)]
    assert best(shop(), k=12, in_stock_only=True).items == best(shop(), k=12).items
    assert best(shop(), k=12, in_stock_only=False).items == TABLE


def test_a_scene_shows_only_what_belongs_there() -> None:
    assert best(shop(), k=12, scene=Scene.COUPON).items == ["0", "2", "4"]
    assert best(shop(), k=12, scene=Scene.NEW_ITEMS).items == ["10"]
    assert best(shop(), k=12, scene=Scene.HOME).items == ["0", "1", "3", "5", "6", "7", "8"]
    assert best(shop(), k=12, scene=Scene.SEARCH).items == ["1", "3", "5", "6", "7", "8"]


def test_an_unknown_shopper_gets_what_is_popular_in_the_scene() -> None:
    catalogue = shop(popular={"coupon": ["4", "77", "0"], "new-items": []})
    answer = catalogue.recommend(ask(catalogue, history=["nobody knows it"], k=9, scene=Scene.COUPON))
    assert (answer.items, answer.fallback) == (["4", "77", "0", "2"], "popular")
    answer = catalogue.recommend(ask(catalogue, k=2, scene=Scene.HOME))
    assert answer.items == ["8", "7"]
    assert catalogue.recommend(ask(catalogue, k=2)).items == ["10", "8"]


def test_candidates_are_ranked_by_the_graph_then_by_popularity_then_as_they_were_sent() -> None:
    catalogue = Catalogue(TABLE, ["3", "5", "x"], max_history=5)
    asked = ask(catalogue, k=9, candidates=["0", "no", "5", "9", "3", "7", "x"], exclude=["0"], history=["5"])
    answer = catalogue.recommend(asked, np.array([8, 2]), np.array([0.9, 0.8], np.float32))
    assert (answer.items, answer.fallback) == (["7", "3", "x", "9"], "filled")


def test_no_category_has_more_than_was_asked_for() -> None:
    assert best(shop(), k=4, max_per_category=1).items == ["0", "1", "2"]
    answer = best(shop(), k=5, max_per_category=1, candidates=["3", "0", "1"])
    assert answer.items == ["0", "1"]


def test_what_a_request_demands_and_the_package_does_not_know_is_refused_but_a_scene_is_skipped() -> None:
    plain = Catalogue(TABLE, TABLE, max_history=5)
    with pytest.raises(InputError) as caught:
        best(plain, in_stock_only=True)
    assert caught.value.where == "filters.in_stock_only" and caught.value.next_step
    with pytest.raises(InputError) as caught:
        best(plain, max_per_category=1)
    assert caught.value.where == "diversity.max_per_category" and caught.value.next_step
    answer = best(plain, k=2, scene=Scene.COUPON, explain=True)
    assert answer.items == ["0", "1"] and answer.steps is not None
    assert {step.name: step.skipped for step in answer.steps if step.skipped} == {
        "in_stock": "stock is not known", "scene": "the package says nothing of scenes",
    }  # fmt: skip


def test_each_step_can_be_seen() -> None:
    request = {"history": ["3", "nope"], "k": 4, "scene": Scene.HOME, "exclude": ["5"], "max_per_category": 1}
    answer = best(shop(), **request, candidates=["0", "3", "6", "1", "9", "8"], explain=True)
    assert answer.items == ["0", "1", "8"] and answer.fallback is None
    assert [step.to_json() for step in answer.steps or ()] == [
        {"step": "history", "in": 2, "out": 1},
        {"step": "graph", "in": 1, "out": 12},
        {"step": "bought", "in": 12, "out": 11},
        {"step": "excluded", "in": 11, "out": 10},
        {"step": "in_stock", "in": 10, "out": 8},
        {"step": "scene", "in": 8, "out": 5},
        {"step": "candidates", "in": 5, "out": 4},
        {"step": "diversity", "in": 4, "out": 3},
        {"step": "k", "in": 3, "out": 3},
        {"step": "popular", "in": 3, "out": 3},
    ]
    assert best(shop(), **request).steps is None
    unknown = shop().recommend(ask(shop(), k=2, explain=True))
    assert unknown.steps is not None and unknown.steps[-1].to_json() == {
        "step": "popular",
        "in": 0,
        "out": 2,
        "added": 2,
    }


SOME = st.lists(st.sampled_from([*TABLE, "x", "y", "unknown"]), max_size=6)


SAID = st.tuples(
    st.none() | st.sampled_from(CATEGORIES), st.none() | st.sets(st.sampled_from([*Scene])), st.none() | st.booleans()
)  # fmt: skip


@given(
    history=SOME, exclude=SOME,
    candidates=st.none() | st.lists(st.sampled_from([*TABLE, "x", "z"]), min_size=1, unique=True),
    k=st.integers(1, 12), scene=st.none() | st.sampled_from(list(Scene)), cap=st.none() | st.integers(1, 3),
    in_stock=st.sampled_from([None, True, False]), graph=st.lists(st.integers(0, 12), max_size=12),
    popular=st.lists(st.sampled_from([*TABLE, "x", "y"])), said=st.dictionaries(st.sampled_from([*TABLE, "x"]), SAID),
)  # fmt: skip
def test_any_answer_is_the_one_that_plain_lists_give(
    history: list[str], exclude: list[str], candidates: list[str] | None, k: int, scene: Scene | None, cap: int | None,
    in_stock: bool | None, graph: list[int], popular: list[str],
    said: dict[str, tuple[str | None, set[Scene] | None, bool | None]],
) -> None:  # fmt: skip
    of = {item: ItemAttributes(category=c, scenes=None if s is None else frozenset(s), in_stock=i)
          for item, (c, s, i) in said.items()}  # fmt: skip
    catalogue = Catalogue(TABLE, popular, max_history=5, attributes=Attributes(items=of))
    there = {item: one for item, one in of.items() if item in TABLE or item in popular}
    try:
        asked = ask(catalogue, history=history, exclude=exclude, candidates=candidates, k=k, scene=scene,
                    max_per_category=cap, in_stock_only=in_stock)  # fmt: skip
    except InputError as error:
        if error.where == "filters.in_stock_only":
            assert in_stock and all(one.in_stock is None for one in there.values())
        else:
            assert cap is not None and all(one.category is None for one in there.values())
        return
    says_scenes = any(one.scenes is not None for one in there.values())

    def passes(item: str) -> bool:
        one = there.get(item, ItemAttributes())
        belongs = one.scenes if one.scenes is not None else EVERYDAY_SCENES
        return (
            item not in history and item not in exclude and (item in TABLE or item in popular)
            and (in_stock is False or one.in_stock is not False)
            and (scene is None or not says_scenes or scene in belongs)
            and (candidates is None or item in candidates)
        )  # fmt: skip

    fill = popular if candidates is None else sorted(
        candidates, key=lambda item: list(dict.fromkeys(popular)).index(item) if item in popular else 99
    )  # fmt: skip
    answer = catalogue.recommend(asked, np.array(graph, np.int64), np.linspace(1, 0, len(graph), dtype=np.float32))
    expected: list[str] = []
    for item in [TABLE[number - 1] for number in graph if number] + fill:
        category = there[item].category if item in there else None
        among = [other for other in expected if other in there and there[other].category == category]
        if passes(item) and item not in expected and (cap is None or category is None or len(among) < cap):
            expected.append(item)
    assert answer.items == expected[:k]
    assert answer.scores == sorted(answer.scores, reverse=True) and len(answer.scores) == len(answer.items)


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"items": []}', b'{"items": {"1": {"colour": "red"}}}', b'{"items": {"1": {"category": ""}}}',
     b'{"items": {"1": {"scenes": ["attic"]}}}', b'{"items": {}, "popular": {"attic": []}}',
     b'{"items": {"1": {"in_stock": 3}}}', b"\xff"],
)  # fmt: skip
def test_attributes_of_another_form_are_refused(raw: bytes) -> None:
    with pytest.raises(PackageError):
        parse_attributes(raw, where=Path("attributes.json"))


def test_stock_changes_without_a_new_package_and_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    catalogue, path = shop(), tmp_path / "stock.json"
    with pytest.raises(InputError, match="no stock file"):
        catalogue.watch_stock(path)
    write_json(path, {"out_of_stock": ["0", "2", "not in the table"]})
    watched = Catalogue(TABLE, TABLE[::-1], max_history=5)
    stock = watched.watch_stock(path)
    assert best(watched, k=3).items == ["1", "3", "4"]
    assert best(watched, k=3, in_stock_only=False).items == ["0", "1", "2"]
    before = watched.stock
    write_json(path, {"out_of_stock": ["1"]})
    asked_before = ask(watched, k=3)
    assert stock.refresh() and best(watched, k=3).items == ["0", "2", "3"]
    assert before is not None and watched.stock is not None and before.token != watched.stock.token
    assert asked_before.stock is before
    for damage in (b"", b"[]", b'{"out_of_stock": {}}', b'{"out_of_stock": [1]}', b'{"out_of_stock": [], "more": 1}'):
        path.write_bytes(damage)
        assert not stock.refresh()
    assert stock.failures == 5 and best(watched, k=3).items == ["0", "2", "3"]


def test_a_package_that_says_what_is_in_stock_is_overruled_by_the_file(tmp_path: Path) -> None:
    catalogue, path = shop(), tmp_path / "stock.json"
    write_json(path, {"out_of_stock": ["0"]})
    catalogue.watch_stock(path)
    assert best(catalogue, k=12).items == TABLE[1:]
