"""What the server counts: summed over its workers, with edges where the objectives have their thresholds."""

from __future__ import annotations

import os
from pathlib import Path

from serving.server.app import Replica, ServerApp
from serving.server.metrics import ServerMetrics
from serving.server.service import load_service
from tests.asgi_client import AsgiClient
from tests.packages import make_package


def value(metrics: ServerMetrics, name: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(f"endcap_server_{name}", {"version": "7", **labels})
    return found


def test_whichever_worker_is_asked_answers_for_all_and_a_restarted_one_counts_on() -> None:
    metrics = ServerMetrics("7", processes=3)
    for worker in (1, 2, 1):  # worker 1 is started twice
        child = os.fork()
        if child == 0:
            metrics.use(worker)
            metrics.attempts["recommend", "answered"].inc()
            metrics.latency["recommend"].observe(0.02)
            metrics.in_flight.set(worker)
            os._exit(0)
        os.waitpid(child, 0)
    metrics.use(0)
    metrics.attempts["recommend", "answered"].inc()
    assert value(metrics, "attempts_total", route="recommend", outcome="answered") == 4
    assert value(metrics, "latency_seconds_count", route="recommend") == 3
    assert value(metrics, "latency_seconds_bucket", route="recommend", le="0.01") == 0
    assert value(metrics, "latency_seconds_bucket", route="recommend", le="0.025") == 3
    assert value(metrics, "in_flight") == 3
    metrics.use(2)
    assert value(metrics, "in_flight") == 1


def test_objectives_thresholds_are_edges() -> None:
    metrics = ServerMetrics("7", thresholds_s=[0.15, 0.1])
    metrics.latency["infer"].observe(0.15)
    metrics.latency["infer"].observe(0.151)
    assert value(metrics, "latency_seconds_bucket", route="infer", le="0.15") == 1
    assert value(metrics, "latency_seconds_bucket", route="infer", le="+Inf") == 2


def test_batches_and_queue_times_are_counted(tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    app = ServerApp(Replica("7", "a"), impression_key=None)
    app.open(load_service(package, tmp_path / "keys" / "signing.pub"))
    with AsgiClient(app) as client:
        for history in (["100"], ["101"], []):
            assert client.post("/v1/recommend", {"shopper": "1", "history": history}).status == 200
        assert client.get("/metrics").status == 200
    assert value(app.metrics, "batch_rows_bucket", le="1.0") == 2
    assert value(app.metrics, "queue_seconds_count") == 2
    assert value(app.metrics, "run_seconds_count") == 2
    assert value(app.metrics, "fallbacks_total", fallback="popular") == 1
    assert value(app.metrics, "admitted") == 256
