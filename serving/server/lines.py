"""A log of JSON lines that answers never wait for.

Lines are gathered in memory and written by a thread of their own, and what a slow or full disk does not take is dropped
and counted.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Protocol

from endcap.errors import EndcapError, InputError, from_os_error

__all__ = ["Line", "LineLog"]

log = logging.getLogger("serving.server")

_MAX_BYTES = 16 * 1024 * 1024
_MAX_PENDING = 4096
_LINES_A_WRITE = 256
_LINES_A_PIPE = 10
"""Of standard output: what is written at once there stays whole among other processes' lines (PIPE_BUF is 4 KiB)."""
_FLUSH_S = 0.1
_CLOSE_S = 2.0
_NONE = -1
"""No open file."""


class Line(Protocol):
    """What is logged."""

    def line(self) -> bytes:
        """The JSON line, with its end."""


class LineLog:
    """One writer a file. A full file becomes ``FILE.1``; the one before it is gone.

    Args:
        path: made (mode 0600) if it is not there, else appended to; None: this process's standard output.
        what: is logged, for people.
        max_bytes: the file's limit.
        max_pending: lines in memory; more than these are dropped.

    Raises:
        InputError: the path is no plain file. StorageError: it cannot be written.
    """

    def __init__(self, path: Path | None, *, what: str, max_bytes: int = _MAX_BYTES,
                 max_pending: int = _MAX_PENDING) -> None:  # fmt: skip
        self.path = path
        self._what = what
        self._max_bytes = max_bytes
        self._max_pending = max_pending
        self._pending: deque[Line] = deque()
        self._refused = self._lost = 0
        self._waiting = threading.Event()
        self._closing = threading.Event()
        self._file = _NONE
        self._size = 0
        self._torn = False  # the file ends in the middle of a line
        self._said = False
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise from_os_error(error, doing=f"opening {path}") from error
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that are not in the log because the disk was slow or full."""
        return self._refused + self._lost

    def add(self, line: Line) -> None:
        """Take a line to be written within 0.2 s. Use from one thread; never waits for the disk."""
        if len(self._pending) >= self._max_pending:
            self._refused += 1
            return
        self._pending.append(line)
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
        if self._file != _NONE and self.path is not None:
            os.close(self._file)

    def _flush(self) -> None:
        at_once = _LINES_A_WRITE if self.path is not None else _LINES_A_PIPE
        while self._pending:
            lines = [self._pending.popleft().line() for _ in range(min(len(self._pending), at_once))]
            data = b"".join(lines)
            self._lost += len(lines) - data.count(b"\n", 0, self._write(data))

    def _write(self, data: bytes) -> int:
        """How many bytes of it are in the file: less than all when the disk refuses."""
        done = 0
        try:
            full = self._size and self._size + len(data) > self._max_bytes
            if self._file != _NONE and self.path is not None and full:
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
                log.warning("%s are not logged: %s", self._what, error)
            self._said = True
        return done

    def _append(self, data: bytes) -> int:
        written = os.write(self._file, data)
        self._size += written
        self._torn = not data[:written].endswith(b"\n")
        return written

    def _open(self) -> None:
        if self.path is None:
            self._file = sys.stdout.fileno()
            return
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"the log of {self._what} must be a plain file", where=self.path)
            os.fchmod(handle, 0o600)
            self._size = status.st_size
            self._torn = self._size > 0 and os.pread(handle, 1, self._size - 1) != b"\n"
        except BaseException:
            os.close(handle)
            raise
        self._file = handle
