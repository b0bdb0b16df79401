"""The operator's process: kopf watches, the conductor drives while the Lease is ours, the health server answers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kopf

from serving.operator.conductor import Conductor
from serving.operator.crds import GROUP, VERSION
from serving.operator.drive import Drive, Outfit
from serving.operator.events import Events
from serving.operator.health import HealthServer
from serving.operator.lease import Election, Leadership
from serving.operator.metrics import Metrics
from serving.operator.objects import Json, Key
from serving.operator.settings import Settings
from serving.rollout.engine import SystemClock
from serving.targets.kserve.cluster import Cluster

__all__ = ["CountedCluster", "Operator", "serve"]

log = logging.getLogger("endcap.operator")
_SILENT_S = 60.0
"""A thread that has not shown up for so long hangs."""
_TRIES_OF_LEASE = 5.0


class CountedCluster(Cluster):
    """Counts what is asked of the API server."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        super().__init__(cluster._api)
        self._metrics = metrics

    def _ask(self, method: str, path: str, **more: Any) -> bytes | None:
        try:
            found = super()._ask(method, path, **more)
        except Exception as error:
            self._metrics.requests.labels(method, type(error).__name__).inc()
            raise
        self._metrics.requests.labels(method, "ok").inc()
        return found


@dataclass
class Operator:
    """All parts of one replica, apart from kopf. ``looked``: see :class:`Conductor`."""

    cluster: Cluster
    outfit: Callable[[Cluster], Outfit]
    settings: Settings
    looked: Callable[[Key, float, float, float], None] | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        settings, metrics = self.settings, self.metrics
        api = CountedCluster(self.cluster, metrics)
        outfit, clock, events = self.outfit(api), SystemClock(), Events(api, settings.identity)

        def make(key: Key, fence: int) -> Drive:
            return Drive(key, api, outfit, self.conductor, fence=fence, clock=clock, events=events, metrics=metrics,
                         refresh_s=settings.refresh_s)  # fmt: skip

        self.conductor = Conductor(make, clock=clock, metrics=metrics, fast=settings.fast, slow=settings.slow,
                                   looked=self.looked)  # fmt: skip
        election = Election(api, settings.namespace, settings.lease_name, settings.identity, lease_s=settings.lease_s)
        self.leadership = Leadership(election, every_s=settings.lease_s / _TRIES_OF_LEASE,
                                     begin=self.conductor.begin, end=self.conductor.end)  # fmt: skip
        self.is_listed = threading.Event()
        self.leads = metrics.leads

    def trouble(self) -> str | None:
        """Why it should be started again."""
        now_s = time.monotonic()
        if now_s - self.leadership.beat_s > _SILENT_S + self.settings.lease_s:
            return "the lease is not tried any more"
        if self.conductor.drives and now_s - self.conductor.beat_s > _SILENT_S:
            return "nobody looks who is due any more"
        return None

    def tell_phases(self) -> None:
        phases = self.conductor.phases()
        self.metrics.rollouts.clear()
        for phase, number in phases.items():
            self.metrics.rollouts.labels(phase).set(number)


def registry_of(operator: Operator) -> kopf.OperatorRegistry:
    """The handlers, for this operator alone. They only hand on: nothing is written to the objects by kopf."""
    registry = kopf.OperatorRegistry()

    @kopf.on.startup(registry=registry)
    async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
        settings.posting.enabled = False
        settings.scanning.disabled = True  # the CRDs come with the chart; to watch for others is not granted
        settings.watching.connect_timeout = 10
        settings.networking.request_timeout = 20

    @kopf.on.login(registry=registry)
    async def login(**kwargs: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_via_client(**kwargs)

    @kopf.on.event(GROUP, VERSION, "rollouts", registry=registry)
    async def rollout(event: Mapping[str, Any], body: Mapping[str, Any], **_: Any) -> None:
        operator.conductor.see(_plain(body), gone=event.get("type") == "DELETED")

    @kopf.on.event(GROUP, VERSION, "objectives", registry=registry)
    async def objectives(namespace: str | None, **_: Any) -> None:
        operator.conductor.objectives_changed(namespace or "")

    return registry


def _plain(body: Mapping[str, Any]) -> Json:
    return dict(body)


def serve(operator: Operator, *, stop: threading.Event | None = None) -> None:
    """Run until SIGTERM, or until ``stop`` is set."""
    settings = operator.settings
    ready = threading.Event()
    health = HealthServer(settings.http_host, settings.http_port, operator.metrics.registry, trouble=operator.trouble,
                          ready=ready.is_set)  # fmt: skip
    with health:
        log.info("listening on port %d", health.port)
        operator.leadership.start()
        try:
            asyncio.run(_watch(operator, ready, stop))
        finally:
            operator.leadership.stop()


async def _watch(operator: Operator, ready: threading.Event, stop: threading.Event | None) -> None:
    async def phases() -> None:
        while True:
            operator.tell_phases()
            await asyncio.sleep(5)

    namespaces = operator.settings.namespaces
    told = asyncio.create_task(phases())
    try:
        await kopf.operator(
            registry=registry_of(operator), standalone=True, clusterwide=not namespaces, namespaces=namespaces,
            # Else kopf asks for the name of the user, and in a pod there is none of that number.
            identity=operator.settings.identity,  # type: ignore[arg-type]
            ready_flag=ready, stop_flag=stop,
        )  # fmt: skip
    finally:
        told.cancel()
