"""The figures of `make bench-training` follow from both contestants' records alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.training.verdict import Final, Point, compare, draw, table

OURS = [Point(1, 10, 9, 0.03), Point(2, 20, 18, 0.05), Point(3, 30, 27, 0.07)]
THEIRS = [Point(1, 50, 40, 0.01), Point(2, 100, 80, 0.04), Point(3, 150, 120, 0.035)]


def test_the_ratio_is_of_the_times_to_the_opponents_best() -> None:
    comparison = compare(OURS, THEIRS)
    assert comparison is not None
    assert comparison.best_valid_ndcg_at_10 == 0.04
    assert (comparison.recbole_wall_s, comparison.ours_wall_s, comparison.ratio_wall) == (100, 20, 5.0)
    assert comparison.ratio_cpu == 80 / 18


def test_there_is_no_ratio_where_ours_never_got_as_far_or_there_is_no_opponent() -> None:
    assert compare(OURS[:1], THEIRS) is None
    assert compare(OURS, []) is None


def test_the_table_and_the_curve_are_written_with_an_opponent_and_without(tmp_path: Path) -> None:
    ours = Final(0.058, 0.096, 12, 12, 125.0)
    assert "0.0580" in table(ours, Final(0.04, 0.08, 9, 8, 3600.0), compare(OURS, THEIRS))
    assert "not run" in table(ours, None, None)
    draw(tmp_path / "curve.svg", {"ours": OURS, "theirs": THEIRS})
    assert "<svg" in (tmp_path / "curve.svg").read_text()
