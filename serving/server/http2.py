"""HTTP/2 with prior knowledge, for unary gRPC calls and nothing else, on an asyncio loop.

Why not grpcio: a unary call through its asyncio server costs 255 microseconds before anything is done, through this
one 32 (decision 14). RFC 9113 without push, priorities and upgrade from HTTP/1; header compression by the ``hpack``
package; checked with h2spec and grpcio's own clients.

What a peer can make a connection hold is bounded: streams at once, bytes of a message and of a header block, frames
that ask for nothing, requests that are taken back, the time a request may take to arrive and an answer to be read. What
all connections hold of such requests and answers together is bounded too (``bounds.Held``). A peer that breaks the
protocol gets GOAWAY with the reason and is closed; a fault of one stream ends that stream.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import cast
from urllib.parse import quote

from hpack import Decoder

from serving.server.bounds import HELD, Allowance, Held

__all__ = ["Connection", "Limits", "Refused", "Request"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITIZED = 0x20
(NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, _, STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM,
 CANCEL, COMPRESSION_ERROR, _, ENHANCE_YOUR_CALM) = range(12)  # fmt: skip

FRAME_BYTES = 16_384
MOST_WINDOW = (1 << 31) - 1
FIRST_WINDOW = 65_535
PREFACE_S = 10.0
LINGER_S = 0.2
CLOSE_S = 5.0
"""For a peer that was told to go to read that; then the connection is cut."""
_KNOWN_HEADS, _KNOWN_BYTES = 16, 64
_MOST_SETTINGS = 64

# What a peer pays for frames that ask for nothing, in frames, and what earns it: ``Limits.idle_frames`` is its credit.
_PRICE_SETTINGS, _PRICE_RESET, _PRICE_REFUSED = 10, 20, 5
_EARNED_REQUEST, _EARNED_DATA, _EARNED_SWEEP = 100, 4, 300
_DATA_THAT_PAYS, _DATA_THAT_EARNS = 64, 1024
"""Bytes: a frame with less of a message, one with more of an answer."""

_QUIET_SWEEPS, _DEAD_SWEEPS = 60, 66
"""Sweeps without a frame after which a peer is asked whether it is there, and those after which it is not."""

OK, CANCELLED, INVALID, DEADLINE, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 1, 3, 4, 8, 12, 13, 14


@dataclass(frozen=True, slots=True)
class Limits:
    message_bytes: int
    streams: int = 256
    header_bytes: int = 16_384
    connections: int = 4096
    idle_frames: int = 10_000
    """Frames that ask for nothing which a peer may send beyond those that its requests need."""
    resets: int = 1000
    resets_per_s: float = 100.0
    """Requests that a connection may take back, or get wrong, at once, and a second; one that does so more often is
    drained: what it has asked is answered, and it must begin anew."""


@dataclass(frozen=True, slots=True)
class Request:
    """One unary call. ``until_s``: its deadline, by ``time.monotonic``; infinity for none."""

    path: str
    headers: list[tuple[bytes, bytes]]
    message: bytes
    until_s: float


class Refused(Exception):  # noqa: N818 - an outcome of a call
    """A call that ends with a status other than OK."""

    def __init__(self, code: int, text: str, more: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(text)
        self.code, self.text, self.more = code, text, more


class _ConnectionFault(Exception):  # noqa: N818
    """The peer broke the protocol."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code, self.text = code, text


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">BHBBL", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that changes no table (HPACK, literal without indexing)."""
    return b"\x00" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 127:
        return bytes((size,))
    size -= 127
    parts = bytearray((127,))
    while size >= 128:
        parts.append(size & 127 | 128)
        size >>= 7
    parts.append(size)
    return bytes(parts)


_STATUS_200 = b"\x88" + literal(b"content-type", b"application/grpc")
_STATUS_415 = literal(b":status", b"415")
_GOOD_END = literal(b"grpc-status", b"0")
_UNITS_S = {72: 3600.0, 77: 60.0, 83: 1.0, 109: 1e-3, 117: 1e-6, 110: 1e-9}
_PADS = PADDED | PRIORITIZED
_UPDATES = frozenset(bytes((byte,)) for byte in range(0x20, 0x40))
"""First bytes of HPACK's update of its table's size."""
_HTTP1 = frozenset({b"connection", b"transfer-encoding", b"keep-alive", b"upgrade", b"proxy-connection"})


@dataclass(frozen=True, slots=True)
class _Head:
    """A request's header fields, read. ``length``: of the body, -1 where it is not said. ``grpc``: it is gRPC's."""

    path: str
    headers: list[tuple[bytes, bytes]]
    timeout_s: float
    length: int
    grpc: bool


class _Stream:
    __slots__ = ("begun_s", "blocked_s", "body", "ended", "head", "held", "out", "task", "trailers", "window")

    def __init__(self, head: _Head, window: int) -> None:
        self.head = head
        self.window = window
        self.body = bytearray()
        self.begun_s = time.monotonic()
        self.ended = False
        self.task: asyncio.Task[None] | None = None
        self.out = memoryview(b"")
        self.trailers = b""
        self.held = False
        self.blocked_s = 0.0


Handler = Callable[[Request], Awaitable[bytes]]


class Connection(asyncio.Protocol):
    """One connection. ``handler`` answers a call with a message, or raises :class:`Refused`."""

    def __init__(self, handler: Handler, limits: Limits, open_connections: set[Connection], held: Held = HELD) -> None:
        self._handler = handler
        self._limits = limits
        self._all = open_connections
        self._held = held
        self._transport: asyncio.Transport
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._begun = False
        self._settled = False
        self._decoder = Decoder(max_header_list_size=limits.header_bytes)
        self._decoder.max_allowed_table_size = 4096
        self._streams: dict[int, _Stream] = {}
        self._last = 0
        self._continued = 0
        self._continued_flags = 0
        self._block = b""
        self._known: dict[bytes, _Head | None] = {}
        self._window = FIRST_WINDOW
        self._first_window = FIRST_WINDOW
        self._unread = 0
        self._idle = 0
        self._resets = Allowance(limits.resets, limits.resets_per_s)
        self._blocked: dict[int, _Stream] = {}
        self._paused_s: float | None = None
        self._frames = 0
        self._swept = (0, 0, False)
        self._quiet = 0
        self._half_closed = False
        self._broken = False
        self._draining = False
        self._leaving = False
        self._waiting_s: asyncio.TimerHandle | None = None

    # ---- asyncio ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if len(self._all) >= self._limits.connections and not self._others_make_way():
            self._give_up()
            self._transport.abort()
            return
        self._all.add(self)
        self._waiting_s = self._loop.call_later(PREFACE_S, self._too_late)
        window = max(FIRST_WINDOW, self._limits.message_bytes + 1024)
        settings = struct.pack(">HLHLHL", 3, self._limits.streams, 4, window, 6, self._limits.header_bytes)
        self._transport.write(
            frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", 4 * window))
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        if self._waiting_s is not None:
            self._waiting_s.cancel()
        self._give_up()

    def _others_make_way(self) -> bool:
        """Whether there is room again: of connections that say nothing one was let go."""
        quiet = next((one for one in self._all if one._quiet and not one._streams), None)
        if quiet is not None:
            quiet._all.discard(quiet)
            quiet._fail(_ConnectionFault(NO_ERROR, "too many connections"))
        return quiet is not None

    def _give_up(self) -> None:
        """Nobody will read the answers."""
        self._broken = True
        self._buffer = self._block = b""
        self._known.clear()
        for number in list(self._streams):
            stream = self._forget(number)
            if stream is not None and stream.task is not None:
                stream.task.cancel()

    def pause_writing(self) -> None:
        self._paused_s = time.monotonic()
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._paused_s = None
        self._transport.resume_reading()
        self._flush()

    def eof_received(self) -> bool:
        """What the peer has asked is answered all the same."""
        if self._broken:
            return False
        self._half_closed = self._draining = True
        for number, stream in list(self._streams.items()):  # nothing more comes for them, and no window either
            if not stream.ended or len(stream.out) > min(self._window, stream.window):
                self._forget(number)
        return bool(self._streams)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        if self._buffer:
            data = self._buffer + data
        place, size = 0, len(data)
        try:
            if not self._begun:
                if not PREFACE.startswith(data[:24]):
                    raise _ConnectionFault(PROTOCOL_ERROR, "no preface")
                if size < 24:
                    self._buffer = data
                    return
                self._begun = True
                place = 24
            while size - place >= 9:
                length = data[place] << 16 | data[place + 1] << 8 | data[place + 2]
                if length > FRAME_BYTES:
                    raise _ConnectionFault(FRAME_SIZE_ERROR, "frame too large")
                end = place + 9 + length
                if end > size:
                    break
                stream = int.from_bytes(data[place + 5 : place + 9], "big") & 0x7FFFFFFF
                self._frame(data[place + 3], data[place + 4], stream, data[place + 9 : end])
                if self._broken:
                    return
                place = end
            self._buffer = data[place:] if place < size else b""
        except _ConnectionFault as fault:
            self._fail(fault)

    def _too_late(self) -> None:
        if not (self._settled or self._broken):
            self._fail(_ConnectionFault(PROTOCOL_ERROR, "no settings"))

    def _fail(self, fault: _ConnectionFault) -> None:
        self._give_up()
        self._transport.write(frame(GOAWAY, 0, 0, struct.pack(">LL", self._last, fault.code) + fault.text.encode()))
        self._transport.close()
        if self._waiting_s is not None:
            self._waiting_s.cancel()
        self._waiting_s = self._loop.call_later(CLOSE_S, self._transport.abort)

    # ---- what comes ----

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        self._frames += 1
        if self._continued and (kind != CONTINUATION or number != self._continued):
            raise _ConnectionFault(PROTOCOL_ERROR, "a header block is not ended")
        if not self._settled:
            if kind != SETTINGS or flags & ACK:
                raise _ConnectionFault(PROTOCOL_ERROR, "no settings first")
            self._settled = True
        if kind == HEADERS:
            self._headers(flags, number, payload)
        elif kind == DATA:
            self._data(flags, number, payload)
        else:
            self._pay(1)
            if kind == WINDOW_UPDATE:
                self._window_update(number, payload)
            elif kind == PING:
                if number:
                    raise _ConnectionFault(PROTOCOL_ERROR, "ping on a stream")
                if len(payload) != 8:
                    raise _ConnectionFault(FRAME_SIZE_ERROR)
                if not flags & ACK:
                    self._transport.write(frame(PING, ACK, 0, payload))
            elif kind == SETTINGS:
                self._settings(flags, number, payload)
            elif kind == RST_STREAM:
                if len(payload) != 4:
                    raise _ConnectionFault(FRAME_SIZE_ERROR)
                if number == 0 or number > self._last:
                    raise _ConnectionFault(PROTOCOL_ERROR, "reset of an idle stream")
                self._pay(_PRICE_RESET)  # each may have begun work
                if number in self._streams:
                    self._take_back(number)
            elif kind == CONTINUATION:
                if not self._continued:
                    raise _ConnectionFault(PROTOCOL_ERROR, "continuation of nothing")
                self._block += payload
                if len(self._block) > self._limits.header_bytes:
                    raise _ConnectionFault(ENHANCE_YOUR_CALM, "headers too large")
                if flags & END_HEADERS:
                    self._continued = 0
                    self._request(number, self._continued_flags, self._block)
            elif kind == PRIORITY:
                if number == 0:
                    raise _ConnectionFault(PROTOCOL_ERROR, "priority of nothing")
                if len(payload) != 5:
                    raise _ConnectionFault(FRAME_SIZE_ERROR)
                if int.from_bytes(payload[:4], "big") & 0x7FFFFFFF == number:
                    raise _ConnectionFault(PROTOCOL_ERROR, "depends on itself")
            elif kind == PUSH_PROMISE:
                raise _ConnectionFault(PROTOCOL_ERROR, "push")
            elif kind == GOAWAY and number:
                raise _ConnectionFault(PROTOCOL_ERROR, "goaway on a stream")

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        if not number & 1:
            raise _ConnectionFault(PROTOCOL_ERROR, "an even stream")
        if flags & _PADS:
            payload = _bare(flags, payload, number)
        if flags & END_HEADERS:
            self._request(number, flags, payload)
        else:
            self._continued, self._continued_flags, self._block = number, flags, payload

    def _request(self, number: int, flags: int, block: bytes) -> None:
        head = self._head(block)
        stream = self._streams.get(number)
        if stream is not None:  # trailers
            if stream.ended or not flags & END_STREAM:
                raise _ConnectionFault(STREAM_CLOSED if stream.ended else PROTOCOL_ERROR, "headers again")
            self._ended(number, stream)
            return
        if number <= self._last:
            raise _ConnectionFault(STREAM_CLOSED, "headers of a closed stream")
        self._last = number
        if self._draining:  # GOAWAY has said that it will not be looked at
            return
        if len(self._streams) >= self._limits.streams:
            self._pay(_PRICE_REFUSED)
            self._transport.write(frame(RST_STREAM, 0, number, struct.pack(">L", REFUSED_STREAM)))
            return
        if head is None:
            self._reset(number, PROTOCOL_ERROR)
            return
        stream = _Stream(head, self._first_window)
        self._streams[number] = stream
        if flags & END_STREAM:
            self._ended(number, stream)

    def _head(self, block: bytes) -> _Head | None:
        """What a header block says; None: no request.

        A client's later blocks mostly point into the table that its first ones filled: one byte a field. Such a block
        changes nothing there, so that it says the same until one of another kind has come.
        """
        pointers = 0 < len(block) <= _KNOWN_BYTES and min(block) > 0x80 and max(block) < 0xFF
        if pointers and block in self._known:
            return self._known[block]
        if block[:1] in _UPDATES and _updates(block) > 2:  # no encoder needs more (RFC 7541, 4.2)
            raise _ConnectionFault(COMPRESSION_ERROR, "many updates of the table's size")
        try:
            fields = self._decoder.decode(block, raw=True)
        except Exception as error:  # whatever the decoder makes of such bytes
            raise _ConnectionFault(COMPRESSION_ERROR, "headers do not decode") from error
        head = _read(fields)
        if not pointers or len(self._known) >= _KNOWN_HEADS:
            self._known.clear()
        if pointers:
            self._known[block] = head
        return head

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        if number == 0 or number > self._last or not number & 1:
            raise _ConnectionFault(PROTOCOL_ERROR, "data of an idle stream")
        self._unread += len(payload)
        if self._unread >= FIRST_WINDOW:
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", self._unread)))
            self._unread = 0
        if flags & PADDED:
            payload = _bare(flags & PADDED, payload, number)
        stream = self._streams.get(number)
        if stream is None:
            self._pay(1)
            if not self._draining:
                self._transport.write(frame(RST_STREAM, 0, number, struct.pack(">L", STREAM_CLOSED)))
            return
        if stream.ended:
            raise _ConnectionFault(STREAM_CLOSED, "data after the end")
        stream.body += payload
        if len(stream.body) > self._limits.message_bytes + 5:
            most = self._limits.message_bytes
            self._refuse(number, stream, Refused(EXHAUSTED, f"body: the message is larger than {most} bytes"))
        elif flags & END_STREAM:
            self._ended(number, stream)
        else:
            if len(payload) < _DATA_THAT_PAYS:
                self._pay(1)
            stream.held = True
            self._held.set(self, number, len(stream.body))

    def _pay(self, frames: int) -> None:
        self._idle += frames
        if self._idle > self._limits.idle_frames:
            raise _ConnectionFault(ENHANCE_YOUR_CALM, "frames without requests")

    def _earn(self, frames: int) -> None:
        self._idle = self._idle - frames if self._idle > frames else 0

    def _ended(self, number: int, stream: _Stream) -> None:
        stream.ended = True
        self._idle = self._idle - _EARNED_REQUEST if self._idle > _EARNED_REQUEST else 0
        if stream.held:
            stream.held = False
            self._held.drop(self, number)
        body = stream.body
        if stream.head.length not in (-1, len(body)):
            self._reset(number, PROTOCOL_ERROR)
        elif not stream.head.grpc:
            self._transport.write(frame(HEADERS, END_HEADERS | END_STREAM, number, _STATUS_415))
            self._drop(number, stream, ended=True)
        elif len(body) < 5 or int.from_bytes(body[1:5], "big") != len(body) - 5:
            self._refuse(number, stream, Refused(INVALID, "body: not one whole message"))
        elif body[0]:
            self._refuse(number, stream, Refused(
                UNIMPLEMENTED, "body: compressed messages are not taken", (("grpc-accept-encoding", "identity"),)
            ))  # fmt: skip
        else:
            stream.task = self._loop.create_task(self._call(number, stream))

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        if number:
            raise _ConnectionFault(PROTOCOL_ERROR, "settings on a stream")
        if len(payload) % 6 or (flags & ACK and payload):
            raise _ConnectionFault(FRAME_SIZE_ERROR)
        if flags & ACK:
            return
        self._pay(_PRICE_SETTINGS)
        if len(payload) > 6 * _MOST_SETTINGS:
            raise _ConnectionFault(ENHANCE_YOUR_CALM, "many settings")
        first_window = self._first_window
        for name, value in struct.iter_unpack(">HL", payload):
            if name == 4:
                if value > MOST_WINDOW:
                    raise _ConnectionFault(FLOW_CONTROL_ERROR)
                first_window = value
            elif (name == 2 and value > 1) or (name == 5 and not FRAME_BYTES <= value < 1 << 24):
                raise _ConnectionFault(PROTOCOL_ERROR, "a setting out of range")
        grown = first_window - self._first_window
        if grown:
            self._first_window = first_window
            for stream in self._streams.values():
                stream.window += grown
                if stream.window > MOST_WINDOW:
                    raise _ConnectionFault(FLOW_CONTROL_ERROR, "window")
        self._transport.write(frame(SETTINGS, ACK, 0, b""))
        self._flush()

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _ConnectionFault(FRAME_SIZE_ERROR)
        grown = int.from_bytes(payload, "big") & MOST_WINDOW
        if number == 0:
            self._window += grown
            if not grown or self._window > MOST_WINDOW:
                raise _ConnectionFault(FLOW_CONTROL_ERROR if grown else PROTOCOL_ERROR, "window")
        else:
            if number > self._last:
                raise _ConnectionFault(PROTOCOL_ERROR, "window of an idle stream")
            stream = self._streams.get(number)
            if stream is not None:
                stream.window += grown
                if not grown or stream.window > MOST_WINDOW:
                    self._reset(number, FLOW_CONTROL_ERROR if grown else PROTOCOL_ERROR)
                elif number in self._blocked:
                    self._flush(number)
            return
        self._flush()

    # ---- what goes ----

    async def _call(self, number: int, stream: _Stream) -> None:
        message = bytes(memoryview(stream.body)[5:])
        stream.body = bytearray()
        head = stream.head
        try:
            answer = await self._handler(Request(head.path, head.headers, message, stream.begun_s + head.timeout_s))
        except Refused as refused:
            self._refuse(number, stream, refused)
            return
        except Exception:  # noqa: BLE001 - the handler says what it was; the connection lives on
            self._refuse(number, stream, Refused(INTERNAL, "server: a fault of the server"))
            return
        if self._streams.get(number) is not stream:
            return
        size = len(answer)
        begin = frame(HEADERS, END_HEADERS, number, _STATUS_200)
        tail = frame(HEADERS, END_HEADERS | END_STREAM, number, _GOOD_END)
        body = b"\x00" + size.to_bytes(4, "big") + answer
        size += 5
        if size <= FRAME_BYTES and size <= self._window and size <= stream.window and self._paused_s is None:
            self._window -= size
            self._transport.write(begin + frame(DATA, 0, number, body) + tail)
            del self._streams[number]
            self._ended_all()
            return
        self._transport.write(begin)
        stream.out, stream.trailers = memoryview(body), tail
        stream.blocked_s = time.monotonic()
        self._blocked[number] = stream
        self._flush(number)
        if number not in self._blocked:
            return
        if self._half_closed and len(stream.out) > min(self._window, stream.window):  # no window will come
            self._forget(number)
            self._ended_all()
            return
        stream.held = True
        self._held.set(self, number, size)

    def _flush(self, number: int | None = None) -> None:
        """Send what the windows let through, of one stream's answer or of all."""
        if not self._blocked:
            return
        for one in [number] if number is not None else list(self._blocked):
            stream = self._blocked[one]
            while stream.out and self._window > 0 and stream.window > 0 and self._paused_s is None:
                size = min(FRAME_BYTES, self._window, stream.window, len(stream.out))
                self._transport.write(frame(DATA, 0, one, bytes(stream.out[:size])))
                stream.out = stream.out[size:]
                self._window -= size
                stream.window -= size
                if size >= _DATA_THAT_EARNS:
                    self._earn(_EARNED_DATA)
            if not stream.out:
                self._transport.write(stream.trailers)
                self._forget(one)
            elif self._window <= 0 or self._paused_s is not None:
                break
        self._ended_all()

    def _forget(self, number: int) -> _Stream | None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            if stream.trailers:
                del self._blocked[number]
            if stream.held:
                self._held.drop(self, number)
        return stream

    def _refuse(self, number: int, stream: _Stream, refused: Refused) -> None:
        if self._streams.get(number) is not stream:
            return
        block = (
            _STATUS_200
            + literal(b"grpc-status", str(refused.code).encode())
            + literal(b"grpc-message", quote(refused.text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode())
        )
        for name, value in refused.more:
            block += literal(name.encode(), value.encode())
        self._transport.write(frame(HEADERS, END_HEADERS | END_STREAM, number, block))
        self._drop(number, stream, ended=stream.ended)

    def _drop(self, number: int, stream: _Stream, *, ended: bool) -> None:
        self._forget(number)
        if not ended:  # it need send no more
            self._transport.write(frame(RST_STREAM, 0, number, struct.pack(">L", NO_ERROR)))
        self._ended_all()

    def _reset(self, number: int, code: int) -> None:
        self._transport.write(frame(RST_STREAM, 0, number, struct.pack(">L", code)))
        self._take_back(number)

    def _take_back(self, number: int) -> None:
        """The peer wants no answer, or has got the request wrong. Who does so all the time makes work for nothing
        (CVE-2023-44487, CVE-2025-8671)."""
        stream = self._forget(number)
        if stream is not None and stream.task is not None:
            stream.task.cancel()
        if not self._resets.spend(time.monotonic()):
            self.drain(ENHANCE_YOUR_CALM)
        self._ended_all()

    def make_way(self, number: int) -> None:
        """Too much is held: give up what has been held for longest (see :class:`~serving.server.bounds.Held`)."""
        stream = self._streams.get(number)
        if stream is None:
            return
        if not stream.ended:
            self._refuse(number, stream, Refused(EXHAUSTED, "body: it came too slowly, and others need the memory"))
        else:
            self._transport.write(frame(RST_STREAM, 0, number, struct.pack(">L", ENHANCE_YOUR_CALM)))
            self._forget(number)
            self._ended_all()

    def _ended_all(self) -> None:
        if self._draining and not self._streams and not self._leaving:
            self._leaving = True
            if self._half_closed:
                self._transport.close()
                return
            # What the peer has sent before it read GOAWAY must be read, or closing would reset the connection and take
            # the last answers with it.
            self._loop.call_later(LINGER_S, self._transport.close)

    def drain(self, code: int = NO_ERROR) -> None:
        """Take no more calls; close when those under way are answered."""
        if not (self._draining or self._broken):
            self._transport.write(frame(GOAWAY, 0, 0, struct.pack(">LL", self._last, code)))
            self._draining = True
            self._ended_all()

    def sweep(self, older_than_s: float) -> None:
        """End what has lasted since before this, by ``time.monotonic``: requests that are not whole, answers that are
        not read. Call it all few seconds: a frame must come whole from one call to the next, and a peer that says
        nothing for ``_QUIET_SWEEPS`` calls is asked whether it is there."""
        if self._broken:
            return
        self._earn(_EARNED_SWEEP)
        late = [(number, stream) for number, stream in self._streams.items() if stream.begun_s < older_than_s]
        for number, stream in late:
            if not stream.ended:
                self._refuse(number, stream, Refused(DEADLINE, "body: the message took too long to arrive"))
            elif stream.trailers and stream.blocked_s < older_than_s:
                self._reset(number, CANCEL)
        if self._paused_s is not None and self._paused_s < older_than_s:
            self._give_up()
            self._transport.abort()
            return
        before, self._swept = self._swept, (self._frames, self._continued, bool(self._buffer))
        self._quiet = self._quiet + 1 if before[0] == self._frames else 0
        begun = before[2] and self._buffer and self._quiet and self._paused_s is None
        if begun or (self._continued and before[1] == self._continued):
            self._fail(_ConnectionFault(ENHANCE_YOUR_CALM, "a frame or header block took too long to arrive"))
        elif self._half_closed and not self._streams:
            self._transport.close()
        elif self._quiet == _QUIET_SWEEPS:
            self._transport.write(frame(PING, 0, 0, bytes(8)))
        elif self._quiet >= _DEAD_SWEEPS:
            self._give_up()
            self._transport.abort()

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()


def _bare(flags: int, payload: bytes, number: int) -> bytes:
    """Without padding and priority."""
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            raise _ConnectionFault(FRAME_SIZE_ERROR)
        start, end = 1, end - payload[0]
    if flags & PRIORITIZED:
        if len(payload) < start + 5:
            raise _ConnectionFault(FRAME_SIZE_ERROR)
        if int.from_bytes(payload[start : start + 4], "big") & 0x7FFFFFFF == number:
            raise _ConnectionFault(PROTOCOL_ERROR, "depends on itself")
        start += 5
    if start > end:
        raise _ConnectionFault(PROTOCOL_ERROR, "more padding than payload")
    return payload[start:end]


def _updates(block: bytes) -> int:
    """How many updates of the table's size a header block begins with."""
    found = place = 0
    while block[place : place + 1] in _UPDATES:
        found += 1
        more = block[place] == 0x3F  # a number of several bytes
        place += 1
        while more and place < len(block):
            more = block[place] >= 0x80
            place += 1
    return found


def _read(fields: Iterable[tuple[bytes, bytes]]) -> _Head | None:
    """A request's header fields; None: they make none."""
    method = scheme = path = content = b""
    timeout_s, length = float("inf"), -1
    headers: list[tuple[bytes, bytes]] = []
    for name, value in fields:
        if name[:1] == b":":
            if headers:
                return None
            if name == b":path" and not path:
                path = value
            elif name == b":method" and not method:
                method = value
            elif name == b":scheme" and not scheme:
                scheme = value
            elif name != b":authority":
                return None
            continue
        if name == b"content-type":
            content = value
        elif name == b"grpc-timeout":
            timeout_s = _seconds(value)
        elif name == b"content-length":
            if not value.isdigit() or len(value) > 12:
                return None
            length = int(value)
        elif name in _HTTP1 or name != name.lower() or (name == b"te" and value != b"trailers"):
            return None
        headers.append((name, value))
    if not (path and method and scheme):
        return None
    grpc = method == b"POST" and content.startswith(b"application/grpc")
    return _Head(path.decode("latin-1"), headers, timeout_s, length, grpc)


def _seconds(timeout: bytes) -> float:
    unit_s = _UNITS_S.get(timeout[-1]) if timeout else None
    if unit_s is None or not timeout[:-1].isdigit() or len(timeout) > 9:
        return float("inf")
    return int(timeout[:-1]) * unit_s
