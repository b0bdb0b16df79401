"""HTTP clients that mean no good, or that know too little: what each can cost is bounded, and told where it can be."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from serving.asgi import MAX_BODY_BYTES
from serving.server.bounds import Held
from serving.server.http import (
    MAX_CHUNKED_BYTES,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    MAX_SKIPPED_BYTES,
    SLOW_S,
    SheddingProtocol,
)
from tests.http1_peer import POST, App, Transport, connected, run, settled

CHUNKED = b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
UPGRADE = (
    b"POST /x HTTP/1.1\r\nhost: x\r\nconnection: Upgrade, keep-alive, HTTP2-Settings\r\nupgrade: h2c\r\n"
    b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\ncontent-length: 2\r\n\r\n{}"
)


class Small(SheddingProtocol):
    """Room for 100,000 bytes that are held, and for two connections."""

    held = Held(100_000)
    most_connections = 2


def said(written: bytes) -> str:
    found: str = orjson.loads(written.rpartition(b"\r\n\r\n")[2])["error"]
    return found


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("part", [b"a:b\r\n" * 2000, b"x" * 60_000])
def test_trailers_without_end_are_cut_off(part: bytes, answered: bool) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(CHUNKED + (b"%x\r\n" % (MAX_BODY_BYTES + 1) if answered else b"0\r\na:"))
        if answered:  # refused as too large, and read on
            protocol.data_received(b"x" * (MAX_BODY_BYTES + 1))
            await settled(transport)
            protocol.data_received(b"\r\n0\r\na:")
        sent = 0
        while not transport.closed:
            assert sent <= MAX_CHUNKED_BYTES
            protocol.data_received(part)
            sent += len(part)

    last = run(work).written.rpartition(b"HTTP/1.1 ")[2]
    assert last[:3] in (b"431", b"413")


def test_a_large_body_that_is_refused_is_skipped_and_one_without_end_is_not() -> None:
    async def large(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: 10000000\r\n\r\n")
        for _ in range(100):
            protocol.data_received(b" " * 100_000)
            await asyncio.sleep(0)
        protocol.data_received(POST)
        await settled(transport, 2)

    written = run(large).written
    assert written.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in written

    async def endless(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: 100000000000\r\n\r\n")
        sent = 0
        while not transport.closed:
            assert sent <= MAX_SKIPPED_BYTES
            protocol.data_received(b" " * 100_000)
            await asyncio.sleep(0)
            sent += 100_000

    run(endless)


def test_of_requests_sent_ahead_so_many_are_answered_and_then_the_connection_is_closed() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.gate.clear()
        protocol.data_received(GET * 1000)
        protocol.data_received(GET * 1000)
        app.gate.set()
        await settled(transport, 1 + MAX_PIPELINED)
        assert transport.closed

    written = run(work).written
    assert written.count(b"HTTP/1.1 200 OK") == written.count(b"HTTP/1.1") == 1 + MAX_PIPELINED
    assert written.count(b"connection: close") == 1


@pytest.mark.parametrize("ahead", [3, 1000])
def test_who_goes_away_before_what_was_sent_ahead_is_answered_is_not_written_to(
    ahead: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.gate.clear()
        protocol.data_received(GET * ahead)
        await asyncio.sleep(0)
        transport.closed = True
        protocol.connection_lost(None)
        app.gate.set()
        async with asyncio.timeout(30):
            while protocol.tasks:
                await asyncio.sleep(0.001)

    assert run(work).written == b""
    assert caplog.records == []


@pytest.mark.parametrize(
    "after", [b"\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n"]
)
def test_what_comes_after_a_whole_request_does_not_take_its_answer(after: bytes) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.gate.clear()
        protocol.data_received(POST + after)
        protocol.data_received(b"more")
        app.gate.set()
        await settled(transport)
        assert transport.closed

    written = run(work).written
    assert written.startswith(b"HTTP/1.1 200 OK")
    assert written.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00", CHUNKED + b"zz\r\n", CHUNKED + b"1\r\nab"])
def test_what_is_no_http_is_told_so(sent: bytes) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(sent)
        assert transport.closed

    written = run(work).written
    assert written.startswith(b"HTTP/1.1 400 ")
    assert said(written).startswith("request: ")


@given(cuts=st.lists(st.integers(1, len(UPGRADE) - 1), max_size=4))
def test_a_request_that_would_rather_speak_another_protocol_is_answered_in_this_one(cuts: list[int]) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        for number in (1, 4):
            for start, end in pairwise([0, *sorted(set(cuts)), len(UPGRADE)]):
                protocol.data_received(UPGRADE[start:end])
            await settled(transport, number)
            protocol.data_received(UPGRADE + POST)
            await settled(transport, number + 2)

    transport = run(work)
    assert transport.written.count(b"HTTP/1.1 200 OK") == 6
    assert transport.written.count(b"\r\n\r\n{}") == 6
    assert not transport.closed


def test_connect_is_refused() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(b"CONNECT a:1 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert transport.closed

    written = run(work).written
    assert written.startswith(b"HTTP/1.1 405 ")
    assert said(written).startswith("method: ")


def test_who_closes_their_half_before_the_request_is_whole_is_told() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(POST[:-1])
        protocol.eof_received()
        assert transport.closed

    written = run(work).written
    assert written.startswith(b"HTTP/1.1 400 ")
    assert "closed" in said(written)


def test_of_requests_that_are_not_whole_the_oldest_makes_way() -> None:
    async def work(app: App, first: SheddingProtocol, transport: Transport) -> None:
        state = ServerState()
        others = [(connected(app, one, Small, state), one) for one in (Transport(), Transport())]
        first.data_received(b"POST / HTTP/1.1\r\ncontent-length: 200000\r\n\r\n" + b"x" * 60_000)
        (second, second_transport), (third, _) = others
        second.data_received(POST)
        await settled(second_transport)
        second.data_received(b"POST / HTTP/1.1\r\ncontent-length: 60000\r\n\r\n" + b"x" * 59_999)
        assert transport.closed
        assert not second_transport.closed
        second.data_received(b"}")
        await settled(second_transport, 2)
        assert Small.held.bytes == 0
        third.data_received(CHUNKED[:-2])
        assert Small.held.bytes == len(CHUNKED) - 2
        third.connection_lost(None)
        second.connection_lost(None)
        assert Small.held.bytes == 0

    written = run(work, Small).written
    assert written.startswith(b"HTTP/1.1 408 ")
    assert said(written).startswith("body: ")


def test_an_answer_that_is_not_read_ends_the_connection() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(POST)
        await settled(transport)
        protocol.sweep(9.0)
        transport.unread = 50_000
        protocol.sweep(10.0)
        protocol.sweep(10.0 + SLOW_S)
        assert Small.held.bytes == 50_000
        transport.unread = 0
        protocol.sweep(20.0 + SLOW_S)
        assert Small.held.bytes == 0
        transport.unread = 1
        for at_s in (50.0, 90.0, 140.0):  # busy: each time another request was answered meanwhile
            protocol.data_received(POST)
            await asyncio.sleep(0.01)
            protocol.sweep(at_s)
        protocol.sweep(141.0)
        protocol.sweep(141.0 + SLOW_S)
        assert not transport.closed
        protocol.sweep(142.0 + SLOW_S)
        assert transport.aborted

    run(work, Small)
    assert Small.held.bytes == 0


def test_beyond_the_limit_of_connections_a_silent_one_makes_way_and_no_busy_one() -> None:
    async def work(app: App, unused: SheddingProtocol, _: Transport) -> None:
        state = ServerState()
        transports = [Transport() for _ in range(4)]
        busy = connected(app, transports[0], Small, state)
        silent = connected(app, transports[1], Small, state)
        app.gate.clear()
        busy.data_received(POST)
        connected(app, transports[2], Small, state).connection_lost(None)
        assert [one.closed for one in transports] == [False, False, True, False]
        assert transports[2].written.startswith(b"HTTP/1.1 503 ")
        for _ in range(2):
            for one in (busy, silent):
                one.sweep(1.0)
        connected(app, transports[3], Small, state)
        assert [one.closed for one in transports] == [False, True, True, False]
        app.gate.set()
        await settled(transports[0])

    run(work, Small)
