"""Run a drill: a Chaos Toolkit experiment in a process of its own, and what it came to for shoppers.

The verdict is made of both: Chaos Toolkit's journal (steady state before and after) and the load's own records.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chaos.faults import HANG, KILL
from chaos.probes import OBJECTIVES_VARIABLE, find_objectives
from endcap.errors import EndcapError, InputError, StateError
from endcap.files import FolderLock, read_json, write_json
from endcap.objectives import load_objectives
from endcap.processes import spawn, stop
from endcap.records import read_faults, read_requests, read_target_events
from endcap.recovery import Recovery, Span, held, measure_recovery, span_of
from serving.targets import TARGET_VARIABLE, open_target

__all__ = ["DRILL_FILE", "EXPERIMENTS", "JOURNAL_FILE", "DrillResult", "Promises", "drill_names", "run_drill"]

EXPERIMENTS = Path(__file__).with_name("experiments")
DRILL_FILE = "drill.json"
JOURNAL_FILE = "journal.json"
LOG_FILE = "chaos.log"
_END_S = 20.0
_RECORDS_WITHIN_S = 5.0
_FAULTS = {"replica-kill": KILL, "zone-loss": HANG}


@dataclass(frozen=True, slots=True)
class Promises:
    """What an experiment's file promises. None: nothing about that. ``rto_s`` is reported beside the time measured."""

    failed_requests: int | None = None
    rto_s: float | None = None


@dataclass(frozen=True, slots=True)
class DrillResult:
    """``held``: the steady state held or came back within the drill, and what the drill promises was kept.

    ``reason``: why it was not held, None when it was. ``status``: Chaos Toolkit's (completed, failed, aborted).
    """

    name: str
    fault: str
    span: Span
    status: str
    held: bool
    reason: str | None
    recovery: Recovery
    promises: Promises
    journal: Path

    def describe(self) -> str:
        """One line for people."""
        seen = self.recovery
        parts = [
            f"{'held' if self.held else 'not held'}",
            f"{seen.failed_requests} of {seen.requests} requests failed",
            f"detected after {_seconds(seen.detected_s)}",
            f"RTO {_seconds(seen.rto_s)}",
        ]
        if self.promises.rto_s is not None:
            parts[-1] += f" (objective {self.promises.rto_s:g} s)"
        return ", ".join(parts) + ("" if self.reason is None else f": {self.reason}")


def drill_names() -> list[str]:
    """The drills that come with endcap."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def run_drill(
    name: str,
    *,
    target: Path,
    out: Path,
    seed: int = 7,
    objectives: Path | None = None,
    zone: str | None = None,
    variables: Mapping[str, float] | None = None,
) -> DrillResult:
    """Run the drill ``name`` against the target of a folder, under the load that is running.

    Args:
        out: the drill's own folder; gets ``journal.json``, ``drill.json`` and ``chaos.log``.
        seed: chooses the replica or the zone (``zone`` names it).
        objectives: the file; default as in :func:`chaos.probes.find_objectives`.
        variables: other values for the experiment's configuration, such as ``lost_s``.

    Raises:
        InputError: no such drill, no objectives. TargetError: no target runs there. BusyError: a drill runs in ``out``.
        EndcapError: Chaos Toolkit failed of itself. A drill that is not held is a result, not an error.

    Whatever ends it (an error, Ctrl-C, SIGKILL), nothing stays stopped. Call it from a thread that lives as long
    as the drill.
    """
    experiment = _experiment(name)
    opened = open_target(target)
    records = opened.records
    opened.close()
    file = find_objectives(records, str(objectives) if objectives else None)
    declared = load_objectives(file)
    environment = {
        TARGET_VARIABLE: str(target.absolute()),
        OBJECTIVES_VARIABLE: str(file.absolute()),
        "ENDCAP_SEED": str(seed),
        "ENDCAP_DRILL_ZONE": zone or "",
    }
    journal_path = out / JOURNAL_FILE
    argv = [sys.executable, "-m", "chaostoolkit", "--no-version-check", "--no-log-file",
            "--settings", str(out / "no-settings.yaml"),
            "run", "--journal-path", str(journal_path.absolute())]  # fmt: skip
    for key, value in (variables or {}).items():
        argv += ["--var", f"{key}:float={value!r}"]
    with FolderLock(out):
        journal_path.unlink(missing_ok=True)
        fault = _FAULTS.get(name, str(experiment["title"]))
        promises = _promises(experiment)
        started_at_s = time.time()
        _write(out, name, fault, Span(started_at_s, None, None, started_at_s), promises, None, None)
        process = spawn([*argv, str(EXPERIMENTS / f"{name}.yaml")], log=out / LOG_FILE, env=environment, leash=True)
        try:
            process.wait()
        finally:
            # Interrupted: Chaos Toolkit plays the rollbacks and the controls on SIGTERM.
            stop(process, grace_s=_END_S)
        ended_at_s = time.time()
        journal = _journal(journal_path, process, out / LOG_FILE)
        span = span_of(name, read_faults(records), started_at_s=started_at_s, ended_at_s=ended_at_s)
        _wait_for_records(records, ended_at_s)
        recovery = measure_recovery(declared, read_requests(records), read_target_events(records), span)
        reason = _reason(journal, recovery, promises)
        result = DrillResult(
            name=name, fault=fault, span=span, status=str(journal["status"]), held=reason is None, reason=reason,
            recovery=recovery, promises=promises, journal=journal_path,
        )  # fmt: skip
        _write(out, name, fault, span, promises, result.held, reason)
        return result


def _experiment(name: str) -> dict[str, Any]:
    path = EXPERIMENTS / f"{name}.yaml"
    if name not in drill_names():
        raise InputError(f"no drill named {name!r}", next_step=f"drills: {', '.join(drill_names())}")
    document = yaml.safe_load(path.read_text())
    if not isinstance(document, dict):
        raise StateError("not an experiment", where=path)
    return document


def _promises(experiment: Mapping[str, Any]) -> Promises:
    for extension in experiment.get("extensions", ()):
        if extension.get("name") == "endcap":
            stated = extension.get("promises", {})
            return Promises(stated.get("failedRequests"), stated.get("rtoSeconds"))
    return Promises()


def _journal(path: Path, process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    if not path.exists():
        raise EndcapError(f"Chaos Toolkit ended with code {process.returncode} and no journal", where=log,
                          next_step="read the end of that log")  # fmt: skip
    document = read_json(path)
    if not isinstance(document, dict) or "status" not in document:
        raise StateError("not a journal of Chaos Toolkit", where=path)
    return document


def _reason(journal: Mapping[str, Any], recovery: Recovery, promises: Promises) -> str | None:
    """Why a drill was not held; None when it was."""
    states = journal.get("steady_states") or {}
    if (states.get("before") or {}).get("steady_state_met") is not True:
        return f"there was no steady state before it ({_first_fault(states.get('before'))})"
    for run in journal.get("run") or ():
        if run.get("status") == "failed":
            return f"{run['activity']['name']} failed ({_said(run.get('exception') or ())})"
    if journal["status"] != "completed":
        return f"Chaos Toolkit's status is {journal['status']}"
    if journal.get("deviated"):
        return f"the steady state did not come back ({_first_fault(states.get('after'))})"
    if recovery.requests == 0:
        return "no request was recorded meanwhile"
    if held(recovery, failed_requests_allowed=promises.failed_requests):
        return None
    if recovery.rto_s is None:
        return "shoppers' requests were not steady again when it ended"
    return f"{recovery.failed_requests} requests failed, {promises.failed_requests} are promised"


def _said(exception: Sequence[str]) -> str:
    """Our own error's first line, out of Chaos Toolkit's wrapping."""
    text = "".join(exception).strip().rpartition("ActivityFailed: ")[2]
    lines = re.sub(r"^(endcap\.errors\.)?\w*Error: ", "", text).splitlines()
    return lines[0] if lines else "no reason given"


def _first_fault(state: Mapping[str, Any] | None) -> str:
    for probe in (state or {}).get("probes", ()):
        if not probe.get("tolerance_met"):
            return f"{probe['activity']['name']}: {probe.get('output') or 'failed'}"
    return "not looked at"


def _wait_for_records(records: Path, until_s: float) -> None:
    """The load flushes its records a few times a second, and a request may take its timeout to fail."""
    progress = records / "load.json"
    deadline = time.monotonic() + _RECORDS_WITHIN_S
    while time.monotonic() < deadline and progress.exists():
        seen = read_json(progress)
        if seen.get("state") != "running" or seen.get("at_s", 0.0) >= until_s + 0.5:
            return
        time.sleep(0.1)


def _write(
    out: Path, name: str, fault: str, span: Span, promises: Promises, was_held: bool | None, reason: str | None
) -> None:
    """``drill.json``; ``held`` null: it has not ended, or was killed."""
    document = {
        "name": name, "fault": fault, "started_at_s": span.started_at_s, "fault_at_s": span.fault_at_s,
        "reverted_at_s": span.reverted_at_s, "ended_at_s": None if was_held is None else span.ended_at_s,
        "held": was_held, "reason": reason,
        "promises": {"failed_requests": promises.failed_requests, "rto_s": promises.rto_s},
    }  # fmt: skip
    write_json(out / DRILL_FILE, document)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
