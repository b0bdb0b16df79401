"""The gates from the engine's side: a child process with a deadline, and a report that is kept."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from pathlib import Path

from endcap.errors import EndcapError, InputError
from endcap.evidence import Verdict
from endcap.files import read_json, write_json
from endcap.objectives import Objectives
from endcap.processes import last_line, spawn, stop
from serving.gates.answers import latency_goals
from serving.gates.job import STABLE, Job, Result, read_result, write_job
from serving.gates.report import GATES, GateReport, GateResult, not_run
from serving.gates.settings import GateSettings

__all__ = ["DEADLINE_S", "REPORT_FILE", "run_gates"]

log = logging.getLogger("serving.gates")

REPORT_FILE = "gates.json"
LOG_FILE = "gates.log"
WORK_FOLDER = "gates"
DEADLINE_S = 900.0


def run_gates(
    settings: GateSettings,
    candidate: Path,
    stable: Path,
    public_key: Path,
    objectives: Objectives,
    *,
    requests: Path | None,
    folder: Path,
    deadline_s: float = DEADLINE_S,
) -> GateReport:
    """Run the gates on ``candidate``; the same inputs in the same ``folder`` are not run twice.

    The report is ``gates.json`` in ``folder``, the progress ``gates.log``; the job and the replicas' logs are in its
    folder ``gates``. The child dies with this process; call it from a thread that lives as long as the gates run.

    Args:
        stable: the package that is served, which the candidate is compared with.
        requests: recorded shoppers; None leaves all gates but ``verify`` out.
        deadline_s: a candidate whose gates take longer fails the one that was under way.

    Raises:
        InputError: the recorded requests or stable's package cannot be used: no word about the candidate.
        EndcapError: the child did not get as far as its first gate.
        StateError: ``gates.json`` is damaged.
        StorageError: no space, or not allowed.
    """
    if deadline_s <= 0:
        raise InputError("the deadline must be above 0", where="gates")
    job = Job(
        settings, candidate.absolute(), stable.absolute(), public_key.absolute(),
        None if requests is None else requests.absolute(), latency_goals(objectives),
    )  # fmt: skip
    digest, kept = job.digest, folder / REPORT_FILE
    if kept.exists():
        document = read_json(kept)
        report = GateReport.from_json(document, where=kept)
        if document.get("inputs") == digest:
            return report
    result = _run_child(job, folder.absolute(), deadline_s)
    if result.error is not None:
        raise result.error
    report = GateReport(result.gates)
    write_json(kept, {"inputs": digest, **report.to_json()})
    return report


def _run_child(job: Job, folder: Path, deadline_s: float) -> Result:
    work, output = folder / WORK_FOLDER, folder / LOG_FILE
    job_file, result_file = work / "job.json", work / "result.json"
    result_file.unlink(missing_ok=True)
    write_job(job_file, job)
    since = output.stat().st_size if output.exists() else 0
    child = spawn([sys.executable, "-m", "serving.gates", str(job_file), str(result_file)], log=output)
    try:
        code = child.wait(deadline_s)
        fate = f"the process ended ({_how(code)})"
    except subprocess.TimeoutExpired:
        fate = f"not done within {deadline_s:g} s"
    finally:
        # Its servers are bound to it: they end when it does.
        stop(child, grace_s=0.5)
    last = last_line(output, since=since)
    if not result_file.exists():
        raise EndcapError(f"the gates did not begin: {fate}; its last words: {last}", where=output)
    result = read_result(result_file)
    if result.error is not None or result.running is None:
        return result
    if result.running == STABLE:
        raise InputError(f"stable's package cannot be compared with: {fate}; its last words: {last}", where=job.stable)
    # What a candidate does to the process that runs it is the candidate's doing.
    failed = GateResult(result.running, Verdict.FAIL, f"{fate}; its last words: {last}")
    log.warning("%s: %s", failed.name, failed.reason)
    after = GATES[GATES.index(failed.name) + 1 :]
    return Result((*result.gates, failed, *(not_run(name, f"{failed.name} was not done") for name in after)))


def _how(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
