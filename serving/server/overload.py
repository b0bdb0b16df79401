"""What runs take, and how much longer by the clock of late: what decisions about overload rest on, purely."""

from __future__ import annotations

import math

__all__ = ["CostModel", "Pace"]


class CostModel:
    """Seconds that a run takes by its size in tokens (rows times the longest row), learned from runs.

    One estimate a power of two. A run much slower than expected (a stall, a machine that took the core away) moves it
    little; runs that stay slow move it all the same.
    """

    _SHARE = 0.2
    _MOST_TIMES = 4.0
    _DEARER = 1.25
    """A token that costs so much more than in the best batch makes the batch too small."""

    def __init__(self) -> None:
        self._by_size: dict[int, float] = {}
        self._enough: tuple[float, float] | None = None

    def learn(self, tokens: int, took_s: float) -> None:
        self._enough = None
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
        below = sorted(other for other in self._by_size if other < size)
        if not below:
            return min(self._by_size.values(), default=math.inf)
        largest_s = self._by_size[below[-1]]
        if len(below) == 1:
            return float(largest_s * 2.0 ** (size - below[-1]))
        # On the line through the two largest known: a part of the time may be there whatever the size.
        token_s = max(0.0, largest_s - self._by_size[below[-2]]) / (2.0 ** below[-1] - 2.0 ** below[-2])
        return float(largest_s + token_s * (2.0**size - 2.0 ** below[-1]))

    def enough(self, within_s: float) -> float:
        """Tokens that a batch need not exceed, because a larger one makes all wait longer and gains little.

        The larger of what runs ``within_s`` and of the smallest size at which tokens are cheap. A size that was never
        run and might be better is tried.
        """
        if self._enough is not None and self._enough[0] == within_s:
            return self._enough[1]
        self._enough = within_s, self._find_enough(within_s)
        return self._enough[1]

    def _find_enough(self, within_s: float) -> float:
        if not self._by_size:
            return math.inf
        each_s = {size: took_s / 2.0**size for size, took_s in self._by_size.items()}
        best_s = min(each_s.values())
        cheap = min(size for size, token_s in each_s.items() if token_s <= self._DEARER * best_s)
        size = max((size for size, took_s in self._by_size.items() if took_s <= within_s), default=cheap)
        size = max(size, cheap)
        if size + 1 not in self._by_size:
            size += 1
        return float((1 << size) - 1)


class Pace:
    """How many times longer answers take by the clock than their runs were expected to; 1 at first.

    The ratio of two sums that fade: of the time from one run's end to the next while something waited, and of what
    those runs were expected to take. Whatever slows answering is in it: others on the same cores, the event loop's
    own work, threads of the graph; and several lanes at once, which make it faster. One stall is no pace: a run
    counts as four times slower than the pace at most, and what stays slow is followed all the same.
    """

    _FADE_S = 0.5
    _MOST_TIMES = 4.0

    def __init__(self) -> None:
        self.times = 1.0
        self._passed_s = 0.0
        self._expected_s = 0.0
        self._at_s = -math.inf

    def learn(self, expected_s: float, passed_s: float, now_s: float) -> None:
        """A run ended ``passed_s`` after the one before it, or after it began if nothing had waited."""
        if not 0.0 < expected_s < math.inf:
            return
        passed_s = min(passed_s, self._MOST_TIMES * self.times * expected_s)
        kept = math.exp(min(0.0, self._at_s - now_s) / self._FADE_S)
        self._passed_s = kept * self._passed_s + passed_s
        self._expected_s = kept * self._expected_s + expected_s
        self._at_s = now_s
        self.times = self._passed_s / self._expected_s
