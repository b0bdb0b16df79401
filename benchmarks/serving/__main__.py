"""``python -m benchmarks.serving``: the model server beside KServe's, MLServer and onnxruntime itself."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.command import ending
from benchmarks.environment import opponent_python
from benchmarks.serving.client import Client, build_client, cores
from benchmarks.serving.figures import shortfalls, table
from benchmarks.serving.parts import PARTS, Bench
from benchmarks.serving.soak import soak
from endcap.errors import InputError, OutcomeError
from endcap.files import FolderLock, read_json, write_atomic, write_json

SEED = 20_261_122
_ROOT = Path(__file__).parents[2]


def main() -> None:
    with ending():
        given = _arguments()
        wrong = _soak(given) if given.soak_s else _bench(given, given.only)
        if wrong:
            raise OutcomeError("; ".join(wrong), where=given.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where serving.json goes (out/bench)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement (10)")
    parser.add_argument("--repeats", type=int, default=5, help="of each, servers in turn (5)")
    parser.add_argument("--overload-s", type=float, default=60.0, help="of overload (60)")
    parser.add_argument("--soak-s", type=float, default=0.0, help="a soak of so long instead")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"measure these anew and keep the rest of serving.json: {', '.join(PARTS)}")  # fmt: skip
    given = parser.parse_args()
    if given.seconds < 1 or given.overload_s < 1 or given.repeats < 1:
        raise InputError("at least a second, and once")
    return given


def _prepare(given: argparse.Namespace) -> Bench:
    work = given.out / "serving"
    work.mkdir(parents=True, exist_ok=True)
    core, others = cores()
    client = Client(build_client(_ROOT / "build" / "serving-client"), others)
    return Bench(
        work, client, core, cache(lambda: opponent_python(_ROOT, "mlserver")),
        cache(lambda: opponent_python(_ROOT, "minilm")), given.seconds, given.repeats, given.overload_s, SEED, _say,
    )  # fmt: skip


def _bench(given: argparse.Namespace, only: Sequence[str]) -> list[str]:
    path = given.out / "serving.json"
    with FolderLock(given.out):
        document: dict[str, Any] = dict(read_json(path)) if path.exists() else {}
        bench = _prepare(given)
        for name in only:
            begun_s = time.monotonic()
            document |= PARTS[name](bench)
            taken = {"took_s": round(time.monotonic() - begun_s, 1), "seconds": given.seconds,
                     "load": round(os.getloadavg()[0], 1), "repeats": given.repeats,
                     "at_s": round(time.time())}  # fmt: skip
            document["parts"] = {**document.get("parts", {}), name: taken}
            document["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
            write_json(path, document)  # a part that was measured is kept whatever happens to the next
        shown = table(document)
        write_atomic(given.out / "serving.md", shown)
    sys.stdout.write(f"\n{shown}\n")
    wrong = shortfalls(document)
    for line in wrong:
        sys.stdout.write(f"NOT as it must be: {line}\n")
    sys.stdout.write(f"results: {path}\n")
    return wrong


def _soak(given: argparse.Namespace) -> list[str]:
    with FolderLock(given.out):
        found = soak(_prepare(given), given.soak_s)
        write_json(given.out / "soak.json", found)
    sys.stdout.write(f"{found['verdict']}: {found['why']}\nresults: {given.out / 'soak.json'}\n")
    return [] if found["verdict"] == "pass" else [found["why"]]


def _say(text: str) -> None:
    sys.stdout.write(f"  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
