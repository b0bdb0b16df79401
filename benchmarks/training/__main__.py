"""``python -m benchmarks.training``: both contestants at the same time, one core each, then the figures."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from benchmarks.command import ending
from benchmarks.training.environment import recbole_python
from benchmarks.training.verdict import Final, Point, compare, draw, table
from components.data.fetch import Source, obtain
from components.data.split import leave_one_out, save_split
from endcap.errors import DataError, EndcapError, InputError, OutcomeError
from endcap.files import FolderLock, read_json, read_json_lines, write_atomic, write_json
from endcap.processes import spawn, stop

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED_NDCG_AT_10 = 0.0531
"""SASRec with sampled softmax on exactly this file (eSASRec's README, RecSys'25)."""
WANTED_RATIO = 3.0


def main() -> None:
    with ending():
        _bench(_arguments())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="the most that either may train (60)")
    parser.add_argument("--out", type=Path, default=Path("out/bench-training"), help="where results go")
    parser.add_argument("--data", type=Path, default=None, help="a file of `user item item ...` lines (Beauty)")
    parser.add_argument("--without-recbole", action="store_true", help="ours alone")
    parser.add_argument("--recbole-history", type=int, default=20, help="newest items RecBole is shown (20)")
    given = parser.parse_args()
    # RecBole pads every history to one length, so its cost grows with it: on Beauty its default of 50 takes three times
    # as long as 20, which cuts one history in twenty and lets it get further in the time.
    if given.minutes <= 0:
        raise InputError("the time must be more than 0 minutes", where="--minutes")
    return given


def _bench(given: argparse.Namespace) -> None:
    out: Path = given.out.resolve()
    with FolderLock(out):
        shutil.rmtree(out / "recbole", ignore_errors=True)
        for old in ("ours", "recbole"):
            for ending in ("jsonl", "json", "log"):
                (out / f"{old}.{ending}").unlink(missing_ok=True)
        dataset = obtain(Source(file=given.data)).dataset
        if dataset.synthetic:
            raise DataError("the published data cannot be had; a synthetic shop would prove nothing",
                            next_step="name a folder that has it in ENDCAP_DATA_MIRROR, or give --data")  # fmt: skip
        save_split(out / "split.npz", leave_one_out(dataset))
        load_before = os.getloadavg()
        started_at_s = time.time()
        missing = _race(given, out)
        shutil.rmtree(out / "recbole", ignore_errors=True)
        finals = {name: _final(out, name) for name in ("ours", "recbole")}
        documents = {name: read_json(out / f"{name}.json") for name in finals if finals[name] is not None}
        curves = {name: _curve(out, name) for name in ("ours", "recbole")}
        comparison = compare(curves["ours"], curves["recbole"])
        markdown = table(finals["ours"], finals["recbole"], comparison)
        write_atomic(out / "table.md", markdown)
        named = {"endcap's transformer": curves["ours"], "RecBole's SASRec": curves["recbole"]}
        draw(out / "curve.svg", {label: points for label, points in named.items() if points})
        ours = finals["ours"]
        good = ours is not None and ours.test_ndcg_at_10 >= PUBLISHED_NDCG_AT_10
        faster = comparison is not None and comparison.ratio_wall >= WANTED_RATIO
        write_json(
            out / "result.json",
            {
                "started_at_s": started_at_s,
                "seconds": time.time() - started_at_s,
                "data": dataset.describe(),
                "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                            "load_before": load_before, "load_after": os.getloadavg()},
                "ours": documents.get("ours"),
                "recbole": documents.get("recbole"),
                "recbole_missing": missing,
                "comparison": None if comparison is None else vars(comparison),
                "published_ndcg_at_10": PUBLISHED_NDCG_AT_10,
                "ok": good and (faster or missing is not None),
            },
        )  # fmt: skip
    sys.stdout.write(markdown + f"\nresults: {out}\n")
    if missing is not None:
        sys.stdout.write(f"RecBole did not take part: {missing}\n")
    if not good:
        raise OutcomeError(f"the transformer's test NDCG@10 is below {PUBLISHED_NDCG_AT_10}", where=out)
    if missing is None and not faster:
        raise OutcomeError(f"RecBole's best was not reached {WANTED_RATIO:.0f} times sooner", where=out)


def _race(given: argparse.Namespace, out: Path) -> str | None:
    """Run the contestants; why RecBole is missing, where it cannot be installed or was left out."""
    cores = sorted(os.sched_getaffinity(0))
    missing: str | None = "left out by --without-recbole" if given.without_recbole else None
    programs = {"ours": (Path(sys.executable), "benchmarks.training.ours")}
    if missing is None:
        try:
            programs["recbole"] = (recbole_python(ROOT), "benchmarks.training.recbole_sasrec")
        except EndcapError as error:
            missing = str(error)
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    children = {}
    for place, (name, (python, module)) in enumerate(programs.items()):
        core = cores[place % len(cores)]
        argv = [str(python), "-m", module, "--split", str(out / "split.npz"), "--out", str(out),
                "--seconds", str(given.minutes * 60), "--core", str(core),
                "--history", str(given.recbole_history)]  # fmt: skip
        children[name] = spawn(argv, log=out / f"{name}.log", env=one_thread, cwd=ROOT)
    try:
        for name, child in children.items():
            code = child.wait()
            if code:
                raise EndcapError(f"{name} ended with code {code}", where=out / f"{name}.log",
                                  next_step="read that file; --without-recbole leaves RecBole out")  # fmt: skip
    finally:
        for child in children.values():
            stop(child)
    return missing


def _final(out: Path, name: str) -> Final | None:
    path = out / f"{name}.json"
    if not path.exists():
        return None
    document = read_json(path)
    return Final(
        test_ndcg_at_10=document["test"]["ndcg_at_10"],
        test_hr_at_10=document["test"]["hr_at_10"],
        epochs=document["epochs"],
        best_epoch=document["best_epoch"],
        seconds=document["seconds"],
    )


def _curve(out: Path, name: str) -> list[Point]:
    return [Point(**record) for record in read_json_lines(out / f"{name}.jsonl")]


if __name__ == "__main__":
    main()
