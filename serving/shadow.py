"""The comparator: joins what the serving version and a shadow answered to the same requests, line by line.

Pure: fed with lines of answers logs in whatever order they come, and a clock. It keeps sums of constant size, and of
answers only those that still wait for their counterpart.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import orjson

from serving.targets.base import Counts, ShadowObservation

__all__ = ["Comparator"]

_MAX_LINE_BYTES = 64 * 1024
_MAX_TEXT = 256
_MAX_ITEMS = 1000
_MAX_NUMBER = 1e100
_MAX_DRIFT = 1e6


@dataclass(frozen=True, slots=True)
class _Line:
    request_id: str
    version: str
    shadow: bool
    code: int
    ms: float
    scores: dict[str, float]
    """By item, best first, the first k."""

    @property
    def answered(self) -> bool:
        """No server error and no refusal for load, as the gateway's attempts are judged."""
        return self.code < 500 and self.code != 429

    @property
    def recommends(self) -> bool:
        return 200 <= self.code < 300


@dataclass(slots=True)
class _Waiting:
    """One request. ``since_s``: when the first of its answers was seen."""

    since_s: float
    serving: _Line | None = None
    shadow: _Line | None = None


class Comparator:
    """What a shadow made of the requests that it got copies of.

    A request counts once the serving version's answer is known and the shadow's too, or ``patience_s`` has gone by.
    The shadow has answered it when it recommends something where the serving version did, and makes no server error
    where that did not. Both recommending are a pair; a serving answer that failed waits for that of a retry. An answer
    of the shadow alone counts nowhere: whether it was asked what shoppers asked is not known.

    The spread of the serving version's scores is their standard deviation over all that was compared.

    Args:
        version: label of the shadow's version.
        serving: labels whose answers it is compared with; None: every other version's.
        thresholds_ms: for ``within_ms``.
        k: answers are compared by their first k items.
        patience_s: how long after a serving answer was seen the shadow's may come.
        max_pending: most requests that wait at once; of more than these the oldest are forgotten, and count nowhere.
            As many that are done are remembered, so that a line that comes again counts once.
    """

    def __init__(
        self,
        version: str,
        serving: Collection[str] | None = None,
        *,
        thresholds_ms: Sequence[int] = (),
        k: int = 10,
        patience_s: float = 5.0,
        max_pending: int = 10_000,
    ) -> None:
        self.version = version
        self.damaged_lines = 0
        """Lines that could not be read, or were of no version that is compared."""
        self.forgotten = 0
        """Requests that gave way to newer ones before both answers were known."""
        self._serving = None if serving is None else frozenset(serving)
        self._k = k
        self._patience_s = patience_s
        self._max_pending = max_pending
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()  # oldest first
        self._done: OrderedDict[str, None] = OrderedDict()
        self._now_s = -math.inf
        self._answered = self._copied = 0
        self._within_ms = dict.fromkeys(sorted(set(thresholds_ms)), 0)
        self._pairs = 0
        self._overlap = 0.0
        self._difference, self._common = 0.0, 0
        self._scores, self._mean, self._squares = 0, 0.0, 0.0  # Welford's sums of the serving version's scores

    def add(self, lines: Iterable[bytes], now_s: float) -> None:
        """Take lines as they are found at ``now_s``, by a clock that never goes back (one that does stands still).

        Nothing is given up here: lines of another log that are as old may be added next. :meth:`observe` does.
        """
        self._now_s = max(self._now_s, now_s)
        for raw in lines:
            line = _parse(raw, self._k)
            if line is None or not self._compared(line):
                self.damaged_lines += 1
            elif line.request_id not in self._done:
                self._take(line)

    def observe(self) -> ShadowObservation:
        """The counts as of the time of the last :meth:`add`."""
        while self._waiting:
            request_id, oldest = next(iter(self._waiting.items()))
            if oldest.since_s + self._patience_s > self._now_s:
                break
            self._end(request_id)
        spread = math.sqrt(self._squares / self._scores) if self._scores else 0.0
        mean_difference = self._difference / self._common if self._common else 0.0
        return ShadowObservation(
            version=self.version,
            answered=Counts(self._answered, self._copied),
            within_ms={ms: Counts(count, self._answered) for ms, count in self._within_ms.items()},
            pairs=self._pairs,
            overlap=self._overlap / self._pairs if self._pairs else 0.0,
            score_drift=_ratio(mean_difference, spread),
        )

    def _compared(self, line: _Line) -> bool:
        if line.shadow:
            return line.version == self.version
        return line.version != self.version if self._serving is None else line.version in self._serving

    def _take(self, line: _Line) -> None:
        waiting = self._waiting.get(line.request_id)
        if waiting is None:
            waiting = self._waiting[line.request_id] = _Waiting(self._now_s)
            if len(self._waiting) > self._max_pending:
                self._give_way()
        if line.shadow:
            waiting.shadow = waiting.shadow or line
        elif waiting.serving is None or (line.answered and not waiting.serving.answered):
            waiting.serving = line
        if waiting.shadow is not None and waiting.serving is not None and waiting.serving.answered:
            self._end(line.request_id)

    def _give_way(self) -> None:
        request_id, oldest = next(iter(self._waiting.items()))
        if oldest.serving is not None and oldest.since_s + self._patience_s > self._now_s:
            self.forgotten += 1
            oldest.serving = None
        self._end(request_id)

    def _end(self, request_id: str) -> None:
        """Count a request of which nothing more is waited for."""
        waiting = self._waiting.pop(request_id)
        self._done[request_id] = None
        if len(self._done) > self._max_pending:
            self._done.popitem(last=False)
        serving, shadow = waiting.serving, waiting.shadow
        if serving is None:
            return
        self._copied += 1
        if shadow is None or not (shadow.recommends if serving.recommends else shadow.answered):
            return
        self._answered += 1
        for threshold_ms in self._within_ms:
            self._within_ms[threshold_ms] += shadow.ms <= threshold_ms
        if serving.recommends and shadow.recommends:
            self._pair(serving.scores, shadow.scores)

    def _pair(self, serving: dict[str, float], shadow: dict[str, float]) -> None:
        common = serving.keys() & shadow.keys()
        longer = max(len(serving), len(shadow))
        self._pairs += 1
        self._overlap += len(common) / longer if longer else 1.0
        self._difference += math.fsum(abs(serving[item] - shadow[item]) for item in common)
        self._common += len(common)
        for score in serving.values():
            self._scores += 1
            step = score - self._mean
            self._mean += step / self._scores
            self._squares += step * (score - self._mean)


def _ratio(difference: float, spread: float) -> float:
    """``difference / spread``, finite; scores that do not spread at all make any difference a large one."""
    if difference == 0:
        return 0.0
    return min(difference / spread, _MAX_DRIFT) if spread > 0 else _MAX_DRIFT


def _parse(raw: bytes, k: int) -> _Line | None:
    """A line of an answers log; None when it is damaged."""
    if len(raw) > _MAX_LINE_BYTES:
        return None
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if type(document) is not dict:
        return None
    request_id, version, shadow = document.get("request_id"), document.get("version"), document.get("shadow")
    code, ms, scores = (
        document.get("code"),
        document.get("ms"),
        _first(document.get("items"), document.get("scores"), k),
    )
    if not _is_name(request_id) or not _is_name(version) or type(shadow) is not bool or scores is None:
        return None
    if type(code) is not int or not 100 <= code <= 599 or not _is_number(ms) or ms < 0:
        return None
    return _Line(request_id, version, shadow, code, float(ms), scores)


def _first(items: object, scores: object, k: int) -> dict[str, float] | None:
    """The first k items, each once, with their scores; None where the two are not lists that fit."""
    if type(items) is not list or type(scores) is not list or len(items) != len(scores) or len(items) > _MAX_ITEMS:
        return None
    found: dict[str, float] = {}
    for item, score in zip(items, scores, strict=True):
        if not _is_name(item) or not _is_number(score):
            return None
        if len(found) < k:
            found.setdefault(item, float(score))
    return found


def _is_name(value: object) -> TypeGuard[str]:
    return type(value) is str and 0 < len(value) <= _MAX_TEXT


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER
