"""A replay judged: are the answers what a shop can show, and do they come in time? Pure.

A fault is what stable, asked the same, does not do. Errors count when both times that a request is replayed end in
one, or when more than one answer in a hundred does: a single one may be the machine's.

Latency counts each request once. An objective's threshold is missed when the share in time is shown to be below the
goal (one-sided exact binomial) *and* requests are late that stable, replayed in the same minute on the same machine,
answered in time (exact sign test on the requests that only one of the two answered in time); each at 1 %, shared over
the thresholds. Below the goal together with stable says something about the machine: inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import orjson
from pydantic import JsonValue

from endcap.evidence import Verdict
from endcap.objectives import Good, Objectives
from endcap.outcomes import exact_percentile
from endcap.shoppers import Shopper
from serving.gates.report import GateResult

__all__ = ["Answer", "LatencyGoal", "Replayed", "binomial_tail", "judge_replay", "latency_goals", "read_answer"]

ALPHA = 0.01
"""Chance that a replica as fast as its goal, or as stable, is refused for its latency."""
_ERRORS_BORNE = 0.01
_SCORE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0: none came, and ``error`` says why; ``error`` is None for what can be read."""

    status: int
    ms: float
    items: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    fallback: str | None = None
    error: str | None = None


def read_answer(status: int, body: bytes, ms: float) -> Answer:
    """An HTTP answer of ``/v1/recommend``."""
    if status != 200:
        return Answer(status, ms, error=f"answered {status}")
    try:
        document = orjson.loads(body)
        items, scores, fallback = document["items"], document["scores"], document["fallback"]
        if not all(type(item) is str for item in items) or not isinstance(fallback, str | None):
            raise TypeError
        return Answer(status, ms, tuple(items), tuple(float(score) for score in scores), fallback)
    except (ValueError, TypeError, KeyError):
        return Answer(status, ms, error="an answer that is none: no items and scores")


@dataclass(frozen=True, slots=True)
class LatencyGoal:
    """At least ``goal`` of the answers within ``within_ms``."""

    name: str
    within_ms: int
    goal: float


def latency_goals(objectives: Objectives) -> tuple[LatencyGoal, ...]:
    """Those of the objectives that are about the time of an answer."""
    return tuple(
        LatencyGoal(one.name, one.within_ms, one.goal)
        for one in objectives.objectives
        if one.good is Good.ANSWERED and one.within_ms is not None
    )


@dataclass(frozen=True, slots=True)
class Replayed:
    """Answers in the order of the requests. ``second`` repeats ``first``, and is shorter where the replay was cut."""

    stable: Sequence[Answer]
    first: Sequence[Answer]
    second: Sequence[Answer]


def judge_replay(requests: Sequence[Shopper], replayed: Replayed, *, k: int, known: Collection[str],
                 goals: Sequence[LatencyGoal]) -> GateResult:  # fmt: skip
    """The gate ``replay``. ``known``: every item that the candidate's package names."""
    faults: dict[str, list[int]] = {}
    for place, (answer, stable) in enumerate(zip(replayed.first, replayed.stable, strict=False)):
        again = replayed.second[place] if place < len(replayed.second) else None
        for fault in _faults(requests[place], answer, again, stable, k=k, known=known):
            faults.setdefault(fault, []).append(place + 1)
    answers = [*replayed.first, *replayed.second]
    errors = sum(answer.error is not None for answer in answers)
    latencies = [_judge_latency(goal, replayed, alpha=ALPHA / len(goals)) for goal in goals]
    figures: dict[str, JsonValue] = {
        "requests": len(replayed.first), "answers": len(answers), "errors": errors,
        "faults": {fault: len(places) for fault, places in faults.items()},
        "latency": {one.goal.name: one.to_json() for one in latencies},
        "candidate": _times(replayed.first), "stable": _times(replayed.stable),
        "mean_overlap_with_stable": _overlap(replayed),
    }  # fmt: skip
    if faults:
        words = "; ".join(
            f"{fault}: {len(places)} of {len(replayed.first)} requests (first: request {places[0]})"
            for fault, places in faults.items()
        )
        return GateResult("replay", Verdict.FAIL, words, figures)
    stable_errors = sum(answer.error is not None for answer in replayed.stable)
    if errors > max(2, _ERRORS_BORNE * len(answers)) and errors > 2 * stable_errors:
        first = next(answer.error for answer in answers if answer.error is not None)
        return GateResult("replay", Verdict.FAIL, f"{errors} of {len(answers)} answers failed ({first})", figures)
    for wanted in (Verdict.FAIL, Verdict.INCONCLUSIVE):
        if found := [one for one in latencies if one.verdict is wanted]:
            return GateResult("replay", wanted, "; ".join(map(str, found)), figures)
    in_time = "".join(f", {one}" for one in latencies)
    return GateResult("replay", Verdict.PASS, f"{len(replayed.first)} requests answered well{in_time}", figures)


def _faults(shopper: Shopper, answer: Answer, again: Answer | None, stable: Answer, *, k: int,
            known: Collection[str]) -> list[str]:  # fmt: skip
    if answer.error is not None:
        failed_twice = again is None or again.error is not None
        return [answer.error] if failed_twice and stable.error is None else []
    items, scores, bought = answer.items, answer.scores, set(shopper.history)
    # Near the end of a small catalogue, or of a long history, there may be no k items left: then as many as stable.
    wanted = k if stable.error is not None else min(k, len(stable.items))
    again_differs = again is not None and again.error is None and not _same(answer, again)
    checks = {
        "more items than asked for": len(items) > k,
        "fewer items than stable gives": len(items) < wanted,
        "an item twice": len(set(items)) < len(items),
        "an item that the package does not name": any(item not in known for item in items),
        "an item of the shopper's own history": any(item in bought for item in items),
        "not one score an item": len(scores) != len(items),
        "a score that is no finite number": not all(map(math.isfinite, scores)),
        "scores that do not descend": any(later > earlier for earlier, later in pairwise(scores)),
        "popular items where stable's graph answered": (
            answer.fallback is not None and stable.error is None and stable.fallback is None
        ),
        "another answer to the same request": again_differs,
    }
    return [fault for fault, found in checks.items() if found]


def _same(one: Answer, other: Answer) -> bool:
    return (
        one.items == other.items
        and one.fallback == other.fallback
        and len(one.scores) == len(other.scores)
        and all(math.isclose(a, b, rel_tol=_SCORE_TOLERANCE, abs_tol=_SCORE_TOLERANCE)
                for a, b in zip(one.scores, other.scores, strict=True))
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Latency:
    goal: LatencyGoal
    in_time: int
    answered: int
    stable_in_time: int
    stable_answered: int
    below_goal: float
    worse_than_stable: float
    alpha: float

    @property
    def verdict(self) -> Verdict:
        if self.answered == 0:
            return Verdict.INCONCLUSIVE
        if self.below_goal < self.alpha:
            return Verdict.FAIL if self.worse_than_stable < self.alpha else Verdict.INCONCLUSIVE
        return Verdict.PASS if self.in_time >= self.goal.goal * self.answered else Verdict.INCONCLUSIVE

    def __str__(self) -> str:
        goal = self.goal
        figures = (f"{self.in_time} of {self.answered} within {goal.within_ms} ms, stable "
                   f"{self.stable_in_time} of {self.stable_answered}, goal {goal.goal:.2%}")  # fmt: skip
        match self.verdict:
            case Verdict.FAIL:
                return f"{goal.name}: worse than its goal, and than stable beside it ({figures})"
            case Verdict.PASS:
                return f"{goal.name}: {figures}"
            case _:
                return f"{goal.name}: the replay does not tell ({figures})"

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "verdict": self.verdict.value, "within_ms": self.goal.within_ms, "goal": self.goal.goal,
            "in_time": self.in_time, "answered": self.answered,
            "stable_in_time": self.stable_in_time, "stable_answered": self.stable_answered,
            "p_below_goal": self.below_goal, "p_worse_than_stable": self.worse_than_stable,
        }  # fmt: skip


def _judge_latency(goal: LatencyGoal, replayed: Replayed, *, alpha: float) -> _Latency:
    limit_ms = goal.within_ms
    answered = [one for one in replayed.first if one.error is None]
    stable = [one for one in replayed.stable if one.error is None]
    in_time = sum(one.ms <= limit_ms for one in answered)
    both = [(one.ms <= limit_ms, other.ms <= limit_ms)
            for one, other in zip(replayed.first, replayed.stable, strict=False)
            if one.error is None and other.error is None]  # fmt: skip
    late_alone = sum(not ours and theirs for ours, theirs in both)
    in_time_alone = sum(ours and not theirs for ours, theirs in both)
    return _Latency(
        goal, in_time, len(answered), sum(one.ms <= limit_ms for one in stable), len(stable),
        binomial_tail(in_time, len(answered), goal.goal),
        binomial_tail(in_time_alone, late_alone + in_time_alone, 0.5), alpha,
    )  # fmt: skip


def binomial_tail(good: int, total: int, share: float) -> float:
    """The chance of ``good`` or fewer good events of ``total`` where each is good with chance ``share``; exact."""
    if good >= total:
        return 1.0
    log_good, log_bad = math.log(share), math.log1p(-share)
    whole = math.lgamma(total + 1)
    return min(1.0, math.fsum(
        math.exp(whole - math.lgamma(n + 1) - math.lgamma(total - n + 1) + n * log_good + (total - n) * log_bad)
        for n in range(good + 1)
    ))  # fmt: skip


def _times(answers: Sequence[Answer]) -> dict[str, JsonValue]:
    times = np.array([one.ms for one in answers if one.error is None], np.float64)
    return {
        "answered": len(times),
        "median_ms": exact_percentile(times, 50),
        "p99_ms": exact_percentile(times, 99),
        "fallbacks": sum(one.fallback is not None for one in answers),
    }


def _overlap(replayed: Replayed) -> float | None:
    """Mean share of the items that stable names which the candidate names too; None where nothing can be compared."""
    shares = [
        len(set(one.items) & set(other.items)) / len(other.items)
        for one, other in zip(replayed.first, replayed.stable, strict=False)
        if one.error is None and other.items
    ]
    return math.fsum(shares) / len(shares) if shares else None
