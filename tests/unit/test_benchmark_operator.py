"""The operator's benchmark: its figures, without a cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.operator.__main__ import _shortfalls
from benchmarks.operator.argo import _delays
from benchmarks.operator.measure import percentile, requests_served, watched
from benchmarks.operator.ours import Asked, _plans
from serving.rollout.spec import RolloutDocument


def asked(**changes: Any) -> Asked:
    fields = {"rollouts": 30, "verdicts": 10, "look_s": 10.0, "window_s": 100.0, "out": Path(), "kubeconfig": Path(),
              "say": print}  # fmt: skip
    return Asked(**{**fields, **changes})


@pytest.mark.parametrize(("part", "expected"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)])
def test_a_percentile_is_a_value_that_was_seen(part: float, expected: float) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], part) == expected
    assert percentile([], part) is None


def test_rollouts_with_a_verdict_come_beside_those_that_go_on() -> None:
    plans = _plans(asked())
    due = [plan["due"] for plan in plans.values()]
    assert (due.count(None), due.count("promoted"), due.count("rolled_back")) == (30, 5, 5)
    for namespace, name in plans:
        steps = plans[namespace, name]["steps"]
        document = {"metadata": {"name": name}, "spec": {"service": name, "candidate": "models:/m/2", "steps": steps}}
        RolloutDocument.model_validate(document)


def test_a_measurement_of_the_peer_s_is_due_a_look_after_the_one_before() -> None:
    told = SimpleNamespace(came={"a": [0.0, 10.2, 20.2], "b": [0.0]}, seen={"a": [0.1, 10.7, 20.3]})
    delays = _delays(told, told, 10.0, 5.0, 100.0, {"a", "b"})  # type: ignore[arg-type]
    assert delays == pytest.approx([0.7, 0.1])


def test_requests_are_counted_without_watches() -> None:
    class Told:
        def text(self, path: str) -> bytes:
            return (b"# TYPE apiserver_request_total counter\n"
                    b'apiserver_request_total{verb="PUT",code="200"} 7\n'
                    b'apiserver_request_total{verb="WATCH",code="200"} 90\n'
                    b'apiserver_request_total{verb="GET",code="404"} 2\n')  # fmt: skip

    assert requests_served(Told()) == 9  # type: ignore[arg-type]


def test_a_process_s_memory_is_its_greatest() -> None:
    with watched(os.getpid()) as memory:
        ends_s = time.monotonic() + 60
        while memory.usage.rss_mb == 0 and time.monotonic() < ends_s:
            time.sleep(0.05)
    assert memory.usage.rss_mb > 10


def test_what_falls_short_is_said() -> None:
    good = {"reconcile_p99_s": 0.4, "rss_mb": 300, "missed_verdicts": 0, "wrong": []}
    assert _shortfalls(good) == []
    assert len(_shortfalls({**good, "reconcile_p99_s": 1.2, "rss_mb": 501, "missed_verdicts": 1, "wrong": ["x"]})) == 3
    assert _shortfalls({"peer": {}}) == []
