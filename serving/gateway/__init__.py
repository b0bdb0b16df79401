"""The gateway: Envoy's configuration as pure functions, its process, and reading its logs and its admin interface."""

from serving.gateway.admin import AdminClient, HostHealth
from serving.gateway.envoy import Envoy
from serving.gateway.logs import AttemptCounts, Tail, Tally
from serving.gateway.settings import Endpoint, GatewaySettings, VersionEndpoints, cluster_name, weights

__all__ = [
    "AdminClient", "AttemptCounts", "Endpoint", "Envoy", "GatewaySettings", "HostHealth", "Tail", "Tally",
    "VersionEndpoints", "cluster_name", "weights",
]  # fmt: skip
