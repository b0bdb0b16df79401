"""Judged queries: reading them, and NDCG and BM25 by hand."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest

from components.text.bm25 import Bm25
from components.text.judged import JudgedQuery, by_bm25, measure_ranking, ndcg, read_judged
from endcap.errors import DataError


def test_ndcg_is_what_it_is_by_hand() -> None:
    # Best first: grades 0, 3, 1; ideal: 3, 1, 0.
    found = 7 / math.log2(3) + 1 / math.log2(4)
    ideal = 7 + 1 / math.log2(3)
    assert ndcg([3, 1, 0], np.array([0.5, 0.1, 0.9])) == pytest.approx(found / ideal)
    assert ndcg([3, 1, 0], np.array([3.0, 2.0, 1.0])) == 1.0
    assert ndcg([0, 0], np.array([1.0, 2.0])) == 0.0
    assert ndcg([0, 3], np.array([2.0, 1.0]), k=1) == 0.0


def test_a_query_without_anything_relevant_does_not_count() -> None:
    queries = [JudgedQuery("q", ("a", "b"), (0, 1)), JudgedQuery("none", ("a",), (0,))]
    found = measure_ranking(queries, lambda query: np.arange(len(query.texts)), seed=1)
    assert (found.queries, found.relevant, found.ndcg_at_10.value) == (2, 1, 1.0)
    with pytest.raises(DataError, match="no query has"):
        measure_ranking(queries[1:], lambda query: np.zeros(1), seed=1)


def test_bm25_prefers_rare_words_short_texts_and_repeats_less_and_less() -> None:
    index = Bm25(["red red shoe", "red lamp", "a long text on a red thing of no use", "green shoe"])
    rare, common = index.scores("lamp red", ["lamp", "red"])
    assert rare > common > 0
    short, long = index.scores("red", ["red lamp", "red lamp and much more of other things here"])
    assert short > long
    once, twice, thrice = (index.scores("red", [f"{'red ' * times}{'x ' * (3 - times)}"])[0] for times in (1, 2, 3))
    assert twice - once > thrice - twice > 0
    assert index.scores("unheard of", ["red"])[0] == 0.0
    queries = [JudgedQuery("Lamp!", ("green shoe", "red lamp"), (0, 1))]
    assert measure_ranking(queries, by_bm25(queries), seed=1).ndcg_at_10.value == 1.0


def write(folder: Path, judgements: str, products: object) -> None:
    (folder / "judgements.csv").write_text(judgements)
    with zipfile.ZipFile(folder / "1.json.zip", "w") as archive:
        archive.writestr("1.json", json.dumps(products))


def test_judgements_and_products_are_joined(tmp_path: Path) -> None:
    products = [{"id": 7, "title": "Lamp", "short_description": "red"}, {"id": "8", "title": "Shoe"}, {"id": "9"}]
    write(tmp_path, 'query,docid,rating\nlight,7,3\n"light, small",8,0\nlight,8,1\nlight,404,2\n', products)
    assert read_judged(tmp_path) == [
        JudgedQuery("light", ("Lamp red", "Shoe"), (3, 1)), JudgedQuery("light, small", ("Shoe",), (0,)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("judgements", "products"),
    [("", []), ("query,docid\na,1\n", []), ("query,docid,rating\na,1,x\n", []), ("query,docid,rating\na,1,99\n", []),
     ("query,docid,rating\na,1,1\n", {"id": 1}), ("query,docid,rating\na,1,1\n", [{"title": "x"}])],
)  # fmt: skip
def test_files_of_another_form_are_named(tmp_path: Path, judgements: str, products: object) -> None:
    write(tmp_path, judgements, products)
    with pytest.raises(DataError) as refused:
        read_judged(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no judgements"):
        read_judged(tmp_path)
    (tmp_path / "judgements.csv").write_text("query,docid,rating\na,1,1\n")
    with pytest.raises(DataError, match="no products"):
        read_judged(tmp_path)
