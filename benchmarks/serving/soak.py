"""A long even load on one server: does its memory grow, do its latencies drift?"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.serving.figures import slope_per_hour
from benchmarks.serving.parts import Bench
from benchmarks.serving.servers import ENDCAP, cpu_s, memory_mb

__all__ = ["judge", "soak"]

_RATE = 200.0
_WINDOW_S = 10.0
_SETTLING_SHARE = 0.1
"""The first tenth: arenas and caches fill."""
_MOST_MB_PER_HOUR = 10.0
_MOST_DRIFT = 0.5
_MOST_COST_DRIFT = 0.2
"""Of processor time a request, which does not depend on who else uses the machine."""
_LEAST_WINDOWS = 6
_LEAST_H = 5 / 60
"""Over less, what the allocator keeps looks like growth."""


def soak(bench: Bench, seconds: float) -> dict[str, Any]:
    """200 one-row requests a second for ``seconds``, looked at in windows of 10 s.

    Raises:
        OutcomeError: the server ended.
    """
    made = bench.sasrec()
    bodies = bench.bodies(made)
    at_s: list[float] = []
    memory: list[float] = []
    p50: list[float] = []
    p99: list[float] = []
    cost_ms: list[float] = []
    loads: list[float] = []
    failed = 0
    with bench.serve(ENDCAP, made) as running:
        begun_s = time.monotonic()
        while time.monotonic() - begun_s < seconds:
            window = min(_WINDOW_S, max(1.0, seconds / (2 * _LEAST_WINDOWS)))
            used_s = cpu_s(running.process)
            found = bench.client.load(running.http, running.infer_path, bodies, connections=32, seconds=window,
                                      rate=_RATE, warm=0.0)  # fmt: skip
            running.check_alive()
            cost_ms.append(1000 * (cpu_s(running.process) - used_s) / max(1, found["due"]))
            loads.append(round(os.getloadavg()[0], 1))
            failed += found["due"] - found["answered"]["count"]
            at_s.append(time.monotonic() - begun_s)
            memory.append(memory_mb(running.process))
            p50.append(found["answered"]["p50_ms"])
            p99.append(found["answered"]["p99_ms"])
            if len(at_s) % 6 == 0:
                bench.say(f"{at_s[-1]:.0f} s: {memory[-1]:.1f} MB, p50 {p50[-1]:.2f} ms, p99 {p99[-1]:.2f} ms, "
                          f"{cost_ms[-1]:.3f} ms of processor time a request, load {loads[-1]}")  # fmt: skip
    return {
        **judge(at_s, memory, p50, failed, cost_ms), "seconds": seconds, "rate": _RATE, "at_s": at_s,
        "rss_mb": memory, "p50_ms": p50, "p99_ms": p99, "cost_ms": cost_ms, "load": loads,
    }  # fmt: skip


def judge(at_s: Sequence[float], memory_mb: Sequence[float], p50_ms: Sequence[float], failed: int,
          cost_ms: Sequence[float]) -> dict[str, Any]:  # fmt: skip
    """Slopes of all but the first tenth, and the verdict: ``inconclusive`` where it was too short to tell.

    Memory may grow by 10 MB an hour or, over a short soak, by 1 MB in all; the median latency by half of itself.
    Latencies that drift while a request's processor time does not are the machine's: inconclusive.
    """
    skipped = int(len(at_s) * _SETTLING_SHARE)
    times, sizes, middles, costs = at_s[skipped:], memory_mb[skipped:], p50_ms[skipped:], cost_ms[skipped:]
    grows = slope_per_hour(times, sizes)
    span_h = (times[-1] - times[0]) / 3600 if times else 0.0
    grown, drift, dearer = grows * span_h, _drift(times, middles), _drift(times, costs)
    why = (
        f"memory {grows:+.1f} MB an hour ({grown:+.1f} MB in {span_h * 60:.0f} min), "
        f"median latency {drift:+.0%} over it, processor time a request {dearer:+.0%}, "
        f"{failed} requests without a good answer"
    )
    verdict = "pass"
    if failed:
        verdict = "fail"
    elif len(times) < _LEAST_WINDOWS or span_h < _LEAST_H:
        verdict = "inconclusive"
    elif (grows > _MOST_MB_PER_HOUR and grown > 1.0) or dearer > _MOST_COST_DRIFT:
        verdict = "fail"
    elif drift > _MOST_DRIFT:
        verdict = "inconclusive"
    return {"verdict": verdict, "why": why, "memory_mb_per_hour": grows, "latency_drift": drift,
            "cost_drift": dearer, "failed": failed}  # fmt: skip


def _drift(at_s: Sequence[float], values: Sequence[float]) -> float:
    """How much the trend's end is above its begin, as a share of it."""
    if len(at_s) < 2:
        return 0.0
    rise = slope_per_hour(at_s, values) * (at_s[-1] - at_s[0]) / 3600
    begin = statistics.median(values) - rise / 2
    return rise / begin if begin > 0 else 0.0
