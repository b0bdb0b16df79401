"""Pure arithmetic on what was measured, what must be reached, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["shortfalls", "slope_per_hour", "spread", "table"]

Document = Mapping[str, Any]


def spread(rates: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of repeated measurements, and all of them."""
    return {"median": statistics.median(rates), "least": min(rates), "most": max(rates), "all": list(rates)}


def slope_per_hour(at_s: Sequence[float], values: Sequence[float]) -> float:
    """Theil and Sen's slope: the median over all pairs, which one odd sample does not move. 0 with fewer than two."""
    slopes = [
        (values[later] - values[earlier]) / (at_s[later] - at_s[earlier])
        for later in range(len(values))
        for earlier in range(later)
        if at_s[later] > at_s[earlier]
    ]
    return statistics.median(slopes) * 3600 if slopes else 0.0


def shortfalls(document: Document) -> list[str]:
    """What is not as it must be, of the parts that were measured."""
    wrong: list[str] = []
    if (http := document.get("one_row_http")) is not None:
        wrong += _rates("one-row HTTP", http, 3.0)
        p99 = http["p99_ms"]
        if p99["endcap"] > 10.0 or p99["endcap"] >= min(p99["kserve"], p99["mlserver"]):
            wrong.append(f"p99 is {p99['endcap']:.1f} ms, must be at most 10 and below the others'")
    if (grpc := document.get("one_row_grpc")) is not None:
        wrong += _rates("one-row gRPC", grpc, 1.5)
    for key, least in (("heavy_share_of_ort", 0.9), ("cache_ratio", 5.0), ("overload_goodput_share", 0.9)):
        if key in document and document[key] < least:
            wrong.append(f"{key} is {document[key]:.2f}, must be at least {least}")
    for key, most in (("ready_s", 2.0), ("rss_mb", 250.0)):
        if key in document and document[key] > most:
            wrong.append(f"{key} is {document[key]:.1f}, must be at most {most:.0f}")
    if (overload := document.get("overload")) is not None:
        if overload["refused_p99_ms"] > 50.0:
            wrong.append(f"refusals' p99 is {overload['refused_p99_ms']:.0f} ms, must be at most 50")
        if overload["failures"]:
            wrong.append(f"{overload['failures']} requests had no answer under overload")
    if (fuzzed := document.get("fuzzed")) is not None and (fuzzed["status_5xx"] or fuzzed["hangs"]):
        wrong.append(f"fuzzed: {fuzzed['status_5xx']} answers of 500 and {fuzzed['hangs']} hangs, must be none")
    return wrong


def _rates(what: str, found: Mapping[str, float], times: float) -> list[str]:
    return [
        f"{what}: {found['endcap_rps']:.0f}/s is {found['endcap_rps'] / found[peer]:.1f} times {peer[:-4]}'s, "
        f"must be {times:g}"
        for peer in ("kserve_rps", "mlserver_rps")
        if found["endcap_rps"] < times * found[peer]
    ]


def table(document: Document) -> str:
    """For people, Markdown."""
    lines = ["| | endcap | KServe | MLServer |", "|---|---|---|---|"]
    for key, what in (("one_row_http", "one row, HTTP"), ("one_row_grpc", "one row, gRPC")):
        if key in document:
            found = document[key]
            cells = [
                f"{found[f'{name}_rps']:,.0f} ({found['spread'][name]['least']:,.0f} to "
                f"{found['spread'][name]['most']:,.0f})"
                for name in ("endcap", "kserve", "mlserver")
            ]
            lines.append(f"| {what}, requests/s, median (spread) | {' | '.join(cells)} |")
    if "one_row_http" in document:
        http = document["one_row_http"]
        cells = [f"{http['p99_ms'][name]:,.1f}" for name in ("endcap", "kserve", "mlserver")]
        lines.append(f"| p99 at {http['p99_rate']:,.0f} requests/s, ms | {' | '.join(cells)} |")
    for key, what in (
        ("ready_s", "ready after, s"), ("rss_mb", "resident memory, 10^6 bytes"),
        ("heavy_share_of_ort", "heavy model, share of onnxruntime's own rate"),
        ("cache_ratio", "heavy model, every answer kept: times the rate without"),
        ("overload_goodput_share", "goodput at 3 times saturation, share of its peak"),
    ):  # fmt: skip
        if key in document:
            lines.append(f"| {what} | {document[key]:.2f} | | |")
    if "overload" in document:
        lines.append(f"| refusals' p99 under that, ms | {document['overload']['refused_p99_ms']:.0f} | | |")
    if "fuzzed" in document:
        fuzzed = document["fuzzed"]
        lines.append(f"| of {fuzzed['requests']:,} fuzzed requests: answers of 500, hangs | {fuzzed['status_5xx']}, "
                     f"{fuzzed['hangs']} | | |")  # fmt: skip
    return "\n".join(lines) + "\n"
