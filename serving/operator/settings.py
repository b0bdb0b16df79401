"""What the operator is told by its environment: one variable a setting, as the chart sets them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from endcap.errors import InputError

__all__ = ["Settings", "settings_from"]


@dataclass(frozen=True, slots=True)
class Settings:
    """``namespaces``: those that are watched; none means all of them. ``namespace``: where the operator itself lives,
    and its Lease. ``identity``: of this process among its replicas.

    ``lease_s``: how long a leader that is silent keeps the Lease; it gives up by itself after two thirds of that.
    ``fast``, ``slow``: threads for looks, and for what may wait for a cluster (capacity, routes, gates).
    ``fallback_runtime``: the ServingRuntime for a version that finds no GPU node; none refuses it.
    ``refresh_s``: how old the figures in a status may become while nothing changes.
    """

    namespace: str = "endcap-system"
    namespaces: tuple[str, ...] = ()
    identity: str = "endcap-operator"
    http_host: str = "0.0.0.0"  # noqa: S104 - probes and scrapes come from other pods
    http_port: int = 8080
    lease_name: str = "endcap-operator"
    lease_s: float = 15.0
    fast: int = 12
    slow: int = 64
    refresh_s: float = 60.0
    log_level: str = "INFO"
    registry_uri: str | None = None
    registry_cache: str = "/tmp/endcap-packages"  # noqa: S108 - the one place that a pod may write to
    storage_template: str | None = None
    fallback_runtime: str | None = None
    collector_url: str | None = None
    prometheus_url: str | None = None
    public_key: str | None = None


def settings_from(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a process's environment.

    Raises:
        InputError: a variable holds what it cannot; the message names it.
    """

    def text(name: str) -> str | None:
        return environment.get(name, "").strip() or None

    def number(name: str, default: float, least: float) -> float:
        held = text(name)
        try:
            found = default if held is None else float(held)
        except ValueError as error:
            raise InputError(f"{held!r} is no number", where=name) from error
        if not least <= found < 1e6:
            raise InputError(f"{found:g} is not allowed; {least:g} is least", where=name)
        return found

    default = Settings()
    return Settings(
        namespace=text("ENDCAP_NAMESPACE") or default.namespace,
        namespaces=tuple(part.strip() for part in (text("ENDCAP_WATCH_NAMESPACES") or "").split(",") if part.strip()),
        identity=text("ENDCAP_POD_NAME") or socket.gethostname(),
        http_host=text("ENDCAP_HTTP_HOST") or default.http_host,
        http_port=int(number("ENDCAP_HTTP_PORT", default.http_port, 0)),
        lease_name=text("ENDCAP_LEASE_NAME") or default.lease_name,
        lease_s=number("ENDCAP_LEASE_SECONDS", default.lease_s, 1),
        fast=int(number("ENDCAP_LOOK_THREADS", default.fast, 1)),
        slow=int(number("ENDCAP_ACT_THREADS", default.slow, 1)),
        refresh_s=number("ENDCAP_STATUS_SECONDS", default.refresh_s, 1),
        log_level=(text("ENDCAP_LOG_LEVEL") or default.log_level).upper(),
        registry_uri=text("MLFLOW_TRACKING_URI"),
        registry_cache=text("ENDCAP_PACKAGE_CACHE") or default.registry_cache,
        storage_template=text("ENDCAP_STORAGE_TEMPLATE"),
        fallback_runtime=text("ENDCAP_FALLBACK_RUNTIME"),
        collector_url=text("ENDCAP_COLLECTOR_URL"),
        prometheus_url=text("ENDCAP_PROMETHEUS_URL"),
        public_key=text("ENDCAP_PUBLIC_KEY"),
    )  # fmt: skip
