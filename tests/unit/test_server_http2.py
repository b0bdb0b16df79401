"""HTTP/2 for gRPC, frame by frame, with a transport that only remembers; grpcio's own clients are elsewhere."""

from __future__ import annotations

import asyncio
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.server import http2
from serving.server.http2 import Refused, Request, frame
from tests.http2_peer import BOTH, FIELDS, SETTINGS, Peer, answered, on_loop, window


@on_loop
async def test_a_call_is_answered_with_its_status_in_trailers() -> None:
    peer = Peer().begin()
    peer.call(1, b"hello", ("grpc-timeout", "5S"), ("x-a", "b"))
    await answered()
    head, body, tail = peer.frames()
    assert head[3] == {":status": "200", "content-type": "application/grpc"}
    assert body == (http2.DATA, 0, 1, b"\0\0\0\0\x05hello")
    assert (tail[1], tail[3]) == (BOTH, {"grpc-status": "0"})
    (request,) = peer.requests
    assert (request.path, dict(request.headers)[b"x-a"]) == ("/s/M", b"b")
    assert 3 < request.until_s - time.monotonic() <= 5


@on_loop
async def test_headers_that_only_point_into_the_table_are_read_as_it_is_now() -> None:
    peer = Peer().begin()
    for number, value in enumerate(["a", "a", "a", "b", "b", "a", "b"]):
        peer.call(2 * number + 1, b"", ("x-who", value), ("x-step", str(number // 4)))
        await answered()
    assert [dict(request.headers)[b"x-who"] for request in peer.requests] == [b"a", b"a", b"a", b"b", b"b", b"a", b"b"]
    assert [dict(request.headers)[b"x-step"] for request in peer.requests] == [b"0"] * 4 + [b"1"] * 3


@on_loop
async def test_it_comes_byte_by_byte_padded_and_continued() -> None:
    peer = Peer()
    block = peer.block()
    sent = b"".join([
        http2.PREFACE, SETTINGS,
        frame(http2.HEADERS, http2.PADDED | http2.PRIORITIZED, 1, b"\x02" + bytes(4) + b"\x10" + block[:3] + b"pp"),
        frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[3:]),
        frame(99, 255, 7, b"unknown kinds are left alone"),
        frame(http2.DATA, http2.PADDED | http2.END_STREAM, 1, b"\x01" + b"\0\0\0\0\x01x" + b"p"),
    ])  # fmt: skip
    for byte in sent:
        peer.send(bytes([byte]))
    await answered()
    assert peer.frames()[-2] == (http2.DATA, 0, 1, b"\0\0\0\0\x01x")


@on_loop
async def test_a_large_answer_waits_for_the_windows() -> None:
    peer = Peer().begin()
    peer.send(frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, 10)))
    peer.call(1, b"x" * 80_000)
    await answered()

    def sizes() -> list[int]:
        return [len(found[3]) for found in peer.frames() if found[0] == http2.DATA]

    assert sizes() == [10]
    peer.send(frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, 20)))
    assert sizes() == [10]
    peer.send(window(20_000, 1))
    assert sizes() == [http2.FRAME_BYTES, 20_000 - http2.FRAME_BYTES]
    peer.send(window(100_000, 1))
    assert sum(sizes()) == http2.FIRST_WINDOW - 20_020
    peer.send(window(100_000))
    *data, tail = peer.frames()
    assert sum(len(found[3]) for found in data) == 80_005 - http2.FIRST_WINDOW
    assert tail[3] == {"grpc-status": "0"}


@on_loop
async def test_what_is_received_is_given_back_to_the_window() -> None:
    peer = Peer().begin()
    for stream in range(1, 21, 2):
        peer.call(stream, b"x" * 50_000)
        await answered()
        peer.send(window(60_000))
    given = [found[3] for found in peer.frames() if found[0] == http2.WINDOW_UPDATE and found[2] == 0]
    assert sum(int.from_bytes(one, "big") for one in given) > 400_000


@on_loop
async def test_refusals_are_statuses_and_the_connection_lives_on() -> None:
    async def refuse(request: Request) -> bytes:
        if request.message == b"fault":
            raise ValueError
        if request.message == b"good":
            return b""
        raise Refused(5, "nö %", (("a", "b"),))

    peer = Peer(refuse, message_bytes=10).begin()
    asked: list[tuple[bytes, str]] = [(b"", "5"), (b"fault", "13"), (b"x" * 11, "8"), (b"good", "0")]
    for number, (message, status) in enumerate(asked):
        peer.call(2 * number + 1, message)
        await answered()
        found = [one[3] for one in peer.frames() if one[0] == http2.HEADERS]
        assert found[-1]["grpc-status"] == status, found
        if status == "5":
            assert (found[-1]["grpc-message"], found[-1]["a"]) == ("n%C3%B6 %25", "b")
    for number, body in enumerate([b"", b"\0\0\0", b"\0\0\0\0\x02x", b"\0\0\0\0\1xx", b"\1\0\0\0\1x"], 10):
        peer.send(
            frame(http2.HEADERS, http2.END_HEADERS, 2 * number + 1, peer.block()),
            frame(http2.DATA, http2.END_STREAM, 2 * number + 1, body),
        )
        assert peer.frames()[-1][3]["grpc-status"] == ("12" if body[:1] == b"\1" else "3")
    peer.send(frame(http2.HEADERS, BOTH, 99, peer.block(fields=[*FIELDS[:3], ("content-type", "text/html")])))
    assert peer.frames()[-1][3] == {":status": "415"}
    assert not peer.transport.closed


@on_loop
async def test_a_call_that_is_reset_is_ended() -> None:
    ended: list[bool] = []

    async def slow(_: Request) -> bytes:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.append(True)
            raise
        return b""

    peer = Peer(slow).begin()
    peer.call(1, b"")
    peer.call(3, b"")
    await answered()
    peer.send(frame(http2.RST_STREAM, 0, 1, bytes(4)))
    await answered()
    assert ended == [True]
    peer.connection.connection_lost(None)
    await answered()
    assert (ended, peer.open) == ([True] * 2, set())


@on_loop
async def test_it_drains() -> None:
    go = asyncio.Event()

    async def slow(_: Request) -> bytes:
        await go.wait()
        return b"done"

    peer = Peer(slow).begin()
    peer.call(1, b"")
    await answered()
    peer.connection.drain()
    assert peer.frames()[-1][0] == http2.GOAWAY
    peer.call(3, b"")
    go.set()
    await answered()
    assert [found[2] for found in peer.frames()] == [1, 1, 1]
    peer.call(5, b"too late, and read all the same")
    async with asyncio.timeout(20):
        while not peer.transport.closed:
            await asyncio.sleep(0.01)
    assert peer.frames() == []


@on_loop
async def test_streams_beyond_the_limit_and_requests_that_never_end_are_refused() -> None:
    peer = Peer(streams=2).begin()
    for stream in (1, 3, 5):
        peer.send(frame(http2.HEADERS, http2.END_HEADERS, stream, peer.block()))
    assert peer.frames() == [(http2.RST_STREAM, 0, 5, struct.pack(">L", http2.REFUSED_STREAM))]
    peer.connection.sweep(time.monotonic() + 1)
    ended = [found for found in peer.frames() if found[0] == http2.HEADERS]
    assert [(found[2], found[3]["grpc-status"]) for found in ended] == [(1, "4"), (3, "4")]
    assert "took too long" in ended[0][3]["grpc-message"]
    peer.call(7, b"x")
    await answered()
    assert peer.frames()[-1][3] == {"grpc-status": "0"}


@on_loop
async def test_connections_beyond_the_limit_are_closed() -> None:
    peer = Peer(connections=0)
    assert peer.transport.closed
    peer.send(OPEN)
    peer.connection.connection_lost(None)
    assert (bytes(peer.transport.sent), peer.open) == (b"", set())


@on_loop
async def test_a_peer_that_does_not_read_is_not_read() -> None:
    peer = Peer().begin()
    peer.connection.pause_writing()
    assert peer.transport.paused
    peer.connection.resume_writing()
    assert not peer.transport.paused


PING = frame(http2.PING, 0, 0, bytes(8))
OPEN = http2.PREFACE + SETTINGS
FAULTS: list[tuple[list[bytes], int]] = [
    ([b"GET / HTTP/1.1\r\n\r\n"], http2.PROTOCOL_ERROR),
    ([http2.PREFACE + PING], http2.PROTOCOL_ERROR),
    ([OPEN, b"\xff\xff\xff" + PING[3:]], http2.FRAME_SIZE_ERROR),
    ([OPEN, *[PING] * 200], http2.ENHANCE_YOUR_CALM),
    ([OPEN, frame(http2.PING, 0, 0, b"1")], http2.FRAME_SIZE_ERROR),
    ([OPEN, frame(http2.DATA, 0, 1, b"")], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.HEADERS, BOTH, 1, b"\xff\xff\xff\xff\xff\xff")], http2.COMPRESSION_ERROR),
    ([OPEN, frame(http2.HEADERS, BOTH, 2, b"")], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.HEADERS, 0, 1, b""), PING], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.HEADERS, 0, 1, b""), *[frame(http2.CONTINUATION, 0, 1, bytes(9000))] * 2],
     http2.ENHANCE_YOUR_CALM),
    ([OPEN, frame(http2.CONTINUATION, 0, 1, b"")], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.HEADERS, BOTH | http2.PADDED, 1, b"\x09")], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.RST_STREAM, 0, 1, bytes(4))], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.PUSH_PROMISE, 0, 1, bytes(4))], http2.PROTOCOL_ERROR),
    ([OPEN, frame(http2.SETTINGS, 0, 0, b"12345")], http2.FRAME_SIZE_ERROR),
    ([OPEN, frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, 1 << 31))], http2.FLOW_CONTROL_ERROR),
    ([OPEN, window(0)], http2.PROTOCOL_ERROR),
    ([OPEN, window((1 << 31) - 1)], http2.FLOW_CONTROL_ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "reason"), FAULTS)
def test_a_peer_that_breaks_the_protocol_is_told_and_closed(sent: list[bytes], reason: int) -> None:
    async def run() -> None:
        peer = Peer(idle_frames=100)
        peer.send(*sent)
        assert peer.fault() == reason

    asyncio.run(run())


KINDS = st.integers(0, 11)
FRAMES = st.builds(
    frame, KINDS, st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 5, 2**31 - 1]), st.binary(max_size=40)
)


@given(st.lists(st.one_of(FRAMES, FRAMES, st.binary(max_size=20)), max_size=12), st.integers(1, 60))
@settings(max_examples=200)
def test_any_frames_in_any_parts_are_taken_or_end_the_connection(frames: list[bytes], part: int) -> None:
    async def run() -> None:
        peer = Peer().begin()
        peer.call(1, b"x")
        sent = b"".join(frames)
        peer.send(*(sent[start : start + part] for start in range(0, len(sent), part)))
        await answered()
        peer.frames()  # what it says is well formed

    asyncio.run(run())
