"""What a look costs a rollout: processor time, and the size of what it has to remember."""

from __future__ import annotations

import gc
import sys
import time
import types
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.rollout.scenarios import OBJECTIVES, PLAIN, SPEC
from endcap.evidence import Counts, Evidence, Stratum
from serving.rollout.decide import begin, decide
from serving.rollout.events import Acted, Gated, Looked, Received
from serving.rollout.spec import Step

__all__ = ["Cost", "measure"]

_DIFFERENT_LOOKS = 500
_BATCHES = 20
_LONG = replace(SPEC, steps=(Step(0.5, 10**9, 60, 10**9), Step(1, 500, 30, 3600)))
"""A rollout that goes on: nearly every look of a real one decides that nothing changes."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of processor time a look of three objectives, of all looks where nothing else is said.

    ``decide_us_*``: of ``decide``. ``look_us_*``: the evidence brought up to date, then ``decide``; ``quietest``: in
    the quietest of twenty batches of looks, since what else a machine does is not the code's.
    ``with_intervals_us_*``: the confidence sequences for people too.
    ``bytes_early``, ``bytes_late``: all that evidence and state hold after ``looks_early`` and ``looks_late`` looks.
    """

    looks: int
    decide_us_median: float
    decide_us_p99: float
    look_us_median: float
    look_us_p99_quietest: float
    look_us_p99: float
    with_intervals_us_median: float
    with_intervals_us_p99: float
    looks_early: int
    bytes_early: int
    looks_late: int
    bytes_late: int


def measure(*, looks: int, late: int, seed: int) -> Cost:
    timed, decisions, early_bytes, late_bytes = _fold(looks, late, seed, intervals=False)
    batches = np.array_split(np.array(timed), _BATCHES)
    with_intervals, _, _, _ = _fold(looks, looks, seed, intervals=True)
    return Cost(
        looks, float(np.median(decisions)), float(np.quantile(decisions, 0.99)),
        float(np.median(timed)), min(float(np.quantile(batch, 0.99)) for batch in batches),
        float(np.quantile(timed, 0.99)),
        float(np.median(with_intervals)), float(np.quantile(with_intervals, 0.99)),
        100, early_bytes, late, late_bytes,
    )  # fmt: skip


def _fold(looks: int, late: int, seed: int, *, intervals: bool) -> tuple[list[float], list[float], int, int]:
    """Times of the first ``looks`` looks, whole and of the decision alone; sizes after 100 looks and after ``late``."""
    rng, per_look = np.random.default_rng(seed), PLAIN.requests_per_s * SPEC.look_s
    strata = [
        {
            name: Stratum(_counts(rng, 0.5 * per_look, good), _counts(rng, 0.5 * per_look, good))
            for name, good in PLAIN.good.items()
        }
        for _ in range(_DIFFERENT_LOOKS)
    ]
    evidence = Evidence.start(OBJECTIVES, alpha=SPEC.alpha, beta=SPEC.beta, intervals=intervals)
    state = begin(_LONG, stable="1", canary="2", now_s=0.0)
    state = decide(_LONG, decide(_LONG, state, Gated(True, ""), 0.0), Acted(), 0.0)
    times: list[float] = []
    decisions: list[float] = []
    early_bytes, attempts = 0, 0
    for look in range(1, late + 1):
        seen = strata[look % _DIFFERENT_LOOKS]
        attempts += seen["availability"].canary.total
        received = Received(attempts, attempts, 2 * attempts)
        started = time.process_time_ns()
        evidence = evidence.update(seen)
        judged = time.process_time_ns()
        event = Looked(evidence.verdict, "", received=received, canary_new=1, control_new=1)
        state = decide(_LONG, state, event, float(look))
        if look <= looks:
            ended = time.process_time_ns()
            times.append((ended - started) / 1000)
            decisions.append((ended - judged) / 1000)
        if look == 100:
            early_bytes = _size((evidence, state))
    return times, decisions, early_bytes, _size((evidence, state))


def _counts(rng: np.random.Generator, mean: float, good: float) -> Counts:
    total = int(rng.poisson(mean))
    return Counts(int(rng.binomial(total, good)), total)


def _size(root: object) -> int:
    """Bytes of an object and of all that it refers to, but for code."""
    seen: set[int] = set()
    waiting, size = [root], 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(one))
        size += one.nbytes if isinstance(one, np.ndarray) else sys.getsizeof(one)
        waiting.extend(gc.get_referents(one))
    return size
