"""What a local target is told at its start, and what it keeps over restarts. Both are files in its folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from endcap.documents import describe_validation
from endcap.errors import InputError, StateError
from endcap.files import read_json, write_json
from serving.gateway import Mark
from serving.targets.base import StickyKey

__all__ = [
    "CONFIG_FILE", "FAILED_FILE", "STATE_FILE", "TARGET_FILE", "Kept", "KeptShadow", "KeptSticky", "KeptVersion",
    "StableVersion", "SupervisorConfig", "TargetFile", "read_config", "read_state", "write_state",
]  # fmt: skip

CONFIG_FILE = "config.json"
STATE_FILE = "state.json"
TARGET_FILE = "target.json"
FAILED_FILE = "failed.json"
NAME = r"^[A-Za-z0-9_-]{1,64}$"
"""A header's or a cookie's name."""
LABEL = r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StableVersion(_Model):
    """The version that serves from the start."""

    label: str = Field(pattern=LABEL)
    package: Path


class SupervisorConfig(_Model):
    """``F/config.json``. Times in seconds; a port of 0 means any free one."""

    folder: Path
    records: Path
    public_key: Path
    stable: StableVersion | None = None
    """Not needed when the folder holds the state of an earlier supervisor, which then wins."""
    thresholds_ms: tuple[int, ...] = ()
    window_s: float = Field(default=5.0, gt=0)
    gateway_port: int = Field(default=0, ge=0, le=65535)
    control_port: int = Field(default=0, ge=0, le=65535)
    host: str = "127.0.0.1"
    zones: tuple[str, ...] = ("a", "b")
    replicas_full: int = Field(default=2, ge=1, le=16)
    """Replicas a zone for a version with at least ``full_share`` of the requests."""
    replicas_small: int = Field(default=1, ge=1, le=16)
    full_share: float = Field(default=0.5, gt=0, le=1)
    starting_at_once: int = Field(default=2, ge=1)
    """Loading a model is seconds of processor time; more at once would starve the replicas that serve."""
    ready_s: float = Field(default=30.0, gt=0)
    """How long one replica may take from its start until it is ready."""
    capacity_s: float = Field(default=90.0, gt=0)
    """How long ``ensure_capacity`` may take in all."""
    drain_s: float = Field(default=3.0, gt=0)
    health_poll_s: float = Field(default=0.2, gt=0)
    server_module: str = "serving.server"
    server_arguments: tuple[str, ...] = ()
    feedback_module: str | None = "serving.feedback"

    @model_validator(mode="after")
    def _absolute(self) -> SupervisorConfig:
        if not (self.folder.is_absolute() and self.records.is_absolute() and self.public_key.is_absolute()):
            raise ValueError("folder, records and public_key must be absolute paths")
        if len(set(self.zones)) != len(self.zones) or not self.zones:
            raise ValueError("zones must differ, and there must be one")
        return self

    def replicas_per_zone(self, share: float) -> int:
        """How many replicas a version with this share needs in each zone."""
        if share <= 0:
            return 0
        return self.replicas_full if share >= self.full_share else self.replicas_small


class KeptVersion(_Model):
    label: str
    package: Path
    replicas_per_zone: int = Field(ge=1)


class KeptSticky(_Model):
    """A :class:`~serving.targets.base.StickyKey` in a file or a message: exactly one of the two."""

    header: str | None = Field(default=None, pattern=NAME)
    cookie: str | None = Field(default=None, pattern=NAME)

    @model_validator(mode="after")
    def _one(self) -> KeptSticky:
        if (self.header is None) == (self.cookie is None):
            raise ValueError("a sticky key is a header or a cookie")
        return self

    @staticmethod
    def of(key: StickyKey | None) -> KeptSticky | None:
        """Raises InputError when it is not one name."""
        if key is None:
            return None
        try:
            return KeptSticky(header=key.header, cookie=key.cookie)
        except ValidationError as error:
            raise InputError(describe_validation(error), where="sticky",
                             next_step="name one header or one cookie") from error  # fmt: skip


class KeptShadow(_Model):
    """``share`` of the requests is copied to version ``label``."""

    label: str
    share: float = Field(gt=0, le=1)
    began_at_s: float = 0.0
    """Unix time of the first copy's turn; a change of the share does not begin anew."""
    answers_from: dict[str, Mark] = Field(default_factory=dict)
    """By file name, where the answers logs stood then."""


class Kept(_Model):
    """``F/state.json``: what a supervisor that starts again resumes with. Only what was achieved is in it."""

    format: int = 1
    token: int = Field(default=0, ge=0)
    holder: str = ""
    versions: tuple[KeptVersion, ...] = ()
    shares: tuple[tuple[str, float], ...] = ()
    """In the order of the routes."""
    sticky: KeptSticky | None = None
    shadow: KeptShadow | None = None
    gateway_port: int = 0
    attempts_offset: int = Field(default=0, ge=0)
    access_offset: int = Field(default=0, ge=0)
    """Where this target's lines begin in the records, so that counts go on over a restart."""

    @model_validator(mode="after")
    def _fits(self) -> Kept:
        known = {version.label for version in self.versions}
        if self.format != 1:
            raise ValueError(f"format {self.format} is unknown")
        if any(label not in known for label, _ in self.shares):
            raise ValueError("a version has a share and is not among the versions")
        if self.shadow is not None and self.shadow.label not in known:
            raise ValueError("the shadow is not among the versions")
        return self

    def version(self, label: str) -> KeptVersion | None:
        return next((version for version in self.versions if version.label == label), None)


class TargetFile(_Model):
    """``F/target.json`` (0600): how to reach a running target."""

    pid: int
    gateway_url: str
    control_url: str
    control_token: str
    envoy_admin_url: str
    feedback_url: str | None
    records: Path
    public_key: Path
    started_at_s: float


def read_config(path: Path) -> SupervisorConfig:
    """Raises InputError when a field does not validate, StateError when the file is missing or no JSON."""
    try:
        return SupervisorConfig.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(describe_validation(error), where=path) from error


def read_state(folder: Path) -> Kept | None:
    """What an earlier supervisor kept; None when there was none.

    Raises:
        StateError: the file is damaged; it is never taken for a fresh start.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        return Kept.model_validate(read_json(path))
    except ValidationError as error:
        raise StateError(f"damaged: {describe_validation(error)}", where=path,
                         next_step="restore it from a backup, or move it away to start anew") from error  # fmt: skip


def write_state(folder: Path, state: Kept) -> None:
    write_json(folder / STATE_FILE, state.model_dump(mode="json"))
