"""From raw samples of counters to events counted once: the pure part of every source.

A *scrape* is what one process said at one moment: good and total are only ever compared within it. Between two
scrapes of a process each counter's increment counts; what cannot be known counts for neither good nor total, so that
nothing is invented and no side is favoured:

- a counter that went back: the process restarted, so all that its counters hold now is new;
- a process seen for the first time: its first scrape is only where counting begins;
- a series born or gone between two scrapes of a process that went on: that one step says nothing (what the series
  counted before its first sample is unknown);
- a scrape that lacks a known series is passed over, a few in a row, in case the series comes back;
- a scrape that holds NaN, infinity or a negative number is passed over;
- after a gap the increment over it counts once; scrapes not newer than the last one folded count nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from endcap.evidence import Counts

__all__ = ["Folders", "Series", "SeriesFolder", "digest"]

_LARGEST = 2.0**53
"""Counters are floats: beyond this they do not count single events."""


def digest(*parts: str) -> str:
    """A short name for a set of labels, so that states stay small."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=9).hexdigest()


@dataclass(frozen=True, slots=True)
class Series:
    """Raw samples of one counter: (Unix time or any number that grows, value).

    ``process``: whose counter it is; samples of one process with the same time are one scrape. ``key``: which of its
    counters. ``copy``: which of several scrapers that see the same process. A series may be both good and total.
    """

    version: str
    process: str
    key: str
    good: bool
    total: bool
    samples: Sequence[tuple[float, float]]
    copy: str = ""


@dataclass(slots=True)
class _Process:
    """The last scrape that was folded. ``skipped``: newer ones, to ``skipped_s``, passed over for a missing series."""

    version: str
    copy: str
    at_s: float
    values: dict[str, float]
    skipped: int = 0
    skipped_s: float = 0.0


@dataclass(slots=True)
class _Scrape:
    values: dict[str, float] = field(default_factory=dict)
    good: set[str] = field(default_factory=set)
    total: set[str] = field(default_factory=set)
    usable: bool = True

    def add(self, series: Series, value: float) -> None:
        if series.key in self.values and self.values[series.key] != value:
            self.usable = False
        self.values[series.key] = value
        if series.good:
            self.good.add(series.key)
        if series.total:
            self.total.add(series.key)
        if not 0 <= value <= _LARGEST:  # NaN too
            self.usable = False


class SeriesFolder:
    """Good and total by version, cumulative, of one objective.

    Args:
        needs_good: a scrape without any good series says nothing. Else good series are some of the total ones, and
            none of them is none good.
        patience: scrapes in a row that may lack a known series before it is taken for gone.
        switch_after_s: the copy of a process that is followed may lag behind another by this much.
        max_series: counters remembered; the longest unseen are forgotten first.
    """

    def __init__(
        self,
        *,
        needs_good: bool,
        patience: int = 3,
        switch_after_s: float = 30.0,
        max_series: int = 2000,
    ) -> None:
        self._needs_good = needs_good
        self._patience, self._switch_after_s, self._max_series = patience, switch_after_s, max_series
        self._sums: dict[str, tuple[float, float]] = {}
        self._processes: dict[str, _Process] = {}
        self.passed_over: str | None = None
        """Why the newest scrape that was passed over was."""

    def fold(self, found: Iterable[Series], *, began_s: float) -> None:
        """Take samples in, in any order and as often as they come.

        ``began_s``: of a process seen for the first time, scrapes up to then are only where counting begins.
        """
        self.passed_over = None
        by_process: dict[str, dict[str, dict[float, _Scrape]]] = {}
        versions: dict[str, str] = {}
        for series in found:
            versions[series.process] = series.version
            scrapes = by_process.setdefault(series.process, {}).setdefault(series.copy, {})
            for at_s, value in series.samples:
                scrapes.setdefault(at_s, _Scrape()).add(series, value)
        for name, copies in by_process.items():
            usable = {copy: self._usable(scrapes) for copy, scrapes in copies.items()}
            self._fold_process(name, versions[name], {copy: some for copy, some in usable.items() if some}, began_s)
        self._forget()

    def _usable(self, scrapes: Mapping[float, _Scrape]) -> list[tuple[float, _Scrape]]:
        kept = []
        for at_s in sorted(scrapes):
            scrape = scrapes[at_s]
            if not scrape.usable:
                self.passed_over = "a counter holds no count (NaN, infinite, negative, or two values at once)"
            elif not scrape.total:
                self.passed_over = "good has samples where total has none"
            elif self._needs_good and not scrape.good:
                self.passed_over = "total has samples where good has none"
            else:
                kept.append((at_s, scrape))
        return kept

    def _fold_process(
        self, name: str, version: str, copies: Mapping[str, Sequence[tuple[float, _Scrape]]], began_s: float
    ) -> None:
        if not copies:
            return
        best = max(sorted(copies), key=lambda copy: copies[copy][-1][0])
        known = self._processes.get(name)
        if known is None:
            scrapes = copies[best]
            at_s, first = next((one for one in reversed(scrapes) if one[0] <= began_s), scrapes[0])
            known = self._processes[name] = _Process(version, best, at_s, dict(first.values))
            self._sums.setdefault(version, (0.0, 0.0))
        elif known.copy not in copies or copies[best][-1][0] - copies[known.copy][-1][0] > self._switch_after_s:
            if copies[best][-1][0] - known.at_s <= self._switch_after_s:
                return
            # The clocks of two scrapers differ, and what lies between their samples cannot be told from a restart:
            # the other copy's first scrape is a new beginning.
            at_s, first = next(one for one in copies[best] if one[0] > known.at_s)
            known.copy, known.at_s, known.values, known.skipped = best, at_s, dict(first.values), 0
        for at_s, scrape in copies[known.copy]:
            if at_s > known.at_s:
                self._step(known, at_s, scrape)

    def _step(self, known: _Process, at_s: float, scrape: _Scrape) -> None:
        last, values = known.values, scrape.values
        restarted = any(values[key] < last[key] for key in values if key in last)
        gone, born = last.keys() - values.keys(), values.keys() - last.keys()
        if gone and not restarted and (at_s <= known.skipped_s or known.skipped < self._patience):
            if at_s > known.skipped_s:
                known.skipped, known.skipped_s = known.skipped + 1, at_s
            self.passed_over = "a series that was there before is missing"
            return
        if restarted or not (gone or born):
            base: Mapping[str, float] = {} if restarted else last
            good, total = self._sums[known.version]
            good += sum(values[key] - base.get(key, 0.0) for key in scrape.good)
            total += sum(values[key] - base.get(key, 0.0) for key in scrape.total)
            self._sums[known.version] = (good, total)
        known.at_s, known.values, known.skipped = at_s, dict(values), 0

    def _forget(self) -> None:
        held = sum(len(process.values) for process in self._processes.values())
        for name in sorted(self._processes, key=lambda name: self._processes[name].at_s):
            if held <= self._max_series:
                break
            held -= len(self._processes.pop(name).values)
        if len(self._sums) > self._max_series:
            living = {process.version for process in self._processes.values()}
            self._sums = {version: sums for version, sums in self._sums.items() if version in living}

    @property
    def newest_s(self) -> float | None:
        """The time of the newest scrape folded; None before the first."""
        return max((process.at_s for process in self._processes.values()), default=None)

    def counts(self, *, since_s: float) -> dict[str, Counts]:
        """What was counted, of the versions that have a scrape at ``since_s`` or newer."""
        newest: dict[str, float] = {}
        for process in self._processes.values():
            newest[process.version] = max(newest.get(process.version, process.at_s), process.at_s)
        return {version: self._counts(version) for version, at_s in sorted(newest.items()) if at_s >= since_s}

    def _counts(self, version: str) -> Counts:
        good, total = self._sums[version]
        return Counts(min(int(good), int(total)), int(total))


class Folders:
    """One folder an objective, and when the source began."""

    def __init__(self, folders: Mapping[str, SeriesFolder]) -> None:
        self.by_name = dict(folders)
        self.began_s: float | None = None

    def fold(self, name: str, found: Iterable[Series], *, at_s: float) -> SeriesFolder:
        """``at_s``: the time that is asked about; that of the first answer is when counting begins."""
        if self.began_s is None:
            self.began_s = at_s
        folder = self.by_name[name]
        folder.fold(found, began_s=self.began_s)
        return folder
