"""What versions did, by their servers' counts and by the gateway's: pods come and go, clusters change hands."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from endcap.errors import SourceError
from endcap.evidence import Counts
from serving.server.metrics import ServerMetrics
from serving.sources.base import RawSeries
from serving.sources.exposition import parse_exposition
from serving.sources.prometheus import PrometheusAccess
from serving.targets.kserve import EnvoyGatewayCounts, PrometheusScrapes, ServerTelemetry
from serving.targets.kserve.cluster import path_of
from serving.targets.kserve.telemetry import SERVER_NAMES, Scrape, compared

T0 = 1_000_000.0


def pod(name: str, version: str, *, started_s: float = T0 - 100, service: str = "") -> dict:
    at = datetime.fromtimestamp(started_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "namespace": "shop",
                     "labels": {"endcap.dev/version": version, "app": f"isvc.{service}"}},
        "status": {"podIP": "127.0.0.1", "startTime": at},
    }  # fmt: skip


class Servers:
    """Servers whose counters are the real ones'. By pod."""

    def __init__(self) -> None:
        self.metrics: dict[str, ServerMetrics] = {}
        self.away: set[str] = set()

    def of(self, name: str, version: str) -> ServerMetrics:
        return self.metrics.setdefault(name, ServerMetrics(version, thresholds_s=[0.1]))

    def answer(
        self, name: str, version: str, count: int, *, failed: int = 0, slow: int = 0, route: str = "recommend"
    ) -> None:
        metrics = self.of(name, version)
        metrics.attempts[route, "answered"].inc(count - failed)
        metrics.attempts[route, "failed"].inc(failed)
        for place in range(count):
            metrics.latency[route].observe(0.5 if place < slow else 0.01)

    def close(self) -> None: ...

    def scrapes(self, pods: list[dict], at_s: float) -> list[Scrape]:
        found = []
        for one in pods:
            name = one["metadata"]["name"]
            if name in self.away or name not in self.metrics:
                continue
            samples = parse_exposition(self.metrics[name].text(), names=SERVER_NAMES, max_series=10_000, where=name)
            series = [RawSeries(s.name, s.labels, ((at_s, s.value),)) for s in samples]
            born = datetime.fromisoformat(one["status"]["startTime"]).timestamp()
            found.append(Scrape(one["metadata"]["uid"], one["metadata"]["labels"]["endcap.dev/version"], series, born))
        return found


class Clock:
    now_s = T0

    def __call__(self) -> float:
        self.now_s += 1
        return self.now_s


def test_counts_of_pods_that_come_go_and_restart_are_their_versions() -> None:
    servers, clock = Servers(), Clock()
    telemetry = ServerTelemetry(servers, thresholds_ms=[100], clock=clock)
    pods = [pod("a", "1"), pod("b", "1")]
    servers.answer("a", "1", 1000)
    servers.answer("b", "1", 500)
    assert telemetry.observe(pods).version("1").attempts == Counts(), "what was before is nobody's"
    servers.answer("a", "1", 10, failed=2, slow=3)
    seen = telemetry.observe(pods).version("1")
    assert (seen.attempts, seen.requests, seen.within_ms[100]) == (Counts(8, 10), Counts(8, 10), Counts(7, 10))
    pods.append(pod("c", "2", started_s=clock.now_s + 0.5))
    servers.answer("c", "2", 7)  # younger than the counting: all of its counts are of now
    servers.away.add("b")
    servers.answer("b", "1", 5)
    seen = telemetry.observe(pods)
    assert (seen.version("2").attempts, seen.version("1").attempts) == (Counts(7, 7), Counts(8, 10))
    servers.away.clear()
    servers.metrics["a"] = ServerMetrics("1", thresholds_s=[0.1])
    servers.answer("a", "1", 4)
    pods = [one for one in pods if one["metadata"]["name"] != "c"]
    seen = telemetry.observe(pods)
    assert seen.version("1").attempts == Counts(17, 19), "b's five, and the four since a's container restarted"
    assert seen.version("2").attempts == Counts(7, 7), "a version without pods keeps what it did"
    assert seen.outcomes == Counts(24, 26)


def test_copies_that_a_server_knows_for_copies_are_no_requests() -> None:
    servers = Servers()
    telemetry = ServerTelemetry(servers, clock=Clock())
    servers.answer("a", "1", 1)
    telemetry.observe([pod("a", "1")])
    servers.answer("a", "1", 50, route="shadow")
    servers.answer("a", "1", 3)
    assert telemetry.observe([pod("a", "1")]).version("1").attempts == Counts(3, 3)


# ---- the gateway's -----------------------------------------------------------------------------------


class Gateway:
    """An API server with one route and one proxy, whose counters are Envoy's text."""

    def __init__(self) -> None:
        self.backends = ["recommender-v1-predictor"]
        self.counters: dict[int, dict[str, int]] = {}

    def count(self, backend: int, *, retries: int = 0, mended: int = 0, **codes: int) -> None:
        mine = self.counters.setdefault(backend, {})
        for name, more in {**codes, "retries": retries, "mended": mended}.items():
            mine[name] = mine.get(name, 0) + more

    def get(self, path: str) -> dict | None:
        if path != path_of("httproutes", "shop", "recommender"):
            return None
        return {"spec": {"rules": [{"backendRefs": [{"name": name} for name in self.backends]}]}}

    def items(self, path: str, *, labels: object = None) -> list[dict]:
        assert path == path_of("pods", "envoy-gateway-system")
        return [{"metadata": {"name": "proxy", "uid": "p", "namespace": "envoy-gateway-system"},
                 "status": {"podIP": "127.0.0.1"}}]  # fmt: skip

    def text(self, path: str) -> bytes:
        assert path.endswith("/pods/proxy:19001/proxy/stats/prometheus")
        lines = ['envoy_cluster_upstream_rq{envoy_response_code="200",envoy_cluster_name="xds_cluster"} 7']
        for backend, counts in self.counters.items():
            name = f'envoy_cluster_name="httproute/shop/recommender/rule/0/backend/{backend}"'
            for code, value in counts.items():
                if code.startswith("c"):
                    lines.append(f'envoy_cluster_upstream_rq{{envoy_response_code="{code[1:]}",{name}}} {value}')
            lines.append(f"envoy_cluster_upstream_rq_retry{{{name}}} {counts.get('retries', 0)}")
            lines.append(f"envoy_cluster_upstream_rq_retry_success{{{name}}} {counts.get('mended', 0)}")
        return ("\n".join(lines) + "\n").encode()


SERVERS = [pod("a", "1", service="recommender-v1-predictor"), pod("b", "2", service="recommender-v2-predictor"),
           pod("c", "1-baseline", service="recommender-v1-baseline-predictor")]  # fmt: skip


def test_what_a_retry_mends_is_a_first_attempt_that_failed_and_no_failed_request() -> None:
    gateway = Gateway()
    counts = EnvoyGatewayCounts(gateway, "recommender", "shop")  # type: ignore[arg-type]
    gateway.count(0, c200=5_000)
    counts.read(SERVERS, T0)
    gateway.count(0, c200=100, retries=6, mended=4)  # two of them by the second retry
    counts.read(SERVERS, T0 + 1)
    attempts, first, requests = counts.versions()["1"]
    assert (attempts, first, requests) == (Counts(100, 106), Counts(96, 100), Counts(100, 100))
    gateway.count(0, c503=3, retries=6)  # three times each
    gateway.count(0, c500=2)  # not tried again
    counts.read(SERVERS, T0 + 2)
    attempts, first, requests = counts.versions()["1"]
    assert (attempts, first, requests) == (Counts(100, 117), Counts(96, 105), Counts(100, 105))


def test_a_cluster_that_becomes_another_versions_does_not_bring_its_counts_along() -> None:
    gateway = Gateway()
    counts = EnvoyGatewayCounts(gateway, "recommender", "shop")  # type: ignore[arg-type]
    gateway.count(0, c200=10)
    counts.read(SERVERS, T0)
    gateway.backends = ["recommender-v1-predictor", "recommender-v2-predictor", "recommender-v1-baseline-predictor"]
    gateway.count(0, c200=80)
    gateway.count(1, c200=15)  # new clusters count from nothing
    gateway.count(2, c200=5)
    counts.read(SERVERS, T0 + 1)
    assert {label: one[2].total for label, one in counts.versions().items()} == {"1": 80, "2": 15, "1-baseline": 5}
    del gateway.backends[1]  # canary is not ready: KServe leaves it out, and the baseline's place is canary's
    counts.read(SERVERS, T0 + 2)
    gateway.count(1, c200=9)
    counts.read(SERVERS, T0 + 3)
    gateway.backends.insert(1, "recommender-v2-predictor")
    counts.read(SERVERS, T0 + 4)
    gateway.count(1, c200=2)
    counts.read(SERVERS, T0 + 5)
    assert {label: one[2].total for label, one in counts.versions().items()} == {"1": 80, "2": 17, "1-baseline": 14}


def test_counts_never_go_back_while_a_retry_is_under_way() -> None:
    gateway = Gateway()
    counts = EnvoyGatewayCounts(gateway, "recommender", "shop")  # type: ignore[arg-type]
    counts.read(SERVERS, T0)
    gateway.count(0, c200=10)
    counts.read(SERVERS, T0 + 1)
    before = counts.versions()["1"]
    gateway.count(0, retries=1)  # its answer is not there yet
    counts.read(SERVERS, T0 + 2)
    for old, new in zip(before, counts.versions()["1"], strict=True):
        assert new.good >= old.good
        assert new.total - new.good >= old.total - old.good


def test_both_sources_are_held_together() -> None:
    gateway, servers, clock = Gateway(), Servers(), Clock()
    counts = EnvoyGatewayCounts(gateway, "recommender", "shop")  # type: ignore[arg-type]
    telemetry = ServerTelemetry(servers, gateway=counts, clock=clock)
    servers.answer("a", "1", 1)
    gateway.count(0, c200=1)
    telemetry.observe(SERVERS)
    servers.answer("a", "1", 97)
    gateway.count(0, c200=95, c503=5)
    seen = telemetry.observe(SERVERS).version("1")
    assert seen.requests == Counts(95, 100), "what never reached a server counts too"
    assert compared(telemetry.servers(), counts.versions()) == {"1": pytest.approx(-0.03)}


# ---- through Prometheus ------------------------------------------------------------------------------


@pytest.fixture
def prometheus() -> Iterator[tuple[str, list[dict], list[str]]]:
    """Its URL, what it answers with, and what it was asked."""
    results: list[dict] = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)["query"][0]
            asked.append(query)
            name = query.partition("{")[0]
            found = [one for one in results if one["metric"]["__name__"] == name]
            body = json.dumps({"status": "success", "data": {"resultType": "matrix", "result": found}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", results, asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_same_counts_come_through_prometheus(prometheus: tuple[str, list[dict], list[str]]) -> None:
    url, results, asked = prometheus
    telemetry = ServerTelemetry(PrometheusScrapes(PrometheusAccess(url), "shop"), thresholds_ms=[100], clock=Clock())
    base = {"namespace": "shop", "pod": "recommender.a", "version": "1", "route": "recommend"}
    pods = [pod("recommender.a", "1")]

    def series(name: str, values: list[list], **labels: str) -> dict:
        return {"metric": {"__name__": name, **base, **labels}, "values": values}

    def scraped(*samples: tuple[float, int, int, int]) -> None:
        results[:] = [
            series("endcap_server_attempts_total", [[at, str(good)] for at, good, _, _ in samples], outcome="answered"),
            series("endcap_server_attempts_total", [[at, str(bad)] for at, _, bad, _ in samples], outcome="failed"),
            series("endcap_server_latency_seconds_bucket", [[at, str(f)] for at, _, _, f in samples], le="0.1"),
            series("endcap_server_latency_seconds_count", [[at, str(g + b)] for at, g, b, _ in samples]),
        ]

    scraped((T0 - 20, 80, 0, 70), (T0 - 5, 100, 0, 90))
    assert telemetry.observe(pods).version("1").attempts == Counts()
    scraped((T0 - 5, 100, 0, 90), (T0 + 10, 130, 5, 115), (T0 + 25, 150, 5, 135))
    seen = telemetry.observe(pods).version("1")
    assert (seen.attempts, seen.within_ms[100]) == (Counts(50, 55), Counts(45, 55))
    assert 'namespace="shop",pod=~"recommender\\\\.a"' in asked[0]


def test_a_prometheus_that_is_gone_is_no_data() -> None:
    telemetry = ServerTelemetry(PrometheusScrapes(PrometheusAccess("http://127.0.0.1:9"), "shop"), clock=Clock())
    with pytest.raises(SourceError):
        telemetry.observe([pod("a", "1")])
