"""The control API's messages, used by the supervisor and by its client. JSON over loopback with a bearer token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serving.targets.base import (
    Counts,
    ModelVersion,
    Observation,
    ShadowObservation,
    StickyKey,
    VersionObservation,
)
from serving.targets.config import LABEL, KeptShadow, KeptSticky

__all__ = [
    "AcquireReply",
    "AcquireRequest",
    "ObservationReply",
    "ReplicaReply",
    "RetireRequest",
    "ShadowRequest",
    "SharesRequest",
    "StateReply",
]  # fmt: skip


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AcquireRequest(_Model):
    holder: str = Field(max_length=200)


class AcquireReply(_Model):
    token: int


class VersionShare(_Model):
    label: str = Field(pattern=LABEL)
    package: Path
    share: float = Field(ge=0, le=1)


class SharesRequest(_Model):
    """Shares in the order of the routes."""

    token: int
    versions: tuple[VersionShare, ...] = Field(max_length=16)
    sticky: KeptSticky | None = None

    @staticmethod
    def of(shares: Mapping[ModelVersion, float], token: int, *, sticky: StickyKey | None = None) -> SharesRequest:
        return SharesRequest(
            token=token,
            sticky=KeptSticky.of(sticky),
            versions=tuple(
                VersionShare(label=version.label, package=version.package.absolute(), share=share)
                for version, share in shares.items()
            ),
        )

    def to_domain(self) -> dict[ModelVersion, float]:
        return {ModelVersion(v.label, v.package): v.share for v in self.versions}


class ShadowRequest(_Model):
    """No ``label``: no copies."""

    token: int
    label: str | None = Field(default=None, pattern=LABEL)
    share: float = Field(default=0.0, ge=0, le=1)


class RetireRequest(_Model):
    token: int
    label: str


class CountsReply(_Model):
    good: int
    total: int

    def to_domain(self) -> Counts:
        return Counts(self.good, self.total)


class VersionReply(_Model):
    attempts: CountsReply
    first_attempts: CountsReply
    within_ms: dict[int, CountsReply]
    requests: CountsReply
    impressions: CountsReply
    impressions_open: int
    shoppers: CountsReply
    measured: dict[str, CountsReply]
    ready_replicas: int
    replicas: int

    @staticmethod
    def of(seen: VersionObservation) -> VersionReply:
        return VersionReply(
            attempts=_counts(seen.attempts),
            first_attempts=_counts(seen.first_attempts),
            within_ms={ms: _counts(counts) for ms, counts in seen.within_ms.items()},
            requests=_counts(seen.requests),
            impressions=_counts(seen.impressions),
            impressions_open=seen.impressions_open,
            shoppers=_counts(seen.shoppers),
            measured={name: _counts(counts) for name, counts in seen.measured.items()},
            ready_replicas=seen.ready_replicas,
            replicas=seen.replicas,
        )

    def to_domain(self) -> VersionObservation:
        return VersionObservation(
            attempts=self.attempts.to_domain(),
            first_attempts=self.first_attempts.to_domain(),
            within_ms={ms: counts.to_domain() for ms, counts in self.within_ms.items()},
            requests=self.requests.to_domain(),
            impressions=self.impressions.to_domain(),
            impressions_open=self.impressions_open,
            shoppers=self.shoppers.to_domain(),
            measured={name: counts.to_domain() for name, counts in self.measured.items()},
            ready_replicas=self.ready_replicas,
            replicas=self.replicas,
        )


class ShadowReply(_Model):
    version: str
    answered: CountsReply
    within_ms: dict[int, CountsReply]
    pairs: int
    overlap: float
    score_drift: float

    @staticmethod
    def of(seen: ShadowObservation) -> ShadowReply:
        return ShadowReply(
            version=seen.version,
            answered=_counts(seen.answered),
            within_ms={ms: _counts(counts) for ms, counts in seen.within_ms.items()},
            pairs=seen.pairs,
            overlap=seen.overlap,
            score_drift=seen.score_drift,
        )

    def to_domain(self) -> ShadowObservation:
        return ShadowObservation(
            version=self.version,
            answered=self.answered.to_domain(),
            within_ms={ms: counts.to_domain() for ms, counts in self.within_ms.items()},
            pairs=self.pairs,
            overlap=self.overlap,
            score_drift=self.score_drift,
        )


class ObservationReply(_Model):
    at_s: float
    shares: tuple[tuple[str, float], ...]
    versions: dict[str, VersionReply]
    outcomes: CountsReply
    window_s: float | None
    shadow: ShadowReply | None

    @staticmethod
    def of(observation: Observation) -> ObservationReply:
        return ObservationReply(
            at_s=observation.at_s,
            shares=tuple(observation.shares.items()),
            versions={label: VersionReply.of(seen) for label, seen in observation.versions.items()},
            outcomes=_counts(observation.outcomes),
            window_s=observation.window_s,
            shadow=None if observation.shadow is None else ShadowReply.of(observation.shadow),
        )

    def to_domain(self) -> Observation:
        return Observation(
            at_s=self.at_s,
            shares=dict(self.shares),
            versions={label: seen.to_domain() for label, seen in self.versions.items()},
            outcomes=self.outcomes.to_domain(),
            window_s=self.window_s,
            shadow=None if self.shadow is None else self.shadow.to_domain(),
        )


def _counts(counts: Counts) -> CountsReply:
    return CountsReply(good=counts.good, total=counts.total)


class ReplicaReply(_Model):
    version: str
    zone: str
    index: int
    pid: int | None
    port: int
    phase: str
    ready: bool
    reasons: tuple[str, ...]


class StateReply(_Model):
    """What the target is doing now. ``damaged_lines``: lines of the gateway's logs that could not be read."""

    token: int
    holder: str
    shares: tuple[tuple[str, float], ...]
    versions: dict[str, Path]
    sticky: KeptSticky | None
    shadow: KeptShadow | None
    replicas: tuple[ReplicaReply, ...]
    gateway_pid: int | None
    feedback_pid: int | None
    damaged_lines: int
