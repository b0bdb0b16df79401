"""Traces of real processes: what a collector receives, through the gateway too, and what it costs to have none."""

from __future__ import annotations

import re
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as service

from endcap.processes import free_port
from serving.targets import StableVersion, SupervisorConfig, start_local_target
from tests.otlp import Collector, Span
from tests.packages import ITEMS, make_package
from tests.process import Program, run_to_end, started, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    make_package(folder / "package", fails_on=[ITEMS[10]])
    return folder


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def arguments(folder: Path, port: int, *more: str) -> list[str]:
    return [
        "-m", "serving.server", "--package", str(folder / "package"), "--public-key",
        str(folder / "keys" / "signing.pub"), "--version", "2", "--zone", "b", "--port", str(port), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(folder: Path, collector: Collector, grpc_port: int) -> Iterator[Program]:
    port = free_port()
    more = ("--grpc-port", str(grpc_port), "--cache", "memory:100", "--drain-s", "0")
    with started(arguments(folder, port, *more), port, folder / "log", environment=collector.environment) as program:
        yield program


def traced() -> tuple[str, dict[str, str]]:
    """A trace of the caller's: its id, and the header that says so."""
    trace_id = uuid.uuid4().hex
    return trace_id, {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}


def recommend(url: str, history: list[str], headers: dict[str, str] | None = None) -> httpx.Response:
    body = {"shopper": "shopper-who-is-secret", "history": history}
    return httpx.post(url + "/v1/recommend", json=body, headers=headers, timeout=30.0)


def test_a_request_s_parts_are_spans_of_the_caller_s_trace(server: Program, collector: Collector) -> None:
    server.wait_for("/v2/health/ready")
    trace_id, headers = traced()
    answer = recommend(server.url, ["104", "105"], headers)
    assert answer.status_code == 200
    spans = collector.wait_for(trace_id, lambda found: "POST /v1/recommend" in found)
    assert set(spans) == {"POST /v1/recommend", "admission", "cache", "queue", "graph", "steps"}
    whole = spans.pop("POST /v1/recommend")
    assert (whole.kind, whole.parent_id, whole.failed) == (2, "00f067aa0ba902b7", False)
    assert whole.said["http.response.status_code"] == 200
    assert whole.resource["service.name"] == "endcap-server"
    assert (whole.resource["service.version"], whole.resource["endcap.zone"]) == ("2", "b")
    assert answer.headers["traceresponse"] == f"00-{trace_id}-{whole.span_id}-01"
    assert {span.parent_id for span in spans.values()} == {whole.span_id}
    assert spans["cache"].said == {"result": "miss"}
    assert spans["graph"].said == {"batch.rows": 1, "batch.requests": 1}
    assert spans["queue"].begun_ns <= spans["queue"].ended_ns == spans["graph"].begun_ns
    assert spans["graph"].ended_ns <= spans["steps"].ended_ns
    for span in spans.values():
        assert whole.begun_ns - 1_000_000 <= span.begun_ns <= span.ended_ns <= whole.ended_ns + 1_000_000
    again_id, headers = traced()
    recommend(server.url, ["104", "105"], headers)
    again = collector.wait_for(again_id, lambda found: "POST /v1/recommend" in found)
    assert (again["cache"].said, "graph" in again) == ({"result": "hit"}, False)
    assert collector.paths == {"/v1/traces"}


def test_a_failure_is_a_failed_span_and_a_refusal_is_none(server: Program, collector: Collector) -> None:
    server.wait_for("/v2/health/ready")
    trace_id, headers = traced()
    assert recommend(server.url, [ITEMS[10]], headers).status_code == 500
    whole = collector.wait_for(trace_id, lambda found: "POST /v1/recommend" in found)["POST /v1/recommend"]
    assert (whole.failed, whole.said["error.type"]) == (True, "500")
    trace_id, headers = traced()
    answer = httpx.post(server.url + "/v2/models/recommender/infer", content=b"{", headers=headers)
    assert answer.status_code == 400
    spans = collector.wait_for(trace_id, lambda found: "POST /v2/models/{model}/infer" in found)
    assert not spans["POST /v2/models/{model}/infer"].failed


def test_a_grpc_call_is_traced_too(server: Program, collector: Collector, grpc_port: int) -> None:
    server.wait_for("/v2/health/ready")
    tensor = InferInput("history", [1, 2], "INT64")
    tensor.set_data_from_numpy(np.array([[1, 2]], np.int64), binary_data=False)
    trace_id, headers = traced()
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
        request = InferRequest("recommender", [tensor]).to_grpc()
        service.GRPCInferenceServiceStub(channel).ModelInfer(request, metadata=list(headers.items()), timeout=30.0)
    name = "inference.GRPCInferenceService/ModelInfer"
    spans = collector.wait_for(trace_id, lambda found: name in found)
    assert (spans[name].said["rpc.grpc.status_code"], spans[name].parent_id) == (0, "00f067aa0ba902b7")
    assert {"admission", "queue", "graph"} < set(spans)


def test_a_caller_that_is_not_sampled_costs_no_spans(server: Program, collector: Collector) -> None:
    server.wait_for("/v2/health/ready")
    unsampled = uuid.uuid4().hex
    answer = recommend(server.url, ["120"], {"traceparent": f"00-{unsampled}-00f067aa0ba902b7-00"})
    assert answer.headers["traceresponse"].startswith(f"00-{unsampled}-")
    trace_id, headers = traced()
    recommend(server.url, ["121"], headers)
    collector.wait_for(trace_id, lambda found: "POST /v1/recommend" in found)
    assert collector.spans(unsampled) == []


def test_no_span_holds_a_shopper_a_history_or_an_item(server: Program, collector: Collector) -> None:
    server.wait_for("/v2/health/ready")
    trace_id, headers = traced()
    recommend(server.url, ["history-that-is-secret", "104"], headers)
    collector.wait_for(trace_id, lambda found: "POST /v1/recommend" in found)
    assert collector.raw
    assert not any(secret in body for body in collector.raw for secret in (b"is-secret", b'"104"'))


def test_what_is_left_is_sent_when_the_server_ends(folder: Path, collector: Collector, tmp_path: Path) -> None:
    port = free_port()
    environment = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "3600000"}
    argv = arguments(folder, port, "--drain-s", "0", "--processes", "2", "--threads", "1")
    with started(argv, port, tmp_path / "log", environment=environment) as program:
        program.wait_for("/v2/health/ready")
        trace_id, headers = traced()
        recommend(program.url, ["104"], headers)
        assert collector.spans(trace_id) == []
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0
    assert "POST /v1/recommend" in {span.name for span in collector.spans(trace_id)}


def test_a_collector_that_is_not_there_costs_no_request(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}", "OTEL_BSP_SCHEDULE_DELAY": "20"}
    with started(arguments(folder, port, "--drain-s", "0"), port, tmp_path / "log", environment=environment) as program:
        program.wait_for("/v2/health/ready")
        assert [recommend(program.url, ["104"]).status_code for _ in range(20)] == [200] * 20
        wait_until(lambda: "opentelemetry" in program.log.read_text(), "the library says that it cannot send")
        assert recommend(program.url, ["104"]).status_code == 200
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0
    assert "is-secret" not in program.log.read_text()


def test_without_configuration_opentelemetry_is_not_even_imported(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    with started(["-X", "importtime", *arguments(folder, port)], port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        answer = recommend(program.url, ["104"], {"traceparent": f"00-{uuid.uuid4().hex}-00f067aa0ba902b7-01"})
    assert "traceresponse" not in answer.headers
    assert re.search(r"\| +serving\.tracing$", program.log.read_text(), re.MULTILINE)
    assert not re.search(r"\| +(opentelemetry|serving\.spans)\b", program.log.read_text())


def test_what_cannot_be_done_is_said_at_the_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    done = run_to_end(arguments(folder, 0))
    assert (done.returncode, "OTEL_EXPORTER_OTLP_PROTOCOL" in done.stderr) == (2, True)


def of_gateway(collector: Collector, trace_id: str) -> list[Span]:
    return [span for span in collector.spans(trace_id) if span.resource["service.name"] == "endcap-gateway"]


def test_a_request_is_one_trace_from_the_gateway_to_the_steps(collector: Collector, tmp_path: Path) -> None:
    package = make_package(tmp_path / "1")
    config = SupervisorConfig(
        folder=tmp_path / "target", records=tmp_path / "records", public_key=tmp_path / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=package), thresholds_ms=(100,), replicas_full=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in collector.environment.items():
            patch.setenv(name, value)
        with start_local_target(config) as target:
            trace_id, headers = traced()
            assert recommend(target.url, ["104"], headers).status_code == 200
            collector.wait_for(trace_id, lambda found: {"steps", "POST /v1/recommend"} <= set(found))
            wait_until(lambda: len(of_gateway(collector, trace_id)) == 2, "the gateway's two spans")
    spans, gateway = collector.spans(trace_id), of_gateway(collector, trace_id)
    (whole,) = [span for span in gateway if span.kind == 2]
    (attempt,) = [span for span in gateway if span.kind == 3]
    (served,) = [span for span in spans if span.name == "POST /v1/recommend"]
    assert whole.parent_id == "00f067aa0ba902b7"
    assert (attempt.parent_id, served.parent_id) == (whole.span_id, attempt.span_id)
    assert served.resource["service.version"] == "1"
