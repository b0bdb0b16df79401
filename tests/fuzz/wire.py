"""Plain clients of HTTP/1.1 and of gRPC over sockets: they send any bytes, and wait for an answer only so long."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

from hpack import Decoder, Encoder

from serving.server import http2
from serving.server.http2 import frame

__all__ = ["WAIT_S", "Answer", "GrpcClient", "HangError", "HttpClient", "exchange", "http_request"]

WAIT_S = 20.0
"""On a busy machine too every answer has come, and every connection that must end has ended, long before."""
_MOST_BYTES = 8 << 20


class HangError(Exception):
    """No answer, or no end of the connection."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``status``: HTTP's; of gRPC, ``grpc`` is its status, None where the call was reset or the connection ended."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    grpc: int | None = None
    closed: bool = False
    interim: bool = False

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace") or self.headers.get("grpc-message", "")


def _connect(address: tuple[str, int]) -> socket.socket:
    try:
        found = socket.create_connection(address, timeout=WAIT_S)
    except TimeoutError:
        raise HangError("no connection") from None
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def http_request(path: str, body: bytes, *headers: tuple[str, str], method: str = "POST") -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class HttpClient:
    """One connection, made anew where the server has closed it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self._rest = b""
        self.connections = 0

    def ask(self, request: bytes, *, head: bool = False) -> Answer:
        """The answer to a whole request; an idle connection that has ended meanwhile is made anew once.

        Raises:
            HangError: none came.
        """
        for again in (False, True):
            fresh = self._socket is None
            try:
                return self._ask(request, head=head)
            except (ConnectionError, EOFError):
                self.close()
                if fresh or again:
                    raise
        raise AssertionError

    def _ask(self, request: bytes, *, head: bool) -> Answer:
        if self._socket is None:
            self._socket, self._rest = _connect(self._address), b""
            self.connections += 1
        self._socket.sendall(request)
        interim = False
        while True:
            answer = self._read(self._socket, head=head)
            if answer.status != 100:
                break
            interim = True
        if answer.headers.get("connection") == "close":
            self.close()
            return Answer(answer.status, answer.headers, answer.body, closed=True, interim=interim)
        return answer

    def _read(self, peer: socket.socket, *, head: bool) -> Answer:
        data = self._rest
        while b"\r\n\r\n" not in data:
            data += _more(peer)
        text, _, data = data.partition(b"\r\n\r\n")
        first, *lines = text.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = 0 if head else int(headers.get("content-length", "0"))
        while len(data) < size:
            data += _more(peer)
        self._rest = data[size:]
        return Answer(int(first.split(" ")[1]), headers, data[:size])

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _more(peer: socket.socket) -> bytes:
    try:
        data = peer.recv(1 << 16)
    except TimeoutError:
        raise HangError(f"no answer within {WAIT_S:g} s") from None
    if not data:
        raise EOFError
    return data


def exchange(address: tuple[str, int], parts: list[bytes], *, ending: str) -> bytes:
    """What comes back on a connection of its own to bytes of any kind.

    ``ending``: ``half`` closes our half, and then the server must end too; ``close`` and ``reset`` go away at once.

    Raises:
        HangError: the server did not end.
    """
    answer = bytearray()
    with _connect(address) as peer:
        try:
            for part in parts:
                peer.sendall(part)
            if ending == "half":
                peer.shutdown(socket.SHUT_WR)
                while len(answer) < _MOST_BYTES:
                    answer += _more(peer)
        except TimeoutError:
            raise HangError("what is sent is not read") from None
        except (OSError, EOFError):
            pass
        if ending == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return bytes(answer)


class GrpcClient:
    """One HTTP/2 connection with one call at a time."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._socket: socket.socket | None = None
        self.connections = 0

    def call(self, path: str, body: bytes, *fields: tuple[str, str], drop: tuple[str, ...] = ()) -> Answer:
        """The answer to a call with ``body`` as the DATA of its stream, whatever that is.

        Args:
            fields: more header fields. drop: names of fields that are left out.

        Raises:
            HangError: none came.
        """
        usual = [(":method", "POST"), (":scheme", "http"), (":path", path), ("content-type", "application/grpc"),
                 ("te", "trailers")]  # fmt: skip
        head = [(name, value) for name, value in usual if name not in drop]
        for again in (False, True):
            fresh = self._socket is None
            if self._socket is None:
                self._open()
            peer, stream = self._socket, self._stream
            assert peer is not None
            self._stream += 2
            block = self._encoder.encode([*head, *fields])
            cuts = [body[at : at + http2.FRAME_BYTES] for at in range(0, len(body), http2.FRAME_BYTES)] or [b""]
            sent = frame(http2.HEADERS, http2.END_HEADERS, stream, block)
            for number, cut in enumerate(cuts, 1):
                sent += frame(http2.DATA, http2.END_STREAM * (number == len(cuts)), stream, cut)
            try:
                peer.sendall(sent)
                return self._answer(peer, stream)
            except TimeoutError:
                raise HangError("what is sent is not read") from None
            except (ConnectionError, EOFError):
                self.close()
                if fresh or again:
                    return Answer(0, closed=True)
        raise AssertionError

    def _open(self) -> None:
        self._encoder, self._decoder, self._data, self._stream = Encoder(), Decoder(), b"", 1
        self._socket = _connect(self._address)
        self.connections += 1
        settings = struct.pack(">HL", 4, http2.MOST_WINDOW)
        window = struct.pack(">L", http2.MOST_WINDOW - http2.FIRST_WINDOW)
        self._socket.sendall(http2.PREFACE + frame(http2.SETTINGS, 0, 0, settings)
                             + frame(http2.WINDOW_UPDATE, 0, 0, window))  # fmt: skip

    def _answer(self, peer: socket.socket, stream: int) -> Answer:
        headers: dict[str, str] = {}
        body = bytearray()
        while True:
            kind, flags, number, payload = self._frame(peer)
            if kind == http2.GOAWAY:
                self.close()
                return Answer(0, {"goaway": str(int.from_bytes(payload[4:8], "big"))}, bytes(payload[8:]), closed=True)
            if kind == http2.SETTINGS and not flags & http2.ACK:
                peer.sendall(frame(http2.SETTINGS, http2.ACK, 0, b""))
            if kind == http2.HEADERS:
                headers |= {str(name): str(value) for name, value in self._decoder.decode(payload)}
            if number != stream:
                continue
            if kind == http2.RST_STREAM:
                return Answer(0, {"reset": str(int.from_bytes(payload, "big"))})
            if kind == http2.DATA:
                body += payload
            if kind in (http2.DATA, http2.HEADERS) and flags & http2.END_STREAM:
                status = int(headers.get(":status", 0))
                grpc = headers.get("grpc-status")
                return Answer(status, headers, bytes(body), int(grpc) if grpc is not None else None)

    def _frame(self, peer: socket.socket) -> tuple[int, int, int, bytes]:
        data = self._data
        while len(data) < 9 or len(data) < 9 + int.from_bytes(data[:3], "big"):
            data += _more(peer)
        end = 9 + int.from_bytes(data[:3], "big")
        self._data = data[end:]
        return data[3], data[4], int.from_bytes(data[5:9], "big") & 0x7FFFFFFF, data[9:end]

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
