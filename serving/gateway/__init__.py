"""The gateway: Envoy's configuration as pure functions, its process, and reading its logs and its admin interface."""

from serving.gateway.admin import AdminClient, HostHealth
from serving.gateway.envoy import Envoy
from serving.gateway.logs import Mark, Tail, Tally, TallyCounts, VersionCounts
from serving.gateway.settings import (
    Copies,
    Endpoint,
    GatewaySettings,
    Routing,
    VersionEndpoints,
    cluster_name,
    shadow_name,
    weights,
)

__all__ = [
    "AdminClient", "Copies", "Endpoint", "Envoy", "GatewaySettings", "HostHealth", "Mark", "Routing",
    "Tail", "Tally", "TallyCounts", "VersionCounts", "VersionEndpoints", "cluster_name", "shadow_name", "weights",
]  # fmt: skip
