"""``python -m tests.fuzz``: fuzzed requests at the model server, on both ports, with a package of each task.

Must hold: no answer of 500 (503 and 504 only where the server sheds, which it says by Retry-After, or where the
request's own deadline has passed), every request answered or its connection ended, good requests answered after it,
memory level, answers as the OpenAPI document says. The same seed sends the same requests; ``--again`` sends one.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.command import ending
from endcap.errors import OutcomeError
from endcap.files import FolderLock, read_json, write_json
from endcap.package import Task
from tests.fuzz.campaign import Findings, again, campaign, growth_mb, judge

SEED = 20_261_130


def main() -> None:
    with ending():
        given = _arguments()
        work = given.out / "fuzz"
        work.mkdir(parents=True, exist_ok=True)
        _say(f"seed {given.seed}")
        begun_s = time.monotonic()
        if given.again:
            task, kind, number = given.again.split(":")
            found = again(work, Task(task), kind, int(number), seed=given.seed)
        else:
            found = campaign(work, given.requests, seed=given.seed, jobs=given.jobs, say=_say)
        wrong = judge(found)
        if not given.again:
            _keep(given.out, found, seed=given.seed, took_s=time.monotonic() - begun_s, wrong=wrong)
        for problem in found.problems:
            _say(problem)
        _say(f"{found.requests.total()} requests ({_counts(found.requests)}), answers: {_counts(found.answers)}")
        _say(f"{'fail: ' + '; '.join(wrong) if wrong else 'pass'}")
        if wrong:
            raise OutcomeError("; ".join(wrong), where=work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2, help="servers at a time, each with a client beside it")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where serving.json is (out/bench)")
    parser.add_argument("--again", metavar="TASK:KIND:NUMBER", help="send this one request")
    return parser.parse_args()


def _keep(out: Path, found: Findings, *, seed: int, took_s: float, wrong: list[str]) -> None:
    """Write what was found beside what the serving benchmark measured."""
    path = out / "serving.json"
    fuzzed: dict[str, Any] = {
        "requests": found.requests.total(), "status_5xx": found.status_5xx, "hangs": found.hangs,
        "unusable": found.unusable, "undocumented": found.undocumented, "by_kind": dict(found.requests),
        "answers": dict(found.answers), "growth_mb": {name: growth_mb(mb) for name, mb in found.rss_mb.items()},
        "rss_mb": found.rss_mb, "seed": seed, "took_s": round(took_s, 1), "load": round(os.getloadavg()[0], 1),
        "problems": found.problems, "verdict": "fail" if wrong else "pass",
    }  # fmt: skip
    with FolderLock(out):
        document = dict(read_json(path)) if path.exists() else {}
        write_json(path, {**document, "fuzzed": fuzzed})


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _say(text: str) -> None:
    sys.stdout.write(f"  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
