"""The figures for people, as Markdown, and what of them is not as it must be. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["shortfalls", "table"]

Document = Mapping[str, Any]

_FALSE_ROLLBACKS, _PROMOTED, _RATIO, _QUICK, _DECIDE_US = 0.012, 0.95, 1.5, 0.99, 100.0


def shortfalls(document: Document) -> list[str]:
    """What was measured and is not as it must be, each in a line."""
    found = []
    for row in document.get("aa", ()):
        if row["upper95"] > _FALSE_ROLLBACKS:
            found.append(f"A/A, {row['scenario']}: at most {row['upper95']:.2%} false rollbacks; 1.2 % is wanted")
        if row["promoted_rate"] < _PROMOTED:
            found.append(f"A/A, {row['scenario']}: {row['promoted_rate']:.1%} promoted; 95 % is wanted")
    found += [
        f"{row['case']}: {_number(row['ratio'], '.2f')} times the oracle's samples; 1.5 is wanted"
        for row in document.get("detection", ())
        if row["ratio"] is None or row["ratio"] > _RATIO
    ]
    quick = document.get("rolled_back_within_10s_share")
    if quick is not None and quick < _QUICK:
        found.append(f"5 % errors: rolled back within 10 s in {quick:.1%}; 99 % is wanted")
    cost = document.get("decide_us_p99")
    if cost is not None and cost > _DECIDE_US:
        found.append(f"a look costs {cost:.0f} µs at p99; 100 is wanted")
    look = document.get("look")
    if look is not None and look["bytes_late"] > 1.1 * look["bytes_early"]:
        found.append(f"memory grows: {look['bytes_early']} bytes at first, {look['bytes_late']} later")
    points = document.get("crash_points")
    if points is not None and points["right"] < points["tried"]:
        found.append(f"crash points: {points['right']} of {points['tried']} ended right")
    local = document.get("local")
    if local is not None and (local["right"] < local["rollouts"] or local["failed_requests"]):
        found.append(
            f"local: {local['right']} of {local['rollouts']} right, {local['failed_requests']} requests failed"
        )
    return found


def table(document: Document) -> str:
    """Markdown, of the parts that are there."""
    parts = [_aa, _peers, _detection, _peers_find, _rest]
    return "\n".join("\n".join(lines) + "\n" for part in parts if (lines := part(document)))


def _aa(document: Document) -> list[str]:
    if "aa" not in document:
        return []
    lines = ["| A/A rollouts | runs | rolled back | rate | upper 95 % | promoted | median, p90 to promotion | seed |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    return lines + [
        f"| {row['scenario']} | {row['runs']:,} | {row['false_rollbacks']} | {row['rate']:.2%} | {row['upper95']:.2%} "
        f"| {row['promoted_rate']:.1%} | {row['median_s']:.0f} s, {row['p90_s']:.0f} s | {row['seed']} |"
        for row in document["aa"]
    ]


def _peers(document: Document) -> list[str]:
    if "aa_peers" not in document:
        return []
    scenarios = list(document["aa_peers"][0]["rates"])
    lines = [f"| A/A, rolled back by | {' | '.join(scenarios)} | an hour at 10 %, plain |",
             "|---" * (len(scenarios) + 2) + "|"]  # fmt: skip
    for row in document["aa_peers"]:
        cells = " | ".join(f"{row['rates'][name]:.1%}" for name in scenarios)
        lines.append(f"| {row['rule']} | {cells} | {row['rate_in_an_hour_at_10_percent']:.1%} |")
    return lines


def _detection(document: Document) -> list[str]:
    if "detection" not in document:
        return []
    lines = ["| canary at 10 %, median canary samples to the verdict | endcap | oracle | ratio | SPRT, one sample "
             "| oracle, margin 0 | p90: endcap, oracle | found | median time |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    return lines + [
        f"| {row['case']} | {_number(row['median_samples'])} | {_number(row['oracle_samples'])} "
        f"| {_number(row['ratio'], '.2f')} | {_number(row['sprt_samples'])} "
        f"| {_number(row['oracle_margin_0_samples'])} "
        f"| {_number(row['p90_samples'])}, {_number(row['oracle_p90_samples'])} | {row['found_share']:.1%} "
        f"| {_number(row['median_s'])} s |"
        for row in document["detection"]
    ]


def _number(value: float | None, shape: str = ",.0f") -> str:
    return "-" if value is None else format(value, shape)


def _peers_find(document: Document) -> list[str]:
    if not document.get("peers_find"):
        return []
    found = document["peers_find"]
    lines = [f"| found within an hour at 10 % (median time) | {' | '.join(case['case'] for case in found)} |",
             "|---" * (len(found) + 1) + "|"]  # fmt: skip
    for index, row in enumerate(found[0]["rules"]):
        cells = []
        for case in found:
            one = case["rules"][index]
            when = "" if one["median_s"] is None else f" ({one['median_s']:.0f} s)"
            cells.append(f"{one['found_share']:.0%}{when}")
        lines.append(f"| {row['rule']} | {' | '.join(cells)} |")
    return lines


def _rest(document: Document) -> list[str]:
    lines = []
    if "sudden_failure" in document:
        sudden = document["sudden_failure"]
        hurt = sudden["shoppers_hurt"]
        quick = document["rolled_back_within_10s_share"]
        lines.append(
            f"- 5 % errors where 99.9 % are promised: rolled back within 10 s in {quick:.2%} of {sudden['runs']:,} "
            f"runs, median {_number(sudden['median_s'])} s, p99 {_number(sudden['p99_s'])} s; shoppers hurt: median "
            f"{hurt['median']:.0f}, p99 {hurt['p99']:.0f}, most {hurt['most']} (seed {sudden['seed']})"
        )
    if "look" in document:
        look = document["look"]
        lines.append(
            f"- `decide`: median {look['decide_us_median']:.0f} µs of processor time, p99 "
            f"{look['decide_us_p99']:.0f}; with the evidence of three objectives brought up to date: "
            f"{look['look_us_median']:.0f}, p99 {look['look_us_p99_quietest']:.0f} in the quietest of 20 batches and "
            f"{look['look_us_p99']:.0f} in all (with the intervals for people {look['with_intervals_us_median']:.0f}, "
            f"p99 {look['with_intervals_us_p99']:.0f}); memory after {look['looks_early']} looks "
            f"{look['bytes_early']:,} bytes, after {look['looks_late']:,} {look['bytes_late']:,}"
        )
    if "replayed" in document:
        lines.append(f"- {document['replayed']} of these runs were judged again by `Evidence` and `decide`: identical")
    if "crash_points" in document:
        points = document["crash_points"]
        lines.append(f"- killed at every write and every call: {points['right']} of {points['tried']} ended right")
    if "local" in document:
        local = document["local"]
        lines.append(
            f"- local target: {local['right']} of {local['rollouts']} rollouts right, {local['failed_requests']} of "
            f"{local['requests']:,} requests failed"
        )
    return lines
