"""The recommender's steps on plain numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from serving.server.steps import Filter, Step, Wanted, capped, distinct, select, table_of

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
