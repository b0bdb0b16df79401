"""Requests that wait: which are let in, which go together, which are too late to begin. Purely: the clock is passed in.

A request is let in while what is ahead of it, at the pace of late, leaves it time to be answered within its deadline.
So the number that may wait follows from what can be answered, and rises and falls with it. A batch is no larger than
it pays to be: a long run makes everyone wait for its end, also those who could not be answered then.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from serving.server.overload import CostModel, Pace
from serving.server.shapes import Extent

__all__ = ["Entry", "Limits", "Priority", "Run", "Waiting"]

_FREE_PADDING = 256
"""Tokens of padding that a batch may hold in any case; beyond them at most a third of it may be padding."""
_AHEAD = 2
"""Batches of the largest size: of so many requests those that are nearest in length go together."""
_RUN_SHARE = 0.25
"""Of the time that a request has, one run may take so much; the rest is for waiting."""
_MEAN_SHARE = 0.05
"""Of the newest request in the mean."""
_DOOMED_SHARE = 0.75
"""A request with less time left than so much of a usual run is not begun while others wait: a batch is made smaller for
who has little time, but never so small that all others are late for it."""


class Priority(enum.Enum):
    """Who asks. Batch jobs run when no shopper waits, and are turned away first."""

    SHOPPER = "shopper"
    BATCH = "batch"

    @property
    def wait_share(self) -> float:
        """Of the time that a request has, what is ahead of it and its own run may be expected to take so much."""
        return 0.5 if self is Priority.SHOPPER else 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """``workers``: threads that run the graph. ``lanes``: runs that should go at once (the cores given over the
    threads a run takes); the other workers stand by for when one is stalled. ``max_wait_s``: how long a request may
    be held to gather others while another lane works. ``max_waiting``: requests in the server; beyond them they are
    turned away. ``max_tokens``: rows times the longest row of a batch. ``max_run_s``: processor time that a batch is
    expected to take at most, where smaller ones are about as efficient. ``timeout_s``: waiting and running."""

    workers: int = 2
    timeout_s: float = 2.0
    max_rows: int = 64
    max_tokens: int = 16_384
    max_wait_s: float = 0.002
    max_waiting: int = 256
    lanes: int = 1
    max_run_s: float = 0.1


class Entry:
    """A request as the queue sees it. ``alone``: it must not share a run. ``threaded``: nor run on the event loop."""

    __slots__ = ("alone", "asked_s", "deadline_s", "extent", "limit_s", "priority", "threaded")

    def __init__(self, extent: Extent, priority: Priority, now_s: float, limit_s: float) -> None:
        self.extent = extent
        self.priority = priority
        self.asked_s = now_s
        self.limit_s = limit_s
        self.deadline_s = now_s + limit_s
        self.alone = False
        self.threaded = False

    @property
    def gone(self) -> bool:
        """Whether nobody waits for its answer any more."""
        return False

    @property
    def tokens(self) -> int:
        return self.extent.rows * self.extent.length


E = TypeVar("E", bound=Entry)


class Run(Generic[E]):
    """Requests that go together. ``tokens``: padding included. ``expected_s``: processor time; infinity: not known.

    ``since_s``: from when its time counts; the run before it may have ended later. ``overdue``: it is stalled, and
    nobody waits for its lane.
    """

    __slots__ = ("entries", "expected_s", "overdue", "since_s", "tokens")

    def __init__(self, entries: list[E], tokens: int, expected_s: float, since_s: float) -> None:
        self.entries = entries
        self.tokens = tokens
        self.expected_s = expected_s
        self.since_s = since_s
        self.overdue = False


class Waiting(Generic[E]):
    """See the module."""

    def __init__(self, limits: Limits, cost: CostModel, *, joinable: bool = True) -> None:
        self._limits = limits
        self._cost = cost
        self._pace = Pace()
        self._joinable = joinable
        self._runs: set[Run[E]] = set()
        self._ended_s = -math.inf
        self._idle = True
        self._queues: dict[Priority, deque[E]] = {priority: deque() for priority in Priority}
        self._tokens = dict.fromkeys(Priority, 0)
        self._mean_tokens = 16.0

    def __bool__(self) -> bool:
        return any(self._queues.values())

    def __iter__(self) -> Iterator[E]:
        for queue in self._queues.values():
            yield from queue

    @property
    def next_queue(self) -> deque[E]:
        """Whose turn it is, in order of arrival."""
        return self._queues[Priority.SHOPPER] or self._queues[Priority.BATCH]

    # -- letting in

    def refused(self, priority: Priority, limit_s: float, now_s: float, *, inside: int,
                tokens: int | None = None) -> float | None:  # fmt: skip
        """How long an answer would take (seconds) where a request is to be turned away; None: let it in.

        Args:
            limit_s: how long its sender waits. inside: requests in the server, those that run included.
            tokens: the request's; None: as they are on average.
        """
        limits = self._limits
        full = inside >= (limits.max_waiting if priority is Priority.SHOPPER else limits.max_waiting // 2)
        if not full and inside < limits.lanes:  # what runs take is learned from runs: a free lane takes whoever comes
            return None
        wait_s = self.wait_s(priority, limit_s, now_s, tokens)
        return wait_s if full or wait_s > priority.wait_share * limit_s else None

    def wait_s(self, priority: Priority, limit_s: float, now_s: float, tokens: int | None = None) -> float:
        """How long an answer is expected to take by the clock.

        A run that takes longer than the pace may take as long again; that says nothing of the runs after it.
        """
        ahead = self._tokens[Priority.SHOPPER] + (self._tokens[Priority.BATCH] if priority is Priority.BATCH else 0)
        times, overrun_s = self._pace.times, 0.0
        for run in self._runs:
            if not run.overdue:
                ahead += run.tokens
                if run.expected_s < math.inf:
                    elapsed_s = now_s - max(run.since_s, self._ended_s)
                    overrun_s = max(overrun_s, elapsed_s - times * run.expected_s)
        ahead += round(self._mean_tokens) if tokens is None else tokens
        return overrun_s + times * self._expect_all_s(ahead, limit_s)

    def _expect_all_s(self, tokens: int, limit_s: float) -> float:
        """Processor time of so many, in as many runs as it takes; 0: not known."""
        batch = self._batch_tokens(limit_s)
        expected_s = self._cost.expect_s(tokens if tokens <= batch else int(batch)) * max(1.0, tokens / batch)
        return 0.0 if math.isinf(expected_s) else expected_s

    def _batch_tokens(self, limit_s: float) -> float:
        """Of a batch of requests with so much time, when there is no lack of them."""
        limits, times = self._limits, self._pace.times
        most = limits.max_rows * self._mean_tokens if self._joinable else self._mean_tokens
        most = min(self._cost.enough(limits.max_run_s), limits.max_tokens, max(1.0, most))
        while most >= 2.0 * self._mean_tokens and times * self._cost.expect_s(int(most)) > _RUN_SHARE * limit_s:
            most /= 2.0
        return most

    @property
    def room(self) -> int:
        """Average requests that may be in the server at once, at the pace of late: for people to look at."""
        limits = self._limits
        each_s = self._pace.times * self._expect_all_s(round(256 * self._mean_tokens), limits.timeout_s) / 256
        if each_s <= 0.0:
            return limits.max_waiting
        return max(limits.lanes, min(limits.max_waiting, int(Priority.SHOPPER.wait_share * limits.timeout_s / each_s)))

    def put(self, entry: E) -> None:
        self._mean_tokens += _MEAN_SHARE * (entry.tokens - self._mean_tokens)
        self._tokens[entry.priority] += entry.tokens
        self._queues[entry.priority].append(entry)

    def put_first(self, entry: E) -> None:
        """Before all others: it was taken already."""
        self._tokens[entry.priority] += entry.tokens
        self._queues[entry.priority].appendleft(entry)

    def remove(self, entry: E) -> None:
        """Its sender has gone. Nothing where it does not wait."""
        queue = self._queues[entry.priority]
        try:
            queue.remove(entry)
        except ValueError:
            return
        self._tokens[entry.priority] -= entry.tokens

    def clear(self) -> None:
        for queue in self._queues.values():
            queue.clear()
        self._tokens = dict.fromkeys(Priority, 0)
        self._runs.clear()
        self._idle = True

    # -- taking out

    def take(self, now_s: float, late: Callable[[E], None], *, most_s: float = math.inf) -> Run[E] | None:
        """The next run, which begins now. None: nobody waits, or the next request alone would take over ``most_s``.

        Shoppers first, and who came first is always in it; with them go, of those who came next, the ones that are
        nearest in length, because what is padded is worked on too. ``late`` is told of those who stood first and cannot
        be answered in time any more.
        """
        queue = self.next_queue
        here = most_s < math.inf  # on the event loop: too short to look at the clock for
        enough, usual_s = (math.inf, 0.0) if here else self._usual(queue)
        first = self._first(queue, now_s, _DOOMED_SHARE * usual_s, late)
        if first is None or (here and (first.threaded or self._cost.expect_s(first.tokens) > most_s)):
            return None
        chosen, tokens = [first], first.tokens
        if len(queue) > 1 and self._joinable and not first.alone:
            chosen, tokens = self._joined(first, queue, now_s, enough, usual_s, most_s)
        if len(chosen) == len(queue):
            queue.clear()
        elif len(chosen) == 1:
            queue.popleft()
        else:
            taken = set(map(id, chosen))
            rest = [entry for entry in queue if id(entry) not in taken]
            queue.clear()
            queue.extend(rest)
        for entry in chosen:
            self._tokens[entry.priority] -= entry.tokens
        run = Run(chosen, tokens, self._cost.expect_s(tokens), now_s if self._idle else self._ended_s)
        self._idle = False
        self._runs.add(run)
        return run

    def _first(self, queue: deque[E], now_s: float, doomed_s: float, late: Callable[[E], None]) -> E | None:
        """Who stands first and can be answered. The last one is tried anyway: only runs teach what they take."""
        while queue:
            entry = queue[0]
            left_s = entry.deadline_s - now_s
            if not entry.gone and left_s > 0 and (left_s >= doomed_s or len(queue) == 1 or entry.alone):
                return entry
            queue.popleft()
            self._tokens[entry.priority] -= entry.tokens
            if not entry.gone:
                late(entry)
        return None

    def _joined(self, first: E, queue: deque[E], now_s: float, enough: float, usual_s: float,
                most_s: float) -> tuple[list[E], int]:  # fmt: skip
        """``first`` and those that go with it, and their tokens."""
        limits, cost, times = self._limits, self._cost, self._pace.times
        here = most_s < math.inf
        key, length = first.extent.key, first.extent.length
        left_s = first.deadline_s - now_s
        run_most_s = min(left_s, _RUN_SHARE * first.limit_s)
        chosen, rows, longest, own, tokens = [first], first.extent.rows, length, first.tokens, first.tokens
        run_s = cost.expect_s(tokens)
        ahead = islice(queue, 1, 1 + _AHEAD * limits.max_rows)
        for entry in sorted(ahead, key=lambda one: abs(one.extent.length - length)):
            extent = entry.extent
            left_s = entry.deadline_s - now_s
            if entry.gone or left_s <= _DOOMED_SHARE * usual_s or entry.alone or extent.key != key:
                continue
            new_longest = max(longest, extent.length)
            new_tokens, new_own = (rows + extent.rows) * new_longest, own + entry.tokens
            new_run_s = cost.expect_s(new_tokens)
            if here:
                if entry.threaded or new_run_s > most_s:
                    break
            elif new_run_s > run_s and (new_tokens > enough or times * new_run_s > min(run_most_s, left_s)):
                break
            if (
                rows + extent.rows > limits.max_rows
                or new_tokens > limits.max_tokens
                or new_tokens > max(1.5 * new_own, new_own + _FREE_PADDING)
            ):
                if rows >= limits.max_rows:
                    break
                continue
            chosen.append(entry)
            rows, longest, own, tokens, run_s = rows + extent.rows, new_longest, new_own, new_tokens, new_run_s
            run_most_s = min(run_most_s, left_s, _RUN_SHARE * entry.limit_s)
        return chosen, tokens

    def ended(self, run: Run[E], now_s: float, *, answered: bool) -> None:
        """A run is over. How long one took that gave no answers says at least that it was not quicker."""
        self._runs.discard(run)
        passed_s = now_s - max(run.since_s, self._ended_s)
        if answered or passed_s > self._pace.times * run.expected_s:
            self._pace.learn(run.expected_s, passed_s, now_s)
        self._ended_s = now_s
        self._idle = not self._runs and not self

    def _usual(self, queue: deque[E]) -> tuple[float, float]:
        """Tokens that are enough for a batch, and how long, by the clock, it would take with those who wait."""
        if not queue:
            return math.inf, 0.0
        first = queue[0]
        enough = self._cost.enough(self._limits.max_run_s)
        tokens = min(self._batch_tokens(first.limit_s), self._tokens[first.priority])
        own_s, usual_s = self._cost.expect_s(first.tokens), self._cost.expect_s(int(tokens))
        if math.isinf(usual_s):
            return enough, 0.0
        times = self._pace.times
        return enough, min(times * usual_s, max(times * own_s, _RUN_SHARE * first.limit_s))
