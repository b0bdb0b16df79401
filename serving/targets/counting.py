"""Counting what the gateway's logs say, kept so that a supervisor that starts again goes on and does not recount."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from endcap.errors import StateError
from endcap.files import read_json, write_json
from serving.gateway import GatewaySettings, Mark, Tail, Tally, TallyCounts
from serving.targets.config import Kept

__all__ = ["TALLY_FILE", "Counting", "take"]

TALLY_FILE = "tally.json"
_FORMAT = 2
"""Raised when more is counted: then the logs are counted again."""
_AT_ONCE_BYTES = 1 << 20
"""Lines taken in at once: some thousands, so that a long log does not stop the event loop."""

log = logging.getLogger("endcap.target")


class _TallyFile(BaseModel):
    """``F/tally.json``: counts, and how far the logs were read for them. Only a shortcut: the logs are the records."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int = _FORMAT
    thresholds_ms: tuple[int, ...]
    begin: tuple[int, int]
    """Where this target's lines begin in the attempts and in the outcomes."""
    attempts: Mark
    outcomes: Mark
    counts: TallyCounts


class Counting:
    """Attempts and outcomes by version since the target began. Use from one event loop."""

    def __init__(self, folder: Path, settings: GatewaySettings, thresholds_ms: tuple[int, ...], kept: Kept) -> None:
        self._path = folder / TALLY_FILE
        self._thresholds_ms = thresholds_ms
        self._begin = (kept.attempts_offset, kept.access_offset)
        self._lock = asyncio.Lock()
        logs = settings.attempts_log, settings.access_log
        saved = self._saved()
        if saved is not None and _goes_on(logs[0], saved.attempts) and _goes_on(logs[1], saved.outcomes):
            attempts, outcomes, self._tally = saved.attempts, saved.outcomes, Tally(thresholds_ms, begin=saved.counts)
        else:
            attempts, outcomes, self._tally = (
                Mark(None, self._begin[0]),
                Mark(None, self._begin[1]),
                Tally(thresholds_ms),
            )
        self._attempts = Tail(logs[0], offset=attempts.offset, inode=attempts.inode)
        self._outcomes = Tail(logs[1], offset=outcomes.offset, inode=outcomes.inode)
        self._kept_at = attempts, outcomes

    def _saved(self) -> _TallyFile | None:
        """What was kept, if it can be gone on from: the same thresholds, of the same target."""
        if not self._path.exists():
            return None
        try:
            saved = _TallyFile.model_validate(read_json(self._path))
        except (StateError, ValidationError) as error:
            log.warning("%s is damaged, so the gateway's logs are counted again: %s", self._path, type(error).__name__)
            return None
        fits = (saved.format, saved.thresholds_ms, saved.begin) == (_FORMAT, self._thresholds_ms, self._begin)
        return saved if fits else None

    async def read(self) -> TallyCounts:
        """Take in all lines that are whole by now.

        Raises:
            StorageError: a log cannot be read.
        """
        async with self._lock:
            for tail, add in (
                (self._attempts, self._tally.add_attempts), (self._outcomes, self._tally.add_outcomes),
            ):  # fmt: skip
                await take(tail, add)
            return self._tally.counts()

    async def save(self) -> None:
        """Keep the counts with the places that they stand for.

        Raises:
            StorageError: they cannot be written; those kept before still hold.
        """
        async with self._lock:
            marks = self._attempts.mark, self._outcomes.mark
            if marks == self._kept_at:
                return
            document = _TallyFile(
                thresholds_ms=self._thresholds_ms, begin=self._begin, attempts=marks[0], outcomes=marks[1],
                counts=self._tally.counts(),
            )  # fmt: skip
            await asyncio.to_thread(write_json, self._path, document.model_dump(mode="json"))
            self._kept_at = marks


async def take(tail: Tail, add: Callable[[Sequence[bytes]], None]) -> None:
    """Hand ``add`` all lines of ``tail`` that are whole by now, so many at once that the event loop is not stopped.

    Raises:
        StorageError: the file cannot be read.
    """
    more = True
    while more:
        lines = await asyncio.to_thread(tail.lines, at_most_bytes=_AT_ONCE_BYTES)
        add(lines)
        more = sum(map(len, lines)) + len(lines) >= _AT_ONCE_BYTES


def _goes_on(path: Path, mark: Mark) -> bool:
    """Whether ``path`` is the file that was read up to ``mark``, with all that was read of it."""
    if mark.inode is None:
        return True
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino == mark.inode and status.st_size >= mark.offset
    return False
