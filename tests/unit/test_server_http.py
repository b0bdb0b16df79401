"""The protocol's own limits, driven byte by byte over a transport that only remembers."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.server.http import MAX_HEAD_BYTES, SheddingProtocol
from tests.http1_peer import POST, App, Transport, run, settled


class Impatient(SheddingProtocol):
    slow_s = 0.01


@given(cuts=st.lists(st.integers(1, len(POST) - 1), max_size=6))
def test_a_request_is_answered_in_whatever_pieces_it_comes(cuts: list[int]) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        for number in (1, 2):
            edges = [0, *sorted(set(cuts)), len(POST)]
            for start, end in pairwise(edges):
                protocol.data_received(POST[start:end])
            await settled(transport, number)

    transport = run(work)
    assert transport.written.count(b"HTTP/1.1 200 OK") == 2
    assert not transport.closed


@given(cuts=st.lists(st.integers(1, len(POST) - 1), max_size=6))
def test_when_crowded_it_is_refused_in_whatever_pieces_and_the_next_is_read(cuts: list[int]) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.crowded = True
        edges = [0, *sorted(set(cuts)), len(POST)]
        for _ in range(2):
            for start, end in pairwise(edges):
                protocol.data_received(POST[start:end])
        protocol.data_received(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        await settled(transport, 3)

    transport = run(work)
    assert transport.written.count(b"HTTP/1.1 503 Service Unavailable\r\n") == 2
    assert transport.written.count(b"HTTP/1.1 200 OK") == 1
    assert not transport.closed


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 1000,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 1000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200,
        b"GET / HTTP/1.1\r\n" + b"x" * 1000,
    ],
)
def test_a_head_without_end_is_cut_off(head: bytes) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(head)
        tail = b"x: y\r\n" * 200 if head.endswith(b"\n") else head[-1:] * 1000
        sent = len(head)
        while not transport.closed:
            assert sent < 2 * MAX_HEAD_BYTES + 4096
            protocol.data_received(tail)
            sent += len(tail)

    assert run(work).written.startswith(b"HTTP/1.1 431 ")


def test_a_large_head_in_one_piece_is_refused_and_a_large_body_is_not_taken_for_one() -> None:
    async def large_head(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(b"GET / HTTP/1.1\r\nx: " + b"y" * MAX_HEAD_BYTES + b"\r\n\r\n")

    transport = run(large_head)
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    assert transport.closed

    async def large_body(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        size = 3 * MAX_HEAD_BYTES
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size + b"}" * size)
        await settled(transport)

    assert run(large_body).written.startswith(b"HTTP/1.1 200 OK")


def test_a_large_body_before_the_begin_of_another_request_is_not_a_large_head() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        size = 3 * MAX_HEAD_BYTES
        protocol.data_received(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % size + b"}" * size + POST[:9])
        protocol.data_received(POST[9:])
        await settled(transport, 2)

    assert run(work).written.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("part", [b"POST / HT", POST[:-1]])
def test_a_slow_sender_is_told_and_let_go(part: bytes) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(part)
        async with asyncio.timeout(30):
            while not transport.closed:
                await asyncio.sleep(0.001)

    written = run(work, Impatient).written
    assert written.startswith(b"HTTP/1.1 408 ")
    assert orjson.loads(written.partition(b"\r\n\r\n")[2])["error"]


def test_a_slow_answer_is_not_a_slow_sender() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.gate.clear()
        protocol.data_received(POST)
        await asyncio.sleep(3 * Impatient.slow_s)
        app.gate.set()
        await settled(transport)

    assert run(work, Impatient).written.startswith(b"HTTP/1.1 200 OK")


def test_who_has_closed_their_half_still_gets_the_answer() -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        app.gate.clear()
        protocol.data_received(POST)
        assert protocol.eof_received() is True
        app.gate.set()
        await settled(transport)
        assert transport.closed

    assert run(work).written.startswith(b"HTTP/1.1 200 OK")

    async def half_a_request(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(POST[:-1])
        assert not protocol.eof_received()

    run(half_a_request)


@given(st.binary(max_size=300))
def test_no_bytes_break_it(data: bytes) -> None:
    async def work(app: App, protocol: SheddingProtocol, transport: Transport) -> None:
        protocol.data_received(data)
        await asyncio.sleep(0)

    run(work)
