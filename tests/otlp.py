"""An OpenTelemetry collector for tests: it takes OTLP over HTTP, as protobuf, and keeps the spans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # type: ignore[import-untyped]
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.process import wait_until

__all__ = ["Collector", "Span"]


@dataclass(frozen=True)
class Span:
    """``kind``: OTLP's number (2: server, 3: client). ``said``: its attributes. ``resource``: those of its process."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    begun_ns: int
    ended_ns: int
    failed: bool
    said: dict[str, Any]
    resource: dict[str, Any]


class Collector:
    """Listens on a port of its own until :meth:`close`."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.paths: set[str] = set()
        self._spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = self.headers["content-length"]
                body = self._parts() if length is None else self.rfile.read(int(length))
                collector._take(self.path, body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def _parts(self) -> bytes:
                """A chunked body, which is how Envoy sends."""
                body = b""
                while size := int(self.rfile.readline().strip() or b"0", 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What turns traces on: spans come here soon after they end."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}

    def spans(self, trace_id: str | None = None) -> list[Span]:
        return [span for span in list(self._spans) if trace_id in (None, span.trace_id)]

    def wait_for(self, trace_id: str, enough: Callable[[dict[str, Span]], bool]) -> dict[str, Span]:
        """The spans of one trace by name, once there are enough of them."""

        def found() -> dict[str, Span]:
            return {span.name: span for span in self.spans(trace_id)}

        wait_until(lambda: enough(found()), f"spans of {trace_id}; there are {sorted(found())}")
        return found()

    def _take(self, path: str, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = _plain(group.resource.attributes)
            for scope in group.scope_spans:
                self._spans += [
                    Span(one.name, one.trace_id.hex(), one.span_id.hex(), one.parent_span_id.hex(), one.kind,
                         one.start_time_unix_nano, one.end_time_unix_nano, one.status.code == 2,
                         _plain(one.attributes), resource)
                    for one in scope.spans
                ]  # fmt: skip
        self.raw.append(body)
        self.paths.add(path)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
