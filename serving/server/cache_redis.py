"""Redis as a store of answers, on terms that suit a shopper: a few milliseconds at most, and never an error.

* What requests ask for in one turn of the event loop goes to Redis as one MGET, and what they leave as one pipeline.
* An MGET that takes longer than ``timeout_s`` is given up, and its requests go on without the cache.
* A breaker: after three failures in a row nothing is asked of Redis any more, until a probe in the background (half
  open) got two answers from it, the second one, on an open connection, within ``timeout_s``. Probes come at half a
  second and then ever more rarely, so a Redis that is slow for good costs next to nothing.
* It begins open: a server never waits for Redis to start, nor does a request for a first connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from endcap.errors import InputError
from serving.server.cache import MAX_VALUE_BYTES, Counts, uncounted

__all__ = ["Breaker", "RedisStore", "check_url"]

log = logging.getLogger("serving.server.cache")

TIMEOUT_S = 0.005
_WRITE_TIMEOUT_S = 0.1
_PROBE_TIMEOUT_S = 1.0
_MAX_READS = 8
_MAX_KEYS = 256
"""Of one MGET."""
_MAX_UNWRITTEN = 1024
_PREFIX = b"endcap:"


@dataclass(slots=True)
class Breaker:
    """Whether to ask at all. ``wait_s``: until the next probe; grows as long as what was mended breaks again."""

    limit: int = 3
    first_wait_s: float = 0.5
    longest_wait_s: float = 10.0
    mended_after: int = 100
    closed: bool = False
    wait_s: float = 0.0
    _failures: int = 0
    _successes: int = 0

    def succeeded(self) -> None:
        """An answer in time."""
        self._failures = 0
        if self.wait_s:
            self._successes += 1
            if self._successes >= self.mended_after:
                self.wait_s = 0.0

    def failed(self) -> bool:
        """None in time; True when this was once too often."""
        self._failures += 1
        if not self.closed or self._failures < self.limit:
            return False
        self.closed = False
        self._wait_longer()
        return True

    def probed(self, well: bool) -> None:
        """What a probe found."""
        self._failures = self._successes = 0
        self.closed = well
        if not well:
            self._wait_longer()

    def _wait_longer(self) -> None:
        self.wait_s = min(self.longest_wait_s, max(self.first_wait_s, 2 * self.wait_s))


class _Client(Protocol):
    """What we use of redis-py."""

    async def ping(self) -> Any: ...
    async def mget(self, keys: list[bytes]) -> list[bytes | None]: ...
    def pipeline(self, transaction: bool) -> Any: ...
    async def aclose(self) -> None: ...


class RedisStore:
    """Values in a Redis that other servers may share.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``; without a password in it.
        counts: ``bypassed``: requests that went on without the cache.
        troubles: ``timed_out``, ``failed``: reads and writes; ``probe_failed``: looks for a Redis that was slow or
            gone; ``dropped``: values that were not written.
    """

    def __init__(self, url: str, *, username: str | None = None, password: str | None = None,
                 timeout_s: float = TIMEOUT_S, counts: Counts | None = None, troubles: Counts | None = None,
                 breaker: Breaker | None = None) -> None:  # fmt: skip
        self.breaker = breaker or Breaker()
        self._url = url
        self._login = {name: value for name, value in (("username", username), ("password", password)) if value}
        self._timeout_s = timeout_s
        self._counts = uncounted() if counts is None else counts
        self._troubles = uncounted() if troubles is None else troubles
        self._client: _Client | None = None
        self._wanted: list[tuple[bytes, asyncio.Future[bytes | None]]] = []
        self._unwritten: dict[bytes, tuple[bytes, float]] = {}
        self._reads = 0
        self._writing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._probe: asyncio.Task[None] | None = None

    async def get(self, key: bytes) -> bytes | None:
        client = self._client
        if client is None or not self.breaker.closed or self._reads >= _MAX_READS:
            if self._probe is None and not self.breaker.closed:
                self._probe = asyncio.create_task(self._mend())
            self._counts["bypassed"].inc()
            return None
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bytes | None] = loop.create_future()
        self._wanted.append((key, future))
        if len(self._wanted) == 1:
            loop.call_soon(self._read_wanted, client)
        elif len(self._wanted) == _MAX_KEYS:
            self._read_wanted(client)
        return await future

    def _read_wanted(self, client: _Client) -> None:
        if self._wanted:
            wanted, self._wanted = self._wanted, []
            self._start(self._read(client, wanted))

    async def _read(self, client: _Client, wanted: list[tuple[bytes, asyncio.Future[bytes | None]]]) -> None:
        self._reads += 1
        values: list[bytes | None] | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await client.mget([_PREFIX + key.hex().encode() for key, _ in wanted])
            self.breaker.succeeded()
        except TimeoutError:
            self._trouble("timed_out")
        except Exception as error:  # noqa: BLE001 - redis-py raises its own, the system's and asyncio's errors
            self._trouble("failed", error)
        finally:
            self._reads -= 1
            for place, (_, future) in enumerate(wanted):
                if values is None:
                    self._counts["bypassed"].inc()
                if not future.done():
                    future.set_result(values[place] if values is not None and place < len(values) else None)

    def put(self, key: bytes, value: bytes, *, ttl_s: float) -> None:
        client = self._client
        if client is None or not self.breaker.closed:
            return
        if len(self._unwritten) >= _MAX_UNWRITTEN or len(value) > MAX_VALUE_BYTES + 1024:
            self._troubles["dropped"].inc()
            return
        self._unwritten[key] = (value, ttl_s)
        if not self._writing:
            self._writing = True
            self._start(self._write(client))

    async def _write(self, client: _Client) -> None:
        try:
            while self._unwritten and self.breaker.closed:
                keys = list(self._unwritten)[:_MAX_KEYS]
                batch = [(key, *self._unwritten.pop(key)) for key in keys]
                try:
                    async with asyncio.timeout(_WRITE_TIMEOUT_S):
                        async with client.pipeline(transaction=False) as pipeline:
                            for key, value, ttl_s in batch:
                                pipeline.set(_PREFIX + key.hex().encode(), value, px=max(1, round(ttl_s * 1000)))
                            results = await pipeline.execute(raise_on_error=False)
                    # A Redis that is full still reads: no reason to leave it alone.
                    self._dropped(sum(isinstance(result, Exception) for result in results))
                except TimeoutError:
                    self._dropped(len(batch))
                    self._trouble("timed_out")
                except Exception as error:  # noqa: BLE001 - as above
                    self._dropped(len(batch))
                    self._trouble("failed", error)
        finally:
            self._writing = False
            self._dropped(len(self._unwritten))
            self._unwritten.clear()

    def _dropped(self, values: int) -> None:
        for _ in range(values):
            self._troubles["dropped"].inc()

    def _trouble(self, kind: str, error: Exception | None = None) -> None:
        self._troubles[kind].inc()
        if self.breaker.failed():
            how = "is too slow" if error is None else f"fails ({type(error).__name__})"
            log.warning("Redis %s; answers are made without it (next look in %.1f s)", how, self.breaker.wait_s)

    async def _mend(self) -> None:
        """Look for Redis until it is there and quick."""
        try:
            while not self.breaker.closed:
                if self.breaker.wait_s:
                    await asyncio.sleep(self.breaker.wait_s * random.uniform(0.8, 1.2))  # noqa: S311
                well = await self._look()
                self.breaker.probed(well)
                if well:
                    log.info("Redis answers")
        finally:
            self._probe = None

    async def _look(self) -> bool:
        try:
            client = self._client
            if client is None:
                client = self._client = await asyncio.to_thread(_connect, self._url, self._login)
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await asyncio.gather(*(client.ping() for _ in range(_MAX_READS)))  # opens that many connections
            async with asyncio.timeout(self._timeout_s):
                await client.ping()
        except Exception:  # noqa: BLE001 - as above
            self._troubles["probe_failed"].inc()
            return False
        return True

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        """Wait until everything that was begun has ended."""
        while self._tasks or self._wanted:
            await asyncio.gather(*self._tasks)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Let go of Redis. What is being written may be lost."""
        self.breaker.closed = False
        tasks = [*self._tasks, *([self._probe] if self._probe is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()
            self._client = None


def _connect(url: str, login: dict[str, str]) -> _Client:
    """A client that has not connected yet. Importing redis-py takes a good part of a second, so: late, on a thread."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    # Nothing of redis-py's own: no second tries, no timeouts, no name that it tells the server.
    settings: dict[str, Any] = {
        "protocol": 2, "retry": Retry(NoBackoff(), 0), "socket_timeout": None, "socket_connect_timeout": None,
        "driver_info": None, "health_check_interval": 0, **login,
    }  # fmt: skip
    client: Any = Redis.from_url(url, **settings)
    return client  # type: ignore[no-any-return]


def check_url(url: str) -> None:
    """Refuse what redis-py would not take, and passwords where everybody sees them.

    Raises:
        InputError: says what is wrong.
    """
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises on a port that is none
    except ValueError as error:
        raise InputError(f"not a Redis address ({error})", where="--cache", next_step="redis://host:port/0") from error
    if parts.password is not None:
        raise InputError("a password in an argument can be seen by everybody on the machine", where="--cache",
                         next_step="set ENDCAP_REDIS_PASSWORD instead")  # fmt: skip
    if parts.scheme == "unix":
        if not parts.path:
            raise InputError("no socket", where="--cache", next_step="unix:///path/to/redis.sock")
    elif not parts.hostname or not (parts.path in ("", "/") or parts.path[1:].isdigit()):
        raise InputError("not a Redis address", where="--cache", next_step="redis://host:port/0")
