"""Reading Envoy's logs: what each attempt and each outcome was, counted by version.

An attempt is one request that the gateway sent to a replica; an outcome is what the shopper got after retries.
A canary that fails a quarter of its attempts fails about one shopper in a hundred: only attempts tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import orjson

from endcap.errors import from_os_error
from serving.gateway.settings import label_of

__all__ = ["Attempt", "AttemptCounts", "Outcome", "Tail", "Tally", "parse_attempt", "parse_outcome"]

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
class AttemptCounts:
    """Attempts of one version so far; ``within_ms``: answered ones in at most that time, by threshold."""

    good: int = 0
    total: int = 0
    within_ms: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))


class Tally:
    """Cumulative counts by version, fed with log lines as they come."""

    def __init__(self, thresholds_ms: Sequence[int] = ()) -> None:
        self._thresholds = tuple(sorted(set(thresholds_ms)))
        self._good: dict[str, int] = {}
        self._total: dict[str, int] = {}
        self._within: dict[str, dict[int, int]] = {}
        self.outcomes_good = 0
        self.outcomes_total = 0
        self.damaged_lines = 0
        """Lines that could not be read: a gateway killed in the middle of a write leaves one."""

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
            if attempt.route not in _SHOPPER_ROUTES or attempt.cut_by_client or "DC" in attempt.flags:
                continue
            self.outcomes_total += 1
            self.outcomes_good += attempt.answered
            label = label_of(attempt.cluster)
            if label is not None and "UH" in attempt.flags and attempt.host is None:
                # None of the version's replicas could be tried: no line among the attempts tells of it.
                self._count(label, attempt)

    def _count(self, label: str, attempt: Attempt) -> None:
        self._total[label] = self._total.get(label, 0) + 1
        within = self._within.setdefault(label, dict.fromkeys(self._thresholds, 0))
        self._good.setdefault(label, 0)
        if attempt.answered:
            self._good[label] += 1
            for threshold in self._thresholds:
                within[threshold] += attempt.duration_ms <= threshold

    def versions(self) -> dict[str, AttemptCounts]:
        return {
            label: AttemptCounts(self._good[label], total, MappingProxyType(dict(self._within[label])))
            for label, total in self._total.items()
        }


class Tail:
    """New whole lines of a file that another process appends to.

    A torn last line waits for its rest; a file that was replaced or cut is read from its beginning; one that is not
    there yet is empty.
    """

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self.path = path
        self._offset = offset
        """After the last whole line: what is torn is read again, since its writer may die and it be cut off."""
        self._inode: int | None = None

    def lines(self, *, chunk_bytes: int = 1 << 20) -> list[bytes]:
        """The lines completed since the last call.

        Raises:
            StorageError: the file is there and cannot be read.
        """
        found: list[bytes] = []
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (self._inode is not None and status.st_ino != self._inode) or status.st_size < self._offset:
                    self._offset = 0
                self._inode = status.st_ino
                file.seek(self._offset)
                rest = b""
                while chunk := file.read(chunk_bytes):
                    *whole, rest = (rest + chunk).split(b"\n")
                    self._offset += sum(len(line) + 1 for line in whole)
                    found.extend(line for line in whole if line)
        except FileNotFoundError:
            return found
        except OSError as error:
            raise from_os_error(error, doing=f"reading {self.path}") from error
        return found
