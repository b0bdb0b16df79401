"""The servers' counters as a Prometheus keeps them: raw samples by pod, folded as those of a pod's own ``/metrics``.

For where pods cannot be reached. Pods have to be scraped with their names as the labels ``namespace`` and ``pod`` (what
a PodMonitor or a ServiceMonitor gives). A pod that was not scraped lately is no data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import httpx

from endcap.errors import InputError, SourceError
from serving.sources.base import RawSeries
from serving.sources.fetch import checked_url, fetch
from serving.sources.prometheus import PrometheusAccess, parse_answer
from serving.targets.kserve.cluster import Json
from serving.targets.kserve.names import VERSION_LABEL
from serving.targets.kserve.telemetry import SERVER_NAMES, Scrape, born_s

__all__ = ["PrometheusScrapes"]

_WINDOW_S = 120
_MAX_SERIES = 50_000


class PrometheusScrapes:
    """See :class:`.telemetry.Scrapes`."""

    def __init__(self, access: PrometheusAccess, namespace: str) -> None:
        self._access, self._namespace = access, namespace
        self._url = checked_url(access.url) + "/api/v1/query"
        self._client = httpx.Client(trust_env=False, follow_redirects=False)
        access.asked_with()

    def scrapes(self, pods: Sequence[Json], at_s: float) -> list[Scrape]:
        """The samples of the last two minutes. Raises SourceError when Prometheus does not answer."""
        asked = {pod["metadata"]["name"]: pod for pod in pods if VERSION_LABEL in (pod["metadata"].get("labels") or {})}
        if not asked:
            return []
        by_pod: dict[str, list[RawSeries]] = {}
        for name in sorted(SERVER_NAMES):
            for series in self._query(name, list(asked), at_s):
                pod = series.labels.get("pod", "")
                if pod in asked:
                    by_pod.setdefault(pod, []).append(series)
        return [
            Scrape(str(asked[name]["metadata"]["uid"]), asked[name]["metadata"]["labels"][VERSION_LABEL],
                   series, born_s(asked[name]))
            for name, series in by_pod.items()
        ]  # fmt: skip

    def close(self) -> None:
        self._client.close()

    def _query(self, name: str, pods: list[str], at_s: float) -> list[RawSeries]:
        names = "|".join(re.escape(pod).replace("\\", "\\\\") for pod in pods)
        selector = f'{name}{{namespace="{self._namespace}",pod=~"{names}"}}[{_WINDOW_S}s]'
        time_s = at_s - self._access.lag_s
        try:
            headers = self._access.asked_with()
        except InputError as error:
            raise SourceError(error.what, where=error.where) from error
        status, body = fetch(self._client, self._url, timeout_s=self._access.timeout_s, headers=headers,
                             params={"query": selector, "time": f"{time_s:.3f}"},
                             answers=frozenset({200, 400, 422}))  # fmt: skip
        return parse_answer(body, status=status, where=self._url, max_series=_MAX_SERIES)
