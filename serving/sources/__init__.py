"""Sources: what counts an objective's events beside the target."""

from serving.sources.base import Measured, Reading, Source, measured, read_all
from serving.sources.composed import Sources
from serving.sources.metrics import EnvoySource, MetricsEndpoint, MetricsSource, envoy_attempts
from serving.sources.prometheus import PrometheusAccess, PrometheusSource

__all__ = [
    "EnvoySource",
    "Measured",
    "MetricsEndpoint",
    "MetricsSource",
    "PrometheusAccess",
    "PrometheusSource",
    "Reading",
    "Source",
    "Sources",
    "envoy_attempts",
    "measured",
    "read_all",
]
