"""Files that may change under a running server: reread when they do, and never worse than what was read before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from endcap.errors import EndcapError, InputError

__all__ = ["Watched", "keep_fresh", "read_bounded"]

log = logging.getLogger("serving.watched")

T = TypeVar("T")

_Stamp = tuple[int, int, int, int]


class Watched(Generic[T]):
    """The value of a file. ``value`` is replaced whole, so a reader sees the old one or the new one, never a mix.

    Args:
        read: reads the file; its :class:`EndcapError` at the start is the caller's, later ones are counted in
            ``failures`` (one for each state of the file) and the last good value stays.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self.path = path
        self.failures = 0
        self._read = read
        self._stamp = _stamp(path)
        self.value = read(path)

    def refresh(self) -> bool:
        """Reread the file when it changed since it was last read; True when ``value`` is new. Blocks."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # taken before reading: a change meanwhile is seen the next time
        try:
            self.value = self._read(self.path)
        except EndcapError as error:
            self.failures += 1
            log.warning("%s cannot be used, what was read before stays: %s", self.path.name, error.what)
            return False
        log.info("%s was read again", self.path.name)
        return True


async def keep_fresh(files: Callable[[], Sequence[Watched[Any]]], *, on_failure: Callable[[], None],
                     every_s: float = 1.0) -> None:  # fmt: skip
    """Refresh ``files()`` for ever, off the event loop. ``on_failure``: one could not be used, now that it changed."""
    while True:
        await asyncio.sleep(every_s)
        for file in files():
            failures = file.failures
            await asyncio.to_thread(file.refresh)
            for _ in range(file.failures - failures):
                on_failure()


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_bounded(path: Path, *, limit: int, what: str) -> bytes:
    """The bytes of ``path``.

    Raises:
        InputError: it cannot be read, or holds more than ``limit`` bytes.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except FileNotFoundError as error:
        raise InputError(f"no {what}", where=path) from error
    except OSError as error:
        raise InputError(f"the {what} cannot be read ({error.strerror})", where=path) from error
    if len(raw) > limit:
        raise InputError(f"the {what} is larger than {limit} bytes", where=path)
    return raw
