"""Queries whose results people have judged, and how well something ranks them."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.text.bm25 import Bm25
from endcap.errors import DataError
from endcap.evidence.bootstrap import Estimate, estimate, resampled_means

__all__ = ["JudgedQuery", "Ranking", "Scorer", "by_bm25", "by_chance", "measure_ranking", "ndcg", "read_judged"]

_RESAMPLES = 2000

MAX_GRADE = 10
MAX_PRODUCTS_BYTES = 1 << 30


@dataclass(frozen=True)
class JudgedQuery:
    """``texts``: of the candidates, in no order that helps; ``grades``: of each, 0 for irrelevant."""

    query: str
    texts: tuple[str, ...]
    grades: tuple[int, ...]


Scorer = Callable[[JudgedQuery], NDArray[np.floating]]
"""A score for each candidate, higher is better."""


@dataclass(frozen=True)
class Ranking:
    """``ndcg_at_10``: its mean over the queries that have a relevant candidate, with a bootstrap interval."""

    queries: int
    relevant: int
    ndcg_at_10: Estimate


def read_judged(folder: Path) -> list[JudgedQuery]:
    """Judgements with the products that they are of, as querqy/chorus publishes them.

    ``judgements.csv`` (``query,docid,rating``) and ``*.json.zip`` (lists of products with ``id``, ``title`` and perhaps
    ``short_description``). Products without a judgement, and judgements of products that are not there, are left out.

    Raises:
        DataError: a file that is missing or of another form.
    """
    path = folder / "judgements.csv"
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        judged = [(row["query"], row["docid"], int(row["rating"])) for row in rows]
    except OSError as error:
        raise DataError("no judgements there", where=path) from error
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise DataError("not judgements: query,docid,rating", where=path) from error
    if not judged or not all(0 <= grade <= MAX_GRADE for _, _, grade in judged):
        raise DataError(f"no judgements, or a rating outside 0 to {MAX_GRADE}", where=path)
    wanted = {product for _, product, _ in judged}
    texts = {product: text for product, text in _products(folder) if product in wanted}
    by_query: dict[str, dict[str, int]] = {}
    for query, product, grade in judged:
        if product in texts:
            by_query.setdefault(query, {})[product] = grade
    return [
        JudgedQuery(query, tuple(texts[product] for product in sorted(grades)),
                    tuple(grades[product] for product in sorted(grades)))
        for query, grades in by_query.items()
    ]  # fmt: skip


def _products(folder: Path) -> Iterator[tuple[str, str]]:
    archives = sorted(folder.glob("*.json.zip"))
    if not archives:
        raise DataError("no products there", where=folder, next_step="put *.json.zip beside the judgements")
    for path in archives:
        try:
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.is_dir() or entry.file_size > MAX_PRODUCTS_BYTES:
                        continue
                    for product in json.loads(archive.read(entry)):
                        described = str(product.get("short_description") or "")
                        yield str(product["id"]), f"{product.get('title', '')} {described}".strip()
        except (OSError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a list of products ({type(error).__name__})", where=path) from error


def ndcg(grades: Sequence[int], scores: NDArray[np.floating], *, k: int = 10) -> float:
    """NDCG@k of one query with gain ``2^grade - 1`` (Burges et al., ICML 2005). Ties keep the candidates' order.

    0 for a query without a relevant candidate, which is better left out.
    """
    gains = np.exp2(np.asarray(grades, np.float64)) - 1.0
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:k]
    discounts = 1.0 / np.log2(np.arange(2, 2 + min(k, len(gains))))
    ideal = float((np.sort(gains)[::-1][:k] * discounts).sum())
    return float((gains[order] * discounts).sum()) / ideal if ideal > 0 else 0.0


def measure_ranking(queries: Sequence[JudgedQuery], scorer: Scorer, *, seed: int) -> Ranking:
    """How well ``scorer`` ranks the judged candidates of each query.

    Raises:
        DataError: there is nothing relevant to be found.
    """
    relevant = [query for query in queries if any(query.grades)]
    if not relevant:
        raise DataError("no query has a relevant candidate", next_step="judge more of them")
    found = np.array([ndcg(query.grades, scorer(query)) for query in relevant])
    draws = resampled_means(found[:, None], resamples=_RESAMPLES, seed=seed)[:, 0]
    return Ranking(len(queries), len(relevant), estimate(float(found.mean()), draws))


def by_bm25(queries: Sequence[JudgedQuery]) -> Scorer:
    """BM25 over all judged candidates, for comparison."""
    index = Bm25([text for query in queries for text in query.texts])
    return lambda query: index.scores(query.query, query.texts)


def by_chance(seed: int) -> Scorer:
    """Any order, for comparison."""
    draw = np.random.default_rng(seed)
    return lambda query: draw.random(len(query.texts))
