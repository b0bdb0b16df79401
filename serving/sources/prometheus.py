"""Counters kept by a Prometheus server, read as raw samples by its query API.

https://prometheus.io/docs/prometheus/latest/querying/api/: an instant query for ``SELECTOR[window]`` gives the samples
themselves. What is computed there (``rate``, ``increase``) extrapolates and forgets, so nothing is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson

from endcap.errors import InputError, SourceError
from endcap.evidence import Counts
from endcap.objectives import CountedBy, Objectives, SeriesCounters
from endcap.selectors import Selector
from serving.sources.base import Measured, RawSeries, note_of, selected
from serving.sources.fetch import TooLargeError, checked_url, excerpt, fetch
from serving.sources.folding import Folders, SeriesFolder

__all__ = ["PrometheusAccess", "PrometheusSource"]

_LATE_S = 30.0
"""A scrape may be stored this much after its own time (scrapes that take long)."""
_SMALL_WINDOW_S = 60.0


@dataclass(frozen=True, slots=True)
class PrometheusAccess:
    """Where a Prometheus server is and how it is asked. The token is read when it is needed and kept nowhere.

    ``lag_s``: samples are asked for up to this long ago, so that scrapes under way are whole.
    ``stale_after_s``: without a scrape for so long a version has no data; at least twice the scrape interval.
    ``every_s``: it is asked no more often (:class:`~serving.sources.composed.Paced`).
    """

    url: str
    token_env: str | None = None
    token_file: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """More headers, as ``X-Scope-OrgID``; no secrets."""
    timeout_s: float = 2.0
    lag_s: float = 2.0
    stale_after_s: float = 120.0
    every_s: float = 2.0
    max_window_s: float = 600.0
    max_series: int = 2000

    def __post_init__(self) -> None:
        checked_url(self.url)
        if self.token_env is not None and self.token_file is not None:
            raise InputError("a token from the environment and from a file", next_step="give one of them")

    def asked_with(self) -> dict[str, str]:
        """The headers of a request. Raises InputError where the token cannot be read."""
        headers = dict(self.headers)
        if self.token_env is not None:
            token = os.environ.get(self.token_env, "")
            where = f"${self.token_env}"
        elif self.token_file is not None:
            where = str(self.token_file)
            try:
                with self.token_file.open("rb") as file:
                    token = file.read(1 << 14).decode("ascii")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError("the token for Prometheus cannot be read", where=where) from error
        else:
            return headers
        token = token.strip()
        if not token or not token.isprintable() or not token.isascii():
            raise InputError("no token for Prometheus there", where=where)
        return headers | {"authorization": f"Bearer {token}"}


class PrometheusSource:
    """Counts the objectives that say ``prometheus:``."""

    def __init__(self, access: PrometheusAccess, objectives: Objectives) -> None:
        self.name = f"prometheus {checked_url(access.url)}"
        self.notes: Mapping[str, str] = {}
        self._access = access
        self._url = checked_url(access.url) + "/api/v1/query"
        self._counters = {
            objective.name: objective.counted
            for objective in objectives.objectives
            if isinstance(objective.counted, SeriesCounters) and objective.counted.by is CountedBy.PROMETHEUS
        }
        self._folders = Folders(
            {
                name: SeriesFolder(needs_good=counters.good.narrows(counters.total) is None,
                                   max_series=access.max_series)
                for name, counters in self._counters.items()
            }
        )  # fmt: skip
        self._client = httpx.Client(trust_env=False, follow_redirects=False)
        access.asked_with()

    def read(self, now_s: float) -> Measured:
        """See :class:`~serving.sources.base.Source`. An objective of its own trouble is left out, with a note."""
        self._ask(now_s)
        return self._fresh(now_s)

    def _ask(self, now_s: float) -> None:
        at_s = round(now_s - self._access.lag_s, 3)
        answers: dict[Selector, list[RawSeries]] = {}
        notes: dict[str, str] = {}
        failure: SourceError | None = None
        window_s = self._window_s(at_s)
        for name, counters in self._counters.items():
            try:
                raw = self._raw(answers, counters, at_s=at_s, window_s=window_s)
                series = selected(counters, raw)
            except SourceError as error:
                failure = error
                notes[name] = note_of(error)
                continue
            folder = self._folders.fold(name, series, at_s=at_s)
            if not series:
                notes[name] = f"Prometheus has no series of {counters.total} in the last {window_s:g} s"
            elif folder.passed_over:
                notes[name] = folder.passed_over
        self.notes = notes
        if failure is not None and len(notes) == len(self._counters):
            raise failure

    def _window_s(self, at_s: float) -> int:
        """Back to the newest scrape that was folded, and a little more; bounded."""
        newest = [folder.newest_s for folder in self._folders.by_name.values()]
        known = [newest_s for newest_s in newest if newest_s is not None]
        longest_s = max(self._access.max_window_s, self._access.stale_after_s)
        least_s = self._access.stale_after_s if len(known) < len(newest) else _LATE_S
        wanted_s = max(at_s - min(known, default=at_s) + _LATE_S, least_s)
        return math.ceil(min(wanted_s, longest_s))

    def _raw(
        self, answers: dict[Selector, list[RawSeries]], counters: SeriesCounters, *, at_s: float, window_s: int
    ) -> list[RawSeries]:
        """All series that the objective is about; good ones that are among total's are not asked for again."""
        wanted = [counters.total]
        if counters.good.narrows(counters.total) is None:
            wanted.append(counters.good)
        for selector in wanted:
            if selector not in answers:
                try:
                    answers[selector] = self._query(selector, at_s, window_s)
                except TooLargeError:
                    if window_s <= _SMALL_WINDOW_S:
                        raise
                    answers[selector] = self._query(selector, at_s, int(_SMALL_WINDOW_S))
        return _unique([one for selector in wanted for one in answers[selector]])

    def _query(self, selector: Selector, at_s: float, window_s: int) -> list[RawSeries]:
        access = self._access
        try:
            headers = access.asked_with()
        except InputError as error:
            raise SourceError(error.what, where=error.where) from error
        status, body = fetch(
            self._client, self._url, timeout_s=access.timeout_s, headers=headers,
            params={"query": f"{selector}[{window_s}s]", "time": f"{at_s:.3f}", "timeout": f"{access.timeout_s:g}s"},
            answers=frozenset({200, 400, 422}),
        )  # fmt: skip
        return parse_answer(body, status=status, where=self._url, max_series=access.max_series)

    def _fresh(self, now_s: float) -> Measured:
        """What has a scrape that is new enough; the objectives without any get a note."""
        since_s = now_s - self._access.lag_s - self._access.stale_after_s
        found: dict[str, Mapping[str, Counts]] = {}
        notes = dict(self.notes)
        for name, folder in self._folders.by_name.items():
            counts = folder.counts(since_s=since_s)
            if counts:
                found[name] = counts
            elif name not in notes:
                age_s = None if folder.newest_s is None else now_s - folder.newest_s
                notes[name] = "no scrape yet" if age_s is None else f"the newest scrape is {age_s:.0f} s old"
        self.notes = notes
        return found

    def close(self) -> None:
        self._client.close()


def _unique(raw: list[RawSeries]) -> list[RawSeries]:
    """Series that both selectors gave, once."""
    return list({(one.name, frozenset(one.labels.items())): one for one in raw}.values())


def parse_answer(body: bytes, *, status: int, where: str, max_series: int) -> list[RawSeries]:
    """A matrix of the query API. Values are taken as they are: NaN is not yet nothing here.

    Raises:
        SourceError: an error of Prometheus in its own words, warnings (an answer that lacks something), more series
            than ``max_series``, or anything else than a matrix.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise SourceError(f"not an answer of Prometheus: {excerpt(body)}", where=where,
                          next_step="see whether the URL is that of a Prometheus server") from error  # fmt: skip
    if not isinstance(document, dict):
        raise _nonsense("not an object", where)
    if document.get("status") != "success":
        said = excerpt(str(document.get("error")).encode())
        raise SourceError(f"Prometheus refuses the query ({status}): {said}", where=where)
    if document.get("warnings"):
        said = excerpt(str(document["warnings"]).encode())
        raise SourceError(f"Prometheus warns that its answer may lack something: {said}", where=where)
    data = document.get("data")
    result = data.get("result") if isinstance(data, dict) and data.get("resultType") == "matrix" else None
    if not isinstance(result, list) or status != 200:
        raise _nonsense("no matrix", where)
    if len(result) > max_series:
        raise SourceError(f"{len(result)} series, and {max_series} are read", where=where,
                          next_step="select fewer series")  # fmt: skip
    return [_raw_series(one, where) for one in result]


def _raw_series(one: object, where: str) -> RawSeries:
    metric = one.get("metric") if isinstance(one, dict) else None
    values = one.get("values") if isinstance(one, dict) else None
    if not isinstance(metric, dict) or not all(isinstance(text, str) for text in metric.values()):
        raise _nonsense("a series without labels", where)
    if not isinstance(values, list):
        raise SourceError(f"no plain samples of {metric.get('__name__')!r}; is it a native histogram?", where=where,
                          next_step="select a classic counter")  # fmt: skip
    samples = []
    for pair in values:
        if not isinstance(pair, list) or len(pair) != 2:
            raise _nonsense("a sample that is no pair", where)
        at_s, text = pair
        if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not isinstance(text, str):
            raise _nonsense("a sample that is not a time and a text", where)
        try:
            samples.append((float(at_s), float(text)))
        except (ValueError, OverflowError) as error:
            raise _nonsense(f"a sample of {text[:40]!r}", where) from error
    labels = {name: value for name, value in metric.items() if name != "__name__"}
    return RawSeries(metric.get("__name__", ""), labels, samples)


def _nonsense(what: str, where: str) -> SourceError:
    return SourceError(f"not an answer that Prometheus gives: {what}", where=where,
                       next_step="see whether the URL is that of a Prometheus server")  # fmt: skip
