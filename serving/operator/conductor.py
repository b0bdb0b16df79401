"""Many rollouts in one process: who is due next, in which thread, and never two threads in one rollout."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from serving.operator.drive import Drive
from serving.operator.metrics import Metrics
from serving.operator.objects import FINALIZER, Key, RolloutObject
from serving.rollout.engine import Clock

__all__ = ["Conductor"]

log = logging.getLogger("endcap.operator")
_CRASHED_S = 30.0
"""After a fault of our own in a turn: the rollout is tried again then, the others go on."""
_ENDS_S = 20.0
"""How long turns that are under way are waited for when this replica stops."""
_OPENING = 8
"""Rollouts that are begun or taken up at once: a thousand of them must not keep the API server from answering looks."""


@dataclass
class _Entry:
    drive: Drive
    due_s: float
    running: bool = False
    again: bool = False
    """Something happened while its turn was under way."""


@dataclass(frozen=True, slots=True)
class _Pools:
    looks: ThreadPoolExecutor
    acts: ThreadPoolExecutor
    openings: ThreadPoolExecutor


class Conductor:
    """Keeps what is seen of all Rollouts; drives them between :meth:`begin` and :meth:`end`.

    Looks, and what may take long, have threads of their own: a canary that waits for a node delays nobody's look.
    ``looked``: is told of each look that was due, with when it was, when its turn began and when it was acknowledged.
    """

    def __init__(
        self, make: Callable[[Key, int], Drive], *, clock: Clock, metrics: Metrics, fast: int, slow: int,
        looked: Callable[[Key, float, float, float], None] | None = None,
    ) -> None:  # fmt: skip
        self._make, self._clock, self._metrics, self._looked = make, clock, metrics, looked
        self._fast, self._slow = fast, slow
        self._objects: dict[Key, RolloutObject] = {}
        self._entries: dict[Key, _Entry] = {}
        self._claims: dict[tuple[str, str], Key] = {}
        """By namespace and service, the Rollout that is under way or begins just now."""
        self._heap: list[tuple[float, int, Key]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._fence: int | None = None
        self._threads: tuple[threading.Thread, _Pools] | None = None
        self.beat_s = time.monotonic()
        """When it last looked who is due."""

    # ---- what is seen ----

    def see(self, document: Mapping[str, Any], *, gone: bool = False) -> None:
        """A Rollout as a watch told of it."""
        seen = RolloutObject.of(document)
        with self._changed:
            before = self._objects.get(seen.key)
            if gone:
                self._objects.pop(seen.key, None)
                self.release(seen.key)
            else:
                self._objects[seen.key] = seen
            if self._fence is not None and (gone or before is None or _differs(before, seen)):
                self._wake(seen.key)

    def objectives_changed(self, namespace: str) -> None:
        """What a rollout lacked may be there now."""
        with self._changed:
            for key, entry in self._entries.items():
                if key.namespace == namespace and not entry.drive.is_under_way:
                    self._wake(key)

    def object_of(self, key: Key) -> RolloutObject | None:
        with self._changed:
            return self._objects.get(key)

    def under_way(self, key: Key) -> Key | None:
        """See :class:`~serving.operator.drive.Surroundings`. What is not another's is claimed."""
        with self._changed:
            seen = self._objects.get(key)
            if seen is None:
                return None
            claim = (key.namespace, seen.service)
            holder = self._claims.get(claim)
            if holder is not None and holder != key:
                return holder
            for other in self._objects.values():
                if other.key != key and (other.key.namespace, other.service) == claim and FINALIZER in other.finalizers:
                    return other.key
            self._claims[claim] = key
            return None

    def release(self, key: Key) -> None:
        """``key`` is not under way any more."""
        with self._changed:
            for claim in [claim for claim, holder in self._claims.items() if holder == key]:
                del self._claims[claim]

    @property
    def drives(self) -> bool:
        return self._fence is not None

    def phases(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._changed:
            for entry in self._entries.values():
                found[entry.drive.phase] = found.get(entry.drive.phase, 0) + 1
        return found

    # ---- driving ----

    def begin(self, fence: int) -> None:
        """Drive all that is seen from now on."""
        with self._changed:
            self._fence = fence
            pools = _Pools(
                ThreadPoolExecutor(self._fast, thread_name_prefix="endcap-look"),
                ThreadPoolExecutor(self._slow, thread_name_prefix="endcap-act"),
                ThreadPoolExecutor(_OPENING, thread_name_prefix="endcap-open"),
            )
            thread = threading.Thread(target=self._run, args=(pools,), name="endcap-conductor", daemon=True)
            self._threads = thread, pools
            for key in self._objects:
                self._wake(key)
            thread.start()
        self._metrics.leads.set(1)
        self._metrics.fence.set(fence)

    def end(self) -> None:
        """Begin no more turns, wait for those under way, let go of all rollouts."""
        self._metrics.leads.set(0)
        with self._changed:
            self._fence = None
            threads, self._threads = self._threads, None
            self._changed.notify_all()
        if threads is None:
            return
        thread, pools = threads
        thread.join()
        for pool in (pools.looks, pools.acts, pools.openings):
            pool.shutdown(wait=False, cancel_futures=True)
        ends_s = time.monotonic() + _ENDS_S
        with self._changed:
            while any(entry.running for entry in self._entries.values()) and time.monotonic() < ends_s:
                self._changed.wait(0.5)
            entries, self._entries, self._heap = self._entries, {}, []
            self._claims.clear()
        for entry in entries.values():
            if not entry.running:  # one that hangs is fenced by its store and its target
                entry.drive.close()

    def _wake(self, key: Key) -> None:
        """A turn as soon as may be."""
        if self._fence is None:
            return
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._make(key, self._fence), self._clock.now_s())
        if entry.running:
            entry.again = True
        else:
            self._push(self._clock.now_s(), key)

    def _push(self, when_s: float, key: Key) -> None:
        heapq.heappush(self._heap, (when_s, next(self._numbers), key))
        self._changed.notify_all()

    def _run(self, pools: _Pools) -> None:
        while True:
            with self._changed:
                self.beat_s = time.monotonic()
                if self._fence is None:
                    return
                now_s = self._clock.now_s()
                if not self._heap or self._heap[0][0] > now_s:
                    self._changed.wait(min(1.0, self._heap[0][0] - now_s) if self._heap else 1.0)
                    continue
                _, _, key = heapq.heappop(self._heap)
                entry = self._entries.get(key)
                if entry is None or entry.running:
                    continue
                entry.running, entry.again = True, False
                drive = entry.drive
                pool = pools.openings if not drive.is_open else pools.acts if drive.may_take_long else pools.looks
                pool.submit(self._turn, key, entry, pool is not pools.looks)

    def _turn(self, key: Key, entry: _Entry, long: bool) -> None:
        was_due_s, begun_s = entry.due_s, self._clock.now_s()
        due_s: float | None
        try:
            due_s = entry.drive.turn()
        except Exception:  # one rollout's fault is not the others'
            log.exception("a fault of the operator's own in a turn", extra={"rollout": str(key)})
            self._metrics.errors.labels("Fault").inc()
            entry.drive.close()
            due_s = self._clock.now_s() + _CRASHED_S
        now_s = self._clock.now_s()
        self._metrics.turn_s.observe(max(0.0, now_s - begun_s))
        acknowledged_s = entry.drive.acknowledged_s
        if not long and was_due_s <= begun_s <= acknowledged_s:
            self._metrics.look_delay_s.observe(max(0.0, acknowledged_s - was_due_s))
            if self._looked is not None:
                self._looked(key, was_due_s, begun_s, acknowledged_s)
        with self._changed:
            entry.running = False
            if due_s is None and not entry.drive.is_under_way and not entry.again:
                self._entries.pop(key, None)
                self.release(key)
            else:
                entry.due_s = now_s if due_s is None else due_s
                self._push(now_s if entry.again else entry.due_s, key)
            self._changed.notify_all()


def _differs(before: RolloutObject, now: RolloutObject) -> bool:
    """In more than what the operator itself writes."""
    return (before.generation, before.annotations, before.is_deleted, before.uid) != (
        now.generation, now.annotations, now.is_deleted, now.uid
    )  # fmt: skip
