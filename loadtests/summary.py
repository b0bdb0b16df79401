"""Exact figures from raw requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from endcap.objectives import Objectives
from endcap.outcomes import exact_percentile, judge_requests
from endcap.records import RequestRecord
from loadtests.config import LoadSummary, Threshold

__all__ = ["SATURATED", "summarise"]

SATURATED = "load generator saturated"
"""The ``error`` of an arrival that the generator could not send."""


def summarise(records: Sequence[RequestRecord], *, span_s: float, objectives: Objectives | None = None) -> LoadSummary:
    """A load's summary. ``span_s``: how long arrivals were offered."""
    asked = [record for record in records if record.kind == "recommend"]
    beacons = [record for record in records if record.kind == "feedback"]
    latencies_ms = np.array([record.latency_s * 1000 for record in asked])
    lags_ms = np.array([(record.sent_s - record.intended_s) * 1000 for record in asked])
    failed = sum(record.failed for record in asked)
    span_s = max(span_s, 1e-9)
    thresholds = () if objectives is None else judge_requests(objectives, records)
    return LoadSummary(
        requests=len(asked),
        failed=failed,
        offered_rps=len(asked) / span_s,
        achieved_rps=(len(asked) - failed) / span_s,
        p50_ms=exact_percentile(latencies_ms, 50),
        p95_ms=exact_percentile(latencies_ms, 95),
        p99_ms=exact_percentile(latencies_ms, 99),
        feedback=len(beacons),
        feedback_failed=sum(record.failed for record in beacons),
        saturated=sum(record.error == SATURATED for record in asked),
        lag_p99_ms=exact_percentile(lags_ms, 99),
        thresholds=tuple(
            Threshold(one.name, one.goal, one.counts.share, one.counts.total, one.held) for one in thresholds
        ),
    )
