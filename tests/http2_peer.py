"""A client of one HTTP/2 connection of ours, frame by frame, over a transport that only remembers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Coroutine
from typing import Any

from hpack import Decoder, Encoder

from serving.server import http2
from serving.server.bounds import Held
from serving.server.http2 import Connection, Limits, Request, frame

FIELDS = [(":method", "POST"), (":scheme", "http"), (":path", "/s/M"), ("content-type", "application/grpc")]
SETTINGS = frame(http2.SETTINGS, 0, 0, b"")
BOTH = http2.END_HEADERS | http2.END_STREAM


__all__ = ["BOTH", "FIELDS", "SETTINGS", "Peer", "Transport", "answered", "on_loop", "window"]


def window(grown: int, stream: int = 0) -> bytes:
    return frame(http2.WINDOW_UPDATE, 0, stream, struct.pack(">L", grown))


class Transport:
    def __init__(self) -> None:
        self.sent = bytearray()
        self.closed = self.paused = self.aborted = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Peer:
    """A client of one connection. ``frames()`` are those that came since it was last asked."""

    def __init__(self, handler: http2.Handler | None = None, *, beside: Peer | None = None,
                 **limits: float) -> None:  # fmt: skip
        async def echo(request: Request) -> bytes:
            self.requests.append(request)
            return request.message

        self.requests: list[Request] = []
        self.open: set[Connection] = beside.open if beside is not None else set()
        self.held = beside.held if beside is not None else Held(int(limits.pop("held", 1 << 20)))
        every: dict[str, Any] = {"message_bytes": 100_000, **limits}
        self.connection = Connection(handler or echo, Limits(**every), self.open, self.held)
        self.transport = Transport()
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]
        self._encoder, self._decoder = Encoder(), Decoder()

    def send(self, *frames: bytes) -> None:
        for one in frames:
            if not self.transport.closed:
                self.connection.data_received(one)

    def begin(self) -> Peer:
        self.send(http2.PREFACE + SETTINGS)
        self.frames()
        return self

    def block(self, *more: tuple[str, str], fields: list[tuple[str, str]] = FIELDS) -> bytes:
        found: bytes = self._encoder.encode([*fields, *more])
        return found

    def status(self) -> str:
        """The gRPC status of the call that was answered last, of what came since it was last asked."""
        found: str = [one[3] for one in self.frames() if one[0] == http2.HEADERS][-1]["grpc-status"]
        return found

    def call(self, stream: int, message: bytes, *more: tuple[str, str]) -> None:
        self.send(frame(http2.HEADERS, http2.END_HEADERS, stream, self.block(*more)))
        body = b"\0" + len(message).to_bytes(4, "big") + message
        for start in range(0, len(body), http2.FRAME_BYTES):
            last = start + http2.FRAME_BYTES >= len(body)
            self.send(frame(http2.DATA, http2.END_STREAM * last, stream, body[start : start + http2.FRAME_BYTES]))

    def frames(self) -> list[tuple[int, int, int, Any]]:
        """Kind, flags, stream and payload; header blocks are decoded."""
        found: list[tuple[int, int, int, Any]] = []
        data, place = bytes(self.transport.sent), 0
        self.transport.sent.clear()
        while place < len(data):
            length = int.from_bytes(data[place : place + 3], "big")
            kind, flags = data[place + 3], data[place + 4]
            stream = int.from_bytes(data[place + 5 : place + 9], "big")
            payload: Any = data[place + 9 : place + 9 + length]
            place += 9 + length
            if kind == http2.HEADERS:
                payload = dict(self._decoder.decode(payload))
            found.append((kind, flags, stream, payload))
        return found

    def fault(self) -> int:
        """The reason of the GOAWAY that ended the connection."""
        assert self.transport.closed
        last = self.frames()[-1]
        assert last[0] == http2.GOAWAY
        return int.from_bytes(last[3][4:8], "big")


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def answered() -> None:
    """What can be answered without waiting is."""
    for _ in range(5):
        await asyncio.sleep(0)
