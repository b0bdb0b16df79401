"""What each drill did to shoppers: :mod:`endcap.recovery` on a run's own records."""

from __future__ import annotations

from dataclasses import replace

from endcap.recovery import Recovery, measure_recovery, span_of
from endcap.report.run import Drill, Run

__all__ = ["measure_drill"]


def measure_drill(run: Run, drill: Drill) -> Recovery | None:
    """None where no request was recorded, or where there are no objectives to judge by."""
    if run.requests is None or run.objectives is None or len(run.requests) == 0:
        return None
    ended_at_s = drill.ended_at_s if drill.ended_at_s is not None else float(run.requests.done_s.max())
    span = span_of(drill.name, run.faults, started_at_s=drill.started_at_s, ended_at_s=ended_at_s)
    if span.fault_at_s is None:
        span = replace(span, fault_at_s=drill.fault_at_s)
    return measure_recovery(run.objectives, run.requests.records, run.events, span)
