"""From a request to an answer, without a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError, PackageError
from endcap.package import Manifest, Task, TensorSpec, Variant
from serving.server.engine import GraphError
from serving.server.recommend import Catalogue, history_tensor, parse_request

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


CATALOGUE = Catalogue([str(100 + number) for number in range(30)], ["129", "128", "129", "100"], max_history=5)
IDS = st.lists(st.integers(90, 140).map(str), max_size=40)


def test_unknown_items_are_dropped_and_the_newest_known_are_kept() -> None:
    known = CATALOGUE.known(["100", "nope", "101", "101"])
    assert known == [1, 2, 2]
    assert history_tensor(known, manifest()).tolist() == [[1, 2, 2]]
    assert history_tensor(list(range(1, 10)), manifest()).tolist() == [[5, 6, 7, 8, 9]]
    assert history_tensor([7], manifest(length=4)).tolist() == [[0, 0, 0, 7]]
    assert history_tensor([7, 8, 9, 10, 11], manifest(length=4)).tolist() == [[8, 9, 10, 11]]


@given(history=IDS, k=st.integers(1, 20))
def test_the_fallback_is_popular_without_repeats_and_without_the_history(history: list[str], k: int) -> None:
    answer = CATALOGUE.popular(history, k)
    assert answer.items == [item for item in ["129", "128", "100"] if item not in history][:k]
    assert answer.fallback == "popular"
    assert answer.scores == sorted(answer.scores, reverse=True)


@given(history=IDS, k=st.integers(1, 20), indices=st.lists(st.integers(0, 30), min_size=20, max_size=20, unique=True))
def test_an_answer_keeps_the_order_and_leaves_out_padding_and_the_whole_history(
    history: list[str], k: int, indices: list[int]
) -> None:
    known = CATALOGUE.known(history)
    answer = CATALOGUE.answer(known, np.array(indices), np.linspace(1, 0, 20, dtype=np.float32), k)
    assert answer.items == [str(99 + index) for index in indices if index and str(99 + index) not in history][:k]
    assert len(answer.items) == len(answer.scores)


def test_masked_scores_are_left_out() -> None:
    answer = CATALOGUE.answer([1], np.array([3, 4]), np.array([1.0, -np.inf], np.float32), 2)
    assert answer.items == ["102"]


@pytest.mark.parametrize(("indices", "scores"), [([31], [1.0]), ([-1], [1.0]), ([1], [float("nan")])])
def test_a_graph_that_answers_nonsense_has_failed(indices: list[int], scores: list[float]) -> None:
    with pytest.raises(GraphError):
        CATALOGUE.answer([], np.array(indices), np.array(scores, np.float32), 1)


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
