"""What a rollout, a load test or a drill may ask of the thing that serves.

Two adapters: ``local`` (model servers as processes behind a real Envoy) and, later, ``kserve``. Weights alone cannot
be safe, so capacity comes first: ``ensure_capacity`` returns when the replicas that the shares need are available.
Every write carries a fencing token (Kleppmann, *Designing Data-Intensive Applications*, ch. 8): a writer that slept
and woke after another has taken over is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from endcap.evidence import Counts

__all__ = ["Counts", "ModelVersion", "Observation", "Target", "VersionObservation"]


@dataclass(frozen=True, slots=True, order=True)
class ModelVersion:
    """A model version as the target sees it. ``label`` is the MLflow registry version ("7")."""

    label: str
    package: Path


@dataclass(frozen=True, slots=True)
class VersionObservation:
    """What one version did, cumulative since the target started.

    ``attempts``: requests that the gateway sent to it, retries included; good = answered with no server error.
    ``within_ms``: by threshold, attempts *answered* in that time out of all answered attempts.
    ``impressions``: closed impressions (attribution window over); good = clicked.
    ``impressions_open``: impressions whose window is still open; no evidence yet.
    """

    attempts: Counts = Counts()
    within_ms: Mapping[int, Counts] = field(default_factory=dict)
    impressions: Counts = Counts()
    impressions_open: int = 0
    ready_replicas: int = 0
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at the target. ``at_s`` is Unix time. ``shares``: what is set now, by version label, summing to 1."""

    at_s: float
    shares: Mapping[str, float]
    versions: Mapping[str, VersionObservation]
    outcomes: Counts = Counts()
    """What shoppers saw: answers after the gateway's retries, good = no server error and no timeout."""


class Target(Protocol):
    """All errors are :class:`~endcap.errors.TargetError` or one of its kinds."""

    def acquire(self, holder: str) -> int:
        """A fencing token greater than every token given out before; older ones are refused from now on."""

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        """Return when every version with a share has the replicas it needs, verified, loaded and in the gateway.

        Versions not named keep what they have. Raises CapacityError (with the replica's own reason) when that
        cannot be, VerificationError when a package must not be loaded; shares in force are untouched then.
        """

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        """Send each version its share of requests. Refuses a version with a share and no capacity."""

    def retire(self, label: str, *, token: int) -> None:
        """Drain and stop a version that has no share. Safe to repeat."""

    def observe(self) -> Observation:
        """Count what each version really received and did. No data is an empty mapping, never a pass."""
