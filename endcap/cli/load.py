"""``endcap load``: shoppers on a schedule, whatever the service does."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from endcap.cli.console import Console
from endcap.cli.options import JsonOption, TargetOption
from endcap.errors import InputError, OutcomeError

app = typer.Typer(no_args_is_help=True, help="Load tests: open loop, exact percentiles, objectives as thresholds.")


@app.command()
def run(
    shoppers: Annotated[Path, typer.Option(help="Shoppers to replay (JSON lines).")],
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("out/load"),
    target: TargetOption = None,
    url: Annotated[str | None, typer.Option(help="Any service with the same routes, instead of a target.")] = None,
    rate: Annotated[float, typer.Option(min=0.1, max=5000, help="Mean arrivals a second.")] = 150.0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds of arrivals.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Seed of the schedule and the shoppers.")] = 7,
    objectives: Annotated[Path | None, typer.Option(help="Objectives file; its goals decide the exit code.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Replay held-out shoppers, and judge what they saw by the objectives."""
    from loadtests.config import LoadConfig
    from loadtests.run import start_load

    if target is None and url is None:
        raise InputError("nothing to load", next_step="give --target or --url")
    console = Console(json_output=json_output)
    load = start_load(
        LoadConfig(shoppers=shoppers, out=out, target=target, url=url, rate_rps=rate, duration_s=duration, seed=seed,
                   objectives=objectives)
    )  # fmt: skip
    with console.task(f"load, {rate:g}/s for {duration:g} s") as task:
        try:
            while load.running():
                seen = load.progress()
                task.update(
                    f"{seen.get('done', 0)} done, {seen.get('failed', 0)} failed", done=seen.get("sent", 0),
                    total=rate * duration,
                )  # fmt: skip
                time.sleep(0.5)
        finally:
            summary = load.stop()
    console.table(
        ["requests", "failed", "offered/s", "achieved/s", "p50 ms", "p95 ms", "p99 ms"],
        [
            (
                summary.requests, summary.failed, f"{summary.offered_rps:.1f}", f"{summary.achieved_rps:.1f}",
                _ms(summary.p50_ms), _ms(summary.p95_ms), _ms(summary.p99_ms),
            )
        ],
    )  # fmt: skip
    for threshold in summary.thresholds:
        share = "no data" if threshold.share is None else f"{threshold.share:.3%}"
        (console.good if threshold.held else console.bad)(f"{threshold.name}: {share}, goal {threshold.goal:.3%}")
    console.result(asdict(summary))
    if not summary.thresholds_held:
        broken = ", ".join(threshold.name for threshold in summary.thresholds if not threshold.held)
        raise OutcomeError(f"objectives not held under load: {broken}", where=out)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
