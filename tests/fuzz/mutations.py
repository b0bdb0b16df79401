"""Requests made wrong, purely: everything follows from the ``Random`` that is passed in."""

from __future__ import annotations

import copy
import gzip
import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from serving.server import http2
from serving.server.http2 import frame, literal

__all__ = ["changed_bytes", "changed_json", "grpc_frames", "http_bytes", "places"]

_ODD: tuple[Any, ...] = (
    None, True, False, [], {}, "", "x", "é\u0000", "\ud800", "x" * 300, "history", "FP32", "INT64", "BYTES", 0, -1, 1,
    255, 2**31, 2**63 - 1, -(2**63), 2**63, 2**64, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"), float("-inf"),
    [[]], [None], [[1], [2, 3]], {"a": 1}, [0] * 2000, ["104"] * 1001, [["104", "104"]],
)  # fmt: skip
_ODD_BYTES = (b"\xff\xfe", b"\x00", b"[" * 3000, b"{", b'"', b"9" * 400, b"\xc0\x80")
_NAMES = ("name", "shape", "data", "parameters", "binary_data_size", "id", "inputs", "instances", "k", "x", "")


def places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    found = [here]
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for name, value in inner:
        found += places(value, (*here, name))
    return found


def _odd(random: Random) -> Any:
    if random.random() < 0.05:
        deep: Any = 1
        for _ in range(random.choice((3, 60, 400))):
            deep = [deep] if random.random() < 0.5 else {"a": deep}
        return deep
    return copy.deepcopy(random.choice(_ODD))


def changed_json(random: Random, good: Any) -> bytes:
    """A body with up to three of its values replaced, removed or doubled; now and then with its bytes changed too."""
    document = copy.deepcopy(good)
    for _ in range(random.randrange(4)):
        path = random.choice(places(document))
        if not path:
            if random.random() < 0.2:
                document = _odd(random)
            continue
        holder = document
        for step in path[:-1]:
            holder = holder[step]
        way = random.randrange(4)
        if way == 0:
            holder[path[-1]] = _odd(random)
        elif way == 1:
            del holder[path[-1]]
        elif way == 2 and isinstance(holder, list):
            holder.insert(random.randrange(len(holder) + 1), copy.deepcopy(holder[path[-1]]))
        elif isinstance(holder, dict):
            holder[random.choice(_NAMES)] = copy.deepcopy(holder[path[-1]]) if way == 2 else _odd(random)
        else:
            holder[path[-1]] = [holder[path[-1]]]
    body = json.dumps(document, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")
    return changed_bytes(random, body) if random.random() < 0.3 else body


def changed_bytes(random: Random, data: bytes) -> bytes:
    """Some bytes flipped, put in, left out or given again."""
    changed = bytearray(data)
    for _ in range(random.randrange(1, 5)):
        at = random.randrange(len(changed) + 1)
        way = random.randrange(6)
        if way == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif way == 1:
            changed[at:at] = random.randbytes(random.randrange(1, 9))
        elif way == 2:
            del changed[at : at + random.randrange(1, 20)]
        elif way == 3:
            changed[at:at] = changed[at : at + random.randrange(1, 200)]
        elif way == 4:
            del changed[at:]
        else:
            changed[at : at + 1] = random.choice(
                (b"\xff\xfe", b"\x00", b"[" * 3000, b"{", b'"', b"9" * 400, b"\xc0\x80")
            )
    return bytes(changed)


# ---- bytes for the HTTP port

_METHODS = (
    b"POST",
    b"GET",
    b"HEAD",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"CONNECT",
    b"PRI",
    b"post",
    b"",
    b"PO ST",
    b"\x00",
)
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.1 ", b"", b"http/1.1", b"HTTP/11")
_HEADERS = (
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1, 1",
    b"Content-Length:\t7", b"Content-Length: 0x10", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: chunked, chunked", b"transfer-encoding : chunked",
    b"Expect: 100-continue", b"Expect: x", b"Connection: close", b"Connection: keep-alive, Upgrade",
    b"Connection: Upgrade\r\nUpgrade: h2c", b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    b"Content-Encoding: gzip", b"Content-Encoding: identity", b"Inference-Header-Content-Length: 20",
    b"Inference-Header-Content-Length: -1", b"x-request-deadline-ms: 1", b"x-endcap-priority: batch",
    b"x-endcap-shadow: 1", b"x-endcap-compare: 1", b"x-request-id: " + b"i" * 500, b"authorization: Bearer x",
    b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"traceparent: ff-\xff",
    b"x: " + b"y" * 33_000, b"\r\n".join([b"a: b"] * 400), b": empty", b"no colon", b" folded", b"x\x00: y", b"x: \x01",
    b"\xff\xfe: \xff", b"Host: a\r\nHost: b",
)  # fmt: skip
_NOISE = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", http2.PREFACE, b"\r\n" * 50, b"\x00" * 300, b"GET /\r\n\r\n",
    b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n",
)  # fmt: skip


def _chunked(random: Random, body: bytes) -> bytes:
    out, place = b"", 0
    while place < len(body):
        size = random.randrange(1, 40)
        part = body[place : place + size]
        said = random.choice((b"%x", b"%x", b"%x", b"%X;ext=1", b"00%x", b"%x ", b"g%x", b"-%x")) % len(part)
        out += said + b"\r\n" + part + random.choice((b"\r\n",) * 9 + (b"\n", b""))
        place += size
    trailers = random.choice((b"",) * 4 + (b"a: b\r\n", b"a: b\r\n" * 7000, b"Content-Length: 5\r\n"))
    return out + random.choice((b"0\r\n",) * 4 + (b"", b"ffffffffffffffffff\r\n")) + trailers + b"\r\n"


def http_bytes(random: Random, path: str, body: bytes) -> list[bytes]:
    """Bytes for one connection, in the parts in which they are sent; ``body`` is a good one for ``path``."""
    if random.random() < 0.06:
        return [random.choice((*_NOISE, random.randbytes(random.randrange(1, 400))))]
    where = path.encode()
    if random.random() < 0.3:
        where = random.choice((
            changed_bytes(random, where), b"/" + b"a" * random.choice((100, 40_000)), b"http://[::1" + where, b"*",
            where + b"?" + b"q=" * 3000, where + b"/%ff%00", b"//" + where, where.replace(b"/", b"/../"),
        ))  # fmt: skip
    method, version = b"POST", b"HTTP/1.1"
    if random.random() < 0.15:
        method = random.choice(_METHODS)
    if random.random() < 0.1:
        version = random.choice(_VERSIONS)
    if random.random() < 0.4:
        body = changed_bytes(random, body)
    if random.random() < 0.05:
        body = gzip.compress(bytes(random.choice((10, 1_000_000))))
    lines = [method + b" " + where + b" " + version, b"Host: x"]
    if random.random() < 0.25:
        lines.append(b"Transfer-Encoding: chunked")
        sent = _chunked(random, body)
    else:
        said = len(body) + (random.choice((-3, -1, 1, 7, 300_000)) if random.random() < 0.2 else 0)
        lines.append(b"Content-Length: %d" % said)
        sent = body
    for _ in range(random.choice((0, 0, 1, 2))):
        lines.insert(random.randrange(1, len(lines) + 1), random.choice(_HEADERS))
    end = b"\n" if random.random() < 0.05 else b"\r\n"
    whole = end.join([*lines, b"", b""]) + sent
    if random.random() < 0.1:
        whole = changed_bytes(random, whole)
    if random.random() < 0.1:
        whole *= random.choice((2, 3, 100))
    if random.random() < 0.05:
        whole += random.choice(_NOISE)
    return _parts(random, whole)


def _parts(random: Random, whole: bytes) -> list[bytes]:
    if random.random() < 0.1:
        whole = whole[: random.randrange(len(whole) + 1)]
    cuts = sorted(random.randrange(len(whole) + 1) for _ in range(random.choice((0, 0, 1, 3))))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


# ---- frames for the gRPC port

_FIELDS = (
    (b"te", b"trailers"), (b"te", b"gzip"), (b"connection", b"close"), (b"Upper", b"x"), (b"grpc-timeout", b"1m"),
    (b"grpc-timeout", b"99999999999S"), (b"grpc-encoding", b"gzip"), (b"content-length", b"7"), (b":path", b"/x"),
    (b":late", b"x"), (b"x", b"y" * 9000), (b"", b""), (b"x", b"\xff\x00"), (b"grpc-accept-encoding", b"identity"),
)  # fmt: skip


def _block(random: Random, path: str) -> bytes:
    fields: list[tuple[bytes, bytes]] = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b"content-type", b"application/grpc"),
    ]  # fmt: skip
    if random.random() < 0.2:
        del fields[random.randrange(4)]
    for _ in range(random.choice((0, 0, 1, 2))):
        fields.insert(random.randrange(len(fields) + 1), random.choice(_FIELDS))
    block = b"".join(literal(*one) for one in fields)
    way = random.random()
    if way < 0.1:
        return changed_bytes(random, block)
    if way < 0.15:
        return random.choice(
            (b"\x20" * 5000, b"\x82" * 500, b"\xff" * 50, b"\x40\x01a\x7f\xa1\x1e" + b"x" * 4000 + b"\xbe" * 99)
        )
    return block


def grpc_frames(random: Random, path: str, message: bytes) -> list[bytes]:
    """Bytes for one connection, in the parts in which they are sent; ``message`` is a good one for ``path``."""
    if random.random() < 0.05:
        return [random.choice((*_NOISE, random.randbytes(random.randrange(1, 400))))]
    stream = 1
    frames = [frame(http2.SETTINGS, 0, 0, _settings(random))]
    for _ in range(random.randrange(1, 8)):
        number = random.choice((stream, stream, stream, 0, 2, stream - 2 if stream > 2 else 1, 2**31 - 1))
        frames += random.choice(_FRAMES)(random, number if random.random() < 0.3 else stream, path, message)
        stream += 2
    preface = http2.PREFACE if random.random() < 0.97 else changed_bytes(random, http2.PREFACE)
    whole = preface + b"".join(frames)
    return _parts(random, changed_bytes(random, whole) if random.random() < 0.2 else whole)


def _settings(random: Random) -> bytes:
    sizes = (0, 1, 100, 65_535, 2**31 - 1, 2**31, 2**32 - 1)
    pairs = [(random.randrange(9), random.choice(sizes)) for _ in range(random.choice((0, 0, 1, 3, 200)))]
    return b"".join(struct.pack(">HL", *pair) for pair in pairs)


def _call(random: Random, stream: int, path: str, message: bytes) -> list[bytes]:
    if random.random() < 0.5:
        message = changed_bytes(random, message)
    size = len(message) + (random.choice((-1, 1, 2**31)) if random.random() < 0.1 else 0)
    body = bytes([random.random() < 0.05]) + (size % 2**32).to_bytes(4, "big") + message
    ended = http2.END_STREAM if random.random() < 0.9 else 0
    step = random.choice((http2.FRAME_BYTES, 7, 1)) if len(body) < 500 else http2.FRAME_BYTES
    cuts = [body[at : at + step] for at in range(0, len(body), step)]
    block, data = _block(random, path), []
    for number, cut in enumerate(cuts, 1):
        flags = ended if number == len(cuts) else 0
        if random.random() < 0.1:
            pad = random.randrange(256)
            cut, flags = bytes([pad]) + cut + bytes(random.choice((pad, 0))), flags | http2.PADDED
        data.append(frame(http2.DATA, flags, stream, cut))
    at = random.randrange(len(block) + 1)
    if random.random() < 0.2:
        begin = [frame(http2.HEADERS, 0, stream, block[:at]),
                 *[frame(http2.CONTINUATION, 0, stream, b"")] * random.choice((0, 3, 500)),
                 frame(http2.CONTINUATION, http2.END_HEADERS, stream, block[at:])]  # fmt: skip
    else:
        begin = [frame(http2.HEADERS, http2.END_HEADERS, stream, block[: http2.FRAME_BYTES])]
    after = [frame(http2.RST_STREAM, 0, stream, bytes(4))] if random.random() < 0.1 else []
    return [*begin, *data, *after]


def _any(random: Random, stream: int, path: str, message: bytes) -> list[bytes]:
    size = random.choice((0, 1, 4, 5, 8, 60))
    one = frame(random.randrange(12), random.randrange(256), stream, random.randbytes(size))
    return [one] * random.choice((1, 1, 3, 300))


def _flood(random: Random, stream: int, path: str, message: bytes) -> list[bytes]:
    one = random.choice((
        frame(http2.PING, 0, 0, bytes(8)), frame(http2.SETTINGS, 0, 0, b""),
        frame(http2.WINDOW_UPDATE, 0, 0, struct.pack(">L", random.choice((0, 1, 2**31 - 1)))),
        frame(http2.WINDOW_UPDATE, 0, stream, struct.pack(">L", 1)), frame(http2.DATA, 0, stream, b""),
        frame(http2.PRIORITY, 0, stream, bytes(5)), frame(http2.RST_STREAM, 0, stream, bytes(4)),
    ))  # fmt: skip
    return [one] * random.choice((10, 1000, 12_000))


def _streams(random: Random, stream: int, path: str, message: bytes) -> list[bytes]:
    block = b"".join(literal(*one) for one in ((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()),
                                               (b"content-type", b"application/grpc")))  # fmt: skip
    body = b"\0" + len(message).to_bytes(4, "big") + message
    taken_back = random.random() < 0.5
    found = []
    for number in range(stream, stream + 2 * random.choice((5, 300, 1200)), 2):
        found.append(frame(http2.HEADERS, http2.END_HEADERS, number, block))
        if taken_back:
            found += [frame(http2.DATA, http2.END_STREAM, number, body), frame(http2.RST_STREAM, 0, number, bytes(4))]
    return found


_FRAMES: Sequence[Callable[[Random, int, str, bytes], list[bytes]]] = (
    *(_call,) * 30, *(_any,) * 15, *(_flood,) * 2, _streams,
)  # fmt: skip
