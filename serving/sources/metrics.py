"""Counters read directly from the endpoints that show them: the model servers' ``/metrics``, Envoy's admin interface.

What they show is what a process counted of itself. A server that is dead, or was never reached, counts nothing: only
the gateway's attempts tell of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx

from endcap.errors import SourceError
from endcap.evidence import Counts
from endcap.objectives import CountedBy, EnvoyCounters, Objectives, SeriesCounters
from serving.sources.base import Measured, RawSeries, note_of, selected
from serving.sources.exposition import TextSample, parse_exposition
from serving.sources.fetch import checked_url, fetch
from serving.sources.folding import Folders, Series, SeriesFolder, digest

__all__ = ["EnvoySource", "MetricsEndpoint", "MetricsSource", "envoy_attempts"]

_MAX_BYTES = 8 << 20
_STEP_S = 0.001
_PARALLEL = 8


@dataclass(frozen=True, slots=True)
class MetricsEndpoint:
    """``url`` of a text endpoint. ``version``: whose it is; None where a label of its series tells."""

    url: str
    version: str | None = None


class _Direct:
    """What reading endpoints has in common: the time of a scrape is that of the read, made to grow always."""

    def __init__(self, folders: Folders, *, timeout_s: float) -> None:
        self.notes: Mapping[str, str] = {}
        self._folders = folders
        self._timeout_s = timeout_s
        self._client = httpx.Client(trust_env=False, follow_redirects=False)

    def _at_s(self, now_s: float) -> float:
        """A clock that goes back must not make what is new look old."""
        newest = [folder.newest_s for folder in self._folders.by_name.values()]
        last_s = max((newest_s for newest_s in newest if newest_s is not None), default=None)
        return now_s if last_s is None else max(now_s, last_s + _STEP_S)

    def _get(self, url: str, params: Mapping[str, str] | None = None) -> bytes:
        return fetch(self._client, url, params=params, timeout_s=self._timeout_s, max_bytes=_MAX_BYTES)[1]

    def _fold(self, found: Mapping[str, Iterable[Series]], at_s: float, notes: dict[str, str]) -> Measured:
        measured: dict[str, Mapping[str, Counts]] = {}
        for name, series in found.items():
            folder = self._folders.fold(name, series, at_s=at_s)
            counts = folder.counts(since_s=at_s)
            if counts:
                measured[name] = counts
            if folder.passed_over:
                notes.setdefault(name, folder.passed_over)
            elif not counts:
                notes.setdefault(name, "no endpoint shows its series")
        self.notes = notes
        return measured

    def close(self) -> None:
        self._client.close()


class MetricsSource(_Direct):
    """Counts the objectives that say ``metrics:``, over all endpoints.

    ``endpoints`` is asked at each read, since replicas come and go. One that does not answer is left out with a note;
    none that answers is an error.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[MetricsEndpoint]],
        objectives: Objectives,
        *,
        timeout_s: float = 2.0,
        max_series: int = 2000,
    ) -> None:
        self.name = "metrics"
        self._endpoints = endpoints
        self._counters = {
            objective.name: objective.counted
            for objective in objectives.objectives
            if isinstance(objective.counted, SeriesCounters) and objective.counted.by is CountedBy.METRICS
        }
        self._names = frozenset(
            selector.name for counters in self._counters.values() for selector in (counters.good, counters.total)
        )
        self._max_series = max_series
        folders = {
            name: SeriesFolder(needs_good=counters.good.narrows(counters.total) is None, max_series=max_series)
            for name, counters in self._counters.items()
        }  # fmt: skip
        super().__init__(Folders(folders), timeout_s=timeout_s)

    def read(self, now_s: float) -> Measured:
        """See :class:`~serving.sources.base.Source`."""
        at_s = self._at_s(now_s)
        endpoints = list(self._endpoints())
        if not endpoints:
            raise SourceError("no endpoint shows metrics", where=self.name)
        with ThreadPoolExecutor(min(_PARALLEL, len(endpoints))) as pool:
            answers = list(pool.map(self._scrape, endpoints))
        silent = [answer for answer in answers if isinstance(answer, SourceError)]
        if len(silent) == len(answers):
            raise silent[0]
        found: dict[str, list[Series]] = {name: [] for name in self._counters}
        notes = {self.name: f"{len(silent)} of {len(answers)} endpoints: {silent[0]}"} if silent else {}
        for endpoint, answer in zip(endpoints, answers, strict=True):
            if isinstance(answer, SourceError):
                continue
            raw = [RawSeries(sample.name, sample.labels, ((at_s, sample.value),)) for sample in answer]
            for name, counters in self._counters.items():
                try:
                    found[name] += selected(counters, raw, process=endpoint.url, version=endpoint.version)
                except SourceError as error:
                    notes[name] = note_of(error)
        return self._fold(found, at_s, notes)

    def _scrape(self, endpoint: MetricsEndpoint) -> list[TextSample] | SourceError:
        try:
            body = self._get(endpoint.url)
            return parse_exposition(body, names=self._names, max_series=self._max_series, where=endpoint.url)
        except SourceError as error:
            return error


_BY_CODE = "envoy_cluster_upstream_rq"
_RETRIED = "envoy_cluster_upstream_rq_retry"
_SENT = "envoy_cluster_upstream_rq_total"
_ENVOY_NAMES = frozenset({_BY_CODE, _RETRIED, _SENT})
_REFUSED_FOR_LOAD = "429"


def envoy_attempts(
    body: bytes, *, cluster_prefix: str = "version-", where: str = "envoy", max_series: int = 2000
) -> dict[str, Counts]:
    """Finished attempts by version, as Envoy counts them itself (``/stats/prometheus?filter=cluster.*upstream_rq``).

    Envoy charges an answer's code only to the attempt that the shopper gets; an attempt that is tried again is in
    ``upstream_rq_retry`` alone, whatever was wrong with it: a server error, a reset, a refused connection, its time
    over. So attempts are all codes and all retries; good are the codes below 500 but 429, as long as only what is no
    answer is tried again. Attempts under way, and those that the shopper left, are in neither.

    Measured against the gateway's log of attempts (tests/local/test_sources_attempts.py): equal, failures, resets and
    timeouts alike, but where a version has no replica left: each request whose retry finds none counts one attempt
    more here, and where the shopper leaves between a failed attempt and its retry: that attempt counts nowhere here,
    and as the failure that it was in the log. Copies sent to a shadow are attempts of the shadow's version.

    Raises:
        SourceError: not Envoy's text.
    """
    good: dict[str, float] = {}
    bad: dict[str, float] = {}
    for sample in parse_exposition(body, names=_ENVOY_NAMES, max_series=max_series, where=where):
        cluster = sample.labels.get("envoy_cluster_name", "")
        version = cluster[len(cluster_prefix) :]
        if not cluster.startswith(cluster_prefix) or not version:
            continue
        if not 0 <= sample.value < 2**53:
            raise SourceError(f"{sample.name} is {sample.value}", where=where)
        good.setdefault(version, 0.0)
        bad.setdefault(version, 0.0)
        if sample.name == _RETRIED:
            bad[version] += sample.value
        elif sample.name == _BY_CODE:
            code = sample.labels.get("envoy_response_code", "")
            side = good if code < "500" and code != _REFUSED_FOR_LOAD else bad
            side[version] += sample.value
    return {version: Counts(int(good[version]), int(good[version] + bad[version])) for version in sorted(good)}


class EnvoySource(_Direct):
    """Counts the objectives that say ``envoy:``: attempts, by an Envoy's admin interface at ``url``."""

    def __init__(
        self,
        url: str,
        objectives: Objectives,
        *,
        timeout_s: float = 2.0,
    ) -> None:
        self._url = checked_url(url)
        self.name = f"envoy {self._url}"
        self._counters = {
            objective.name: objective.counted
            for objective in objectives.objectives
            if isinstance(objective.counted, EnvoyCounters)
        }
        super().__init__(Folders({name: SeriesFolder(needs_good=True) for name in self._counters}), timeout_s=timeout_s)

    def read(self, now_s: float) -> Measured:
        """See :class:`~serving.sources.base.Source`."""
        at_s = self._at_s(now_s)
        body = self._get(self._url + "/stats/prometheus", {"filter": r"^cluster\..*\.upstream_rq"})
        found: dict[str, list[Series]] = {}
        for name, counters in self._counters.items():
            attempts = envoy_attempts(body, cluster_prefix=counters.cluster_prefix, where=self._url)
            found[name] = [
                Series(version, digest(version), side, side == "good", side == "total", ((at_s, float(value)),))
                for version, seen in attempts.items()
                for side, value in (("good", seen.good), ("total", seen.total))
            ]
        return self._fold(found, at_s, {})
