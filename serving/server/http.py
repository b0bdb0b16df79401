"""HTTP for the model server: uvicorn's protocol, safe to expose, and a short way out for what would be turned away.

When the server is crowded a request is refused as soon as its headers are read: no task, no body, no parsing. So
even several times more requests than it can answer leave the processor to those that it does answer.

What uvicorn leaves open is bounded here: the size of a request's head and trailers (431), the time that a request may
take to arrive (408) and an answer to be read, requests sent ahead, what is skipped of a body that was refused,
connections, and what all of them hold of requests that are not whole (``bounds.Held``). A client that has closed its
half of the connection still gets its answer, and so does one that asks for another protocol: in this one, as if it had
not asked (RFC 9110, 7.8); Java's client does so with the first request of each connection.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from asyncio import TimerHandle
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Protocol

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.asgi import MAX_BODY_BYTES, Headers
from serving.server import bounds

__all__ = ["MAX_HEAD_BYTES", "SLOW_S", "SheddingProtocol", "Turnstile", "sweep"]


MAX_HEAD_BYTES = 32 * 1024
SLOW_S = 30.0
"""From a request's first byte to its last, and for an answer to be read."""
MAX_SKIPPED_BYTES = 16 << 20
"""Of a body that was refused: so much is read on, so that the next request can be answered; then the end."""
MAX_CHUNKED_BYTES = 8 * MAX_BODY_BYTES
"""Of a body in chunks, with all that is round them: the smallest take six bytes for one."""
MAX_PIPELINED = 64
_SWEEP_S = 5.0
_REQUEST, _ANSWER = 0, 1
_UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


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
    most_connections = bounds.connections("http")
    held = bounds.HELD

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0
        self._part_bytes = 0
        self._message_bytes = 0
        self._messages = 0
        self._in_head = True
        self._arriving = False
        self._chunked = False
        self._holds = False
        self._gone = False
        self._slow: TimerHandle | None = None
        self._running: Any = None
        self._upgrade: bytes | None = None
        self._upgrade_at = 0
        self._unread_since_s: float | None = None
        self._swept = -1
        self.quiet = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            others = (one for one in self.connections if isinstance(one, SheddingProtocol) and one.quiet)
            quiet = next(others, None)
            if quiet is None:
                self._refuse_and_close(503, "server: too many connections")
            else:
                quiet.quiet, quiet._gone = False, True
                quiet.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._gone:
            return
        began = self._messages
        super().data_received(data)
        while self._upgrade is not None and not self._gone:
            head, self._upgrade = self._upgrade, None
            self.parser = httptools.HttpRequestParser(self)
            data = head + data[self._upgrade_at :]
            super().data_received(data)
        if self._arriving and not self._gone:
            self._not_whole(len(data), began=self._messages != began)

    def _not_whole(self, size: int, *, began: bool) -> None:
        """More of a request has come, and not its end."""
        self._message_bytes += size
        if self._in_head and not began:  # the parser keeps what is not whole yet
            self._part_bytes += size
        answered = self.cycle is None or self.cycle.response_complete
        if max(self._part_bytes, self._head_bytes) > MAX_HEAD_BYTES:
            self._refuse_and_close(431, "head: the request's head or trailers are too large")
        elif self._message_bytes > (MAX_CHUNKED_BYTES if self._chunked else MAX_SKIPPED_BYTES):
            self._refuse_and_close(413, "body: the body is too large, or its chunks are too small")
        else:
            if self._slow is None:
                self._slow = self.loop.call_later(self.slow_s, self._too_slow)
            if self._in_head or self._chunked or not answered:
                self._holds = True
                self.held.set(self, _REQUEST, self._message_bytes)
            elif self._holds:
                self._let_go()

    def make_way(self, number: int) -> None:
        """Too much is held, and this for longest."""
        if number == _REQUEST:
            self._refuse_and_close(408, "body: it came too slowly, and others need the memory")
        else:
            self.transport.abort()

    def _let_go(self) -> None:
        self._holds = False
        self.held.drop(self, _REQUEST)

    def sweep(self, now_s: float) -> None:
        """Look whether its answers are read, and whether it says anything; now and then."""
        waiting = self.transport.get_write_buffer_size()
        if not waiting or self._swept != self._messages:  # on a busy connection something is always being sent
            if self._unread_since_s is not None:
                self._unread_since_s = None
                self.held.drop(self, _ANSWER)
        elif self._unread_since_s is None:
            self._unread_since_s = now_s
            self.held.set(self, _ANSWER, waiting)
        elif now_s - self._unread_since_s > self.slow_s:
            self.transport.abort()
        idle = self.cycle is None or self.cycle.response_complete
        self.quiet = idle and not waiting and not self._arriving and self._swept == self._messages
        self._swept = self._messages

    def on_message_begin(self) -> None:
        self._arriving = self._in_head = True
        self._chunked = False
        self._head_bytes = self._part_bytes = self._message_bytes = 0
        self._messages += 1
        self.quiet = False
        super().on_message_begin()

    def on_chunk_header(self) -> None:
        """The parser calls this, of bodies in chunks only."""
        self._chunked = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + 4
        super().on_header(name, value)

    def on_message_complete(self) -> None:
        if self._upgrade is not None:
            return
        self._arriving = False
        self._no_longer_slow()
        super().on_message_complete()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        if self._gone:
            return not self.transport.is_closing() or None
        cycle = self.cycle
        if self._arriving:
            self._refuse_and_close(400, "request: the connection was closed before it was whole")
            return None
        if cycle is None or cycle.response_complete:
            return None
        cycle.keep_alive = False  # answer what was asked, then close
        return True

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True
        self.pipeline.clear()
        if self._running is not None:  # not always uvicorn's own, which is the one that came last
            self._running.disconnected = True
            self._running.message_event.set()
        self._no_longer_slow()
        self.held.drop(self, _ANSWER)
        super().connection_lost(exc)

    def _no_longer_slow(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if self._holds:
            self._let_go()

    def _too_slow(self) -> None:
        self._slow = None
        if self._arriving:
            self._refuse_and_close(408, "body: the request took too long to arrive")

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this where bytes are no HTTP; what was asked before them is answered first."""
        if self._gone:
            return
        self._in_head = self._in_head or not self._arriving
        self._refuse_and_close(400, "request: not HTTP/1.1 as it should be")

    def _last_answer(self) -> None:
        """Read no more; close when the last request that was read is answered."""
        self._gone = True
        self._no_longer_slow()
        self.cycle.keep_alive = False
        self.flow.pause_reading()

    def _refuse_and_close(self, status: int, what: str) -> None:
        """Say what is wrong with the request that is arriving, unless that would be taken for another's answer."""
        self._gone = True
        self._no_longer_slow()
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if self._in_head and cycle is not None and not cycle.response_complete:  # an earlier one's, not answered yet
            self._last_answer()
            return
        if not self.pipeline and (cycle is None or cycle.response_complete or not cycle.response_started):
            self.transport.write(_raw(status, orjson.dumps({"error": what}), (), keep=False))
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn calls this while it handles the parser's exception, of which the argument is where it stopped."""
        error = sys.exception()
        self._upgrade_at = error.args[0] if isinstance(error, httptools.HttpParserUpgrade) else 0

    def _without_upgrade(self) -> None:
        """Keep the request's head without the wish for another protocol, to be read again: the parser skips the body
        of a request with one."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse_and_close(405, "method: CONNECT is not for this server")
            return
        lines = [b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                words = [word for word in value.split(b",") if word.strip().lower() not in _UPGRADE_HEADERS]
                lines.append(b"connection: " + b",".join(words))
            elif name not in _UPGRADE_HEADERS:
                lines.append(b"%s: %s" % (name, value))
        self._upgrade = b"\r\n".join([*lines, b"", b""])

    def on_headers_complete(self) -> None:
        if self._head_bytes > MAX_HEAD_BYTES and not self._gone:
            self._refuse_and_close(431, "head: the request's head or trailers are too large")
        elif len(self.pipeline) >= MAX_PIPELINED and not self._gone:
            self._last_answer()
        elif self.parser.should_upgrade() and not self._gone:
            self._without_upgrade()
            return
        self._in_head = False
        if self._gone:
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
        if self.parser.get_method() != b"POST":
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


async def sweep(connections: Iterable[Any]) -> None:
    """Sweep a server's connections now and then, until cancelled."""
    while True:
        await asyncio.sleep(_SWEEP_S)
        now_s = time.monotonic()
        for connection in list(connections):
            connection.sweep(now_s)


class _Seldom(logging.Filter):
    """Lets a message through once a second: who sends bytes that are no HTTP must not fill the log."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text
        self._said_s = -1.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != self._text:
            return True
        said, self._said_s = self._said_s, record.created
        if record.created - said < 1.0:
            self._said_s = said
            return False
        return True


logging.getLogger("uvicorn.error").addFilter(_Seldom("Invalid HTTP request received."))
