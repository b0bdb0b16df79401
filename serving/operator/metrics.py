"""The operator's own metrics, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

__all__ = ["Metrics"]

_DELAYS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All under ``endcap_operator_``."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.look_delay_s = Histogram(
            "endcap_operator_look_delay_seconds", "From when a look was due until the API server acknowledged it.",
            buckets=_DELAYS, registry=registry,
        )  # fmt: skip
        self.turn_s = Histogram(
            "endcap_operator_turn_seconds", "What a turn of a rollout took, acts included.", buckets=_DELAYS,
            registry=registry,
        )  # fmt: skip
        self.decisions = Counter(
            "endcap_operator_decisions", "Decisions that changed a rollout.", ["action"], registry=registry
        )
        self.endings = Counter("endcap_operator_endings", "Rollouts that ended.", ["outcome"], registry=registry)
        self.errors = Counter("endcap_operator_errors", "Turns that ended in an error.", ["reason"], registry=registry)
        self.requests = Counter(
            "endcap_operator_api_requests", "Requests to the API server.", ["method", "code"], registry=registry
        )
        self.rollouts = Gauge("endcap_operator_rollouts", "Rollouts by phase.", ["phase"], registry=registry)
        self.leads = Gauge("endcap_operator_leads", "1 while this replica has the Lease.", registry=registry)
        self.fence = Gauge("endcap_operator_lease_transitions", "The fencing token.", registry=registry)
