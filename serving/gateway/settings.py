"""What the gateway is told, as typed values. Pure; :mod:`serving.gateway.xds` turns them into Envoy's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from endcap.errors import InputError
from serving.tracing import traces_endpoint

__all__ = [
    "TOTAL_WEIGHT", "Copies", "Endpoint", "GatewaySettings", "Routing", "Traces", "VersionEndpoints", "cluster_name",
    "label_of", "shadow_name", "traces_of", "weights",
]  # fmt: skip

TOTAL_WEIGHT = 10_000
"""Weights sum to this, always, so that a share is exact to a hundredth of a percent and sticky routing stays stable."""

_PREFIX = "version-"
_SHADOW_PREFIX = "shadow-"


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """Where one replica listens."""

    zone: str
    port: int
    host: str = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class VersionEndpoints:
    """One model version's replicas; one Envoy cluster."""

    label: str
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of ``share`` of the requests for recommendations go to version ``label`` too."""

    label: str
    share: float


@dataclass(frozen=True, slots=True)
class Routing:
    """Which version a request goes to. ``weights`` by version label, in their order: see :func:`weights`.

    With a sticky header or cookie (never both) a request that has it gets its version by the hash of its value,
    else by chance. A hash's place among the ranges of the weights never changes while their sum does not: of two
    neighbours one grows into the other, and nobody else moves.
    """

    weights: Mapping[str, int] = field(default_factory=dict)
    sticky_header: str | None = None
    sticky_cookie: str | None = None
    copies: Copies | None = None


@dataclass(frozen=True, slots=True)
class Traces:
    """Where the gateway's spans go, by OTLP over plain HTTP. ``share``: of the requests that come without a trace."""

    host: str
    port: int
    path: str
    share: float = 1.0
    service: str = "endcap-gateway"


def traces_of(environ: Mapping[str, str]) -> Traces | None:
    """What OpenTelemetry's variables say to the gateway; None: it passes ``traceparent`` on and makes no spans.

    Raises:
        InputError: as :func:`serving.tracing.traces_endpoint`, or the address is not plain HTTP, or the sampler's
            share is none.
    """
    endpoint = traces_endpoint(environ)
    if endpoint is None:
        return None
    parts = urlsplit(endpoint)
    if parts.scheme != "http":
        raise InputError("the gateway sends its spans over plain HTTP alone", where="OTEL_EXPORTER_OTLP_ENDPOINT",
                         next_step="name a collector on this machine")  # fmt: skip
    sampler, given = environ.get("OTEL_TRACES_SAMPLER", ""), environ.get("OTEL_TRACES_SAMPLER_ARG", "")
    share = 1.0
    if sampler.endswith("always_off"):
        share = 0.0
    elif sampler.endswith("traceidratio") and given:
        try:
            share = float(given)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise InputError(f"{given!r} is no share", where="OTEL_TRACES_SAMPLER_ARG", next_step="0 to 1")
    return Traces(str(parts.hostname), parts.port or 80, parts.path or "/", share)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How the gateway behaves. Times are in seconds.

    The defaults let a request whose first two attempts hang (a stopped zone) still be answered inside
    ``request_timeout_s``: 2 x ``try_timeout_s`` and one fast attempt.
    """

    folder: Path
    """Where the xDS files are kept; absolute, since Envoy resolves paths from its own working folder."""
    records: Path
    """Where ``attempts.jsonl`` and ``access.jsonl`` are written."""
    zones: tuple[str, ...] = ("a", "b")
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port; the admin interface tells which."""
    request_timeout_s: float = 2.5
    try_timeout_s: float = 0.5
    retries: int = 2
    feedback_try_timeout_s: float = 1.0
    feedback_retries: int = 6
    retry_budget_percent: float = 50.0
    """Attempts that are retries, out of all active ones, beyond the first ``retry_concurrency``."""
    retry_concurrency: int = 64
    health_interval_s: float = 0.25
    health_timeout_s: float = 0.25
    health_path: str = "/v2/health/ready"
    unhealthy_after: int = 2
    panic_percent: float = 10.0
    """Below this part of healthy replicas Envoy tries all of them. With a handful of replicas: when none is healthy.
    A version whose every replica looks ill is then still tried, so that its failures stay in the evidence."""
    max_ejection_percent: int = 50
    """Outlier detection may take out one zone's worth of a version and never all of it: the evidence stays."""
    ejection_s: float = 2.0
    max_ejection_s: float = 10.0
    upstream_idle_s: float = 3.0
    """Shorter than any model server's keep-alive (uvicorn's default: 5 s), so that a server never closes a connection
    under a request, which would count as a failed attempt of its version."""
    shadow_concurrency: int = 8
    """Copies that a shadow may have open, and as many that wait: what is more is not sent, however slow it is."""
    version_header: str = "x-endcap-version"
    compare_header: str = "x-endcap-compare"
    """Set on a request that a shadow gets a copy of, and on the copy: both servers then log their answers."""
    shadow_header: str = "x-endcap-shadow"
    """Set on the copy alone."""
    traces: Traces | None = None

    def patient_for(self, thresholds_ms: Sequence[int]) -> GatewaySettings:
        """These settings, with tries long enough to tell whether an answer keeps to each threshold."""
        needed_s = 1.25 * max(thresholds_ms, default=0) / 1000
        if needed_s <= self.try_timeout_s:
            return self
        return replace(self, try_timeout_s=needed_s, request_timeout_s=self.retries * needed_s + 1.5)

    @property
    def attempts_log(self) -> Path:
        return self.records / "attempts.jsonl"

    @property
    def access_log(self) -> Path:
        return self.records / "access.jsonl"


def cluster_name(label: str) -> str:
    """The Envoy cluster of a model version: ``version-7``."""
    return _PREFIX + label


def shadow_name(label: str) -> str:
    """The Envoy cluster that copies for a model version go to; its requests are nobody's attempts."""
    return _SHADOW_PREFIX + label


def label_of(cluster: str | None) -> str | None:
    """The inverse of :func:`cluster_name`; None for a cluster that serves no version."""
    return cluster[len(_PREFIX) :] if cluster is not None and cluster.startswith(_PREFIX) else None


def weights(shares: Mapping[str, float]) -> dict[str, int]:
    """``shares`` (summing to 1) as whole weights summing to :data:`TOTAL_WEIGHT`, in the caller's order.

    Largest remainders; a version with a share, however small, keeps a weight of at least 1; one without is left out.

    Raises:
        InputError: a share outside 0..1, or a sum that is not 1.
    """
    for label, share in shares.items():
        if not 0 <= share <= 1:
            raise InputError(f"the share of version {label} is {share}", next_step="give each a share from 0 to 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise InputError(f"the shares sum to {total:g}", next_step="make them sum to 1")
    asked = {label: share / total * TOTAL_WEIGHT for label, share in shares.items() if share > 0}
    given = {label: max(1, int(weight)) for label, weight in asked.items()}
    by_remainder = sorted(asked, key=lambda label: (given[label] - asked[label], label))
    missing = TOTAL_WEIGHT - sum(given.values())
    if missing > 0:
        for label in by_remainder[:missing]:
            given[label] += 1
    while missing < 0:  # the minimum of 1 was given to versions that were due less: the largest pays
        given[max(given, key=lambda label: given[label])] -= 1
        missing += 1
    return given
