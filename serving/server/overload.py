"""How much may wait, and for how long a run will take: decisions about overload, purely (the clock is passed in)."""

from __future__ import annotations

import math

__all__ = ["AdaptiveLimit", "CostModel"]


class AdaptiveLimit:
    """Additive increase, multiplicative decrease of the number of requests that may be in the server at once.

    The signal is the time that a request waited before its run began: unlike the whole latency it does not depend on
    how large the request is. As in TCP (Chiu and Jain, 1989) and Netflix' concurrency-limits (``AIMDLimit``); that a
    standing queue, not a burst, is what to act on is CoDel's lesson (Nichols and Jacobson, 2012): the limit falls only
    when *every* request of an interval waited longer than the target.

    Args:
        most: the limit at rest; never exceeded. least: never less.
        target_s: a queue time that is well.
        interval_s: how long a queue must stand.
    """

    def __init__(self, most: int, *, least: int, target_s: float = 0.1, interval_s: float = 0.1) -> None:
        self.limit = most
        self._most = most
        self._least = min(least, most)
        self._target_s = target_s
        self._interval_s = interval_s
        self._interval_ends_s = -math.inf
        self._shortest_s = math.inf

    def observe(self, queued_s: float, now_s: float, *, run_s: float = 0.0) -> None:
        """A request began to run after it had waited ``queued_s``.

        ``run_s``: what runs take of late. Who comes while a run goes on waits for its end and perhaps for another's,
        however short the queue: only more than that is a standing queue.
        """
        if now_s < self._interval_ends_s:
            self._shortest_s = min(self._shortest_s, queued_s)
            return
        if math.isinf(self._shortest_s) or self._shortest_s <= max(self._target_s, 2.0 * run_s):
            self.limit = min(self._most, self.limit + max(1, self._most // 32))
        else:
            self.limit = max(self._least, int(self.limit * 0.8))
        self._interval_ends_s = now_s + self._interval_s
        self._shortest_s = queued_s


class CostModel:
    """Seconds that a run takes by its size in tokens (rows times the longest row), learned from runs.

    One estimate a power of two. A run much slower than expected (a stall, a machine that took the core away) moves it
    little; runs that stay slow move it all the same.
    """

    _SHARE = 0.2
    _MOST_TIMES = 4.0

    def __init__(self) -> None:
        self._by_size: dict[int, float] = {}

    def learn(self, tokens: int, took_s: float) -> None:
        size = tokens.bit_length()
        known_s = self._by_size.get(size)
        if known_s is None:
            self._by_size[size] = took_s
        else:
            self._by_size[size] = known_s + self._SHARE * (min(took_s, self._MOST_TIMES * known_s) - known_s)

    def expect_s(self, tokens: int) -> float:
        """Infinity while nothing is known."""
        size = tokens.bit_length()
        known_s = self._by_size.get(size)
        if known_s is not None:
            return known_s
        below = max((other for other in self._by_size if other < size), default=None)
        if below is not None:
            return self._by_size[below] * 2.0 ** (size - below)
        return min((self._by_size[other] for other in self._by_size), default=math.inf)
