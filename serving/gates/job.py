"""What the engine's process and the one that runs the gates hand each other: a job and a result, as files.

The result is written anew before and after each gate, so that what a crash leaves says which gate it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue

from endcap.errors import EndcapError, StateError
from endcap.files import read_json, sha256_file, write_json
from serving.gates.answers import LatencyGoal
from serving.gates.report import GATES, GateReport, GateResult
from serving.gates.settings import GateSettings

__all__ = ["STABLE", "Job", "Result", "read_job", "read_result", "write_job", "write_result"]

STABLE = "stable"
"""What runs while stable's own quality is measured: no gate, and nothing that a candidate can fail."""
RULES = 1
"""Raised when the gates judge otherwise than before: kept reports of other rules are not used again."""


@dataclass(frozen=True, slots=True)
class Job:
    """All that the gates' verdicts hang on. Paths are absolute."""

    settings: GateSettings
    candidate: Path
    stable: Path
    public_key: Path
    requests: Path | None
    goals: tuple[LatencyGoal, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the contents of all inputs: the same digest, the same gates."""
        parts: list[JsonValue] = [
            RULES, json.loads(json.dumps(asdict(self.settings))), [asdict(goal) for goal in self.goals],
            _digests(self.candidate), _digests(self.stable), _digest(self.public_key),
            None if self.requests is None else _digest(self.requests),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(package: Path) -> list[JsonValue]:
    return [[path.name, _digest(path)] for path in sorted(package.iterdir())] if package.is_dir() else []


def _digest(path: Path) -> str:
    """Of a plain file; anything else has none, and is refused by the gates themselves."""
    try:
        return sha256_file(path) if path.is_file() and not path.is_symlink() else "no plain file"
    except OSError:
        return "unreadable"


def write_job(path: Path, job: Job) -> None:
    write_json(path, {
        "settings": asdict(job.settings), "candidate": str(job.candidate), "stable": str(job.stable),
        "public_key": str(job.public_key), "requests": None if job.requests is None else str(job.requests),
        "goals": [asdict(goal) for goal in job.goals],
    })  # fmt: skip


def read_job(path: Path) -> Job:
    """The inverse of :func:`write_job`.

    Raises:
        StateError: not a job.
    """
    document = read_json(path)
    try:
        requests = document["requests"]
        return Job(
            GateSettings(**document["settings"]), Path(document["candidate"]), Path(document["stable"]),
            Path(document["public_key"]), None if requests is None else Path(requests),
            tuple(LatencyGoal(**goal) for goal in document["goals"]),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise StateError(f"damaged, not a job of gates ({error!r})", where=path) from error


@dataclass(frozen=True, slots=True)
class Result:
    """``gates``: those that are done. ``running``: the one under way, None when all are done.

    ``error``: why the gates cannot be run, through no fault of the candidate.
    """

    gates: tuple[GateResult, ...] = ()
    running: str | None = None
    error: EndcapError | None = None


def write_result(path: Path, gates: Sequence[GateResult], *, running: str | None = None,
                 error: EndcapError | None = None) -> None:  # fmt: skip
    write_json(path, {
        "gates": [gate.to_json() for gate in gates], "running": running,
        "error": None if error is None else error.to_json(),
    })  # fmt: skip


def read_result(path: Path) -> Result:
    """The inverse of :func:`write_result`.

    Raises:
        StateError: missing, or not a result.
    """
    document = read_json(path)
    try:
        gates, error, running = document["gates"], document["error"], document["running"]
        if running not in (None, STABLE, *GATES):
            raise ValueError(running)
        return Result(
            GateReport.from_json({"gates": gates}, where=path).gates if gates else (),
            running,
            None if error is None else EndcapError.from_json(error),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StateError(f"damaged, not a result of gates ({error!r})", where=path) from error
