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

__all__ = [
    "Counts", "ModelVersion", "Observation", "ShadowObservation", "StickyKey", "Target", "VersionObservation",
]  # fmt: skip


@dataclass(frozen=True, slots=True, order=True)
class ModelVersion:
    """A model version as the target sees it. ``label`` is the MLflow registry version ("7")."""

    label: str
    package: Path


@dataclass(frozen=True, slots=True)
class StickyKey:
    """What a shopper is known by at the gateway: exactly one of a request header's and a cookie's name.

    Requests without it get a version by chance, as if nothing were sticky.
    """

    header: str | None = None
    cookie: str | None = None


@dataclass(frozen=True, slots=True)
class VersionObservation:
    """What one version did, cumulative since the target started.

    ``attempts``: requests that the gateway sent to it, retries included; good = answered with no server error.
    ``first_attempts``: requests by what became of their first attempt, which no retry mends; good = answered. One a
    request: what fails whoever tries it fails each attempt, and evidence needs events that fail for themselves.
    ``within_ms``: by threshold, attempts *answered* in that time out of all answered attempts.
    ``requests``: what shoppers saw of it: one a request however often it was retried; good = answered in the end.
    ``impressions``: closed impressions (attribution window over); good = clicked.
    ``impressions_open``: impressions whose window is still open; no evidence yet.
    ``shoppers``: shoppers whose first closed impression since the asked time was this version's; good = they clicked
    it. A shopper counts once, whatever they see later: counts of different versions are then independent, however
    heavy a shopper is.
    ``measured``: by objective, what sources beside the target counted.
    """

    attempts: Counts = Counts()
    first_attempts: Counts = Counts()
    within_ms: Mapping[int, Counts] = field(default_factory=dict)
    requests: Counts = Counts()
    impressions: Counts = Counts()
    impressions_open: int = 0
    shoppers: Counts = Counts()
    measured: Mapping[str, Counts] = field(default_factory=dict)
    ready_replicas: int = 0
    replicas: int = 0


@dataclass(frozen=True, slots=True)
class ShadowObservation:
    """What the comparator saw of a version that answers copies of requests, since the copying began.

    ``answered``: copied requests whose time to be answered is over; good = the shadow answered them.
    ``within_ms``: by threshold, shadow answers made in that time by the server's own clock, out of all of them.
    ``pairs``: requests answered by both. ``overlap``: mean share of the first k items that both named, 0..1.
    ``score_drift``: mean absolute difference of the scores of items that both named, as a part of the spread of
    the serving version's scores.
    """

    version: str
    answered: Counts = Counts()
    within_ms: Mapping[int, Counts] = field(default_factory=dict)
    pairs: int = 0
    overlap: float = 0.0
    score_drift: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at the target. ``at_s`` is Unix time. ``shares``: what is set now, by version label, summing to 1.

    ``window_s``: the attribution window that impressions are closed by; None where nothing collects feedback.
    """

    at_s: float
    shares: Mapping[str, float]
    versions: Mapping[str, VersionObservation]
    outcomes: Counts = Counts()
    """What shoppers saw: answers after the gateway's retries, good = no server error and no timeout."""
    window_s: float | None = None
    shadow: ShadowObservation | None = None


class Target(Protocol):
    """All errors are :class:`~endcap.errors.TargetError` or one of its kinds."""

    def acquire(self, holder: str) -> int:
        """A fencing token greater than every token given out before; older ones are refused from now on."""

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        """Return when every version with a share has the replicas it needs, verified, loaded and in the gateway.

        Versions not named keep what they have. Raises CapacityError (with the replica's own reason) when that
        cannot be, VerificationError when a package must not be loaded; shares in force are untouched then.
        """

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        """Send each version its share of requests. Refuses a version with a share and no capacity.

        ``sticky``: shoppers keep their version. The order of ``shares`` is that of the ranges of the hash, so with
        canary first (and a baseline last) a growing share only moves shoppers from stable to canary.
        """

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        """Copy ``share`` of the requests to ``version`` too, and forget its answers; None ends it. Safe to repeat.

        Needs its capacity. Never more than one; the copies are bounded so that they cannot hurt what shoppers get.
        """

    def retire(self, label: str, *, token: int) -> None:
        """Drain and stop a version that has no share. Safe to repeat."""

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        """Count what each version really received and did. No data is an empty mapping, never a pass.

        ``shoppers_since_s``: the time from which a shopper's first impression is looked for; None counts none.
        """
