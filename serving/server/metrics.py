"""What a model server counts about itself, in Prometheus' terms. No histories, no shoppers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.server.recommend import FALLBACK_FILLED, FALLBACK_POPULAR

__all__ = ["LATENCY_BUCKETS_S", "ROUTES", "ServerMetrics"]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
ROUTES = ("recommend", "infer", "shadow")
"""``shadow``: copies of requests for recommendations, of whose answers no shopper sees anything."""
FALLBACKS = (FALLBACK_POPULAR, FALLBACK_FILLED)
OUTCOMES = ("answered", "refused", "failed", "timed_out", "shed")


class ServerMetrics:
    """One registry a server; the children are bound once, because looking labels up costs more than counting."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        attempts = Counter(
            "endcap_server_attempts", "Requests by outcome: answered (2xx), refused (4xx), failed, timed out, shed.",
            ["version", "route", "outcome"], registry=self.registry,
        )  # fmt: skip
        latency = Histogram(
            "endcap_server_latency_seconds", "From the whole request read to the answer handed over.",
            ["version", "route"], buckets=LATENCY_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        fallbacks = Counter(
            "endcap_server_fallbacks", "Answers that were not the graph's, by reason.",
            ["version", "fallback"], registry=self.registry,
        )  # fmt: skip
        self.attempts = {
            (route, outcome): attempts.labels(version, route, outcome) for route in ROUTES for outcome in OUTCOMES
        }
        self.latency = {route: latency.labels(version, route) for route in ROUTES}
        self.fallbacks = {reason: fallbacks.labels(version, reason) for reason in FALLBACKS}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"endcap_server_{name}", text, ["version"], registry=self.registry).labels(version)

        self.verification_s = gauge("verification_seconds", "Time to verify the package's signature and digests.")
        self.load_s = gauge("load_seconds", "Time to load and warm the graph.")
        self.ready = gauge("ready", "1 while the server is ready.")
        self.answers_dropped = gauge("answers_dropped", "Answers that the answers log's disk was too slow or full for.")
        self.in_flight = gauge("in_flight", "Runs of the graph that are waiting or running.")

    def text(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)
