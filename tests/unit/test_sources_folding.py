"""Counters become events counted once: resets, gaps, duplicates, births, NaN and clocks that jump."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endcap.evidence import Counts
from serving.sources.folding import Folders, Series, SeriesFolder

Scrape = tuple[float, dict[str, float]]
NAN, INF = math.nan, math.inf


def series(scrapes: Sequence[Scrape], *, version: str = "7", process: str = "p", copy: str = "") -> list[Series]:
    """Keys that begin with ``ok`` are good; all are total."""
    keys = sorted({key for _, values in scrapes for key in values})
    return [
        Series(version, process, key, key.startswith("ok"), True,
               [(at_s, values[key]) for at_s, values in scrapes if key in values], copy)
        for key in keys
    ]  # fmt: skip


def folded(*reads: Sequence[Scrape], **options: object) -> Counts:
    folder = SeriesFolder(needs_good=False, **options)  # type: ignore[arg-type]
    for scrapes in reads:
        folder.fold(series(scrapes), began_s=0.0)
    return folder.counts(since_s=-1e9).get("7", Counts())


def both(ok: float, bad: float) -> dict[str, float]:
    return {"ok": ok, "bad": bad}


@pytest.mark.parametrize(
    ("what", "reads", "expected"),
    [
        ("the first scrape is where counting begins", [[(0, both(90, 10))]], Counts(0, 0)),
        ("increments count", [[(0, both(90, 10))], [(1, both(95, 11))]], Counts(5, 6)),
        ("many scrapes in a read", [[(0, both(0, 0)), (1, both(3, 1)), (2, both(4, 1))]], Counts(4, 5)),
        ("a scrape read again", [[(0, both(0, 0)), (1, both(3, 1))], [(0, both(0, 0)), (1, both(3, 1))]], Counts(3, 4)),
        ("a restart", [[(0, both(90, 10))], [(1, both(4, 2))]], Counts(4, 6)),
        ("a restart seen on one counter only", [[(0, both(90, 2))], [(1, both(4, 3))]], Counts(4, 7)),
        ("a gap", [[(0, both(90, 10))], [(3600, both(95, 11))]], Counts(5, 6)),
        ("NaN", [[(0, both(0, 0)), (1, both(NAN, 1)), (2, both(5, 1))]], Counts(5, 6)),
        ("infinity", [[(0, both(0, 0)), (1, both(INF, 1)), (2, both(5, 1))]], Counts(5, 6)),
        ("a negative number", [[(0, both(0, 0)), (1, both(-1, 1)), (2, both(5, 1))]], Counts(5, 6)),
        ("two values at once", [[(0, both(0, 0)), (1, both(9, 1)), (1, both(8, 1)), (2, both(5, 1))]], Counts(5, 6)),
        ("time goes back", [[(9, both(0, 0))], [(5, both(50, 0))], [(10, both(1, 1))]], Counts(1, 2)),
        ("a series misses one scrape", [[(0, both(0, 0)), (1, {"ok": 4.0}), (2, both(5, 2))]], Counts(5, 7)),
        (
            "a series is born: that step alone is lost",
            [[(0, {"ok": 10.0}), (1, {"ok": 11.0}), (2, both(15, 3)), (3, both(16, 4))]],
            Counts(2, 3),
        ),
        (
            "a process that restarts under new names counts from its first scrapes on",
            [[(0, {"ok": 10.0})], [(t, {"ok_new": 5.0 + t}) for t in range(1, 7)]],
            Counts(2, 2),
        ),
        (
            "a series is gone for good: it is waited for, then the step without it is lost",
            [[(0, both(0, 0))], [(t, {"ok": 10.0 * t}) for t in range(1, 6)]],
            Counts(10, 10),
        ),
        (
            "a series is missing from scrapes that are read twice, and comes back",
            [[(0, both(0, 0))], *[[(t, {"ok": 1.0}) for t in range(1, 4)]] * 2, [(4, both(5, 2))]],
            Counts(5, 7),
        ),
        ("no series at all", [[]], Counts(0, 0)),
    ],
)
def test_what_happens_to_counters(what: str, reads: list[list[Scrape]], expected: Counts) -> None:
    assert folded(*reads) == expected, what


def test_only_scrapes_since_the_source_began_count() -> None:
    folder = SeriesFolder(needs_good=False)
    folder.fold(series([(1, both(10, 0)), (2, both(20, 0)), (3, both(30, 0))]), began_s=2.5)
    assert folder.counts(since_s=0) == {"7": Counts(10, 10)}


def test_good_and_total_of_other_names_count_only_where_one_scrape_has_both() -> None:
    folder = SeriesFolder(needs_good=True)
    good = Series("7", "p", "bucket", True, False, [(0, 0.0), (1, 9.0)])
    total = Series("7", "p", "count", False, True, [(0, 0.0), (1, 10.0), (2, 20.0)])
    folder.fold([good, total], began_s=0)
    assert folder.counts(since_s=0) == {"7": Counts(9, 10)}
    assert folder.passed_over == "total has samples where good has none"
    good = Series("7", "p", "bucket", True, False, [(1, 9.0), (2, 19.0)])
    folder.fold([good, total], began_s=0)
    assert folder.counts(since_s=0) == {"7": Counts(19, 20)}


def test_a_version_without_a_new_scrape_has_no_data() -> None:
    folder = SeriesFolder(needs_good=False)
    folder.fold([*series([(10, both(0, 0))]), *series([(50, both(0, 0))], version="8", process="q")], began_s=0)
    assert folder.counts(since_s=20) == {"8": Counts(0, 0)}
    assert folder.newest_s == 50


def test_copies_of_a_pair_of_scrapers_count_once_and_one_takes_over() -> None:
    folder = SeriesFolder(needs_good=False, switch_after_s=5)
    # The second scraper's clock is ahead: its samples look newer and are smaller. No restart happened.
    for now in range(20):
        first = [(float(t), both(10 * t, 0)) for t in range(now) if t < 8]
        second = [(t + 0.5, both(10 * t - 3, 0)) for t in range(1, now)]
        folder.fold([*series(first, copy="a"), *series(second, copy="b")], began_s=0)
    (counts,) = folder.counts(since_s=0).values()
    assert 160 <= counts.total <= 180


def test_a_copy_that_is_late_is_waited_for() -> None:
    folder = SeriesFolder(needs_good=False, switch_after_s=5)
    for at_s, copy, value in ((0.0, "a", 0.0), (1.0, "b", 9.0), (2.0, "a", 20.0)):
        folder.fold(series([(at_s, both(value, 0))], copy=copy), began_s=0)
    assert folder.counts(since_s=0) == {"7": Counts(20, 20)}


def test_good_that_was_read_a_moment_after_total_is_no_more_than_total() -> None:
    folder = SeriesFolder(needs_good=True)
    good = Series("7", "p", "bucket", True, False, [(0, 0.0), (1, 5.0)])
    total = Series("7", "p", "count", False, True, [(0, 0.0), (1, 4.0)])
    folder.fold([good, total], began_s=0)
    assert folder.counts(since_s=0) == {"7": Counts(4, 4)}


def test_reading_the_same_again_counts_nothing_twice() -> None:
    folders = Folders({"o": SeriesFolder(needs_good=False)})
    folders.fold("o", series([(0, both(90, 10))]), at_s=0)
    for _ in range(2):
        folder = folders.fold("o", series([(0, both(90, 10)), (1, both(93, 11))]), at_s=1)
        assert folder.counts(since_s=0) == {"7": Counts(3, 4)}


def test_memory_is_bounded_and_forgetting_invents_nothing() -> None:
    folder = SeriesFolder(needs_good=False, max_series=10)
    for number in range(200):
        scrapes = [(float(number), both(1000, 1000)), (number + 0.5, both(1001, 1000))]
        folder.fold(series(scrapes, version=str(number % 50), process=str(number)), began_s=0)
    assert len(folder._processes) <= 5
    assert len(folder._sums) <= 11
    assert all(counts.total <= 4 for counts in folder.counts(since_s=0).values())


# What really happened to one process: events by kind, restarts, and scrapes that are taken, lost or damaged.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("events"), st.sampled_from(["ok", "ok2", "bad"]), st.integers(1, 20)),
        st.tuples(st.just("restart"), st.just(""), st.just(0)),
        st.tuples(st.just("scrape"), st.just(""), st.just(0)),
        st.tuples(st.just("scrape"), st.just("nan"), st.just(0)),
        st.tuples(st.just("lost"), st.just(""), st.just(0)),
    ),
    max_size=40,
)


@dataclass
class Truth:
    scrapes: list[Scrape] = field(default_factory=list)
    good: int = 0
    bad: int = 0


def happen(steps: Sequence[tuple[str, str, int]], *, lazy: bool) -> Truth:
    """``lazy``: a counter is there from its first event on, not before."""
    names = ("ok", "ok2", "bad")
    truth = Truth()
    now_s, held = 0.0, dict.fromkeys([] if lazy else names, 0.0)
    for what, kind, count in steps:
        now_s += 1.0
        if what == "events":
            held[kind] = held.get(kind, 0.0) + count
            if truth.scrapes:
                truth.good += count * kind.startswith("ok")
                truth.bad += count * (kind == "bad")
        elif what == "restart":
            held = dict.fromkeys([] if lazy else names, 0.0)
        elif what == "scrape" and held:
            truth.scrapes.append((now_s, dict.fromkeys(held, NAN) if kind == "nan" else dict(held)))
    return truth


def brute_force(scrapes: Sequence[Scrape]) -> Counts:
    """The whole history at once, of a process whose counters are all there from its start."""
    whole = [values for _, values in scrapes if not any(math.isnan(value) for value in values.values())]
    good = total = 0.0
    for before, after in itertools.pairwise(whole):
        back = any(after[key] < before[key] for key in after)
        new = {key: after[key] - (0 if back else before[key]) for key in after}
        total += sum(new.values())
        good += sum(value for key, value in new.items() if key.startswith("ok"))
    return Counts(int(good), int(total))


def read_in_parts(scrapes: Sequence[Scrape], cuts: Sequence[int], overlap: int) -> Counts:
    """As a source would: overlapping windows, in any order of samples."""
    folders = Folders({"o": SeriesFolder(needs_good=False)})
    for end in sorted({min(cut, len(scrapes)) for cut in cuts} | {len(scrapes)}):
        begin = 0 if folders.began_s is None else max(0, end - overlap)
        # Never more than the window lacks: what was not read yet is always in it.
        begin = min(begin, next((i for i, (at_s, _) in enumerate(scrapes) if at_s > (last_s(folders) or 0)), begin))
        folders.fold("o", reversed(series(scrapes[begin:end])), at_s=0.0)
    return folders.by_name["o"].counts(since_s=-1).get("7", Counts())


def last_s(folders: Folders) -> float | None:
    return folders.by_name["o"].newest_s


@settings(max_examples=150)
@given(steps, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 40))
def test_reading_in_parts_is_the_same_as_the_whole_history_at_once(
    steps: list[tuple[str, str, int]], cuts: list[int], overlap: int
) -> None:
    truth = happen(steps, lazy=False)
    assert read_in_parts(truth.scrapes, cuts, overlap) == brute_force(truth.scrapes)


@settings(max_examples=150)
@given(steps, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 40))
def test_nothing_is_invented_whatever_series_come_and_go(
    steps: list[tuple[str, str, int]], cuts: list[int], overlap: int
) -> None:
    truth = happen(steps, lazy=True)
    counts = read_in_parts(truth.scrapes, cuts, overlap)
    assert counts == folded(truth.scrapes)
    assert counts.good <= truth.good
    assert counts.total - counts.good <= truth.bad
    json.dumps([counts.good, counts.total])


@given(
    st.lists(
        st.builds(
            Series, st.sampled_from("78"), st.sampled_from("pq"), st.sampled_from("kl"), st.booleans(), st.booleans(),
            st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats()), max_size=4), st.sampled_from("ab"),
        ),
        max_size=8,
    ),
    st.booleans(),
)  # fmt: skip
def test_no_samples_break_it_and_good_is_never_more_than_total(found: list[Series], needs_good: bool) -> None:
    folder = SeriesFolder(needs_good=needs_good)
    for _ in range(2):
        folder.fold(found, began_s=0)
    for counts in folder.counts(since_s=-INF).values():
        assert 0 <= counts.good <= counts.total
