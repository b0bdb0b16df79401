"""Dynamic batching: many requests, few runs of the graph, and none of them started in vain.

The first request of an idle server runs at once; what comes while it runs goes together in the next run, as far as
rows and tokens allow. A graph that answers in a millisecond or two runs on the event loop itself, because handing it
to a thread and back costs as much; a watchdog ends such a run that takes too long, and from then on it goes on a
thread, as any slow graph does. So a stalled graph never holds the loop for more than ``WATCH_S``, and threads
beyond the lanes stand by for the time in which one is stalled.

A batch that fails is run again request by request, so that only the one that makes the graph fail is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from numpy.typing import NDArray

from endcap.errors import EndcapError
from serving.server.engine import Engine, GraphError, GraphTimeoutError, Tensors, Ticket
from serving.server.overload import CostModel
from serving.server.shapes import BatchShape, Extent
from serving.server.waiting import Entry, Limits, Priority, Run, Waiting
from serving.tracing import CURRENT

__all__ = ["Batcher", "Limits", "Observer", "OverloadedError", "Priority"]

INLINE_S = 0.002
"""Runs expected to take no longer run on the event loop."""
WATCH_S = 0.05
"""A run on the loop that takes longer is ended and goes to a thread."""
_DISTRUST_S = 1.0
"""For so long after that nothing runs on the loop."""
_OVERDUE_TIMES = 20.0
_OVERDUE_S = 0.5
"""A batch on a thread is overdue, and split, after the longer of this and so many times what was expected."""
_CROWDED_S = 0.01
"""An expected wait that is worth asking whether a request would be turned away."""

Outputs = dict[str, NDArray[Any]]


class Observer(Protocol):
    """Told of what happens; must not block."""

    def ran(self, rows: int, took_s: float) -> None:
        """A run of so many rows ended well."""

    def queued(self, waited_s: float) -> None:
        """A request waited so long for its run to begin."""


class OverloadedError(EndcapError):
    """More requests wait than could be answered in time. ``retry_after_s``: when it may be worth trying again."""

    def __init__(self, what: str, priority: Priority, retry_after_s: int) -> None:
        super().__init__(what, where="server", next_step="try another replica, or later")
        self.priority = priority
        self.retry_after_s = retry_after_s


class _Request(Entry):
    __slots__ = ("batch", "future", "inputs", "timer", "trace")

    def __init__(self, inputs: Tensors, extent: Extent, priority: Priority, now_s: float, limit_s: float,
                 future: asyncio.Future[Outputs]) -> None:  # fmt: skip
        super().__init__(extent, priority, now_s, limit_s)
        self.inputs = inputs
        self.future = future
        self.timer: asyncio.TimerHandle | None = None
        self.batch: _Batch | None = None
        self.trace = CURRENT.get()

    @property
    def gone(self) -> bool:
        return self.future.done()


class _Batch:
    """A run and what watches it. ``open``: of its requests, those that someone still waits for."""

    __slots__ = ("begun_s", "cpu_s", "open", "requests", "rows", "run", "split", "ticket", "timer")

    def __init__(self, run: Run[_Request], ticket: Ticket) -> None:
        self.run = run
        self.requests = run.entries
        self.rows = sum(request.extent.rows for request in run.entries)
        self.ticket = ticket
        self.begun_s = 0.0
        self.cpu_s = 0.0
        self.open = len(run.entries)
        self.split = False
        self.timer: asyncio.TimerHandle | None = None


class Batcher:
    """Queue and runs of one engine. All calls on one event loop."""

    def __init__(self, engine: Engine, shape: BatchShape, limits: Limits, *, cost: CostModel | None = None,
                 observer: Observer | None = None) -> None:  # fmt: skip
        self.limits = limits
        self.observer = observer
        self.waiting = 0
        """Requests that wait or run."""
        self._engine = engine
        self._shape = shape
        self._cost = cost or CostModel()
        self._queue: Waiting[_Request] = Waiting(limits, self._cost, joinable=shape.joinable)
        self._running: set[_Batch] = set()
        self._executor = ThreadPoolExecutor(limits.workers, thread_name_prefix="graph")
        self._watchdog = _Watchdog()
        weakref.finalize(self, self._watchdog.close)  # a package that was replaced leaves no thread behind
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_soon = False
        self._gather: asyncio.TimerHandle | None = None
        self._inline_again_s = -math.inf
        self._closed = False

    # -- asking

    @property
    def crowded(self) -> bool:
        """Whether :meth:`admit` may refuse; cheap."""
        return 2 * self.waiting >= self.limits.max_waiting or (
            self.waiting >= self.limits.lanes
            and self._queue.wait_s(Priority.BATCH, self.limits.timeout_s, time.monotonic()) > _CROWDED_S
        )

    @property
    def room(self) -> int:
        """Requests of average size that may be in the server at once, as the pace of late allows."""
        return self._queue.room

    def admit(self, priority: Priority = Priority.SHOPPER, *, within_s: float = math.inf) -> None:
        """Nothing, or why a request of ``priority`` would be turned away now. Cheap: ask before reading a body.

        Raises:
            OverloadedError: too many wait, or it would not be answered ``within_s``.
        """
        self._admit(priority, min(self.limits.timeout_s, within_s), None)

    def _admit(self, priority: Priority, limit_s: float, tokens: int | None) -> None:
        wait_s = self._queue.refused(priority, limit_s, time.monotonic(), inside=self.waiting, tokens=tokens)
        if wait_s is not None:
            what = f"{self.waiting} requests wait already, an answer would take about {wait_s:.1f} s"
            raise OverloadedError(what, priority, min(30, max(1, math.ceil(wait_s))))

    async def infer(self, inputs: Tensors, *, within_s: float = math.inf,
                    priority: Priority = Priority.SHOPPER) -> Outputs:  # fmt: skip
        """All outputs by name. ``within_s``: how long the caller waits; a shorter limit than our own holds.

        Raises:
            InputError: rows that do not fit together, or none.
            OverloadedError: too many wait already.
            GraphError: the graph failed, or (GraphTimeoutError) there was no answer in time.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._move(loop)
        limit_s = min(self.limits.timeout_s, within_s)
        extent = self._shape.measure(inputs)
        self._admit(priority, limit_s, extent.rows * extent.length)
        request = _Request(inputs, extent, priority, time.monotonic(), limit_s, loop.create_future())
        self._queue.put(request)
        self.waiting += 1
        self._flush_later(loop)
        try:
            return await request.future
        finally:
            if loop is self._loop:
                self.waiting -= 1
            if request.timer is not None:
                request.timer.cancel()
            self._leave(request)

    def close(self) -> None:
        """Let go of the threads; a run that hangs does not hold the process."""
        self._closed = True
        for batch in self._running:
            batch.ticket.revoke()
        self._watchdog.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin on ``loop``. What an earlier loop left behind, nobody waits for."""
        self._loop = loop
        self._queue.clear()
        for batch in self._running:
            batch.ticket.revoke()
        self._running.clear()
        self._flush_soon = False
        self._gather = None
        self.waiting = 0

    def _leave(self, request: _Request) -> None:
        """Its caller waits no more: answered, late or gone."""
        batch = request.batch
        if batch is not None:
            request.batch = None
            batch.open -= 1
            if batch.open == 0:
                batch.ticket.revoke()
        elif not request.future.done() or request.future.cancelled() or request.future.exception() is not None:
            self._queue.remove(request)

    def _expire(self, request: _Request) -> None:
        if not request.future.done():
            request.future.set_exception(
                GraphTimeoutError(f"no answer from the graph within {request.limit_s:g} s", where="graph",
                                  next_step="try again")
            )  # fmt: skip

    # -- dispatching

    def _flush_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the end of this turn of the loop: all that came in it goes together."""
        if not self._flush_soon:
            self._flush_soon = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_soon = False
        loop = self._loop
        if loop is None or self._closed:
            return
        now_s = time.monotonic()
        while self._queue:
            batch = self._take(now_s, INLINE_S) if now_s >= self._inline_again_s else None
            if batch is not None:
                self._run_here(batch)
                if self._queue:
                    self._flush_later(loop)  # the loop's other work in between
                return
            if not self._lane_free(loop, now_s):
                break
            batch = self._take(now_s, math.inf)
            if batch is not None:
                self._run_on_thread(batch, loop)
        for request in self._queue:
            self._arm(request, loop)

    def _lane_free(self, loop: asyncio.AbstractEventLoop, now_s: float) -> bool:
        if len(self._running) >= self.limits.workers:
            return False
        working = sum(not batch.run.overdue for batch in self._running)
        if working >= self.limits.lanes:
            return False
        if working and self.limits.max_wait_s > 0:
            # Another lane works: hold on a moment to gather, if there is anything to gather for.
            queue = self._queue.next_queue
            rows = sum(request.extent.rows for request in queue)
            due_s = (queue[0].asked_s if queue else now_s) + self.limits.max_wait_s
            if self._shape.joinable and rows < self.limits.max_rows and now_s < due_s:
                if self._gather is None:
                    self._gather = loop.call_later(due_s - now_s, self._gathered)
                return False
        return True

    def _gathered(self) -> None:
        self._gather = None
        self._flush()

    def _take(self, now_s: float, most_s: float) -> _Batch | None:
        run = self._queue.take(now_s, self._expire, most_s=most_s)
        if run is None:
            return None
        if self.observer is not None:
            for request in run.entries:
                self.observer.queued(now_s - request.asked_s)
        batch = _Batch(run, self._engine.ticket())
        for request in run.entries:
            request.batch = batch
        return batch

    def _run(self, batch: _Batch) -> tuple[list[Outputs] | None, GraphError | None, float]:
        """Blocks; on any thread. The batch keeps what it took of this thread's processor time."""
        batch.begun_s = begun_s = time.perf_counter()
        begun_cpu_s = time.thread_time()
        try:
            outputs = self._engine.run(self._shape.join([one.inputs for one in batch.requests]), batch.ticket)
            parts = self._shape.split(outputs, [one.extent for one in batch.requests])
        except GraphError as error:
            return None, error, time.perf_counter() - begun_s
        except Exception as error:  # noqa: BLE001 - outputs of another form than the manifest's
            return None, GraphError(f"the graph failed ({type(error).__name__})"), time.perf_counter() - begun_s
        batch.cpu_s = time.thread_time() - begun_cpu_s
        return parts, None, time.perf_counter() - begun_s

    def _run_here(self, batch: _Batch) -> None:
        until_s = min(min(request.deadline_s for request in batch.requests), time.monotonic() + WATCH_S)
        self._watchdog.watch(batch.ticket, until_s)
        parts, error, took_s = self._run(batch)
        self._watchdog.rest()
        self._queue.ended(batch.run, time.monotonic(), answered=parts is not None)
        if isinstance(error, GraphTimeoutError):
            self._inline_again_s = time.monotonic() + _DISTRUST_S
            self._again(batch, threaded=True)
        else:
            self._ended(batch, parts, error, took_s)

    def _run_on_thread(self, batch: _Batch, loop: asyncio.AbstractEventLoop) -> None:
        for request in batch.requests:
            self._arm(request, loop)
        self._running.add(batch)
        expected_s = 0.0 if math.isinf(batch.run.expected_s) else batch.run.expected_s
        batch.timer = loop.call_later(max(_OVERDUE_S, _OVERDUE_TIMES * expected_s), self._overdue, batch)

        def work() -> None:
            result = self._run(batch)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._back, batch, *result)

        self._executor.submit(work)

    def _overdue(self, batch: _Batch) -> None:
        """It takes far too long: the others need not wait for it, nor with it."""
        batch.run.overdue = True
        if batch.open > 1:
            batch.split = True
            batch.ticket.revoke()
        self._flush()

    def _back(self, batch: _Batch, parts: list[Outputs] | None, error: GraphError | None, took_s: float) -> None:
        if batch not in self._running:
            return
        self._running.discard(batch)
        self._queue.ended(batch.run, time.monotonic(), answered=parts is not None)
        if batch.timer is not None:
            batch.timer.cancel()
        if batch.split and parts is None:
            self._again(batch, threaded=True)
        else:
            self._ended(batch, parts, error, took_s)
        self._flush()

    def _ended(self, batch: _Batch, parts: list[Outputs] | None, error: GraphError | None, took_s: float) -> None:
        if parts is None:
            if len(batch.requests) > 1 and not isinstance(error, GraphTimeoutError):
                self._again(batch, threaded=False)
                return
            for request in batch.requests:
                request.batch = None
                if not request.future.done():
                    request.future.set_exception(error or GraphError("the graph failed"))
            return
        # On a machine that others use too a run may take long by the clock; a thread would not make it shorter.
        self._cost.learn(batch.run.tokens, batch.cpu_s if self._engine.on_cpu else took_s)
        if self.observer is not None:
            self.observer.ran(batch.rows, took_s)
        for request, part in zip(batch.requests, parts, strict=True):
            request.batch = None
            if not request.future.done():
                if request.trace is not None:
                    request.trace.add("queue", request.asked_s, batch.begun_s)
                    request.trace.add("graph", batch.begun_s, batch.begun_s + took_s,
                                      **{"batch.rows": batch.rows, "batch.requests": len(batch.requests)})  # fmt: skip
                request.future.set_result(part)

    def _again(self, batch: _Batch, *, threaded: bool) -> None:
        """Run the requests of a batch again, each alone, before all others."""
        now_s = time.monotonic()
        for request in reversed(batch.requests):
            request.batch = None
            if request.future.done():
                continue
            if request.deadline_s <= now_s:
                self._expire(request)
                continue
            request.alone = True
            request.threaded = request.threaded or threaded
            self._queue.put_first(request)
        if self._loop is not None:
            self._flush_later(self._loop)

    def _arm(self, request: _Request, loop: asyncio.AbstractEventLoop) -> None:
        """Only what does not run at once needs a timer."""
        if request.timer is None and request.limit_s < math.inf:
            request.timer = loop.call_later(max(0.0, request.deadline_s - time.monotonic()), self._expire, request)


class _Watchdog:
    """Ends runs on the event loop that take too long, from a thread that sleeps while there are none."""

    _TICK_S = 0.02

    def __init__(self) -> None:
        self._run: tuple[Ticket, float] | None = None
        self._runs = 0
        self._awake = threading.Event()
        self._closed = False
        self._thread: threading.Thread | None = None

    def watch(self, ticket: Ticket, until_s: float) -> None:
        """Revoke ``ticket`` after ``until_s`` (monotonic) unless :meth:`rest` was called."""
        self._run = (ticket, until_s)
        self._runs += 1
        if not self._awake.is_set():
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
                self._thread.start()
            self._awake.set()

    def rest(self) -> None:
        self._run = None

    def close(self) -> None:
        self._closed = True
        self._awake.set()

    def _work(self) -> None:
        while not self._closed:
            self._awake.wait()
            seen, idle = -1, 0
            while idle < 50 and not self._closed:
                run = self._run
                if run is not None and time.monotonic() >= run[1]:
                    run[0].revoke()
                idle = idle + 1 if seen == self._runs and run is None else 0
                seen = self._runs
                time.sleep(self._TICK_S)
            if not self._closed:
                self._awake.clear()
                if self._run is not None or seen != self._runs:
                    self._awake.set()
