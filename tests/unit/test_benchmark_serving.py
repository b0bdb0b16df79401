"""The serving benchmark's arithmetic: what falls short is said, slopes are right, requests are reproducible."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.client import http_body
from benchmarks.serving.figures import shortfalls, slope_per_hour, spread, table
from benchmarks.serving.packages import HEAVY, SASREC, inputs_of
from benchmarks.serving.soak import judge


def measured(**changes: Any) -> dict[str, Any]:
    rates = {"endcap_rps": 3000.0, "kserve_rps": 400.0, "mlserver_rps": 300.0,
             "spread": {name: spread([1.0, 2.0]) for name in ("endcap", "kserve", "mlserver")}}  # fmt: skip
    return {
        "one_row_http": {**rates, "p99_ms": {"endcap": 5.0, "kserve": 90.0, "mlserver": 80.0}, "p99_rate": 300.0},
        "one_row_grpc": rates, "heavy_share_of_ort": 0.95, "cache_ratio": 9.0, "ready_s": 1.2, "rss_mb": 150.0,
        "overload_goodput_share": 0.95, "overload": {"refused_p99_ms": 20.0, "failures": 0},
        "fuzzed": {"requests": 100_000, "status_5xx": 0, "hangs": 0},
    } | changes  # fmt: skip


def test_figures_that_reach_everything_have_no_shortfall() -> None:
    assert shortfalls(measured()) == []
    assert shortfalls({}) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"heavy_share_of_ort": 0.89}, "heavy_share_of_ort"),
        ({"cache_ratio": 4.9}, "cache_ratio"),
        ({"ready_s": 2.1}, "ready_s"),
        ({"rss_mb": 251.0}, "rss_mb"),
        ({"overload_goodput_share": 0.8}, "overload_goodput_share"),
        ({"overload": {"refused_p99_ms": 51.0, "failures": 0}}, "refusals"),
        ({"overload": {"refused_p99_ms": 5.0, "failures": 1}}, "no answer"),
        ({"fuzzed": {"requests": 9, "status_5xx": 0, "hangs": 1}}, "hangs"),
        ({"one_row_grpc": {"endcap_rps": 599.0, "kserve_rps": 400.0, "mlserver_rps": 300.0}}, "kserve"),
    ],
)
def test_what_falls_short_is_said(changes: dict[str, Any], word: str) -> None:
    wrong = shortfalls(measured(**changes))
    assert len(wrong) == 1
    assert word in wrong[0]


def test_a_p99_that_is_low_but_above_a_peers_falls_short() -> None:
    document = measured()
    document["one_row_http"]["p99_ms"]["mlserver"] = 4.0
    assert len(shortfalls(document)) == 1


def test_the_table_has_what_was_measured_only() -> None:
    assert "0.95" in table(measured())
    assert "gRPC" not in table({"ready_s": 1.0})


def test_one_odd_sample_does_not_move_the_slope() -> None:
    at_s = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    memory = [100.0, 101.0, 102.0, 400.0, 104.0, 105.0, 106.0]
    assert slope_per_hour(at_s, memory) == pytest.approx(360.0)
    assert slope_per_hour([1.0], [2.0]) == 0.0


def test_a_soak_is_judged_by_growth_drift_and_failures() -> None:
    at_s = [60.0 * minute for minute in range(1, 31)]
    even, quick = [150.0] * 30, [1.0] * 30
    slower = [1.0 + minute / 20 for minute in range(30)]
    assert judge(at_s, even, quick, 0, quick)["verdict"] == "pass"
    assert judge(at_s, [150.0 + minute for minute in range(30)], quick, 0, quick)["verdict"] == "fail"
    assert judge(at_s, even, slower, 0, slower)["verdict"] == "fail"
    assert judge(at_s, even, slower, 0, quick)["verdict"] == "inconclusive"  # the machine's doing
    assert judge(at_s, even, quick, 1, quick)["verdict"] == "fail"
    assert judge(at_s[:3], even[:3], quick[:3], 0, quick[:3])["verdict"] == "inconclusive"
    growing = [150.0 + second for second in range(30)]
    assert judge([float(second) for second in range(30)], growing, quick, 0, quick)["verdict"] == "inconclusive"
    assert judge([], [], [], 0, [])["verdict"] == "inconclusive"


@pytest.mark.parametrize("name", [SASREC, HEAVY])
def test_requests_follow_from_the_seed_and_have_their_shapes(name: str) -> None:
    once, again = inputs_of(name, 20, seed=3), inputs_of(name, 20, seed=3)
    for one, other in zip(once, again, strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
        tensors = json.loads(http_body(one))["inputs"]
        assert all(len(tensor["data"]) == tensor["shape"][1] for tensor in tensors)
