"""Requests as OpenTelemetry's spans, sent by OTLP over HTTP. Imported only where traces are configured.

One server span a request, with a child for each of its parts (:class:`serving.tracing.Trace`). Who asks may send W3C's
``traceparent``; the answer says in ``traceresponse`` which span it was. Spans are gathered and sent by a thread of the
library's; where the collector is slow or gone they are dropped, and no request waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextvars import Token
from types import TracebackType

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.asgi import Headers
from serving.tracing import CURRENT, Said, Trace

__all__ = ["RequestTrace", "Tracing"]

_PROPAGATED = {b"traceparent": "traceparent", b"tracestate": "tracestate"}
_W3C = TraceContextTextMapPropagator()


class Tracing:
    """Traces of one process. Make it after the fork: its thread does not live through one.

    Args:
        service: ``service.name``, unless the environment names another.
        said: of the resource: the model version and the zone.
        exporter: where spans go; None: what the environment says.
    """

    def __init__(self, service: str, said: Mapping[str, str], *, exporter: OTLPSpanExporter | None = None) -> None:
        names_itself = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        )
        named = {} if names_itself else {"service.name": service}
        self._provider = TracerProvider(resource=Resource.create({**named, **said}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("endcap")

    def request(self, name: str, headers: Headers, said: Mapping[str, Said]) -> RequestTrace:
        """The trace of one request: enter it, and while it is entered it is :data:`serving.tracing.CURRENT`."""
        carrier = {_PROPAGATED[key]: value.decode("latin-1") for key, value in headers if key in _PROPAGATED}
        parent = _W3C.extract(carrier, context=Context()) if carrier else Context()
        return RequestTrace(self, name, parent, said)

    def close(self, *, within_s: float = 2.0) -> None:
        """Send what is left, for so long at most."""
        ending = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        ending.start()
        ending.join(within_s)


class RequestTrace:
    """One request's span."""

    def __init__(self, tracing: Tracing, name: str, parent: Context, said: Mapping[str, Said]) -> None:
        self._tracer = tracing._tracer
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER, attributes=said)
        self._context = set_span_in_context(self._span, Context())
        self._token: Token[Trace | None] | None = None

    def __enter__(self) -> RequestTrace:
        self._token = CURRENT.set(self if self._span.is_recording() else None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 where: TracebackType | None) -> None:  # fmt: skip
        if self._token is not None:
            CURRENT.reset(self._token)
        self._span.end()

    @property
    def traceresponse(self) -> bytes:
        """W3C's header of the answer."""
        found = self._span.get_span_context()
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{int(found.trace_flags):02x}".encode()

    def add(self, name: str, begun_s: float, ended_s: float, /, **said: Said) -> None:
        """See :class:`serving.tracing.Trace`."""
        span = self._tracer.start_span(name, context=self._context, start_time=self._ns(begun_s), attributes=said)
        span.end(self._ns(ended_s))

    def ended(self, said: Mapping[str, Said], *, fault: str | None = None) -> None:
        """What became of it. ``fault``: the server's, in a word."""
        self._span.set_attributes(dict(said))
        if fault is not None:
            self._span.set_attribute("error.type", fault)
            self._span.set_status(Status(StatusCode.ERROR))

    def _ns(self, at_s: float) -> int:
        return int(at_s * 1e9) + self._offset_ns
