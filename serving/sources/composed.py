"""All the sources that a rollout's objectives need, as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from endcap.errors import InputError, SourceError
from endcap.objectives import EnvoyCounters, Objectives
from serving.sources.base import Measured, Reading, Source, read_all
from serving.sources.metrics import EnvoySource, MetricsEndpoint, MetricsSource
from serving.sources.prometheus import PrometheusAccess, PrometheusSource

__all__ = ["Paced", "Sources"]

T = TypeVar("T")
_REST = 4.0
"""A source that is slow rests this many times as long as it took: looks wait for it at most a fifth of the time."""


class Paced:
    """A source that is asked no more often than ``every_s``; looks in between get its last answer or error."""

    def __init__(self, source: Source, *, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds that only grow."""
        self.name = source.name
        self._source, self._every_s, self._clock = source, every_s, clock
        self._next_s: float | None = None
        self._last: Measured | SourceError = {}

    @property
    def notes(self) -> Mapping[str, str]:
        return self._source.notes

    def read(self, now_s: float) -> Measured:
        """See :class:`~serving.sources.base.Source`."""
        begun_s = self._clock()
        if self._next_s is None or begun_s >= self._next_s:
            try:
                self._last = self._source.read(now_s)
            except SourceError as error:
                self._last = error
            ended_s = self._clock()
            self._next_s = max(begun_s + self._every_s, ended_s + _REST * (ended_s - begun_s))
        if isinstance(self._last, SourceError):
            raise self._last
        return self._last

    def close(self) -> None:
        self._source.close()


class Sources:
    """Opens what the objectives ask for; none where all are counted by the target.

    A rollout that is gone on with opens them anew: what happened while no engine ran is not counted, for either side.

    Raises:
        InputError: an objective is counted by something that was not given.
    """

    def __init__(
        self,
        objectives: Objectives,
        *,
        prometheus: PrometheusAccess | None = None,
        endpoints: Callable[[], Sequence[MetricsEndpoint]] | None = None,
        envoy_url: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources: dict[str, Source] = {}
        asked = _asked(objectives)
        if "prometheus" in asked:
            given = _given(prometheus, asked["prometheus"], "Prometheus", "name its URL: spec.prometheus.url")
            source = PrometheusSource(given, objectives)
            self._sources["prometheus"] = Paced(source, every_s=given.every_s, clock=clock)
        if "metrics" in asked:
            found = _given(endpoints, asked["metrics"], "metrics endpoints", "take a target whose servers show metrics")
            direct = MetricsSource(found, objectives)
            self._sources["metrics"] = Paced(direct, every_s=0.0, clock=clock)
        if "envoy" in asked:
            url = _given(envoy_url, asked["envoy"], "Envoy", "take a target whose gateway is an Envoy")
            gateway = EnvoySource(url, objectives)
            self._sources["envoy"] = Paced(gateway, every_s=0.0, clock=clock)

    def read(self, now_s: float) -> Reading:
        """What all of them count. Never raises SourceError: what fails is a note, and no data."""
        return read_all(self._sources.values(), now_s)

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


def _asked(objectives: Objectives) -> Mapping[str, str]:
    """By kind of source, the first objective that needs it."""
    asked: dict[str, str] = {}
    for objective in objectives.objectives:
        counted = objective.counted
        if counted is not None:
            kind = "envoy" if isinstance(counted, EnvoyCounters) else counted.by.value
            asked.setdefault(kind, objective.name)
    return asked


def _given(value: T | None, objective: str, what: str, next_step: str) -> T:
    if value is None:
        raise InputError(f"the objective {objective!r} is counted by {what}, which this rollout does not know",
                         next_step=next_step)  # fmt: skip
    return value
