"""HTTP for the model server: uvicorn's protocol, safe to expose, and a short way out for what would be turned away.

When the server is crowded a request is refused as soon as its headers are read: no task, no body, no parsing. So
even several times more requests than it can answer leave the processor to those that it does answer.

What uvicorn leaves open is bounded here: the size of a request's head (431), the time that a request may take to
arrive (408), and a client that has closed its half of the connection still gets its answer.
"""

from __future__ import annotations

from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any, Protocol

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.asgi import Headers

__all__ = ["MAX_HEAD_BYTES", "SLOW_S", "SheddingProtocol", "Turnstile"]


MAX_HEAD_BYTES = 32 * 1024
SLOW_S = 30.0
"""From a request's first byte to its last."""


class Turnstile(Protocol):
    """What the protocol asks of the application."""

    @property
    def crowded(self) -> bool:
        """Whether asking :meth:`turn_away` is worth it."""

    def turn_away(self, path: str, headers: Headers) -> tuple[int, bytes, Headers] | None:
        """Status, body and headers of the refusal of a POST, or None to let it in."""


class _Event:
    def set(self) -> None:
        """Nobody waits for more of a request that was answered."""


class _Refused:
    """In place of uvicorn's cycle: a request that is answered, whose body is skipped as it comes."""

    response_complete = True
    response_started = True
    disconnected = False
    message_event = _Event()


_REFUSED = _Refused()


class SheddingProtocol(HttpToolsProtocol):
    """See the module."""

    slow_s = SLOW_S

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._part_bytes = 0
        self._messages = 0
        self._in_head = True
        self._arriving = False
        self._slow: TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        began = self._messages
        super().data_received(data)
        if self._in_head and self._messages == began:  # the parser keeps what is not whole yet
            self._part_bytes += len(data)
            if self._part_bytes > MAX_HEAD_BYTES:
                self._refuse_and_close(431, "the request's head is too large")
        if self._arriving and self._slow is None and not self.transport.is_closing():
            self._slow = self.loop.call_later(self.slow_s, self._too_slow)

    def on_message_begin(self) -> None:
        self._arriving = self._in_head = True
        self._head_bytes = self._part_bytes = 0
        self._messages += 1
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_message_complete(self) -> None:
        self._arriving = False
        self._no_longer_slow()
        super().on_message_complete()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        cycle = self.cycle
        if self._arriving or cycle is None or cycle.response_complete:
            return None
        cycle.keep_alive = False  # answer what was asked, then close
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_longer_slow()
        super().connection_lost(exc)

    def _no_longer_slow(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None

    def _too_slow(self) -> None:
        self._slow = None
        if self._arriving:
            self._refuse_and_close(408, "the request took too long to arrive")

    def _refuse_and_close(self, status: int, what: str) -> None:
        """Say why, unless an answer is being sent already."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_raw(status, orjson.dumps({"error": what}), (), keep=False))
        self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse_and_close(431, "the request's head is too large")
            self.cycle = _REFUSED  # type: ignore[assignment]
            return
        app = self.config.app
        if app.crowded and (self.cycle is None or self.cycle.response_complete) and not self.pipeline:  # type: ignore[union-attr]
            found = self._refusal(app)  # type: ignore[arg-type]
            if found is not None:
                # Who waits for "100 Continue" may or may not send the body after this: no next request could be told
                # from it.
                keep = (
                    self.parser.should_keep_alive()
                    and self.parser.get_http_version() == "1.1"
                    and not self.expect_100_continue
                )
                self.cycle = _REFUSED  # type: ignore[assignment]
                self.server_state.total_requests += 1
                self.transport.write(_raw(*found, keep=keep))
                if not keep:
                    self.transport.close()
                return
        super().on_headers_complete()

    def _refusal(self, app: Turnstile) -> tuple[int, bytes, Headers] | None:
        if self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            return None
        return app.turn_away(self.url.partition(b"?")[0].decode("latin-1"), self.headers)


def _raw(status: int, body: bytes, headers: Headers, *, keep: bool) -> bytes:
    parts = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n".encode()
    ]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    if not keep:
        parts.append(b"connection: close\r\n")
    parts += (b"\r\n", body)
    return b"".join(parts)
