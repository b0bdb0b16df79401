"""``python -m benchmarks.rollout``: false rollbacks, detection and cost of rollouts decided by evidence."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.command import ending
from benchmarks.rollout import parts
from benchmarks.rollout.scenarios import settings
from benchmarks.rollout.table import shortfalls, table
from endcap.errors import InputError, OutcomeError
from endcap.files import FolderLock, read_json, write_atomic, write_json

__all__ = ["PARTS", "bench", "main"]

SEED = 20_261_122


def main() -> None:
    with ending():
        given = _arguments()
        wrong = bench(given.out, given.only, runs=given.runs, seed=given.seed)
        if wrong:
            raise OutcomeError("; ".join(wrong), where=given.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000, help="simulated rollouts a scenario (10000)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"everything drawn follows from it ({SEED})")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where rollout.json goes (out/bench)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"measure these anew and keep the rest of rollout.json: {', '.join(PARTS)}")  # fmt: skip
    given = parser.parse_args()
    if given.runs < 10:
        raise InputError("at least 10 runs are needed", where="--runs")
    return given


def bench(out: Path, only: Sequence[str], *, runs: int, seed: int) -> list[str]:
    """Measure the parts in ``only``, put them into ``rollout.json``, print the table; what falls short."""
    path = out / "rollout.json"
    with FolderLock(out):
        document: dict[str, Any] = dict(read_json(path)) if path.exists() else {}
        _say(f"seed {seed}, {runs:,} runs a scenario")
        for name in only:
            started, cpu = time.monotonic(), time.process_time()
            document |= PARTS[name](_Asked(out, runs, seed))
            taken = {"seconds": round(time.monotonic() - started, 1), "cpu_s": round(time.process_time() - cpu, 1),
                     "runs": runs, "seed": seed, "at_s": round(time.time())}  # fmt: skip
            document["parts"] = {**document.get("parts", {}), name: taken}
            _say(f"{name}: {taken['seconds']:.0f} s, of one processor {taken['cpu_s']:.0f} s")
            document |= {
                "seed": seed, "settings": settings(), "replayed": _replayed(document),
                "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            }  # fmt: skip
            write_json(path, document)  # a part that was measured is kept whatever happens to the next
        shown = table(document)
        write_atomic(out / "rollout.md", shown)
    sys.stdout.write(f"\n{shown}\n")
    wrong = shortfalls(document)
    for line in wrong:
        sys.stdout.write(f"NOT as it must be: {line}\n")
    sys.stdout.write(f"results: {path}\n")
    return wrong


def _replayed(document: Mapping[str, Any]) -> int:
    return sum(int(count) for name, count in document.items() if name.endswith("_replayed"))


@dataclass(frozen=True, slots=True)
class _Asked:
    out: Path
    runs: int
    seed: int


def _simulated(part: Callable[[int, int, parts.Say], parts.Part]) -> Callable[[_Asked], parts.Part]:
    return lambda asked: part(asked.runs, asked.seed, _say)


def _crash(asked: _Asked) -> parts.Part:
    """Every write and every call to a target is a point at which the engine is killed: enumerated, nothing is drawn."""
    from benchmarks.rollout.crash import crash_points

    with tempfile.TemporaryDirectory(prefix="endcap-crash-") as folder:
        result = crash_points(Path(folder))
    _say(f"crash points: {result.right} of {result.tried} ended right")
    return {"crash_points": {"tried": result.tried, "right": result.right}, "crash_wrong": list(result.wrong)}


def _local(asked: _Asked) -> parts.Part:
    """A real Envoy, real servers and real load; its own records are in local.json beside."""
    from benchmarks.rollout.local import local_rollouts

    result = local_rollouts(asked.out, seed=asked.seed, say=_say)
    _say(f"local: {result.right} of {result.rollouts} rollouts right")
    return {
        "local": {
            "rollouts": result.rollouts, "right": result.right, "requests": result.requests,
            "failed_requests": result.failed_requests,
        }
    }  # fmt: skip


PARTS: Mapping[str, Callable[[_Asked], parts.Part]] = {
    "aa": _simulated(parts.false_rollbacks),
    "detection": _simulated(parts.finding),
    "failing": _simulated(parts.sudden_failure),
    "look": _simulated(parts.looks),
    "crash": _crash,
    "local": _local,
}
"""What can be measured, in this order; each returns its keys of ``rollout.json``."""


def _say(text: str) -> None:
    sys.stdout.write(f"  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
