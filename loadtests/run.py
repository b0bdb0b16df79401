"""Start a load: ``python -m loadtests.run`` for people, :func:`start_load` for our own commands.

The load is a process of its own, because Locust patches the standard library of the one it runs in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from endcap.errors import EndcapError, OutcomeError, StorageError, TargetError
from endcap.files import read_json, write_json
from endcap.processes import bind_to_parent, spawn, stop
from loadtests.config import LoadConfig, LoadSummary, Threshold

__all__ = ["LoadConfig", "LoadProcess", "LoadSummary", "config_from_argv", "start_load"]

_STOP_S = 15.0
_ROOM_TO_SAY_WHY = 64 << 10
TARGET_VARIABLE = "ENDCAP_TARGET"


class LoadProcess:
    """A load that runs beside us and dies with us."""

    def __init__(self, config: LoadConfig, process: subprocess.Popen[bytes], summary: Path, log: Path) -> None:
        self.config = config
        self.log = log
        self._process = process
        self._summary = summary

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def progress(self) -> Mapping[str, Any]:
        """The newest ``load.json``; empty before the first."""
        path = self.config.out / "load.json"
        if not path.exists():
            return {}
        document = read_json(path)
        return document if isinstance(document, dict) and document.get("pid") == self.pid else {}

    def wait_until_answered(self, *, timeout_s: float = 20.0) -> None:
        """Return when the first requests came to their end.

        Raises:
            TargetError: the load ended first, or nothing was answered in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not self.running():
                self.summary()
                raise TargetError("the load ended before its first request", where=self.log)
            if self.progress().get("done", 0) > 0:
                return
            time.sleep(0.05)
        raise TargetError(f"no request was answered within {timeout_s:g} s", where=self.log)

    def stop(self) -> LoadSummary:
        """No more arrivals; what is in flight is waited for. Returns the summary.

        Raises:
            EndcapError: the load had failed; its own error.
        """
        if self.running():
            stop(self._process, grace_s=_STOP_S)
        return self.summary()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for a load with a duration to end by itself; False while it still runs after ``timeout_s``."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def summary(self) -> LoadSummary:
        """The summary of a load that has ended.

        Raises:
            EndcapError: it still runs, or it failed (its own error).
        """
        if self.running():
            raise EndcapError("the load still runs", where=self.log)
        if not self._summary.exists():
            if shutil.disk_usage(self.config.out).free < _ROOM_TO_SAY_WHY:
                raise StorageError("no space left while the load kept its records", where=self.config.out,
                                   next_step="free some space, then run the same command again")  # fmt: skip
            raise EndcapError(f"the load ended with code {self._process.returncode} and no summary",
                              where=self.log, next_step="read the end of that log")  # fmt: skip
        document = read_json(self._summary)
        if "error" in document:
            raise EndcapError.from_json(document)
        document["thresholds"] = tuple(Threshold(**one) for one in document["thresholds"])
        return LoadSummary(**document)

    def kill(self) -> None:
        """End it at once; its left-over lines are converted by the next reader."""
        self._process.kill()
        self._process.wait()


def start_load(config: LoadConfig, *, log: Path | None = None) -> LoadProcess:
    """Start a load in a child process that cannot outlive us. Its output goes to ``log``.

    Call it from a thread that lives as long as the process.

    Raises:
        EndcapError: it cannot be started. Bad input shows in :meth:`LoadProcess.stop` and ``summary``.
    """
    log = log or config.out / "load.log"
    summary = config.out / "load-summary.json"
    summary.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "loadtests.run", *config.to_argv(), "--summary", str(summary), "--bound"]
    return LoadProcess(config, spawn(argv, log=log), summary, log)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.run",
        description="Open-loop load with feedback: replays held-out shoppers against a running target.",
        epilog="Exit code: 0 when every threshold held, 4 when one broke, others for errors.",
    )
    add = parser.add_argument
    target = os.environ.get(TARGET_VARIABLE)
    add("--target", type=Path, default=Path(target) if target else None, metavar="FOLDER",
        help=f"the running target's folder (default: ${TARGET_VARIABLE})")  # fmt: skip
    add("--url", help="a service by its URL instead of a target")
    add("--shoppers", type=Path, required=True, metavar="FILE", help="JSON lines: shopper, history, next")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the records folder")
    add("--rate", type=float, default=150.0, metavar="RPS", help="mean arrivals a second (default: 150)")
    add("--duration", type=float, metavar="SECONDS", help="how long (default: until SIGTERM or Ctrl-C)")
    add("--seed", type=int, default=7, help="fixes arrivals, order of shoppers and think times (default: 7)")
    add("--timeout", type=float, default=3.0, metavar="SECONDS", help="a request's time (default: 3)")
    add("--k", type=int, default=10, help="items to ask for (default: 10)")
    add("--objectives", type=Path, metavar="FILE", help="their goals become thresholds")
    add("--no-thresholds", action="store_true", help="report objectives, but exit with 0 when one is broken")
    add("--no-feedback", action="store_true", help="send no shown and clicked events")
    add("--max-in-flight", type=int, default=4096, metavar="N", help="most requests at once (default: 4096)")
    add("--summary", type=Path, metavar="FILE", help="write the summary, or the error, as JSON there too")
    add("--json", action="store_true", help="print the summary as JSON")
    add("--bound", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def config_from_argv(argv: Sequence[str]) -> LoadConfig:
    """The inverse of :meth:`LoadConfig.to_argv`."""
    return _config(_parse(argv))


def _config(options: argparse.Namespace) -> LoadConfig:
    return LoadConfig(
        shoppers=options.shoppers, out=options.out, target=options.target, url=options.url,
        rate_rps=options.rate, duration_s=options.duration, seed=options.seed, timeout_s=options.timeout,
        k=options.k, objectives=options.objectives, thresholds=not options.no_thresholds,
        feedback=not options.no_feedback, max_in_flight=options.max_in_flight,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if argv is None else argv)
    if options.bound:
        bind_to_parent()
    config = _config(options)
    try:
        summary = _run(config)
        if options.summary is not None:
            write_json(options.summary, asdict(summary))
        sys.stdout.write(json.dumps(asdict(summary)) + "\n" if options.json else describe(summary))
        broken = [threshold.name for threshold in summary.thresholds if not threshold.held]
        if broken and config.thresholds:
            raise OutcomeError(f"broken under this load: {', '.join(broken)}", where=config.objectives)
    except EndcapError as error:
        if options.summary is not None and not isinstance(error, OutcomeError):
            write_json(options.summary, error.to_json())
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


def _run(config: LoadConfig) -> LoadSummary:
    # Before Locust is imported, and in this process alone.
    from gevent import monkey  # type: ignore[import-untyped]

    monkey.patch_all()
    from loadtests.generator import run_load

    return run_load(config)


def describe(summary: LoadSummary) -> str:
    """A summary for people, some lines."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    lines = [
        f"requests   {summary.requests} ({summary.failed} failed), "
        f"offered {summary.offered_rps:.1f}/s, answered {summary.achieved_rps:.1f}/s",
        f"latency    p50 {ms(summary.p50_ms)}, p95 {ms(summary.p95_ms)}, p99 {ms(summary.p99_ms)} "
        f"(sent late: p99 {ms(summary.lag_p99_ms)})",
        f"feedback   {summary.feedback} beacons ({summary.feedback_failed} failed)",
    ]
    if summary.saturated:
        lines.append(f"saturated  {summary.saturated} arrivals could not be sent: the load generator was too small")
    for one in summary.thresholds:
        share = "no data" if one.share is None else f"{one.share:.3%} of {one.total}"
        lines.append(f"objective  {one.name}: {share}, goal {one.goal:.3%}: {'held' if one.held else 'BROKEN'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
