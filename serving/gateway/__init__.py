"""The gateway: Envoy's configuration as pure functions, its process, and reading its logs and its admin interface."""

from serving.gateway.admin import AdminClient, HostHealth
from serving.gateway.envoy import Envoy
from serving.gateway.logs import Mark, Tail, Tally, TallyCounts, VersionCounts
from serving.gateway.settings import (
    Copies,
    Endpoint,
    GatewaySettings,
    Routing,
    Traces,
    VersionEndpoints,
    cluster_name,
    shadow_name,
    traces_of,
    weights,
)

__all__ = [
    "AdminClient", "Copies", "Endpoint", "Envoy", "GatewaySettings", "HostHealth", "Mark", "Routing",
    "Tail", "Tally", "TallyCounts", "Traces", "VersionCounts", "VersionEndpoints", "cluster_name", "shadow_name",
    "traces_of", "weights",
]  # fmt: skip
