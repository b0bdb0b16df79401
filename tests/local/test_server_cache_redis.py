"""The cache on a real Redis, which is killed, stopped, filled and written to by others in the middle of load."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from serving.server.cache import AnswerCache, Codec
from serving.server.cache_redis import Breaker, RedisStore
from tests.process import wait_until

TEXT: Codec[str] = Codec(str.encode, bytes.decode)


@dataclass
class Server:
    """A Redis on a socket of its own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    options: list[str] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.folder / "redis.sock"

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "apt-get install redis-server"
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--appendonly", "no",
                 "--dir", str(self.folder), *self.options],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self.answers, "Redis answers")

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "redis.log").read_text()
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    @contextmanager
    def client(self) -> Iterator[Any]:
        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            yield client

    def tell(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number is signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.end()


class _Count:
    def __init__(self, of: Counter[str], name: str) -> None:
        self._of, self._name = of, name

    def inc(self) -> None:
        self._of[self._name] += 1


class Tally(dict[str, Any]):
    def __init__(self) -> None:
        self.of: Counter[str] = Counter()

    def __missing__(self, name: str) -> _Count:
        return _Count(self.of, name)


class World:
    """One server's cache on that Redis. A quick breaker: probes come every few milliseconds."""

    def __init__(
        self, server: Server, *, ttl_s: float = 60.0, timeout_s: float = 0.25, url: str = "", **login: str
    ) -> None:
        self.tally, self.troubles, self.made = Tally(), Tally(), 0
        # Longer than in service, where 5 ms are right: what is counted here must not depend on a busy machine.
        self.store = RedisStore(
            url or f"unix://{server.socket}", timeout_s=timeout_s, counts=self.tally, troubles=self.troubles,
            breaker=Breaker(first_wait_s=0.005, longest_wait_s=0.02), **login,
        )  # fmt: skip
        self.cache = AnswerCache(self.store, ttl_s=ttl_s, counts=self.tally, troubles=self.troubles)

    async def make(self) -> str:
        self.made += 1
        return "made"

    async def ask(self, number: int) -> str:
        return await self.cache.answer(number.to_bytes(32, "big"), self.make, TEXT)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Ask for something now and then, as shoppers do, until ``condition`` holds."""
        async with asyncio.timeout(30.0):
            while not condition():
                assert await self.ask(1 << 200) == "made"
                await asyncio.sleep(0.002)

    async def connected(self) -> None:
        await self.until(lambda: self.store.breaker.closed)


def run(world: World, work: Callable[[], Any]) -> None:
    async def whole() -> None:
        try:
            await work()
        finally:
            await world.cache.close()

    asyncio.run(whole())


def test_what_one_server_made_another_serves(server: Server) -> None:
    one, other = World(server), World(server)

    async def work() -> None:
        await one.connected()
        await asyncio.gather(*(one.ask(number) for number in range(500)))
        await one.store.settled()
        await other.connected()
        before = other.made
        await asyncio.gather(*(other.ask(number) for number in range(500)))
        assert other.made == before
        assert other.tally.of["hit"] >= 500 and not other.troubles.of
        await other.cache.close()

    run(one, work)
    with server.client() as client:
        keys = client.keys("*")
        assert len(keys) == 500 and all(key.startswith(b"endcap:") and len(key) == 7 + 64 for key in keys)
        assert all(0 < client.pttl(key) <= 60_000 for key in keys[:20])


def test_a_server_starts_and_serves_without_redis_and_uses_it_once_it_comes(server: Server) -> None:
    server.tell(signal.SIGKILL)
    world = World(server)

    async def work() -> None:
        assert [await world.ask(1) for _ in range(3)] == ["made"] * 3
        assert (world.made, world.tally.of["bypassed"]) == (3, 3)
        await world.until(lambda: world.troubles.of["probe_failed"] >= 2)
        await asyncio.to_thread(server.start)
        await world.connected()
        await world.ask(1)
        await world.store.settled()
        before = world.made
        assert await world.ask(1) == "made" and world.made == before

    run(world, work)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_redis_gone_or_hanging_in_the_middle_of_load_costs_a_bounded_number_of_timeouts_and_no_error(
    server: Server, blow: signal.Signals
) -> None:
    world = World(server, timeout_s=0.05)
    answered = 0

    async def shopper(number: int, stop: asyncio.Event) -> None:
        nonlocal answered
        while not stop.is_set():
            assert await world.ask(number) == "made"
            answered += 1
            await asyncio.sleep(0.001)

    async def work() -> None:
        await world.connected()
        stop = asyncio.Event()
        shoppers = [asyncio.create_task(shopper(number, stop)) for number in range(50)]
        await world.until(lambda: world.tally.of["hit"] > 200)
        server.tell(blow)
        await world.until(lambda: not world.store.breaker.closed)
        bypassed = world.tally.of["bypassed"]
        answered_before = answered
        await world.until(lambda: answered > answered_before + 500)
        assert world.tally.of["bypassed"] > bypassed + 400  # asked of Redis no more: no waiting either
        # Whatever comes, a request waits for one read at most, and no more reads than these were begun in vain: three
        # until the breaker opened, with those that were on their way then, and a write.
        assert world.troubles.of["timed_out"] + world.troubles.of["failed"] <= 3 + 8 + 1
        if blow is signal.SIGSTOP:
            server.tell(signal.SIGCONT)
        else:
            await asyncio.to_thread(server.start)
        hits = world.tally.of["hit"]
        await world.until(lambda: world.store.breaker.closed and world.tally.of["hit"] > hits + 200)
        stop.set()
        await asyncio.gather(*shoppers)
        assert not world.troubles.of["damaged"]

    run(world, work)


def test_a_full_redis_a_wrong_password_or_foreign_values_cost_no_error(server: Server) -> None:
    world = World(server)
    key = b"endcap:" + (7).to_bytes(32, "big").hex().encode()

    async def work() -> None:
        await world.connected()
        with server.client() as client:
            client.lpush(key, "a list")
            assert await world.ask(7) == "made"  # MGET says nil of what is no string
            await world.store.settled()
            client.delete(key)
            client.set(key, b"x" * 1_000_000)
            assert await world.ask(7) == "made" and world.troubles.of["damaged"] == 1
            await world.store.settled()
            assert client.strlen(key) < 1000  # put right
            client.config_set("maxmemory", 1)
            for number in range(50, 60):
                assert await world.ask(number) == "made"
            await world.store.settled()
            assert world.troubles.of["dropped"] == 10 and world.store.breaker.closed
            before = world.made
            assert await world.ask(7) == "made" and world.made == before  # what it has it still gives
            client.config_set("maxmemory", 0)
        await world.connected()

    run(world, work)
    with server.client() as client:
        client.config_set("requirepass", "right")
    wrong, right = World(server, password="wrong"), World(server, password="right")

    async def locked_out() -> None:
        await wrong.until(lambda: wrong.troubles.of["probe_failed"] >= 2)
        assert not wrong.store.breaker.closed

    run(wrong, locked_out)
    run(right, right.connected)


def test_values_expire_in_redis_too(server: Server) -> None:
    world = World(server, ttl_s=0.05)

    async def work() -> None:
        await world.connected()
        await world.ask(3)
        await world.store.settled()
        before = world.made
        async with asyncio.timeout(10.0):
            while world.made == before:
                await world.ask(3)
                await asyncio.sleep(0.005)

    run(world, work)


def test_a_redis_that_is_slow_for_good_is_left_alone_but_for_probes(server: Server) -> None:
    """Between us and Redis is one who hands on answers late, once he is told to."""
    late_s = 0.0
    path = f"{server.folder}/slow.sock"

    connections: list[asyncio.Task[None]] = []

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, late: bool) -> None:
        try:
            while data := await reader.read(65536):
                if late:
                    await asyncio.sleep(late_s)
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(str(server.socket))
        await asyncio.gather(hand_on(reader, ours, late=False), hand_on(theirs, writer, late=True))

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.create_task(between(reader, writer)))

    world = World(server, url=f"unix://{path}", timeout_s=0.05)

    async def work() -> None:
        nonlocal late_s
        slow = await asyncio.start_unix_server(accept, path)
        await world.connected()
        late_s = 0.15
        await world.until(lambda: not world.store.breaker.closed)
        timed_out = world.troubles.of["timed_out"]
        await world.until(lambda: world.troubles.of["probe_failed"] >= 3)
        assert world.troubles.of["timed_out"] == timed_out <= 4 and not world.store.breaker.closed
        late_s = 0.0
        await world.connected()
        await world.cache.close()
        slow.close()
        await asyncio.gather(*connections)

    run(world, work)
