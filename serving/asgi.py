"""What our HTTP servers share: small raw-ASGI helpers, and a uvicorn server that drains.

Raw ASGI, because a framework's routing and request objects cost as much as the rest of a small answer.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from types import FrameType
from typing import Any, Literal, Protocol

import orjson
import uvicorn

from endcap.errors import EndcapError, InputError, from_os_error

__all__ = [
    "MAX_BODY_BYTES", "App", "BodyTooLargeError", "DrainingServer", "EncodedBodyError", "Headers", "Receive", "Scope",
    "Send", "error_body", "listen", "one_line", "read_body", "send_answer",
]  # fmt: skip

MAX_BODY_BYTES = 256 * 1024

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]


class App(Protocol):
    """An ASGI application that can be told to drain."""

    draining: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class BodyTooLargeError(InputError):
    """A request body over the limit: 413."""


class EncodedBodyError(InputError):
    """A compressed request body: 415. What a few bytes unfold to could not be bounded."""


async def read_body(scope: Scope, receive: Receive, *, limit: int = MAX_BODY_BYTES) -> bytes:
    """The request's body.

    Raises:
        BodyTooLargeError: it is, or says it is, larger than ``limit``; no more than that was kept.
        EncodedBodyError: it is compressed.
        ConnectionError: the client went away.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > limit:
            raise _too_large(limit)
        if name == b"content-encoding" and value.lower() not in (b"", b"identity"):
            raise EncodedBodyError("compressed bodies are not taken", where="Content-Encoding",
                                   next_step="send the body as it is")  # fmt: skip
    message = await receive()
    if message["type"] != "http.request":
        raise ConnectionError
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        parts, size = [body], len(body)
        while message.get("more_body", False):
            if size > limit:
                raise _too_large(limit)
            message = await receive()
            if message["type"] != "http.request":
                raise ConnectionError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
        body = b"".join(parts)
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {limit} bytes", where="body", next_step="send less at once")


async def send_answer(send: Send, status: int, body: bytes, headers: Headers = (), *,
                      content_type: bytes = b"application/json") -> None:  # fmt: skip
    """One whole answer."""
    await send({
        "type": "http.response.start",
        "status": status,
        "headers": [
            (b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers,
        ],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": body})


def error_body(error: EndcapError) -> bytes:
    """``{"error": {"what", "where", "next"}}``."""
    return orjson.dumps({"error": {"what": error.what, "where": error.where, "next": error.next_step}})


def one_line(error: EndcapError) -> str:
    """An error on one line, for a process's last word on stderr."""
    return " ".join(str(error).replace("\n  next:", "; next:").split())


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes any free one.

    Raises:
        InputError: the port is in use, or not ours to open; the message says which.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(2048)
    except OSError as error:
        server.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened"
            raise InputError(f"port {port} {why}", where=host, next_step="choose another --port (0: any)") from error
        raise from_os_error(error, doing=f"listening on {host}:{port}") from error
    server.setblocking(False)
    return server


class DrainingServer(uvicorn.Server):
    """uvicorn that loses no request when it is told to end.

    On SIGTERM or SIGINT the app learns that it is draining (readiness fails from then on) and everything is still
    answered for ``drain_s``, so that the gateway's health checks see it and send no more; then idle connections are
    closed and requests in flight finish. A second SIGINT ends at once.

    Args:
        on_started: called on the event loop once the port is open.
        on_stopping: awaited on it before the port is closed, for what else serves beside; with it the server drains
            for all of ``drain_s``, because it does not know of the others' connections.
    """

    def __init__(self, app: App, *, drain_s: float, finish_s: int = 3,
                 on_started: Callable[[DrainingServer], None] | None = None,
                 on_stopping: Callable[[], Awaitable[None]] | None = None,
                 http: type[asyncio.Protocol] | Literal["httptools"] = "httptools") -> None:  # fmt: skip
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=http,
                proxy_headers=False,  # nothing here asks where a request came from
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                date_header=False,
                # The gateway closes idle connections, never we: a request that crosses our closing of its
                # connection would be lost.
                timeout_keep_alive=2 * 3600,
                timeout_graceful_shutdown=finish_s,
            )
        )
        self.failure: EndcapError | None = None
        self._app = app
        self._drain_s = drain_s
        self._on_started = on_started
        self._on_stopping = on_stopping
        self._drained_at_s: float | None = None

    def fail(self, error: EndcapError) -> None:
        """End the server at once because of ``error``. Call on the event loop."""
        self.failure = self.failure or error
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_started is not None:
            self._on_started(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_stopping is not None:
            await self._on_stopping()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drained_at_s is None:
            self._app.draining = True
            self._drained_at_s = time.monotonic() + self._drain_s
        elif sig == 2:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self._drained_at_s is not None and (
            time.monotonic() >= self._drained_at_s
            or not (self.server_state.connections or self._on_stopping is not None)
        ):
            self.should_exit = True
        return await super().on_tick(counter)

    def run_on(self, listener: socket.socket) -> int:
        """Serve until told to end; the process's exit code. A failure is one line on stderr."""
        self.run(sockets=[listener])
        if self.failure is None:
            return 0
        sys.stderr.write(one_line(self.failure) + "\n")
        return self.failure.exit_code
