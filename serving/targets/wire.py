"""The control API's messages, used by the supervisor and by its client. JSON over loopback with a bearer token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from serving.targets.base import Counts, ModelVersion, Observation, VersionObservation
from serving.targets.config import LABEL

__all__ = [
    "AcquireReply",
    "AcquireRequest",
    "ObservationReply",
    "ReplicaReply",
    "RetireRequest",
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

    @staticmethod
    def of(shares: Mapping[ModelVersion, float], token: int) -> SharesRequest:
        return SharesRequest(
            token=token,
            versions=tuple(
                VersionShare(label=version.label, package=version.package.absolute(), share=share)
                for version, share in shares.items()
            ),
        )

    def to_domain(self) -> dict[ModelVersion, float]:
        return {ModelVersion(v.label, v.package): v.share for v in self.versions}


class RetireRequest(_Model):
    token: int
    label: str


class CountsReply(_Model):
    good: int
    total: int


class VersionReply(_Model):
    attempts: CountsReply
    within_ms: dict[int, CountsReply]
    impressions: CountsReply
    impressions_open: int
    ready_replicas: int
    replicas: int


class ObservationReply(_Model):
    at_s: float
    shares: tuple[tuple[str, float], ...]
    versions: dict[str, VersionReply]
    outcomes: CountsReply

    @staticmethod
    def of(observation: Observation) -> ObservationReply:
        return ObservationReply(
            at_s=observation.at_s,
            shares=tuple(observation.shares.items()),
            versions={
                label: VersionReply(
                    attempts=_counts(seen.attempts),
                    within_ms={ms: _counts(counts) for ms, counts in seen.within_ms.items()},
                    impressions=_counts(seen.impressions),
                    impressions_open=seen.impressions_open,
                    ready_replicas=seen.ready_replicas,
                    replicas=seen.replicas,
                )
                for label, seen in observation.versions.items()
            },
            outcomes=_counts(observation.outcomes),
        )

    def to_domain(self) -> Observation:
        return Observation(
            at_s=self.at_s,
            shares=dict(self.shares),
            versions={
                label: VersionObservation(
                    attempts=Counts(seen.attempts.good, seen.attempts.total),
                    within_ms={ms: Counts(counts.good, counts.total) for ms, counts in seen.within_ms.items()},
                    impressions=Counts(seen.impressions.good, seen.impressions.total),
                    impressions_open=seen.impressions_open,
                    ready_replicas=seen.ready_replicas,
                    replicas=seen.replicas,
                )
                for label, seen in self.versions.items()
            },
            outcomes=Counts(self.outcomes.good, self.outcomes.total),
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
    replicas: tuple[ReplicaReply, ...]
    gateway_pid: int | None
    feedback_pid: int | None
    damaged_lines: int
