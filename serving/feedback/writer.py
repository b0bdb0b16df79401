"""Group commit: one thread owns the store, and everything that came while it was syncing goes into its next commit.

The time of an event is taken when its request is handed over, in the order of the queue, so a slow disk makes no
click late and a look never runs ahead of an event that came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from endcap.errors import EndcapError, StateError
from serving.feedback.attribution import Outcome
from serving.feedback.events import Event
from serving.feedback.store import Evidence, FeedbackStore, Submission

__all__ = ["Writer"]

_MAX_REQUESTS_A_COMMIT = 512
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Record:
    submission: Submission
    answer: asyncio.Future[list[Outcome]]


@dataclass(frozen=True, slots=True)
class _Look:
    now_us: int
    shoppers_since_us: int | None
    answer: asyncio.Future[Evidence]


class Writer:
    """Use from one event loop.

    Args:
        store: owned by the writer from now on.
        on_damage: called on the event loop when the database turns out damaged; nothing can be kept from then on.
        on_commit: told (seconds, requests) after each commit, from the writer's thread.
    """

    def __init__(
        self,
        store: FeedbackStore,
        *,
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        on_damage: Callable[[EndcapError], None] = lambda error: None,
        on_commit: Callable[[float, int], None] = lambda seconds, requests: None,
    ) -> None:
        self._store = store
        self._now_us = now_us
        self._on_damage = on_damage
        self._on_commit = on_commit
        self._catching_up: int | None = None  # the time asked from of the long count that is being made
        self._queue: queue.SimpleQueue[_Record | _Look | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="feedback-writer", daemon=True)
        self._thread.start()

    async def record(self, events: Sequence[Event]) -> list[Outcome]:
        """What became of each event; returns when they are on disk.

        Raises:
            StorageError: the disk is full or refuses; nothing of this request was kept.
            StateError: the database is damaged.
        """
        answer: asyncio.Future[list[Outcome]] = self._loop.create_future()
        self._queue.put(_Record(Submission(events, self._now_us()), answer))
        return await answer

    async def evidence(self, *, shoppers_since_us: int | None = None) -> Evidence:
        """The counts as of now, every event that was handed over before included; see ``FeedbackStore.evidence``."""
        answer: asyncio.Future[Evidence] = self._loop.create_future()
        self._queue.put(_Look(self._now_us(), shoppers_since_us, answer))
        return await answer

    def close(self) -> None:
        """Finish what was handed over, then close the store."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        open_ = True
        while open_:
            batch = [self._queue.get()]
            while len(batch) < _MAX_REQUESTS_A_COMMIT:
                try:
                    batch.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            open_ = None not in batch
            self._commit([entry for entry in batch if isinstance(entry, _Record)])
            for entry in batch:
                if isinstance(entry, _Look):
                    self._look(entry, at_once=not open_)
        self._store.close()

    def _commit(self, records: Sequence[_Record]) -> None:
        if not records:
            return
        begun_s = time.perf_counter()
        try:
            outcomes = self._store.record([record.submission for record in records])
        except Exception as error:  # noqa: BLE001 - whatever goes wrong, those who wait are told, and the thread lives
            self._refuse([record.answer for record in records], _ours(error))
            return
        self._on_commit(time.perf_counter() - begun_s, len(records))
        self._answer([(record.answer, outcome) for record, outcome in zip(records, outcomes, strict=True)])

    def _look(self, look: _Look, *, at_once: bool) -> None:
        """Answer it; or, where that would take long, do a part of the work and put it behind what came meanwhile."""
        since_us = look.shoppers_since_us
        try:
            if since_us is not None and not at_once and not self._caught_up(look.now_us, since_us):
                self._queue.put(look)
                return
            self._answer([(look.answer, self._store.evidence(look.now_us, shoppers_since_us=since_us))])
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse([look.answer], _ours(error))

    def _caught_up(self, now_us: int, since_us: int) -> bool:
        """One long count after the other: many at once would push each other out of what the store keeps."""
        if self._catching_up not in (None, since_us):
            return False
        self._catching_up = None
        if self._store.catch_up(now_us, shoppers_since_us=since_us):
            return True
        self._catching_up = since_us
        return False

    def _answer(self, answers: Sequence[tuple[asyncio.Future[_T], _T]]) -> None:
        def tell() -> None:
            for future, value in answers:
                if not future.done():
                    future.set_result(value)

        self._tell(tell)

    def _refuse(self, futures: Sequence[asyncio.Future[list[Outcome]] | asyncio.Future[Evidence]],
                error: EndcapError) -> None:  # fmt: skip
        def tell() -> None:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            if isinstance(error, StateError):
                self._on_damage(error)

        self._tell(tell)

    def _tell(self, tell: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everyone who waited
            self._loop.call_soon_threadsafe(tell)


def _ours(error: Exception) -> EndcapError:
    if isinstance(error, EndcapError):
        return error
    return EndcapError(f"a fault of the collector ({type(error).__name__})")
