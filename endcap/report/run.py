"""A run folder as typed values: the raw records that a report is computed from, and what of them is missing.

A missing part is noted and the report says so; a damaged one is an error that names the file. Nothing derived that an
earlier report wrote is ever read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from endcap import records
from endcap.documents import describe_validation
from endcap.errors import InputError, StateError
from endcap.files import read_json, read_json_lines
from endcap.objectives import Objectives, load_objectives

__all__ = [
    "Attempts",
    "Data",
    "Decision",
    "Drill",
    "Evaluation",
    "Expected",
    "ExpectedDrill",
    "Judged",
    "Measured",
    "Model",
    "Requests",
    "Rollout",
    "Run",
    "Training",
    "read_run",
]

_NO_END = 1000
"""An end of a group of history lengths that no history reaches."""
_MOST_LOOKS = 1000
"""Kept of each rollout's looks that changed nothing; of more, an even part."""
Verdict = Literal["promoted", "rolled_back", "refused", "held", "aborted"]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Texts = NDArray[np.object_]


class _Part(BaseModel):
    """Base of what other parts of endcap write: further fields are theirs and do not concern a report."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Dropped(_Part):
    malformed_lines: int = 0
    duplicates: int = 0
    short_users: int = 0


class Data(_Part):
    name: str
    users: int
    items: int
    interactions: int
    synthetic: bool
    sha256: str = ""
    dropped: Dropped = Dropped()
    caveats: tuple[str, ...] = ()


class Epoch(_Part):
    epoch: int
    seconds: float
    loss: float | None = None
    valid_ndcg_at_10: float | None = None


class Training(_Part):
    seconds: float
    epochs: int
    curve: tuple[Epoch, ...] = ()
    stopped_early: bool = False


class Measured(_Part):
    """A value and its bootstrap interval."""

    value: float
    low: float | None = None
    high: float | None = None


class LengthGroup(_Part):
    from_: int = Field(alias="from")
    to: int | None = None
    users: int
    ndcg_at_10: Measured
    hr_at_10: Measured | None = None

    @property
    def words(self) -> str:
        """How many items: ``5–9``, or ``20+`` where the group has no end that matters."""
        return f"{self.from_}+" if self.to is None or self.to >= _NO_END else f"{self.from_}–{self.to}"


class Model(_Part):
    metrics: dict[str, Measured]
    coverage_at_10: Measured | None = None
    popularity_bias_at_10: Measured | None = None
    by_history_length: tuple[LengthGroup, ...] = ()


class Paired(_Part):
    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float


class Evaluation(_Part):
    split: str = "test"
    models: dict[str, Model]
    paired: tuple[Paired, ...] = ()
    candidate: str | None = None
    int8: dict[str, Any] = Field(default_factory=dict)
    parity: dict[str, Any] = Field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """The model that the run exports: the one named, else the blend, else the transformer."""
        for name in (self.candidate, "transformer+item-knn", "transformer"):
            if name is not None and name in self.models:
                return name
        return None


class ExpectedDrill(_Part):
    """What a drill had to do. ``rto_s`` is an objective to report beside the time, never an outcome."""

    held: bool | None = True
    failed_requests: int | None = None
    rto_s: float | None = Field(default=None, ge=0)


class Expected(_Part):
    rollouts: dict[str, Verdict] = Field(default_factory=dict)
    drills: dict[str, ExpectedDrill | Literal["held"]] = Field(default_factory=dict)

    def drill(self, name: str) -> ExpectedDrill | None:
        found = self.drills.get(name)
        return ExpectedDrill() if found == "held" else found


class RunCard(_Part):
    """``run.json``. ``environment``: what ran it (versions, machine), shown as it is. ``version_names``: what each
    model version is, in a few words, by label. ``expected``: the outcomes that had to happen."""

    name: str
    started_at_s: float | None = None
    seed: int | None = None
    git_commit: str | None = None
    data: Data | None = None
    expected: Expected | None = None
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    version_names: dict[str, str] = Field(default_factory=dict)


class Tally(_Part):
    good: int
    total: int


class Lift(_Part):
    """Of an A/B rollout's primary objective: canary's share less control's, as a part of control's."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


class Judged(_Part):
    """One objective at one look: canary minus control, with an interval that may be looked at any time."""

    canary: Tally
    control: Tally
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    verdict: str | None = None
    lift: Lift | None = None


class Received(_Part):
    """Requests since the rollout began, as the engine counted them."""

    canary_requests: int
    requests: int


class RolloutEvent(_Part):
    """What a decision was about: a look, an act that was done or not, checks, or what a person asked for."""

    kind: str
    command: str | None = None
    by: str | None = None
    received: Received | None = None


class Decision(_Part):
    at_s: float
    from_: str = Field(alias="from")
    to: str
    step: int | None = None
    share: float | None = None
    phase: str = ""
    action: str = ""
    verdict: str | None = None
    outcome: Verdict | None = None
    reason: str = ""
    waiting: str | None = None
    event: RolloutEvent | None = None
    evidence: dict[str, Judged] = Field(default_factory=dict)


class RolloutState(_Part):
    stable: str
    canary: str
    started_at_s: float
    verdict: Verdict | None = None
    reason: str = ""
    ended_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Rollout:
    """``ended_at_s`` and ``verdict`` are None while a rollout goes on, or where its engine was stopped."""

    folder: str
    stable: str
    canary: str
    started_at_s: float
    ended_at_s: float | None
    verdict: Verdict | None
    reason: str
    decisions: tuple[Decision, ...]


class Promises(_Part):
    """What the drill's own file promises; ``rto_s`` is an objective that is reported beside the time."""

    failed_requests: int | None = None
    rto_s: float | None = None


class Drill(_Part):
    name: str
    fault: str
    started_at_s: float
    fault_at_s: float | None = None
    ended_at_s: float | None = None
    held: bool | None = None
    reason: str | None = None
    promises: Promises = Promises()


@dataclass(frozen=True, slots=True)
class Requests:
    """Recommendation requests as the load saw them, in the order of their intended send; one row a request.

    ``records`` and, in the same order, arrays of one length: ``intended_s`` and ``done_s`` (Unix seconds),
    ``failed``, ``version`` (None where no answer named one), ``shown`` (an impression was made), ``clicked``,
    ``fallback`` (answered from the fallback).
    ``feedback`` and ``feedback_failed`` count the deliveries of feedback, which no shopper waits for.
    """

    records: tuple[records.RequestRecord, ...]
    intended_s: Floats
    done_s: Floats
    failed: Flags
    version: Texts
    shown: Flags
    clicked: Flags
    fallback: Flags
    feedback: int
    feedback_failed: int

    def __len__(self) -> int:
        return len(self.intended_s)

    @property
    def latency_s(self) -> Floats:
        """From the intended send to the end of the answer, so that a stalled service cannot hide the wait."""
        return self.done_s - self.intended_s


@dataclass(frozen=True, slots=True)
class Attempts:
    """What the gateway sent to replicas, retries included; one row an attempt."""

    at_s: Floats
    version: Texts
    failed: Flags
    request_id: Texts


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a report is computed from. ``missing`` names, by its path in the folder, each part not there."""

    card: RunCard
    data: Data | None
    training: Training | None
    evaluation: Evaluation | None
    objectives: Objectives | None
    rollouts: tuple[Rollout, ...]
    drills: tuple[Drill, ...]
    requests: Requests | None
    attempts: Attempts | None
    faults: tuple[records.FaultRecord, ...]
    events: tuple[records.TargetEvent, ...]
    missing: tuple[str, ...]

    @property
    def synthetic(self) -> bool:
        return self.data is not None and self.data.synthetic

    @property
    def versions(self) -> tuple[str, ...]:
        """Labels of all model versions met in the run, in the order of their first share, then of rollouts."""
        seen: dict[str, None] = {}
        if self.requests is not None:
            labels, first = np.unique([v for v in self.requests.version if v is not None], return_index=True)
            seen.update(dict.fromkeys(str(label) for label in labels[np.argsort(first)]))
        for rollout in self.rollouts:
            seen.update({rollout.stable: None, rollout.canary: None})
        return tuple(seen)


P = TypeVar("P", bound=_Part)
_SHARE = re.compile(r"(\S+)=(\d+(?:\.\d+)?)%")


def _parse(model: type[P], document: Any, where: object) -> P:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise StateError(f"damaged: {describe_validation(error)}", where=where,
                         next_step="restore the file, or move it away to report without it") from error  # fmt: skip


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        InputError: there is no such folder, or nothing of a run in it.
        StateError: a file is damaged; the message names it.
    """
    if not folder.is_dir():
        raise InputError("no such folder", where=folder, next_step="name the folder of a run, such as out/demo")
    missing: list[str] = []

    def part(model: type[P], name: str) -> P | None:
        path = folder / name
        if not path.exists():
            missing.append(name)
            return None
        return _parse(model, read_json(path), path)

    card = part(RunCard, "run.json")
    data = part(Data, "data.json")
    training = part(Training, "training.json")
    evaluation = part(Evaluation, "evaluation.json")
    objectives = None
    if (folder / "objectives.yaml").exists():
        objectives = load_objectives(folder / "objectives.yaml")
    else:
        missing.append("objectives.yaml")
    home = folder / "records"
    requests = _requests(home)
    attempts = _attempts(home)
    if requests is None:
        missing.append(f"records/{records.REQUESTS_FILE}")
    if attempts is None:
        missing.append(f"records/{records.ATTEMPTS_FILE}")
    rollouts = []
    for path in _folders(folder / "rollouts"):
        rollout = _rollout(path)
        if rollout is None:
            missing.append(f"rollouts/{path.name}/state.json")
        else:
            rollouts.append(rollout)
    if not rollouts:
        missing.append("rollouts/")
    drills = _drills(folder / "drills")
    card = card or RunCard(name=folder.resolve().name)
    if card.expected is not None and card.expected.drills and not drills:
        missing.append("drills/")
    nothing = (card, data, training, evaluation, objectives, requests, *rollouts, *drills)
    if all(part is None for part in nothing[1:]) and "run.json" in missing:
        raise InputError("nothing of a run is in this folder", where=folder,
                         next_step="name the folder of a run, such as out/demo")  # fmt: skip
    return Run(
        card, data or card.data, training, evaluation, objectives, tuple(rollouts), drills, requests, attempts,
        tuple(records.read_faults(home)), tuple(records.read_target_events(home)), tuple(missing),
    )  # fmt: skip


def _folders(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.is_dir()) if home.is_dir() else []


def _rollout(home: Path) -> Rollout | None:
    """None where the run was stopped between making the folder and the first decision."""
    decisions = _decisions(home / "decisions.jsonl")
    file = home / "state.json"
    if file.exists():
        state = _parse(RolloutState, read_json(file), file)
        return Rollout(home.name, state.stable, state.canary, state.started_at_s, state.ended_at_s, state.verdict,
                       state.reason, decisions)  # fmt: skip
    if not decisions:
        return None
    first = decisions[0]
    return Rollout(home.name, first.from_, first.to, first.at_s, None, None, decisions[-1].reason, decisions)


def _decisions(path: Path) -> tuple[Decision, ...]:
    """All that changed something, and the last look; of the other looks as many as a plot can show."""
    kept: list[tuple[int, Decision]] = []
    looks, every = 0, 1
    left_out: tuple[int, dict[str, Any]] | None = None
    for number, record in enumerate(read_json_lines(path), 1):
        is_look = record.get("action") == "look"
        looks += is_look
        if is_look and looks % every:
            left_out = (number, record)
            continue
        left_out = None
        kept.append((looks if is_look else 0, _parse(Decision, record, f"{path}, line {number}")))
        if len(kept) > 2 * _MOST_LOOKS and is_look:
            every *= 2
            kept = [(look, decision) for look, decision in kept if look % every == 0]
    decisions = tuple(decision for _, decision in kept)
    if left_out is None:
        return decisions
    number, record = left_out
    return (*decisions, _parse(Decision, record, f"{path}, line {number}"))


def _drills(home: Path) -> tuple[Drill, ...]:
    found = [
        _parse(Drill, read_json(path / "drill.json"), path / "drill.json")
        for path in _folders(home)
        if (path / "drill.json").exists()
    ]
    return tuple(sorted(found, key=lambda drill: drill.started_at_s))


def _requests(home: Path) -> Requests | None:
    if records.leftover_request_files(home):
        records.convert_requests(home)
    found = records.read_requests(home)
    if not found and not (home / records.REQUESTS_FILE).exists():
        return None
    asked = tuple(record for record in found if record.kind == "recommend")
    feedback = [record for record in found if record.kind == "feedback"]

    def floats(values: Iterable[float]) -> Floats:
        return np.fromiter(values, dtype=np.float64, count=len(asked))

    def flags(values: Iterable[bool]) -> Flags:
        return np.fromiter(values, dtype=np.bool_, count=len(asked))

    version: Texts = np.empty(len(asked), dtype=object)
    version[:] = [record.version for record in asked]
    return Requests(
        records=asked,
        intended_s=floats(record.intended_s for record in asked),
        done_s=floats(record.done_s for record in asked),
        failed=flags(record.failed for record in asked),
        version=version,
        shown=flags(record.impression is not None for record in asked),
        clicked=flags(record.clicked for record in asked),
        fallback=flags(record.fallback is not None for record in asked),
        feedback=len(feedback),
        feedback_failed=sum(record.failed for record in feedback),
    )


def _attempts(home: Path) -> Attempts | None:
    if not (home / records.ATTEMPTS_FILE).exists():
        return None
    kept = [record for record in records.read_attempts(home) if record.version is not None]
    return Attempts(
        np.array([record.at_s for record in kept], dtype=np.float64),
        np.array([record.version for record in kept], dtype=object),
        np.array([record.failed for record in kept], dtype=np.bool_),
        np.array([record.request_id for record in kept], dtype=object),
    )


def shares_set(events: tuple[records.TargetEvent, ...]) -> list[tuple[float, Mapping[str, float]]]:
    """When which shares were set, from the target's events (``1=95% 2=5%``); unreadable ones are left out."""
    found: list[tuple[float, Mapping[str, float]]] = []
    for event in events:
        if event.event != "shares_set":
            continue
        parts = _SHARE.findall(event.detail or "")
        if parts:
            found.append((event.at_s, {label: float(percent) / 100 for label, percent in parts}))
    return found
