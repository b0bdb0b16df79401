"""A small open-loop load for tests of the gateway: arrivals at a steady rate on keep-alive connections, no retries."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import httpx

__all__ = ["Answer", "Load", "eventually"]


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0: none came."""

    sent_s: float
    done_s: float
    status: int
    version: str | None
    zone: str | None
    error: str | None

    @property
    def failed(self) -> bool:
        return self.status == 0 or self.status >= 500


class Load:
    """Asks ``url`` for recommendations at ``rate`` a second from a thread of its own, until the block ends."""

    def __init__(self, url: str, *, rate: float = 80.0, timeout_s: float = 3.0) -> None:
        self._url, self._rate, self._timeout_s = url + "/v1/recommend", rate, timeout_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)
        self.answers: list[Answer] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(timeout=30)

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=32)
        async with httpx.AsyncClient(limits=limits, timeout=self._timeout_s, trust_env=False) as client:
            start_s, number = time.monotonic(), 0
            async with asyncio.TaskGroup() as group:
                while not self._ending.is_set():
                    group.create_task(self._ask(client))
                    number += 1
                    await asyncio.sleep(max(0.0, start_s + number / self._rate - time.monotonic()))

    async def _ask(self, client: httpx.AsyncClient) -> None:
        sent_s = time.time()
        body = {"shopper": "1", "history": ["103"], "k": 3}
        try:
            response = await client.post(self._url, json=body)
        except httpx.HTTPError as error:
            self.answers.append(Answer(sent_s, time.time(), 0, None, None, repr(error)))
        else:
            version, zone = response.headers.get("x-endcap-version"), response.headers.get("x-endcap-zone")
            self.answers.append(Answer(sent_s, time.time(), response.status_code, version, zone, None))

    @property
    def failed(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.failed]

    def more(self, count: int, *, within_s: float = 20.0) -> list[Answer]:
        """The next ``count`` answers."""
        begin = len(self.answers)
        eventually(lambda: len(self.answers) >= begin + count, within_s=within_s)
        return self.answers[begin : begin + count]


def eventually(condition: Callable[[], object], *, within_s: float = 20.0, what: str = "") -> None:
    """Return once ``condition`` holds; fail when it does not in time."""
    ends_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends_at, f"not within {within_s:g} s: {what or condition}"
        time.sleep(0.02)
