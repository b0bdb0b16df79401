"""What each version did, on a cluster: from its servers' own counts, and from the gateway's where they tell versions
apart.

What the sources cannot tell:

- *The servers* know nothing of requests that never reached them (no connection, a pod that died with a request in its
  hands), nor which of their requests were a gateway's second try; what a pod counted after its last scrape dies with
  it; and their latencies are of all attempts, failed ones too, without the way through the gateway.
- *The gateway* (Envoy Gateway's proxies) merges the backends of a route into one cluster unless a policy makes it one
  each (:mod:`serving.targets.kserve.gateway`), and where it does not, it is not asked. Its counts are by cluster: the
  last seconds before a promotion may go to the other version.

With both, attempts and requests are the gateway's, latency the servers', and :func:`compared` holds them together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from endcap.errors import SourceError, TargetError
from endcap.evidence import Counts
from serving.sources.base import RawSeries
from serving.sources.exposition import parse_exposition
from serving.sources.fetch import checked_url, fetch
from serving.sources.folding import Folders, Series, SeriesFolder, digest
from serving.targets.base import VersionObservation
from serving.targets.kserve.cluster import Cluster, Json, path_of
from serving.targets.kserve.names import VERSION_LABEL

__all__ = [
    "SERVER_NAMES", "Counted", "Feedback", "GatewayCounts", "NoTelemetry", "PodScrapes", "Scrape", "Scrapes",
    "ServerTelemetry", "Telemetry", "born_s", "compared", "is_ready",
]  # fmt: skip

log = logging.getLogger("endcap.target")

ATTEMPTS = "endcap_server_attempts_total"
LATENCY = "endcap_server_latency_seconds"
SERVER_NAMES = frozenset({ATTEMPTS, f"{LATENCY}_bucket", f"{LATENCY}_count"})
_GOOD = ("answered", "refused")
_SHADOW = "shadow"
_PARALLEL = 16
_TIMEOUT_S = 3.0
_MAX_SERIES = 20_000


@dataclass(frozen=True, slots=True)
class Counted:
    """Counts since counting began. ``window_s``: the attribution window; None where nothing collects feedback."""

    versions: Mapping[str, VersionObservation] = field(default_factory=dict)
    outcomes: Counts = Counts()
    window_s: float | None = None

    def version(self, label: str) -> VersionObservation:
        return self.versions.get(label, VersionObservation())


class Telemetry(Protocol):
    """Counts by version. Needs the service's pods at each read, since they come and go."""

    def read(self, pods: Sequence[Json]) -> None:
        """Take in what can be read now."""

    def observe(self, pods: Sequence[Json], *, shoppers_since_s: float | None = None) -> Counted:
        """Read, and say what was counted. Raises SourceError or TargetError where that cannot be told."""


class NoTelemetry:
    """Counts nothing: enough to place versions, not to judge them."""

    def read(self, pods: Sequence[Json]) -> None: ...

    def observe(self, pods: Sequence[Json], *, shoppers_since_s: float | None = None) -> Counted:
        return Counted()


@dataclass(frozen=True, slots=True)
class Scrape:
    """What one process showed. ``born_s``: Unix time it cannot have counted anything before; None: not known."""

    process: str
    version: str | None
    series: Sequence[RawSeries]
    born_s: float | None = None


class Scrapes(Protocol):
    def scrapes(self, pods: Sequence[Json], at_s: float) -> list[Scrape]:
        """The servers' series now. Raises SourceError when none can be read."""

    def close(self) -> None: ...


class PodScrapes:
    """Each pod's ``/metrics``, by its address, or through the API server where pods cannot be reached (a laptop).

    A pod that does not answer is left out: no data.
    """

    def __init__(self, cluster: Cluster | None = None, *, port: int = 8080, path: str = "/metrics",
                 timeout_s: float = _TIMEOUT_S) -> None:  # fmt: skip
        """``cluster``: through its API server; None: by their addresses."""
        self._cluster, self._port, self._path, self._timeout_s = cluster, port, path, timeout_s
        self._client = httpx.Client(trust_env=False, follow_redirects=False)

    def scrapes(self, pods: Sequence[Json], at_s: float) -> list[Scrape]:
        """See :class:`Scrapes`."""
        asked = [pod for pod in pods if (pod.get("status") or {}).get("podIP") and _version(pod)]
        if not asked:
            return []
        with ThreadPoolExecutor(min(_PARALLEL, len(asked))) as pool:
            found = list(pool.map(lambda pod: self._scrape(pod, at_s), asked))
        answers = [one for one in found if isinstance(one, Scrape)]
        if not answers and any(is_ready(pod) for pod in asked):
            raise next(one for one in found if isinstance(one, SourceError))
        return answers

    def close(self) -> None:
        """Let go of connections, as do the others' ``close``."""
        self._client.close()

    def text(self, pod: Json) -> bytes:
        """Raises SourceError."""
        meta = pod["metadata"]
        if self._cluster is not None:
            path = f"{path_of('pods', meta['namespace'], '')}/{meta['name']}:{self._port}/proxy{self._path}"
            try:
                return self._cluster.text(path)
            except TargetError as error:
                raise SourceError(error.what, where=f"pod {meta['name']}") from error
        url = f"http://{_host(pod['status']['podIP'])}:{self._port}{self._path}"
        return fetch(self._client, url, timeout_s=self._timeout_s)[1]

    def _scrape(self, pod: Json, at_s: float) -> Scrape | SourceError:
        meta = pod["metadata"]
        try:
            body = self.text(pod)
            samples = parse_exposition(body, names=SERVER_NAMES, max_series=_MAX_SERIES, where=f"pod {meta['name']}")
        except SourceError as error:
            return error
        series = [RawSeries(one.name, one.labels, ((at_s, one.value),)) for one in samples]
        return Scrape(str(meta["uid"]), _version(pod), series, born_s(pod))


class _VersionEvidence(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    closed: int = 0
    clicked: int = 0
    open: int = 0
    shoppers: int = 0
    shoppers_clicked: int = 0


class _Evidence(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    window_s: float
    versions: dict[str, _VersionEvidence] = Field(default_factory=dict)


class Feedback:
    """The feedback collector's evidence, by its URL or through the API server (``/api/v1/.../proxy``)."""

    def __init__(self, url: str, *, cluster: Cluster | None = None, timeout_s: float = _TIMEOUT_S) -> None:
        """``url``: a path of the API server's where ``cluster`` is given."""
        self._url = url if cluster is not None else checked_url(url)
        self._cluster, self._timeout_s = cluster, timeout_s
        self._client = httpx.Client(trust_env=False, follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def evidence(self, shoppers_since_s: float | None) -> _Evidence:
        """Raises SourceError: it does not answer; counts of zero would make all that was counted look new later."""
        query = {} if shoppers_since_s is None else {"shoppers_since_s": f"{shoppers_since_s:.6f}"}
        if self._cluster is not None:
            asked = "&".join(f"{key}={value}" for key, value in query.items())
            try:
                body = self._cluster.text(f"{self._url}/v1/evidence" + (f"?{asked}" if asked else ""))
            except TargetError as error:
                raise SourceError(error.what, where=self._url) from error
        else:
            body = fetch(self._client, f"{self._url}/v1/evidence", params=query, timeout_s=self._timeout_s)[1]
        try:
            return _Evidence.model_validate_json(body)
        except ValidationError as error:
            raise SourceError("not an answer of the feedback collector", where=self._url) from error


class GatewayCounts(Protocol):
    def read(self, pods: Sequence[Json], at_s: float) -> None:
        """Take in what can be read now; ``pods``: the servers'."""

    def versions(self) -> Mapping[str, tuple[Counts, Counts, Counts]]:
        """Attempts, first attempts and requests by version, since counting began."""

    def close(self) -> None: ...


class ServerTelemetry:
    """Counts of a service's versions. See the module for what each source can tell.

    Counting begins with the first read: one made anew begins at nothing, which a rollout takes for a counter that was
    restarted; what happened in between is lost, and nothing counts twice.

    Args:
        thresholds_ms: the objectives' latency thresholds; the servers' histograms have them as edges
            (``--thresholds-ms``).
    """

    def __init__(
        self,
        scrapes: Scrapes,
        *,
        thresholds_ms: Iterable[int] = (),
        feedback: Feedback | None = None,
        gateway: GatewayCounts | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._scrapes, self._feedback, self._gateway, self._clock = scrapes, feedback, gateway, clock
        self._thresholds_ms = tuple(sorted(set(thresholds_ms)))
        names = ["attempts", *(f"within {ms}" for ms in self._thresholds_ms)]
        folders = {name: SeriesFolder(needs_good=True, max_series=_MAX_SERIES) for name in names}
        self._folders = Folders(folders)
        self._last_feedback: dict[float | None, _Evidence] = {}

    def read(self, pods: Sequence[Json]) -> None:
        """See :class:`Telemetry`."""
        at_s = self._clock()
        self._fold(self._scrapes.scrapes(pods, at_s), at_s)
        if self._gateway is not None:
            self._gateway.read(pods, at_s)

    def _fold(self, scrapes: Sequence[Scrape], at_s: float) -> None:
        began_s = self._folders.began_s if self._folders.began_s is not None else at_s
        attempts: list[Series] = []
        within: dict[int, list[Series]] = {ms: [] for ms in self._thresholds_ms}
        for scrape in scrapes:
            for one in scrape.series:
                version = scrape.version or one.labels.get("version")
                if version is None or one.labels.get("route") == _SHADOW:
                    continue
                samples = one.samples
                if scrape.born_s is not None and scrape.born_s > began_s and samples and samples[0][0] > scrape.born_s:
                    samples = ((scrape.born_s, 0.0), *samples)  # a server younger than the counting began at nothing
                process = digest(scrape.process, version)
                key = digest(one.name, *(f"{k}={v}" for k, v in sorted(one.labels.items()) if k in _KEYS))
                if one.name == ATTEMPTS:
                    good = one.labels.get("outcome") in _GOOD
                    attempts.append(Series(version, process, key, good, True, samples))
                elif one.name == f"{LATENCY}_bucket":
                    ms = _edge_ms(one.labels.get("le", ""))
                    if ms in within:
                        within[ms].append(Series(version, process, key, True, False, samples))
                elif one.name == f"{LATENCY}_count":
                    for all_of in within.values():
                        all_of.append(Series(version, process, key, False, True, samples))
        self._folders.fold("attempts", attempts, at_s=at_s)
        for ms, series in within.items():
            self._folders.fold(f"within {ms}", series, at_s=at_s)

    def observe(self, pods: Sequence[Json], *, shoppers_since_s: float | None = None) -> Counted:
        """See :class:`Telemetry`."""
        self.read(pods)
        attempts = self._folders.by_name["attempts"].counts(since_s=float("-inf"))
        within = {ms: self._folders.by_name[f"within {ms}"].counts(since_s=float("-inf")) for ms in self._thresholds_ms}
        gateway = {} if self._gateway is None else self._gateway.versions()
        evidence = None if self._feedback is None else self._evidence(self._feedback, shoppers_since_s)
        fed = {} if evidence is None else evidence.versions
        versions = {}
        for label in sorted({*attempts, *gateway, *fed}):
            own = attempts.get(label, Counts())
            tried, first, asked = gateway.get(label, (own, own, own))
            seen = fed.get(label, _VersionEvidence())
            versions[label] = VersionObservation(
                attempts=tried, first_attempts=first, requests=asked,
                within_ms={ms: of[label] for ms, of in within.items() if label in of},
                impressions=Counts(seen.clicked, seen.closed), impressions_open=seen.open,
                shoppers=Counts(seen.shoppers_clicked, seen.shoppers),
            )  # fmt: skip
        outcomes = sum((one.requests for one in versions.values()), Counts())
        return Counted(versions, outcomes, None if evidence is None else evidence.window_s)

    def _evidence(self, feedback: Feedback, since_s: float | None) -> _Evidence:
        """While the collector is away its last counts still hold."""
        try:
            found = feedback.evidence(since_s)
        except SourceError as error:
            log.warning("no evidence from the feedback collector: %s", error.what)
            if since_s not in self._last_feedback:
                raise
            return self._last_feedback[since_s]
        self._last_feedback = {since_s: found}
        return found

    def close(self) -> None:
        for one in (self._scrapes, self._feedback, self._gateway):
            if one is not None:
                one.close()

    def servers(self) -> Mapping[str, Counts]:
        """Attempts by the servers' own counts."""
        return self._folders.by_name["attempts"].counts(since_s=float("-inf"))


_KEYS = ("route", "outcome", "le")


def compared(servers: Mapping[str, Counts], gateway: Mapping[str, tuple[Counts, Counts, Counts]]) -> dict[str, float]:
    """By version, how far the servers' attempts are from the gateway's, as a part of the gateway's (0: the same).

    The servers' are fewer where requests never reached one, or a pod died after its last scrape.
    """
    found = {}
    for label, (tried, _, _) in gateway.items():
        own = servers.get(label, Counts()).total
        found[label] = (own - tried.total) / tried.total if tried.total else 0.0
    return found


def _version(pod: Json) -> str | None:
    return (pod["metadata"].get("labels") or {}).get(VERSION_LABEL)


def is_ready(pod: Json) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def born_s(pod: Json) -> float | None:
    """When it was started, Unix time: no counter of its is older."""
    text = (pod.get("status") or {}).get("startTime")
    try:
        return None if text is None else datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _edge_ms(text: str) -> int | None:
    try:
        edge = float(text) * 1000
    except ValueError:
        return None
    return round(edge) if abs(edge) < 1e9 and abs(edge - round(edge)) < 1e-6 else None
