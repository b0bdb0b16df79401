"""``/healthz``, ``/readyz`` and ``/metrics``, from a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from endcap.errors import EndcapError, from_os_error

__all__ = ["HealthServer"]


class HealthServer:
    """``trouble``: why the process should be started again, None while it is well. ``ready``: it sees the objects.

    Raises:
        EndcapError: the port is in use.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, *, trouble: Callable[[], str | None],
        ready: Callable[[], bool],
    ) -> None:  # fmt: skip
        def answer(path: str) -> tuple[int, str, bytes]:
            if path == "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest(registry)
            if path == "/healthz":
                why = trouble()
                return (200, "text/plain", b"ok\n") if why is None else (503, "text/plain", f"{why}\n".encode())
            if path == "/readyz":
                return (200, "text/plain", b"ok\n") if ready() else (503, "text/plain", b"not yet\n")
            return 404, "text/plain", b"no such page: /healthz, /readyz, /metrics\n"

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                code, kind, body = answer(self.path.partition("?")[0])
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:  # probes come every few seconds
                pass

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            told: EndcapError = from_os_error(error, doing=f"listening on {host}:{port}")
            raise told from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="endcap-health", daemon=True)

    def __enter__(self) -> HealthServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
