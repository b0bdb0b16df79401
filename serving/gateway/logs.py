"""Reading Envoy's logs: what each attempt and each outcome was, counted by version.

An attempt is one request that the gateway sent to a replica; an outcome is what the shopper got after retries.
A canary that fails a quarter of its attempts fails about one shopper in a hundred: only attempts tell.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import orjson

from endcap.errors import from_os_error
from serving.gateway.settings import label_of

__all__ = [
    "Attempt", "Mark", "Outcome", "Tail", "Tally", "TallyCounts", "VersionCounts", "parse_attempt", "parse_outcome",
]  # fmt: skip

_SHOPPER_ROUTES = frozenset({"recommend", "infer"})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request to one replica. ``code`` 0: no answer (timeout, reset, refused); ``flags`` then say why."""

    at_s: float
    request_id: str | None
    route: str | None
    cluster: str | None
    host: str | None
    code: int
    flags: tuple[str, ...]
    duration_ms: float

    @property
    def answered(self) -> bool:
        """An answer that is no server error and no refusal for load (429)."""
        return 0 < self.code < 500 and self.code != 429

    @property
    def cut_by_client(self) -> bool:
        """The shopper went away before an answer: nobody's failure and nobody's success."""
        return self.code == 0 and (not self.flags or "DC" in self.flags)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one shopper's request came to. ``attempts`` 0: no replica could even be tried."""

    attempt: Attempt
    attempts: int


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    return float(value)


def _fields(line: bytes) -> Mapping[str, object]:
    document = orjson.loads(line)
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def _attempt(document: Mapping[str, object]) -> Attempt:
    flags = _text(document.get("flags")) or "-"
    return Attempt(
        at_s=_number(document["at_s"]),
        request_id=_text(document.get("request_id")),
        route=_text(document.get("route")),
        cluster=_text(document.get("cluster")),
        host=_text(document.get("host")),
        code=int(_number(document.get("code") or 0)),
        flags=() if flags == "-" else tuple(flags.split(",")),
        duration_ms=_number(document.get("duration_ms") or 0),
    )


def parse_attempt(line: bytes) -> Attempt | None:
    """A line of ``attempts.jsonl``; None when it is damaged."""
    try:
        return _attempt(_fields(line))
    except (ValueError, KeyError, OverflowError):
        return None


def parse_outcome(line: bytes) -> Outcome | None:
    """A line of ``access.jsonl``; None when it is damaged."""
    try:
        document = _fields(line)
        return Outcome(_attempt(document), int(_number(document.get("attempts") or 0)))
    except (ValueError, KeyError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class VersionCounts:
    """One version so far. ``good`` of ``total`` attempts were answered, ``within_ms`` of them in at most that time, by
    threshold; ``requests_good`` of ``requests_total`` requests that the gateway gave it were answered in the end, and
    ``first_good`` of ``first_total`` at their first attempt."""

    good: int = 0
    total: int = 0
    within_ms: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    requests_good: int = 0
    requests_total: int = 0
    first_good: int = 0
    first_total: int = 0


@dataclass(frozen=True, slots=True)
class TallyCounts:
    """All that a :class:`Tally` has counted. ``damaged_lines``: lines that could not be read; a gateway killed in the
    middle of a write leaves one."""

    versions: Mapping[str, VersionCounts] = field(default_factory=lambda: MappingProxyType({}))
    outcomes_good: int = 0
    outcomes_total: int = 0
    damaged_lines: int = 0


@dataclass(slots=True)
class _Running:
    within_ms: dict[int, int]
    good: int = 0
    total: int = 0
    requests_good: int = 0
    requests_total: int = 0
    first_good: int = 0
    first_total: int = 0


class Tally:
    """Cumulative counts by version, fed with log lines as they come. ``begin``: what was counted before."""

    def __init__(self, thresholds_ms: Sequence[int] = (), *, begin: TallyCounts | None = None) -> None:
        begin = begin or TallyCounts()
        self._thresholds = tuple(sorted(set(thresholds_ms)))
        self._versions = {
            label: _Running(
                {ms: counts.within_ms.get(ms, 0) for ms in self._thresholds},
                counts.good, counts.total, counts.requests_good, counts.requests_total,
                counts.first_good, counts.first_total,
            )
            for label, counts in begin.versions.items()
        }  # fmt: skip
        self.outcomes_good = begin.outcomes_good
        self.outcomes_total = begin.outcomes_total
        self.damaged_lines = begin.damaged_lines

    def add_attempts(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            attempt = parse_attempt(line)
            if attempt is None:
                self.damaged_lines += 1
                continue
            label = label_of(attempt.cluster)
            if label is not None and not attempt.cut_by_client:
                self._count(label, attempt)

    def add_outcomes(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            outcome = parse_outcome(line)
            if outcome is None:
                self.damaged_lines += 1
                continue
            attempt = outcome.attempt
            if attempt.route not in _SHOPPER_ROUTES:
                continue
            cut, label = attempt.cut_by_client or "DC" in attempt.flags, label_of(attempt.cluster)
            if label is not None and (outcome.attempts > 1 or not cut):  # one that was retried had failed by then
                version = self._version(label)
                version.first_total += 1
                version.first_good += attempt.answered and outcome.attempts <= 1
            if cut:
                continue
            self.outcomes_total += 1
            self.outcomes_good += attempt.answered
            if label is None:
                continue
            version = self._version(label)
            version.requests_total += 1
            version.requests_good += attempt.answered
            if "UH" in attempt.flags and attempt.host is None:
                # None of the version's replicas could be tried: no line among the attempts tells of it.
                self._count(label, attempt)

    def _version(self, label: str) -> _Running:
        version = self._versions.get(label)
        if version is None:
            version = self._versions[label] = _Running(dict.fromkeys(self._thresholds, 0))
        return version

    def _count(self, label: str, attempt: Attempt) -> None:
        version = self._version(label)
        version.total += 1
        if attempt.answered:
            version.good += 1
            for threshold in self._thresholds:
                version.within_ms[threshold] += attempt.duration_ms <= threshold

    def versions(self) -> dict[str, VersionCounts]:
        return {
            label: VersionCounts(
                v.good, v.total, dict(v.within_ms), v.requests_good, v.requests_total, v.first_good, v.first_total
            )
            for label, v in self._versions.items()
        }  # fmt: skip

    def counts(self) -> TallyCounts:
        return TallyCounts(self.versions(), self.outcomes_good, self.outcomes_total, self.damaged_lines)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a file was read: its inode (None: no file was seen yet) and the bytes of its whole lines."""

    inode: int | None = None
    offset: int = 0


class Tail:
    """New whole lines of a file that another process appends to.

    A torn last line waits for its rest; a file that was replaced or cut is read from its beginning; one that is not
    there yet is empty. What was left to read in a file that was rotated to ``<name>.1`` is read first.
    """

    def __init__(self, path: Path, *, offset: int = 0, inode: int | None = None) -> None:
        self.path = path
        self._offset = offset
        """After the last whole line: what is torn is read again, since its writer may die and it be cut off."""
        self._inode = inode

    @property
    def mark(self) -> Mark:
        return Mark(self._inode, self._offset)

    def lines(self, *, chunk_bytes: int = 1 << 20, at_most_bytes: int | None = None) -> list[bytes]:
        """The lines completed since the last call; with ``at_most_bytes`` about so many of them, the rest later.

        Raises:
            StorageError: the file is there and cannot be read.
        """
        found: list[bytes] = []
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if self._inode is not None and status.st_ino != self._inode:
                    self._finish_rotated(found, chunk_bytes)
                    self._offset = 0
                elif status.st_size < self._offset:
                    self._offset = 0
                self._inode = status.st_ino
                self._take(file, found, chunk_bytes, at_most_bytes)
        except FileNotFoundError:
            return found
        except OSError as error:
            raise from_os_error(error, doing=f"reading {self.path}") from error
        return found

    def _finish_rotated(self, found: list[bytes], chunk_bytes: int) -> None:
        with (
            contextlib.suppress(FileNotFoundError),
            self.path.with_name(f"{self.path.name}.1").open("rb") as file,
        ):
            if os.fstat(file.fileno()).st_ino == self._inode:
                self._take(file, found, chunk_bytes, None)

    def _take(self, file: BinaryIO, found: list[bytes], chunk_bytes: int, at_most_bytes: int | None) -> None:
        begin = self._offset
        file.seek(begin)
        rest = b""
        while chunk := file.read(chunk_bytes):
            *whole, rest = (rest + chunk).split(b"\n")
            self._offset += sum(len(line) + 1 for line in whole)
            found.extend(line for line in whole if line)
            if at_most_bytes is not None and self._offset - begin >= at_most_bytes:
                return
