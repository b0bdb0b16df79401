"""Shoppers of a service behind a cluster's gateway: open loop, no retries, and some of them click."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

import aiohttp
import orjson

from tests.packages import ITEMS

_TOGETHER_S = 0.1
_MOST_EVENTS = 100


@dataclass(frozen=True, slots=True, order=True)
class Answer:
    """``answered_s``, ``asked_s``: monotonic."""

    answered_s: float
    asked_s: float
    bucket: int
    version: str


@dataclass
class Shoppers:
    """Asks ``url`` with the header ``host`` at ``rate`` a second until the block ends.

    Each request is a shopper's of their own. One in two wants what follows their newest item in the table, and clicks
    it where it is what they are shown. ``feedback``: the collector's URL.
    """

    url: str
    host: str
    rate: float = 100.0
    timeout_s: float = 5.0
    feedback: str | None = None
    buckets: str | None = None
    """The header that the shop's edge puts a shopper's bucket into, 0 to 99."""
    answers: list[Answer] = field(default_factory=list)
    """With ``buckets``: each of them."""
    statuses: Counter[str] = field(default_factory=Counter)
    """By status, or by what there was instead of one."""
    versions: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events: list[dict[str, str]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="shoppers", daemon=True)

    def __enter__(self) -> Shoppers:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join(timeout=60)

    @property
    def asked(self) -> int:
        return sum(self.statuses.values())

    async def _run(self) -> None:
        draw = random.Random(11)
        # Connections are let go of before any server closes them: a request must not meet that.
        pool = aiohttp.TCPConnector(limit=300, keepalive_timeout=4.0)
        patience = aiohttp.ClientTimeout(total=self.timeout_s)
        nobodys = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(connector=pool, timeout=patience, cookie_jar=nobodys) as client:
            start_s, number = time.monotonic(), 0
            telling = asyncio.create_task(self._tell(client))
            async with asyncio.TaskGroup() as group:
                while not self._ending.is_set():
                    newest, wants = draw.randrange(len(ITEMS)), draw.random() < 0.5
                    group.create_task(self._ask(client, f"s{number}", newest, wants))
                    number += 1
                    await asyncio.sleep(max(0.0, start_s + number / self.rate - time.monotonic()))
            await telling

    async def _ask(self, client: aiohttp.ClientSession, shopper: str, newest: int, wants: bool) -> None:
        body = {"shopper": shopper, "history": [ITEMS[newest]], "k": 1}
        headers = {"host": self.host, "x-endcap-shopper": shopper}
        bucket, sent_s = int(shopper[1:]) * 37 % 100, time.monotonic()
        if self.buckets is not None:
            headers[self.buckets] = str(bucket)
        try:
            async with client.post(self.url + "/v1/recommend", json=body, headers=headers) as answer:
                said = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._note(type(error).__name__, f"{time.time():.1f} {error!r}")
            return
        if answer.status != 200:
            self._note(str(answer.status), f"{time.time():.1f} {answer.status} {said[:200]!r}")
            return
        self.statuses["200"] += 1
        version = answer.headers.get("x-endcap-version", "?")
        self.versions[version] += 1
        if self.buckets is not None:
            self.answers.append(Answer(time.monotonic(), sent_s, bucket, version))
        shown = orjson.loads(said)
        if self.feedback is None or "impression" not in shown:
            return
        self._events.append({"impression": shown["impression"], "type": "shown"})
        if wants and shown["items"][:1] == [ITEMS[(newest + 1) % len(ITEMS)]]:
            self._events.append({"impression": shown["impression"], "type": "clicked", "item": shown["items"][0]})

    async def _tell(self, client: aiohttp.ClientSession) -> None:
        """What shoppers saw and clicked, together, as their pages' edge sends it."""
        while not self._ending.is_set() or self._events:
            await asyncio.sleep(_TOGETHER_S)
            events, self._events[:] = self._events[:_MOST_EVENTS], self._events[_MOST_EVENTS:]
            if not events:
                continue
            try:
                async with client.post(f"{self.feedback}/v1/feedback", json={"events": events}) as answer:
                    if answer.status >= 300:
                        self.failures.append(f"feedback: {answer.status} {await answer.text()}")
            except (aiohttp.ClientError, TimeoutError) as error:
                self.failures.append(f"feedback: {error!r}")

    def _note(self, what: str, detail: str) -> None:
        self.statuses[what] += 1
        self.failures.append(detail)

    @property
    def failed(self) -> int:
        return self.asked - self.statuses["200"]
