"""The answers log: what this replica answered to requests that a shadow answered too, for a comparator to join.

One JSON line an answer, no history and no shopper in it. The answer to the shopper never waits for it: lines are
gathered in memory and written by a thread of their own, and what a slow or full disk does not take is dropped and
counted.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from endcap.errors import EndcapError, InputError, from_os_error

__all__ = ["MAX_ITEMS", "AnswerLog", "LoggedAnswer"]

log = logging.getLogger("serving.server")

MAX_ITEMS = 50
_MAX_BYTES = 16 * 1024 * 1024
_MAX_PENDING = 4096
_LINES_A_WRITE = 256
_FLUSH_S = 0.1
_CLOSE_S = 2.0
_NONE = -1
"""No open file."""


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """``ms``: from the whole request read to the answer handed over, by this server's clock.

    ``items`` and ``scores``: best first, empty where the answer is an error; only the first 50 are written.
    """

    request_id: str
    version: str
    shadow: bool
    code: int
    ms: float
    items: Sequence[str] = ()
    scores: Sequence[float] = ()

    def line(self) -> bytes:
        """The JSON line."""
        return orjson.dumps(
            {
                "request_id": self.request_id, "version": self.version, "shadow": self.shadow, "code": self.code,
                "ms": self.ms, "items": self.items[:MAX_ITEMS], "scores": self.scores[:MAX_ITEMS],
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )  # fmt: skip


class AnswerLog:
    """One writer a file. A full file becomes ``FILE.1``; the one before it is gone.

    Args:
        path: made (mode 0600) if it is not there, else appended to.
        max_bytes: the file's limit.
        max_pending: answers in memory; more than these are dropped.

    Raises:
        InputError: the path is no plain file. StorageError: it cannot be written.
    """

    def __init__(self, path: Path, *, max_bytes: int = _MAX_BYTES, max_pending: int = _MAX_PENDING) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._max_pending = max_pending
        self._pending: deque[LoggedAnswer] = deque()
        self._refused = self._lost = 0
        self._waiting = threading.Event()
        self._closing = threading.Event()
        self._file = _NONE
        self._size = 0
        self._torn = False  # the file ends in the middle of a line
        self._said = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise from_os_error(error, doing=f"opening {path}") from error
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Answers that are not in the log because the disk was slow or full."""
        return self._refused + self._lost

    def add(self, answer: LoggedAnswer) -> None:
        """Take an answer to be written within 0.2 s. Use from one thread; never waits for the disk."""
        if len(self._pending) >= self._max_pending:
            self._refused += 1
            return
        self._pending.append(answer)
        if not self._waiting.is_set():
            self._waiting.set()

    def close(self) -> None:
        """Write what is left, but wait for no disk that hangs."""
        self._closing.set()
        self._waiting.set()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while not self._closing.is_set():
            self._waiting.wait()
            self._closing.wait(_FLUSH_S)  # what comes meanwhile shares the write
            self._waiting.clear()  # before taking: what comes from now on sets it again
            self._flush()
        self._flush()
        if self._file != _NONE:
            os.close(self._file)

    def _flush(self) -> None:
        while self._pending:
            lines = [self._pending.popleft().line() for _ in range(min(len(self._pending), _LINES_A_WRITE))]
            data = b"".join(lines)
            self._lost += len(lines) - data.count(b"\n", 0, self._write(data))

    def _write(self, data: bytes) -> int:
        """How many bytes of it are in the file: less than all when the disk refuses."""
        done = 0
        try:
            if self._file != _NONE and self._size and self._size + len(data) > self._max_bytes:
                handle, self._file = self._file, _NONE
                os.close(handle)
                self.path.replace(self.path.with_name(f"{self.path.name}.1"))
            if self._file == _NONE:
                self._open()
            if self._torn:
                self._append(b"\n")
            while done < len(data):
                done += self._append(data[done:])
            self._said = False
        except (OSError, EndcapError) as error:
            if not self._said:
                log.warning("answers are not logged: %s", error)
            self._said = True
        return done

    def _append(self, data: bytes) -> int:
        written = os.write(self._file, data)
        self._size += written
        self._torn = not data[:written].endswith(b"\n")
        return written

    def _open(self) -> None:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise InputError("the answers log must be a plain file", where=self.path)
            os.fchmod(handle, 0o600)
            self._size = status.st_size
            self._torn = self._size > 0 and os.pread(handle, 1, self._size - 1) != b"\n"
        except BaseException:
            os.close(handle)
            raise
        self._file = handle
