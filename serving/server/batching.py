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
import enum
import math
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from endcap.errors import EndcapError
from serving.server.engine import Engine, GraphError, GraphTimeoutError, Tensors, Ticket
from serving.server.overload import AdaptiveLimit, CostModel
from serving.server.shapes import BatchShape, Extent
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
_FREE_PADDING = 256
"""Tokens of padding that a batch may hold in any case; beyond them at most a third of it may be padding."""

Outputs = dict[str, NDArray[Any]]


class Priority(enum.Enum):
    """Who asks. Batch jobs run when no shopper waits, and are turned away first."""

    SHOPPER = "shopper"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Limits:
    """``workers``: threads that run the graph. ``lanes``: runs that should go at once (the cores given over the
    threads a run takes); the other workers stand by for when one is stalled. ``max_wait_s``: how long a request may
    be held to gather others while another lane works. ``max_waiting``: requests in the server; beyond them they are
    turned away. ``max_tokens``: rows times the longest row of a batch. ``timeout_s``: waiting and running."""

    workers: int = 2
    timeout_s: float = 2.0
    max_rows: int = 64
    max_tokens: int = 16_384
    max_wait_s: float = 0.002
    max_waiting: int = 256
    lanes: int = 1
    queue_target_s: float = 0.1


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


class _Request:
    __slots__ = ("alone", "asked_s", "batch", "deadline_s", "extent", "future", "inputs", "limit_s", "priority",
                 "threaded", "timer", "trace")  # fmt: skip

    def __init__(self, inputs: Tensors, extent: Extent, priority: Priority, now_s: float, limit_s: float,
                 future: asyncio.Future[Outputs]) -> None:  # fmt: skip
        self.inputs = inputs
        self.extent = extent
        self.priority = priority
        self.asked_s = now_s
        self.limit_s = limit_s
        self.deadline_s = now_s + limit_s
        self.future = future
        self.alone = False
        self.threaded = False
        self.timer: asyncio.TimerHandle | None = None
        self.batch: _Batch | None = None
        self.trace = CURRENT.get()


class _Batch:
    """Requests of one run. ``open``: of them, those that someone still waits for."""

    __slots__ = ("begun_s", "cpu_s", "expected_s", "open", "overdue", "requests", "rows", "split", "ticket", "timer",
                 "tokens")  # fmt: skip

    def __init__(self, requests: list[_Request], tokens: int, expected_s: float, ticket: Ticket) -> None:
        self.requests = requests
        self.rows = sum(request.extent.rows for request in requests)
        self.tokens = tokens
        self.expected_s = expected_s
        self.ticket = ticket
        self.begun_s = 0.0
        self.cpu_s = 0.0
        self.open = len(requests)
        self.overdue = False
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
        self.adaptive = AdaptiveLimit(limits.max_waiting, least=max(8, 2 * limits.lanes),
                                      target_s=limits.queue_target_s)  # fmt: skip
        self._engine = engine
        self._shape = shape
        self._cost = cost or CostModel()
        self._queues: dict[Priority, deque[_Request]] = {priority: deque() for priority in Priority}
        self._running: set[_Batch] = set()
        self._executor = ThreadPoolExecutor(limits.workers, thread_name_prefix="graph")
        self._watchdog = _Watchdog()
        weakref.finalize(self, self._watchdog.close)  # a package that was replaced leaves no thread behind
        self._loop: asyncio.AbstractEventLoop | None = None
        self._flush_soon = False
        self._gather: asyncio.TimerHandle | None = None
        self._inline_again_s = -math.inf
        self._each_s = 0.0
        self._run_s = 0.0
        self._closed = False

    # -- asking

    @property
    def crowded(self) -> bool:
        """Whether :meth:`admit` may refuse; cheap."""
        return 2 * self.waiting >= self.adaptive.limit - 1

    def admit(self, priority: Priority = Priority.SHOPPER) -> None:
        """Nothing, or why a request of ``priority`` would be turned away now. Cheap: ask before reading a body.

        Raises:
            OverloadedError: too many wait.
        """
        allowed = self.adaptive.limit if priority is Priority.SHOPPER else self.adaptive.limit // 2
        if self.waiting >= allowed:
            raise self._overloaded(priority)

    def _overloaded(self, priority: Priority) -> OverloadedError:
        wait_s = self.waiting * self._each_s
        return OverloadedError(f"{self.waiting} requests wait already", priority, min(30, max(1, math.ceil(wait_s))))

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
        self.admit(priority)
        limit_s = min(self.limits.timeout_s, within_s)
        if self.waiting * self._each_s > limit_s:  # it would be late before its turn
            raise self._overloaded(priority)
        now_s = time.monotonic()
        extent = self._shape.measure(inputs)
        request = _Request(inputs, extent, priority, now_s, limit_s, loop.create_future())
        self._queues[priority].append(request)
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
        for queue in self._queues.values():
            queue.clear()
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
            with contextlib.suppress(ValueError):
                self._queues[request.priority].remove(request)

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
        while self._waits():
            batch = self._take(now_s, INLINE_S) if now_s >= self._inline_again_s else None
            if batch is not None:
                self._run_here(batch)
                if self._waits():
                    self._flush_later(loop)  # the loop's other work in between
                return
            if not self._lane_free(loop, now_s):
                break
            batch = self._take(now_s, math.inf)
            if batch is not None:
                self._run_on_thread(batch, loop)
        for queue in self._queues.values():
            for request in queue:
                self._arm(request, loop)

    def _waits(self) -> bool:
        return any(self._queues.values())

    def _lane_free(self, loop: asyncio.AbstractEventLoop, now_s: float) -> bool:
        if len(self._running) >= self.limits.workers:
            return False
        working = sum(not batch.overdue for batch in self._running)
        if working >= self.limits.lanes:
            return False
        if working and self.limits.max_wait_s > 0:
            # Another lane works: hold on a moment to gather, if there is anything to gather for.
            queue = self._queues[Priority.SHOPPER] or self._queues[Priority.BATCH]
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
        """The next batch of at most ``most_s`` expected, or None when the next request alone takes longer.

        Shoppers first, in order of arrival; requests that do not fit the first one's keep their place.
        """
        queue = self._queues[Priority.SHOPPER] or self._queues[Priority.BATCH]
        chosen: list[_Request] = []
        passed: list[_Request] = []
        rows = tokens = own_tokens = longest = 0
        limits = self.limits
        inline = most_s < math.inf
        while queue:
            request = queue.popleft()
            if request.future.done():
                continue
            if request.deadline_s <= now_s:
                self._expire(request)
                continue
            extent = request.extent
            new_longest = max(longest, extent.length)
            new_tokens = (rows + extent.rows) * new_longest
            new_own = own_tokens + extent.rows * extent.length
            if inline and (request.threaded or self._cost.expect_s(new_tokens) > most_s):
                passed.append(request)
                break
            if chosen and not (
                extent.key == chosen[0].extent.key
                and rows + extent.rows <= limits.max_rows
                and new_tokens <= limits.max_tokens
                and new_tokens <= max(1.5 * new_own, new_own + _FREE_PADDING)
                and not request.alone
            ):
                passed.append(request)
                if rows >= limits.max_rows:
                    break
                continue
            chosen.append(request)
            rows, tokens, own_tokens, longest = rows + extent.rows, new_tokens, new_own, new_longest
            if request.alone or not self._shape.joinable:
                break
        queue.extendleft(reversed(passed))
        if not chosen:
            return None
        for request in chosen:
            waited_s = now_s - request.asked_s
            self.adaptive.observe(waited_s, now_s, run_s=self._run_s)
            if self.observer is not None:
                self.observer.queued(waited_s)
        batch = _Batch(chosen, tokens, self._cost.expect_s(tokens), self._engine.ticket())
        for request in chosen:
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
        if isinstance(error, GraphTimeoutError):
            self._inline_again_s = time.monotonic() + _DISTRUST_S
            self._again(batch, threaded=True)
        else:
            self._ended(batch, parts, error, took_s)

    def _run_on_thread(self, batch: _Batch, loop: asyncio.AbstractEventLoop) -> None:
        for request in batch.requests:
            self._arm(request, loop)
        self._running.add(batch)
        expected_s = 0.0 if math.isinf(batch.expected_s) else batch.expected_s
        batch.timer = loop.call_later(max(_OVERDUE_S, _OVERDUE_TIMES * expected_s), self._overdue, batch)

        def work() -> None:
            result = self._run(batch)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._back, batch, *result)

        self._executor.submit(work)

    def _overdue(self, batch: _Batch) -> None:
        """It takes far too long: the others need not wait for it, nor with it."""
        batch.overdue = True
        if batch.open > 1:
            batch.split = True
            batch.ticket.revoke()
        self._flush()

    def _back(self, batch: _Batch, parts: list[Outputs] | None, error: GraphError | None, took_s: float) -> None:
        if batch not in self._running:
            return
        self._running.discard(batch)
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
        self._cost.learn(batch.tokens, batch.cpu_s if self._engine.on_cpu else took_s)
        self._run_s += 0.1 * (took_s - self._run_s)
        self._each_s += 0.1 * (took_s / len(batch.requests) / self.limits.lanes - self._each_s)
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
            self._queues[request.priority].appendleft(request)
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
