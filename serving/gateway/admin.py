"""Envoy's admin interface: which replicas it holds for healthy, which configuration it runs, its own counts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

from endcap.errors import TargetError

__all__ = ["AdminClient", "HostHealth", "RouteStatus", "parse_hosts", "parse_prometheus", "parse_routes"]


@dataclass(frozen=True, slots=True)
class HostHealth:
    """One replica in Envoy's eyes. ``reasons``: why it is not healthy, in Envoy's words."""

    cluster: str
    port: int
    zone: str
    reasons: tuple[str, ...]

    @property
    def healthy(self) -> bool:
        return not self.reasons


@dataclass(frozen=True, slots=True)
class RouteStatus:
    """The routes Envoy runs; ``refused`` is its own reason for not taking a newer version."""

    version: str | None
    refused: str | None


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def parse_hosts(document: object) -> list[HostHealth]:
    """``/clusters?format=json`` as hosts. Fields that are not there are taken for nothing wrong."""
    found = []
    for cluster in map(_mapping, _list(_mapping(document).get("cluster_statuses"))):
        for host in map(_mapping, _list(cluster.get("host_statuses"))):
            port = _mapping(_mapping(host.get("address")).get("socket_address")).get("port_value")
            status = dict(_mapping(host.get("health_status")))
            eds = status.pop("eds_health_status", "HEALTHY")
            reasons = [reason for reason, value in status.items() if value is True]
            if eds not in ("HEALTHY", "UNKNOWN"):
                reasons.append(f"eds {eds}")
            if isinstance(port, int):
                zone = str(_mapping(host.get("locality")).get("zone") or "")
                found.append(HostHealth(str(cluster.get("name")), port, zone, tuple(sorted(reasons))))
    return found


def parse_routes(document: object) -> RouteStatus:
    """``/config_dump?resource=dynamic_route_configs`` as the version in force."""
    for config in map(_mapping, _list(_mapping(document).get("configs"))):
        refused = _mapping(config.get("error_state")).get("details")
        version = config.get("version_info")
        return RouteStatus(version if isinstance(version, str) else None, refused if isinstance(refused, str) else None)
    return RouteStatus(None, None)


_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>[^ ]+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_prometheus(text: str, name: str, *, label: str) -> dict[str, float]:
    """The samples of one metric in Prometheus' text format, by the value of one label (summed over the others)."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match and match["name"] == name:
            labels = dict(_LABEL.findall(match["labels"] or ""))
            key = labels.get(label, "")
            found[key] = found.get(key, 0.0) + float(match["value"])
    return found


class AdminClient:
    """Asks a running Envoy. Every answer that does not come is a :class:`TargetError`."""

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        self.url = url
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout_s, trust_env=False)

    async def _get(self, path: str) -> httpx.Response:
        try:
            response = await self._client.get(path)
            response.raise_for_status()
        except httpx.HTTPError as error:
            what = f"the gateway's admin interface does not answer: {error!r}"
            raise TargetError(what, where=self.url) from error
        return response

    async def ready(self) -> bool:
        try:
            return (await self._client.get("/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def hosts(self) -> list[HostHealth]:
        return parse_hosts((await self._get("/clusters?format=json")).json())

    async def routes(self) -> RouteStatus:
        return parse_routes((await self._get("/config_dump?resource=dynamic_route_configs")).json())

    async def port(self) -> int:
        """The port that the listener really has."""
        document = (await self._get("/listeners?format=json")).json()
        for listener in map(_mapping, _list(_mapping(document).get("listener_statuses"))):
            port = _mapping(_mapping(listener.get("local_address")).get("socket_address")).get("port_value")
            if isinstance(port, int) and port:
                return port
        raise TargetError("the gateway has no listener", where=self.url)

    async def active_requests(self, cluster: str) -> int:
        """Requests of a cluster that wait for their answer."""
        text = (await self._get(f"/stats?filter=^cluster\\.{re.escape(cluster)}\\.upstream_rq_active$")).text
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if ":" in line)

    async def request_totals(self) -> dict[str, int]:
        """Envoy's own count of attempts by cluster: requests sent, and those whose connection could not be made."""
        text = (await self._get("/stats/prometheus?filter=upstream_rq")).text
        found: dict[str, int] = {}
        for metric in ("envoy_cluster_upstream_rq_total", "envoy_cluster_upstream_rq_pending_failure_eject"):
            for cluster, value in parse_prometheus(text, metric, label="envoy_cluster_name").items():
                found[cluster] = found.get(cluster, 0) + int(value)
        return found

    async def close(self) -> None:
        await self._client.aclose()
