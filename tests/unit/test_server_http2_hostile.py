"""HTTP/2 peers that mean no good: what each can cost is bounded, and an honest one beside them sees nothing of it."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Iterator

import pytest

from serving.server import http2
from serving.server.bounds import Allowance, Held, connections
from serving.server.http2 import Request, frame
from tests.http2_peer import BOTH, SETTINGS, Peer, answered, on_loop, window

LATER_S = 3600.0
CANCEL = struct.pack(">L", http2.CANCEL)
PING = frame(http2.PING, 0, 0, bytes(8))


def reset(stream: int) -> bytes:
    return frame(http2.RST_STREAM, 0, stream, CANCEL)


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(http2.SETTINGS, 0, 0, b"".join(struct.pack(">HL", *pair) for pair in pairs))


def numbers() -> Iterator[int]:
    return iter(range(1, 1_000_000, 2))


async def never(_: Request) -> bytes:
    await asyncio.sleep(3600)
    return b""


async def short(_: Request) -> bytes:
    return b""


def goaways(peer: Peer) -> list[int]:
    return [int.from_bytes(found[3][4:8], "big") for found in peer.frames() if found[0] == http2.GOAWAY]


# ---- requests that are begun and taken back (CVE-2023-44487, CVE-2025-8671)


@on_loop
async def test_rapid_resets_end_the_connection_once_what_was_asked_is_answered() -> None:
    go = asyncio.Event()
    begun: list[bytes] = []

    async def slow(request: Request) -> bytes:
        begun.append(request.message)
        await go.wait()
        return b"done"

    peer = Peer(slow, resets=20, resets_per_s=0.0).begin()
    stream = numbers()
    peer.call(honest := next(stream), b"honest")
    for _ in range(20):
        peer.call(one := next(stream), b"x")
        peer.send(reset(one))
    await answered()
    assert goaways(peer) == []
    peer.call(one := next(stream), b"x")
    peer.send(reset(one))
    assert goaways(peer) == [http2.ENHANCE_YOUR_CALM]
    peer.call(next(stream), b"after")
    go.set()
    await answered()
    assert [found[2] for found in peer.frames()] == [honest] * 3
    assert b"after" not in begun
    async with asyncio.timeout(20):
        while not peer.transport.closed:
            await asyncio.sleep(0.01)


@on_loop
async def test_a_server_made_to_reset_does_not_do_so_for_ever() -> None:
    peer = Peer(never, resets=20, resets_per_s=0.0).begin()
    for one in range(1, 43, 2):
        peer.call(one, b"x")
        peer.send(window(0, one))
    assert goaways(peer) == [http2.ENHANCE_YOUR_CALM]


@on_loop
async def test_calls_given_up_now_and_then_are_no_attack() -> None:
    peer = Peer(resets=20, resets_per_s=1e6).begin()
    for number in range(2000):
        one = 2 * number + 1
        peer.call(one, b"x")
        if number % 2:
            peer.send(reset(one))
        await asyncio.sleep(0)
    await answered()
    assert goaways(peer) == []
    assert len(peer.requests) >= 1000


# ---- frames that ask for nothing


FLOODS = {
    "pings": [PING],
    "settings": [SETTINGS],
    "priorities": [frame(http2.PRIORITY, 0, 99, bytes(5))],
    "unknown kinds": [frame(99, 0, 0, b"")],
    "windows byte by byte": [window(1), window(1, 1)],
    "resets of what is closed": [frame(http2.RST_STREAM, 0, 1, CANCEL)],
    "empty data": [frame(http2.DATA, 0, 1, b"")],
    "padded data": [frame(http2.DATA, http2.PADDED, 1, b"\x09" + bytes(9))],
    "data in bytes": [frame(http2.DATA, 0, 1, b"\0")],
}


@pytest.mark.parametrize("name", FLOODS)
@pytest.mark.parametrize("requests_between", [False, True])
def test_a_flood_ends_the_connection_whatever_is_asked_between(name: str, requests_between: bool) -> None:
    async def run() -> None:
        peer = Peer(idle_frames=1000).begin()
        peer.send(frame(http2.HEADERS, BOTH if name.startswith("resets") else http2.END_HEADERS, 1, peer.block()))
        later = iter(range(3, 1_000_000, 2))
        sent = 0
        while not peer.transport.closed:
            assert sent < 20_000
            for _ in range(200):
                peer.send(*FLOODS[name])
                sent += 1
            if requests_between and not peer.transport.closed:
                peer.call(next(later), b"")
                await answered()
        assert peer.fault() == http2.ENHANCE_YOUR_CALM

    asyncio.run(run())


@on_loop
async def test_continuations_without_end_end_the_connection() -> None:
    peer = Peer(idle_frames=100).begin()
    peer.send(frame(http2.HEADERS, 0, 1, b""), *[frame(http2.CONTINUATION, 0, 1, b"")] * 200)
    assert peer.fault() == http2.ENHANCE_YOUR_CALM


@on_loop
async def test_many_settings_in_one_frame_are_not_worked_through() -> None:
    peer = Peer().begin()
    peer.send(settings(*[(4, size) for size in range(2000)]))
    assert peer.fault() == http2.ENHANCE_YOUR_CALM


@on_loop
async def test_of_settings_given_twice_the_last_holds() -> None:
    peer = Peer().begin()
    peer.send(settings((4, 0), (4, 1 << 20), (4, 5)))
    peer.call(1, b"0123456789")
    await answered()
    assert [found[3] for found in peer.frames() if found[0] == http2.DATA] == [b"\0\0\0\0\x0a"]
    peer.send(window(http2.MOST_WINDOW, 1), settings((4, 6)))
    await answered()
    assert peer.transport.closed or peer.status() == "0"


@on_loop
async def test_a_window_that_settings_make_too_large_ends_the_connection() -> None:
    peer = Peer(never).begin()
    peer.call(1, b"")
    peer.send(window(http2.MOST_WINDOW - http2.FIRST_WINDOW, 1), settings((4, http2.FIRST_WINDOW + 1)))
    assert peer.fault() == http2.FLOW_CONTROL_ERROR


@on_loop
async def test_streams_beyond_the_limit_are_refused_and_a_flood_of_them_ends_the_connection() -> None:
    peer = Peer(never, streams=2, idle_frames=1000).begin()
    refused = 0
    for one in numbers():
        peer.send(frame(http2.HEADERS, http2.END_HEADERS, one, peer.block()))
        refused += 1
        if peer.transport.closed:
            break
    assert refused > 100
    assert peer.fault() == http2.ENHANCE_YOUR_CALM


@on_loop
async def test_who_reads_large_answers_in_small_windows_pays_nothing() -> None:
    peer = Peer(idle_frames=1000).begin()
    for one in range(1, 400, 2):
        peer.call(one, b"x" * 90_000)
        await answered()
        for _ in range(6):
            peer.send(window(16_384), window(16_384, one))
        await answered()
        assert peer.status() == "0"


# ---- HPACK


@on_loop
async def test_a_header_block_that_unfolds_to_much_ends_the_connection() -> None:
    peer = Peer(header_bytes=16_384).begin()
    long = b"\x40\x01a\x7f\xa1\x1e" + b"x" * 4000  # into the table; then pointed at again and again
    peer.send(frame(http2.HEADERS, BOTH, 1, peer.block() + long + b"\xbe" * 1000))
    assert peer.fault() == http2.COMPRESSION_ERROR


@pytest.mark.parametrize("updates", [b"\x20" * 16_000, b"\x3f\xe1\x1f\x20" * 3])
def test_a_tables_size_is_not_changed_again_and_again(updates: bytes) -> None:
    async def run() -> None:
        peer = Peer().begin()
        peer.send(frame(http2.HEADERS, BOTH, 1, updates))
        assert peer.fault() == http2.COMPRESSION_ERROR

    asyncio.run(run())


@on_loop
async def test_a_tables_size_may_be_changed_twice() -> None:
    peer = Peer().begin()
    peer.send(frame(http2.HEADERS, http2.END_HEADERS, 1, b"\x20\x3f\xe1\x1f" + peer.block()))
    peer.send(frame(http2.DATA, http2.END_STREAM, 1, bytes(5)))
    await answered()
    assert peer.status() == "0"


# ---- what is held


@on_loop
async def test_requests_that_are_never_whole_make_way_oldest_first() -> None:
    peer = Peer(held=100_000).begin()
    other = Peer(short, beside=peer).begin()
    for one in range(1, 9, 2):
        for who in (peer, other):
            who.send(frame(http2.HEADERS, http2.END_HEADERS, one, who.block()))
            who.send(frame(http2.DATA, 0, one, bytes(16_000)))
    assert peer.held.bytes == 96_000
    refused = [(found[2], found[3]["grpc-status"]) for found in peer.frames() if found[0] == http2.HEADERS]
    assert refused == [(1, "8")]
    assert [found[2] for found in other.frames() if found[0] == http2.HEADERS] == [1]
    other.call(99, b"x" * 90_000)
    await answered()
    assert other.status() == "0"
    peer.connection.connection_lost(None)
    other.connection.connection_lost(None)
    assert peer.held.bytes == 0


@on_loop
async def test_answers_that_no_window_is_given_for_make_way_and_are_given_up() -> None:
    peer = Peer(held=200_000).begin()
    peer.send(settings((4, 0)))
    for one in (1, 3, 5):
        peer.call(one, b"x" * 80_000)
        await answered()
    assert peer.held.bytes == 160_010
    calm = struct.pack(">L", http2.ENHANCE_YOUR_CALM)
    assert (http2.RST_STREAM, 0, 1, calm) in peer.frames()
    peer.connection.sweep(time.monotonic() - LATER_S)
    assert peer.held.bytes == 160_010
    peer.connection.sweep(time.monotonic() + LATER_S)
    assert [found for found in peer.frames() if found[0] == http2.RST_STREAM] == [
        (http2.RST_STREAM, 0, 3, CANCEL), (http2.RST_STREAM, 0, 5, CANCEL),
    ]  # fmt: skip
    assert peer.held.bytes == 0
    peer.send(settings((4, 100_000)))
    peer.call(7, b"x")
    await answered()
    assert peer.status() == "0"


@on_loop
async def test_who_does_not_read_is_sent_nothing_more_and_cut_off() -> None:
    peer = Peer().begin()
    peer.send(settings((4, 1 << 20)), window(1 << 20))
    peer.connection.pause_writing()
    peer.connection.data_received(b"")
    peer.call(1, b"x" * 50_000)
    peer.call(3, b"y")
    await answered()
    assert [found for found in peer.frames() if found[0] == http2.DATA] == []
    assert peer.held.bytes == 50_011
    peer.connection.resume_writing()
    assert sum(len(found[3]) for found in peer.frames() if found[0] == http2.DATA) == 50_011
    assert peer.held.bytes == 0
    peer.connection.pause_writing()
    peer.connection.sweep(time.monotonic() - LATER_S)
    assert not peer.transport.closed
    peer.connection.sweep(time.monotonic() + LATER_S)
    assert peer.transport.aborted


def test_a_connection_that_was_told_to_go_is_cut_when_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "CLOSE_S", 0.01)

    async def run() -> None:
        peer = Peer().begin()
        peer.send(frame(http2.PUSH_PROMISE, 0, 1, bytes(4)))
        async with asyncio.timeout(20):
            while not peer.transport.aborted:
                await asyncio.sleep(0.01)

    asyncio.run(run())


# ---- slow and silent peers


@on_loop
async def test_a_frame_or_header_block_must_come_whole_from_one_sweep_to_the_next() -> None:
    now_s = time.monotonic()
    for part in (PING[:5], frame(http2.HEADERS, 0, 1, b"")):
        peer = Peer().begin()
        for _ in range(3):
            peer.connection.sweep(now_s - LATER_S)  # idle so far
        peer.send(part)
        peer.connection.sweep(now_s - LATER_S)
        assert not peer.transport.closed
        if part != PING[:5]:
            peer.send(frame(http2.CONTINUATION, 0, 1, b""))
        peer.connection.sweep(now_s - LATER_S)
        assert peer.fault() == http2.ENHANCE_YOUR_CALM


@on_loop
async def test_a_silent_peer_is_asked_whether_it_is_there() -> None:
    early_s = time.monotonic() - LATER_S
    alive, dead = Peer().begin(), Peer().begin()
    for _ in range(100):
        for peer in (alive, dead):
            if not peer.transport.closed:
                peer.connection.sweep(early_s)
        if [found for found in alive.frames() if found[0] == http2.PING]:
            alive.send(frame(http2.PING, http2.ACK, 0, bytes(8)))
    assert dead.transport.aborted
    assert not alive.transport.closed


@on_loop
async def test_at_the_limit_of_connections_a_silent_one_makes_way() -> None:
    first = Peer(connections=2).begin()
    busy = Peer(never, beside=first, connections=2).begin()
    busy.call(1, b"")
    assert Peer(beside=first, connections=2).transport.closed
    for peer in (first, busy):
        for _ in range(2):
            peer.connection.sweep(time.monotonic() - LATER_S)
    third = Peer(beside=first, connections=2).begin()
    assert (first.transport.closed, busy.transport.closed, third.transport.closed) == (True, False, False)
    assert first.open == {busy.connection, third.connection}


@on_loop
async def test_who_has_closed_their_half_is_answered_and_closed() -> None:
    go = asyncio.Event()

    async def slow(_: Request) -> bytes:
        await go.wait()
        return b"done"

    peer = Peer(slow).begin()
    peer.call(1, b"x")
    peer.send(frame(http2.HEADERS, http2.END_HEADERS, 3, peer.block()))
    await answered()
    assert peer.connection.eof_received()
    go.set()
    await answered()
    assert peer.status() == "0"
    async with asyncio.timeout(20):
        while not peer.transport.closed:
            await asyncio.sleep(0.01)
    idle = Peer().begin()
    assert not idle.connection.eof_received()


@on_loop
async def test_who_has_closed_their_half_without_a_window_is_not_waited_for() -> None:
    peer = Peer().begin()
    peer.send(settings((4, 0)))
    peer.call(1, b"x")
    await answered()
    assert not peer.connection.eof_received()
    other = Peer().begin()
    other.send(settings((4, 0)))
    other.call(1, b"x")
    assert other.connection.eof_received()
    async with asyncio.timeout(20):
        while not other.transport.closed:
            await asyncio.sleep(0.01)
    assert (peer.held.bytes, other.held.bytes) == (0, 0)


# ---- the arithmetic


class Holder:
    def __init__(self) -> None:
        self.gone: list[int] = []

    def make_way(self, number: int) -> None:
        self.gone.append(number)


def test_the_oldest_holders_make_way_and_the_last_one_never() -> None:
    held, holder = Held(100), Holder()
    for number in range(5):
        held.set(holder, number, 30)
    assert (holder.gone, held.bytes) == ([0, 1], 90)
    held.set(holder, 2, 40)
    held.set(holder, 9, 1000)
    assert (holder.gone, held.bytes) == ([0, 1, 2, 3, 4], 1000)
    held.drop(holder, 9)
    held.drop(holder, 9)
    assert held.bytes == 0


def test_an_allowance_refills_with_time_up_to_its_burst() -> None:
    allowance = Allowance(2, 0.5)
    assert [allowance.spend(100.0) for _ in range(3)] == [True, True, False]
    assert allowance.spend(106.0)
    later = [allowance.spend(1000.0) for _ in range(3)]
    assert later == [True, True, False]


def test_a_port_leaves_files_for_others() -> None:
    assert 16 <= connections("grpc") <= 4096
