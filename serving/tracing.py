"""Whether requests are traced, and what a trace is told. OpenTelemetry itself is not imported here.

Traces are configured by OpenTelemetry's own variables: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``, or
``OTEL_TRACES_EXPORTER=otlp``) turns them on; headers, sampler, resource and batches are the library's to read. Without
them :mod:`serving.spans` and OpenTelemetry are not imported, and a request costs one look into a context variable.

What is told of a request are times and counts: never a shopper, a history or an item.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Protocol
from urllib.parse import urlsplit

from endcap.errors import InputError

__all__ = ["CURRENT", "Trace", "traces_endpoint"]

Said = str | int | float | bool


class Trace(Protocol):
    """A request that is being traced."""

    def add(self, name: str, begun_s: float, ended_s: float, /, **said: Said) -> None:
        """A part of it that has ended, from and to (seconds of ``time.monotonic``; on Linux ``perf_counter`` is it)."""


CURRENT: ContextVar[Trace | None] = ContextVar("endcap trace", default=None)
"""The trace of the request that this task answers; None: it is not traced."""


def traces_endpoint(environ: Mapping[str, str]) -> str | None:
    """The URL that spans are sent to; None: requests are not traced.

    Raises:
        InputError: an exporter or a protocol that endcap does not have, or no URL.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    own = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "").strip()
    common = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip()
    if exporter == "none" or not (exporter or own or common):
        return None
    if exporter not in ("", "otlp"):
        raise InputError("traces go out by otlp alone", where="OTEL_TRACES_EXPORTER", next_step="otlp or none")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := environ.get(name, "").strip():
            if protocol != "http/protobuf":
                raise InputError("traces go out over http/protobuf alone", where=name,
                                 next_step="set it to http/protobuf and the collector's HTTP port")  # fmt: skip
            break
    found = own or f"{(common or 'http://localhost:4318').rstrip('/')}/v1/traces"
    try:
        parts = urlsplit(found)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InputError("not the address of an OpenTelemetry collector", where="OTEL_EXPORTER_OTLP_ENDPOINT",
                         next_step="http://host:4318")  # fmt: skip
    return found
