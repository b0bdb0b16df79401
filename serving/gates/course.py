"""The gates in their order. Runs in a process of its own: a model may crash it, hang in it or fill its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from endcap.errors import EndcapError, InputError, PackageError
from endcap.evidence import Verdict
from endcap.package import Manifest, read_items, read_popular, verify_package
from serving.gates.answers import judge_replay
from serving.gates.job import STABLE, Job, write_result
from serving.gates.quality import judge_offline, judge_segments, segment
from serving.gates.recorded import Recorded, read_recorded
from serving.gates.replay import ReplicaEndedError, replay, replica
from serving.gates.report import GATES, GateResult, not_run
from serving.gates.scoring import CUTOFF, MOST_TIMEOUTS, RUN_S, Scored, score
from serving.server.service import Service, load_service

__all__ = ["run_course"]

log = logging.getLogger("serving.gates")

LOAD_S = 60.0
"""As long as a replica may take to be ready."""


def run_course(job: Job, *, result: Path, folder: Path) -> None:
    """Run every gate that can be run and keep the results in ``result``; logs of the replicas go to ``folder``.

    Raises:
        InputError: the recorded requests or stable's package cannot be used.
        StorageError: no space, or not allowed.
    """
    done: list[GateResult] = []

    def run(name: str, gate: Callable[[], GateResult]) -> GateResult:
        log.info("%s: begins", name)
        write_result(result, done, running=name)
        found = gate()
        log.info("%s: %s: %s", name, found.verdict.value, found.reason)
        done.append(found)
        return found

    stable = _stable(job)
    verified = run("verify", lambda: _verify(job, stable))
    if not verified.passed or job.requests is None:
        why = "no recorded requests" if job.requests is None else "the package is refused"
        done.extend(not_run(name, why) for name in GATES[1:])
        write_result(result, done)
        return
    settings = job.settings
    recorded = read_recorded(
        job.requests, purchases=settings.max_shoppers, requests=settings.replayed_requests, seed=settings.seed
    )
    log.info("stable's quality")
    write_result(result, done, running=STABLE)
    yardstick = _score_stable(job, recorded)
    scored: list[Scored] = []

    def offline() -> GateResult:
        try:
            scored.append(_score_candidate(job, recorded))
        except PackageError as error:
            return GateResult("offline", Verdict.FAIL, _line(error))
        return judge_offline(scored[0], yardstick, settings)

    run("offline", offline)
    if scored:
        segments = segment(recorded.purchases, items=read_items(job.stable), popular=read_popular(job.stable))
        run("segments", lambda: judge_segments(scored[0], yardstick, segments, settings))
        run("replay", lambda: _replay(job, recorded, stable, folder))
    else:
        done.extend(not_run(name, "the candidate could not be scored") for name in GATES[2:])
    write_result(result, done)


def _stable(job: Job) -> Manifest:
    try:
        return verify_package(job.stable, job.public_key)
    except PackageError as error:
        raise _no_yardstick(job, error) from error


def _no_yardstick(job: Job, error: EndcapError) -> InputError:
    return InputError(
        f"stable's package cannot be compared with: {_line(error)}",
        where=job.stable,
        next_step="restore the package that is served, and give the key that it was signed with",
    )


def _verify(job: Job, stable: Manifest) -> GateResult:
    try:
        manifest = verify_package(job.candidate, job.public_key)
    except PackageError as error:
        return GateResult("verify", Verdict.FAIL, _line(error))
    for what, ours, theirs in (
        ("task", manifest.task.value, stable.task.value), ("top_k", manifest.top_k, stable.top_k)
    ):  # fmt: skip
        if ours != theirs:
            return GateResult("verify", Verdict.FAIL, f"its {what} is {ours}, stable's is {theirs}")
    return GateResult("verify", Verdict.PASS, "signature and digests verify", {"files": len(manifest.digests)})


def _score_stable(job: Job, recorded: Recorded) -> Scored:
    try:
        return _score(job.stable, job, recorded, "stable")
    except PackageError as error:
        raise _no_yardstick(job, error) from error


def _score_candidate(job: Job, recorded: Recorded) -> Scored:
    return _score(job.candidate, job, recorded, "candidate")


def _score(package: Path, job: Job, recorded: Recorded, who: str) -> Scored:
    log.info("offline: %s is loaded", who)
    scored = score(_load(package, job.public_key), recorded.purchases, who=who)
    if not scored.complete:
        raise PackageError(f"for {MOST_TIMEOUTS} recorded shoppers its graph took longer than {RUN_S:g} s")
    return scored


def _load(package: Path, public_key: Path) -> Service:
    """Loading runs the graph, with no limit of its own; a run that hangs is left behind for the process to end."""
    executor = ThreadPoolExecutor(1)
    try:
        return executor.submit(load_service, package, public_key).result(timeout=LOAD_S)
    except TimeoutError:
        raise PackageError(f"it was not loaded, and its graph run once, within {LOAD_S:g} s") from None
    finally:
        executor.shutdown(wait=False)


def _replay(job: Job, recorded: Recorded, manifest: Manifest, folder: Path) -> GateResult:
    known = frozenset(read_items(job.candidate)) | frozenset(read_popular(job.candidate))
    k = min(CUTOFF, manifest.top_k)
    try:
        with replica(job.stable, job.public_key, label="stable", folder=folder) as stable:
            try:
                with replica(job.candidate, job.public_key, label="candidate", folder=folder) as candidate:
                    replayed = replay(recorded.requests, stable=stable, candidate=candidate, k=k)
            except ReplicaEndedError as error:
                if error.replica is stable:
                    raise
                return GateResult("replay", Verdict.FAIL, _line(error))
            except PackageError as error:
                return GateResult("replay", Verdict.FAIL, _line(error))
    except PackageError as error:
        raise _no_yardstick(job, error) from error
    return judge_replay(recorded.requests, replayed, k=k, known=known, goals=job.goals)


def _line(error: EndcapError) -> str:
    """What happened, on one line; next steps are for those who asked, not for a report."""
    return " ".join(error.what.split("; next: ")[0].split())
