"""Run the recommender's pipeline here, by Kubeflow's local runner, and hand back what it made.

    result = run_recommender(RunConfig(out=folder, registry_uri=uri, keys=folder / "keys"), on_event=show)

Everything goes on in a child process bound to this one; its output is in ``<out>/logs/pipeline.log``. Killed at any
moment, the next run starts with a clean working folder.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.evaluation import Evaluation, read_evaluation
from components.steps.progress import PROGRESS_VARIABLE
from endcap.errors import EndcapError, StepError, from_os_error
from endcap.files import FolderLock, read_json, replaced_folder, write_atomic, write_json
from endcap.processes import spawn, stop

__all__ = [
    "STEPS", "DataSummary", "PipelineResult", "RunConfig", "StepEvent", "TrainingCurve", "TrainingPoint",
    "run_recommender",
]  # fmt: skip

STEPS = ("ingest", "split", "train", "evaluate", "compare", "export", "compress", "package", "register")
"""In order; those after ``compare`` run only where the gate passes."""

_POLL_S = 0.1
_FULL_BYTES = 1_000_000


@dataclass(frozen=True)
class RunConfig:
    """One run of the pipeline.

    Attributes:
        out: the run folder; ``data.json``, ``training.json``, ``evaluation.json``, ``shoppers.jsonl``, ``gate.json``
            and ``packages/`` are written to it.
        registry_uri: the MLflow registry (:func:`endcap.registry.sqlite_uri` makes one of a folder).
        keys: folder of the signing key, made on first use.
        name: of the registered model.
        file: data file; None: the published ``dataset``. ``sha256`` is what the file must have; None: anything.
        dataset: ``beauty`` or ``synthetic``; ``shoppers`` and ``items`` size the synthetic shop (0: default).
        candidate: ``best`` (on validation) or the model to register: ``item-knn`` makes the first champion's package.
        epochs: of the transformer at most; None: as configured.
        training_seconds: of the transformer at most; None: no limit.
        checkpoint: file that training writes after every epoch; gone when the run has come to its end. None: none.
        resume: go on from the checkpoint of a run that was interrupted; else such a one is deleted first.
        git_commit: for lineage.
    """

    out: Path
    registry_uri: str
    keys: Path
    name: str = "recommender"
    file: Path | None = None
    sha256: str | None = None
    dataset: str = "beauty"
    shoppers: int = 0
    items: int = 0
    candidate: str = "best"
    seed: int = 7
    epochs: int | None = None
    training_seconds: float | None = None
    checkpoint: Path | None = None
    resume: bool = False
    git_commit: str = ""


@dataclass(frozen=True)
class StepEvent:
    """What a step said: ``started``, ``epoch``, ``produced``, ``gate``, ``registered``, ``finished`` or ``failed``."""

    at_s: float
    step: str
    event: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSummary:
    """What ``data.json`` says."""

    name: str
    users: int
    items: int
    interactions: int
    synthetic: bool
    sha256: str
    origin: str
    dropped: Mapping[str, int]
    caveats: Sequence[str] = ()


@dataclass(frozen=True)
class TrainingPoint:
    """One epoch; ``seconds`` since training began."""

    epoch: int
    seconds: float
    loss: float
    valid_ndcg_at_10: float


@dataclass(frozen=True)
class TrainingCurve:
    """What ``training.json`` says."""

    seconds: float
    epochs: int
    curve: tuple[TrainingPoint, ...]
    stopped_early: bool


@dataclass(frozen=True)
class PipelineResult:
    """What a run made.

    Attributes:
        promoted_by_gate: the gate passed and the candidate was registered.
        gate_reason: why, or why not.
        version: the registered version; None where the gate did not pass.
        package: its folder under the run folder; None likewise.
        step_seconds: by step that ran.
    """

    promoted_by_gate: bool
    gate_reason: str
    version: str | None
    package: Path | None
    data: DataSummary
    training: TrainingCurve
    evaluation: Evaluation
    shoppers: Path
    step_seconds: Mapping[str, float]


def run_recommender(config: RunConfig, *, on_event: Callable[[StepEvent], None] | None = None) -> PipelineResult:
    """Run the pipeline once.

    Args:
        on_event: called in this thread with each event, as it comes.

    Raises:
        StepError: a step failed; its own error is the ``__cause__`` and in the message.
        BusyError: another run works in the same folder.
        StorageError: no space, or not allowed.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, doing="making the run folder") from error
    with FolderLock(config.out, name=".pipeline.lock"):
        return _run(config, on_event or (lambda _: None))


def _run(config: RunConfig, on_event: Callable[[StepEvent], None]) -> PipelineResult:
    work = config.out / "pipeline"
    log = config.out / "logs" / "pipeline.log"
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        if config.checkpoint is not None and not config.resume:
            config.checkpoint.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, doing="making the working folder") from error
    progress = work / "progress.jsonl"
    arguments = _arguments(config)
    write_json(work / "config.json", {"root": str(work / "artifacts"), "arguments": arguments})
    process = spawn([sys.executable, "-m", "pipelines.local", str(work / "config.json")], log=log,
                    env=_environment(progress))  # fmt: skip
    seen: list[StepEvent] = []
    tail = _Tail(progress)
    try:
        while True:
            ended = _ended(process)
            for event in tail.new():
                seen.append(event)
                on_event(event)
            if ended:
                break
    finally:
        stop(process)
    _raise_failure(seen, process.returncode, log)
    result = _collect(config, work, seen)
    if config.checkpoint is not None:
        config.checkpoint.unlink(missing_ok=True)
    return result


def _environment(progress: Path) -> dict[str, str]:
    return {
        PROGRESS_VARIABLE: str(progress),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # OpenMP's threads that spin as they wait cost several times the work where others want the cores too.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }


def _ended(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_POLL_S)
    return process.poll() is not None


def _arguments(config: RunConfig) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return {
        "registry": config.registry_uri,
        "keys": str(config.keys.resolve()),
        "name": config.name,
        "file": str(config.file.resolve()) if config.file is not None else "",
        "sha256": config.sha256 or "",
        "dataset": config.dataset,
        "shoppers": config.shoppers,
        "items": config.items,
        "candidate": config.candidate,
        "seed": config.seed,
        "epochs": config.epochs or 0,
        "training_seconds": float(config.training_seconds or 0.0),
        "checkpoint": str(config.checkpoint.resolve()) if config.checkpoint is not None else "",
        "git_commit": config.git_commit,
        "run": f"{config.name}-{now}-{secrets.token_hex(3)}",
    }


class _Tail:
    """The events of a file that still grows; a line counts once it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> list[StepEvent]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                raw = file.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at += len(whole)
        events = []
        for line in whole.splitlines():
            record = json.loads(line)
            events.append(StepEvent(record.pop("at_s"), record.pop("step"), record.pop("event"), record))
        return events


def _raise_failure(seen: list[StepEvent], code: int, log: Path) -> None:
    for event in seen:
        if event.event == "failed":
            cause = EndcapError.from_json(event.details["error"])
            where = f"step {event.step}" if cause.where is None else f"step {event.step}, {cause.where}"
            raise StepError(cause.what, where=where, next_step=cause.next_step or f"see {log}") from cause
    if code != 0:
        running = [event.step for event in seen if event.event == "started"]
        ended = {event.step for event in seen if event.event == "finished"}
        cut = [name for name in running if name not in ended]
        where = f"step {cut[-1]}" if cut else "the pipeline"
        if shutil.disk_usage(log.parent).free < _FULL_BYTES:
            # Then there was no room for a step's own word either.
            raise StepError("no space left on the disk", where=where,
                            next_step="free some space, then run the same command again")  # fmt: skip
        problem = f"ended without a word (killed?), code {code}" if cut else f"could not be run, code {code}"
        raise StepError(problem, where=where, next_step=f"see {log}, then run it again")


def _collect(config: RunConfig, work: Path, seen: list[StepEvent]) -> PipelineResult:
    """Copy what the steps made to the run folder, and read it."""
    produced = {event.details["file"]: Path(event.details["path"]) for event in seen if event.event == "produced"}
    package: Path | None = None
    try:
        for file, path in produced.items():
            if path.is_dir():
                package = config.out / file
                with replaced_folder(package) as scratch:
                    shutil.copytree(path, scratch)
            else:
                write_atomic(config.out / file, path.read_bytes())
    except OSError as error:
        raise from_os_error(error, doing="copying results to the run folder") from error
    verdict = next((event.details for event in seen if event.event == "gate"), None)
    if verdict is None:
        raise StepError("the gate did not decide", where="step compare", next_step="see logs/pipeline.log")
    version = next((str(event.details["version"]) for event in seen if event.event == "registered"), None)
    if verdict["verdict"] == "pass" and version is None:
        raise StepError("the gate passed and nothing was registered", where="step register",
                        next_step="see logs/pipeline.log")  # fmt: skip
    training = read_json(config.out / "training.json")
    return PipelineResult(
        promoted_by_gate=verdict["verdict"] == "pass",
        gate_reason=str(verdict["reason"]),
        version=version,
        package=package,
        data=DataSummary(**read_json(config.out / "data.json")),
        training=TrainingCurve(
            training["seconds"], training["epochs"],
            tuple(TrainingPoint(**point) for point in training["curve"]), training["stopped_early"],
        ),
        evaluation=read_evaluation(config.out / "evaluation.json"),
        shoppers=config.out / "shoppers.jsonl",
        step_seconds={
            event.step: float(event.details["seconds"]) for event in seen if event.event == "finished"
        },
    )  # fmt: skip
