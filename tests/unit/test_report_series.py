"""What the plots stand on: exact percentiles, slices that lose nothing, axes and ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.outcomes import exact_percentile
from endcap.records import RequestRecord
from endcap.report.charts import Axis, Chart, linear_ticks, log_ticks, plain, time_ticks
from endcap.report.run import Attempts, Requests
from endcap.report.series import MAX_SLICES, fold, rolling_share

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 1000))
def test_a_percentile_is_the_smallest_value_that_enough_values_do_not_exceed(values: list[float], mille: int) -> None:
    found = exact_percentile(np.array(values), mille / 10)
    enough = [v for v in values if sum(w <= v for w in values) * 1000 >= mille * len(values)]
    assert found == min(enough)


def test_percentiles_of_nothing_and_of_round_numbers() -> None:
    assert exact_percentile(np.zeros(0), 99) is None
    hundred = np.arange(1.0, 101.0)
    assert [exact_percentile(hundred, p) for p in (50, 95, 99, 99.9, 100)] == [50, 95, 99, 100, 100]
    assert exact_percentile(np.arange(1.0, 1001.0), 99.9) == 999


def _requests(rows: Sequence[tuple[float, float, bool, str | None, bool]]) -> Requests:
    ordered = sorted(rows, key=lambda row: row[0])
    at, took, failed, version, clicked = (list(column) for column in zip(*ordered, strict=True))
    labels = np.empty(len(rows), dtype=object)
    labels[:] = version
    intended = np.array(at)
    shown = ~np.array(failed)
    records: tuple[RequestRecord, ...] = ()
    return Requests(records, intended, intended + np.array(took), np.array(failed), labels, shown,
                    np.array(clicked) & shown, ~shown, 0, 0)  # fmt: skip


row = st.tuples(
    st.floats(1000, 5000), st.floats(0.001, 3), st.booleans(), st.sampled_from(["1", "2", None]), st.booleans()
)


@given(st.lists(row, min_size=1, max_size=80))
def test_slices_lose_no_request_and_no_attempt(rows: list[tuple[float, float, bool, str | None, bool]]) -> None:
    requests = _requests(rows)
    attempts = Attempts(requests.intended_s, requests.version, requests.failed, requests.version)
    slices = fold(requests, attempts, ("1", "2"))
    assert len(slices) <= MAX_SLICES + 1
    assert slices.start_s <= requests.intended_s[0]
    assert requests.intended_s[-1] < slices.end_s
    assert slices.asked.sum() == len(requests)
    assert slices.failed.sum() == requests.failed.sum()
    for label in ("1", "2"):
        mine = requests.version == label
        assert slices.answered[label].sum() == (mine & ~requests.failed).sum()
        assert slices.clicked[label].sum() == (mine & requests.clicked).sum()
        assert slices.attempts[label].sum() == mine.sum()
        assert slices.attempts_failed[label].sum() == (mine & requests.failed).sum()
    assert np.isnan(slices.p50_ms[slices.asked == 0]).all()
    assert np.isfinite(slices.p99_ms[slices.asked > 0]).all()


def test_a_share_over_the_last_slices() -> None:
    good, total = np.array([1.0, 0, 2, 0, 0, 0]), np.array([2.0, 2, 4, 0, 0, 0])
    share = rolling_share(good, total, slices=2, at_least=3, quiet=2)
    assert share[1:4].tolist() == [0.25, pytest.approx(2 / 6), 0.5]
    assert np.isnan(share[[0, 4, 5]]).all()


@given(finite, st.floats(1e-6, 1e6), st.integers(1, 12))
def test_linear_ticks_lie_inside_and_are_not_crowded(low: float, length: float, count: int) -> None:
    high = low + length
    ticks = linear_ticks(low, high, count)
    slack = 1e-6 * (abs(low) + length)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert len(ticks) <= count + 2
    assert ticks == sorted(ticks)


@given(st.floats(1e-3, 1e4), st.floats(1.1, 1e5))
def test_log_ticks_lie_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert all(low * 0.99 <= tick <= low * factor * 1.01 for tick in ticks)
    assert ticks == sorted(set(ticks))


@given(st.floats(0, 1e6))
def test_time_ticks_are_few(length: float) -> None:
    ticks = time_ticks(0, length)
    assert len(ticks) <= 10
    assert all(0 <= tick <= length for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (1.5, "1.5"), (-0.25, "−0.25"), (10.0, "10"), (12500, "12,500"), (99.9, "99.9")],
)
def test_numbers_as_a_person_writes_them(value: float, text: str) -> None:
    assert plain(value) == text


def test_a_line_breaks_where_there_is_no_value() -> None:
    chart = Chart("one", Axis(0, 4), Axis(0, 1))
    chart.line([0, 1, 2, 3, 4], [0, 1, math.nan, 1, 0], "c0")
    assert chart.html().count("M0 1000L250 0M750 0L1000 1000") == 1


def test_a_chart_escapes_its_words() -> None:
    chart = Chart('<b> & "', Axis(0, 1), Axis(0, 1), title="<i>")
    chart.text(0, 0, "</svg>")
    page = chart.html()
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;/svg&gt;" in page
