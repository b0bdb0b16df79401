"""The simulated parts of the benchmark: each returns its keys of ``rollout.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.rollout.cost import measure
from benchmarks.rollout.oracle import Crossings, one_sample, two_samples
from benchmarks.rollout.peers import All, peers
from benchmarks.rollout.replay import differences
from benchmarks.rollout.scenarios import AA, DETECTION, FAILING, FIXED, HOUR_S, OBJECTIVES, PLAIN, SPEC, Detection, line
from endcap.errors import OutcomeError
from endcap.objectives import Objectives
from serving.rollout.simulate import RecordedRun, SimulatedRuns, simulate, upper_limit, watch
from serving.rollout.spec import RolloutSpec

__all__ = ["REPLAYED", "check", "false_rollbacks", "finding", "looks", "sudden_failure"]

Say = Callable[[str], None]
Part = dict[str, Any]

REPLAYED = {"aa": 30, "detection": 10, "failing": 10}
"""Runs of each scenario that are judged again: 5 * 30 + 4 * 10 + 10 = 200."""
_QUICK_S = 10.0
_FEWER = 5
"""What peers do over an hour is simulated with so many times fewer runs."""


def false_rollbacks(runs: int, seed: int, say: Say, *, only: Sequence[str] = tuple(AA)) -> Part:
    """Candidates no worse than stable: how often each rule rolls them back."""
    aa: list[Part] = []
    rates: dict[str, dict[str, float]] = {}
    replayed = 0
    for number, (scenario, traffic) in enumerate(AA.items()):
        if scenario not in only:
            continue
        rules = peers(OBJECTIVES, runs)
        done = simulate(OBJECTIVES, SPEC, traffic, runs=runs, seed=seed + number, horizon_s=HOUR_S,
                        watcher=All(rules), record=min(runs, REPLAYED["aa"]))  # fmt: skip
        replayed += check(OBJECTIVES, SPEC, done.recorded, scenario)
        false = int(done.ended("rolled_back").sum())
        promoted = done.ended("promoted")
        aa.append({
            "scenario": scenario, "runs": runs, "false_rollbacks": false, "rate": false / runs,
            "upper95": upper_limit(false, runs), "promoted_rate": float(promoted.mean()),
            "undecided_rate": done.share("undecided"), "held_rate": done.share("held"),
            "compared_again_rate": float((done.compared_again > 0).mean()), "seed": seed + number,
            "median_s": float(np.median(done.seconds)), "p90_s": float(np.quantile(done.seconds, 0.9)),
            "by_objective": _by_objective(done), "by_step": np.bincount(done.step[done.ended("rolled_back")],
                                                                       minlength=len(SPEC.steps)).tolist(),
        })  # fmt: skip
        for rule in rules:
            rates.setdefault(rule.name, {})[scenario] = float((rule.rolled_back_s <= done.seconds).mean())
        say(f"A/A, {scenario}: {false} of {runs} rolled back, {promoted.mean():.1%} promoted, "
            f"median {np.median(done.seconds):.0f} s")  # fmt: skip
    fewer = max(1, runs // _FEWER)
    hour = peers(OBJECTIVES, fewer)
    watch(OBJECTIVES, PLAIN, All(hour), share=0.1, seconds=HOUR_S, runs=fewer, seed=seed + 20)
    at_an_hour = {rule.name: float(np.isfinite(rule.rolled_back_s).mean()) for rule in hour}
    listed = [
        {"rule": rule, "rate": found["plain"], "rates": found, "rate_in_an_hour_at_10_percent": at_an_hour[rule]}
        for rule, found in rates.items()
    ]
    return {"aa": aa, "aa_peers": listed, "aa_replayed": replayed}


def finding(runs: int, seed: int, say: Say, *, cases: Sequence[Detection] = DETECTION, peers_too: bool = True) -> Part:
    """Candidates that are worse: how many canary samples it takes, beside tests that know the truth."""
    found, replayed = [], 0
    for number, case in enumerate(cases):
        record, replayed = _detect(case, runs, seed + 100 + number, replayed)
        found.append(record)
        ratio = (
            "not found by half of the runs" if record["ratio"] is None else f"{record['ratio']:.2f} times the oracle's"
        )
        say(f"{case.case}: canary samples to the verdict {ratio}")
    part = {"detection": found, "detection_replayed": replayed}
    return {**part, "peers_find": _what_peers_find(runs, seed + 150, say)} if peers_too else part


def _detect(case: Detection, runs: int, seed: int, replayed: int) -> tuple[Part, int]:
    objectives, column = case.objectives, case.column
    done = simulate(objectives, FIXED, case.traffic, runs=runs, seed=seed, horizon_s=HOUR_S,
                    record=min(runs, REPLAYED["detection"]))  # fmt: skip
    replayed += check(objectives, FIXED, done.recorded, case.case)
    rolled_back = done.ended("rolled_back")
    samples = np.where(rolled_back, done.events[:, column], np.inf)
    control, canary, share = 1 - case.control, 1 - case.canary, FIXED.steps[0].share
    slope, constant = line(objectives.objectives[column])
    tests = {
        "oracle": two_samples(control, canary, slope=slope, constant=constant, share=share),
        "equality": two_samples(control, canary, slope=1.0, constant=0.0, share=share),
        "sprt": one_sample(canary, slope * control + constant),
    }
    alpha_each = FIXED.alpha / len(objectives.objectives)
    knowing = Crossings(tests, column=column, runs=runs, alpha=alpha_each)
    watch(objectives, case.traffic, knowing, share=share, seconds=case.watched_s, runs=runs, seed=seed + 40)
    medians = {name: float(np.median(knowing.samples(name))) for name in tests}
    median = float(np.median(samples))
    return {
        "case": case.case, "median_samples": _finite(median), "oracle_samples": _finite(medians["oracle"]),
        "ratio": _finite(median / medians["oracle"]), "sprt_samples": _finite(medians["sprt"]),
        "oracle_margin_0_samples": _finite(medians["equality"]),
        "ratio_margin_0": _finite(median / medians["equality"]),
        "found_share": float(rolled_back.mean()), "promoted_share": done.share("promoted"), "runs": runs,
        "median_s": _finite(float(np.median(np.where(rolled_back, done.seconds, np.inf)))), "seed": seed,
        "p90_samples": _p90(samples), "oracle_p90_samples": _p90(knowing.samples("oracle")),
    }, replayed  # fmt: skip


def _finite(value: float) -> float | None:
    """None where fewer runs than that ever came to a verdict: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _p90(samples: NDArray[np.float64]) -> float | None:
    return _finite(float(np.quantile(samples, 0.9, method="higher")))


def _what_peers_find(runs: int, seed: int, say: Say) -> list[Part]:
    """All rules on candidates that are worse, under the goals of the A/A scenarios, at 10 % for an hour."""
    fewer = max(1, runs // (2 * _FEWER))
    cases: Mapping[str, Mapping[str, float]] = {
        "errors 0.05 % -> 5 %": {"availability": 0.95},
        "errors 0.05 % -> 1 %": {"availability": 0.99},
        "late answers 1 % -> 3 %": {"latency": 0.97},
        "click-through 8 % -> 6 %": {"click-through": 0.06},
    }
    found = []
    for number, (case, worse) in enumerate(cases.items()):
        traffic = replace(PLAIN, canary=worse)
        done = simulate(OBJECTIVES, FIXED, traffic, runs=fewer, seed=seed + number, horizon_s=HOUR_S)
        rules = peers(OBJECTIVES, fewer)
        watch(OBJECTIVES, traffic, All(rules), share=0.1, seconds=HOUR_S, runs=fewer, seed=seed + 20 + number)
        rolled_back = done.ended("rolled_back")
        rows = [_finds("endcap", np.where(rolled_back, done.seconds, np.inf))]
        rows += [_finds(rule.name, rule.rolled_back_s) for rule in rules]
        found.append({"case": case, "runs": fewer, "rules": rows})
        say(f"{case}: found by endcap in {rolled_back.mean():.1%} of the runs")
    return found


def _finds(rule: str, seconds: NDArray[np.float64]) -> Part:
    caught = seconds[np.isfinite(seconds)]
    return {
        "rule": rule, "found_share": len(caught) / len(seconds),
        "median_s": float(np.median(caught)) if len(caught) else None,
    }  # fmt: skip


def sudden_failure(runs: int, seed: int, say: Say) -> Part:
    """5 % errors where 99.9 % are promised, canary at 10 % of 200 requests a second."""
    seed += 200
    done = simulate(OBJECTIVES, FIXED, FAILING, runs=runs, seed=seed, horizon_s=600,
                    record=min(runs, REPLAYED["failing"]))  # fmt: skip
    replayed = check(OBJECTIVES, FIXED, done.recorded, "5 % errors")
    rolled_back = done.ended("rolled_back")
    quick = rolled_back & (done.seconds <= _QUICK_S)
    seconds = np.where(rolled_back, done.seconds, np.inf)
    hurt = {
        "median": float(np.median(done.failed)), "p99": float(np.quantile(done.failed, 0.99)),
        "most": int(done.failed.max()),
    }  # fmt: skip
    say(f"5 % errors: rolled back within 10 s in {quick.mean():.2%} of the runs, {hurt['median']:.0f} shoppers hurt")
    return {
        "rolled_back_within_10s_share": float(quick.mean()),
        "sudden_failure": {
            "runs": runs, "seed": seed, "median_s": _finite(float(np.median(seconds))),
            "p99_s": _finite(float(np.quantile(seconds, 0.99, method="higher"))), "shoppers_hurt": hurt,
        },
        "sudden_failure_replayed": replayed,
    }  # fmt: skip


def looks(runs: int, seed: int, say: Say) -> Part:
    """What one look costs, and whether memory grows."""
    cost = measure(looks=min(20_000, 20 * runs), late=min(100_000, 100 * runs), seed=seed)
    say(f"decide: p99 {cost.decide_us_p99:.0f} µs; a look: {cost.look_us_median:.0f} µs, p99 {cost.look_us_p99:.0f} µs")
    return {"decide_us_p99": cost.decide_us_p99, "look": asdict(cost)}


def check(objectives: Objectives, spec: RolloutSpec, recorded: tuple[RecordedRun, ...], what: str) -> int:
    """Judge recorded runs again; how many they were.

    Raises:
        OutcomeError: evidence and ``decide`` come to another verdict, or to the same at another time.
    """
    wrong = differences(objectives, spec, recorded)
    if wrong:
        raise OutcomeError(f"{what}: {len(wrong)} of {len(recorded)} replayed runs differ: {wrong[0]}")
    return len(recorded)


def _by_objective(done: SimulatedRuns) -> dict[str, int]:
    failing = done.failing[done.ended("rolled_back")]
    return {o.name: int(failing[:, column].sum()) for column, o in enumerate(OBJECTIVES.objectives)}
