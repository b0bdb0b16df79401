"""Requests on disk while the load runs, and a small file that says how it goes. No gevent here."""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import orjson

from endcap.errors import from_os_error
from endcap.records import RequestRecord, lock_request_file

__all__ = ["Progress", "RequestWriter"]


class RequestWriter:
    """Appends requests to a ``requests-*.jsonl`` of its own; :meth:`flush` often, for what is buffered is lost
    with the process. A full disk leaves whole lines only.

    Raises:
        StorageError: the folder or the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        name = f"requests-{time.time_ns() // 1_000_000}-{os.getpid()}.jsonl"
        self.path = folder / name
        hidden = folder / f".{name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Locked before it gets the name that a converter looks for, so that none takes it for a left-over.
            self._file = hidden.open("xb", buffering=0)
            lock_request_file(self._file)
            hidden.rename(self.path)
        except OSError as error:
            raise from_os_error(error, doing=f"opening {self.path}") from error
        self._pending: list[bytes] = []
        self._size = 0

    def add(self, record: RequestRecord) -> None:
        self._pending.append(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))

    def flush(self) -> None:
        if not self._pending:
            return
        data = b"".join(self._pending)
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:
            self._file.truncate(self._size)
            raise from_os_error(error, doing=f"appending to {self.path}") from error
        self._size += len(data)
        self._pending.clear()

    def close(self) -> None:
        """Flush, and let a converter have the file."""
        try:
            self.flush()
        finally:
            self._file.close()


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """``load.json``: for people and the CLI to look at, not a record. ``state``: running, stopping or ended."""

    state: str
    pid: int
    started_at_s: float
    at_s: float
    offered: int
    sent: int
    done: int
    failed: int
    feedback: int
    in_flight: int
    saturated: int
    rps: float
    p99_ms: float | None


class Progress:
    """Counters of a running load, written to ``load.json`` by :meth:`write` (about each second).

    Renamed into place, and not synced: a sync would stall the very arrivals that are being timed.
    """

    def __init__(self, path: Path, *, started_at_s: float, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._started_at_s = started_at_s
        self._latencies_ms = array("d")
        self._last = (started_at_s, 0)
        self.state = "running"
        self.offered = self.sent = self.done = self.failed = self.feedback = self.in_flight = self.saturated = 0

    def finished(self, record: RequestRecord) -> None:
        """Count one request that came to its end."""
        if record.kind == "feedback":
            self.feedback += 1
            return
        self.done += 1
        self.failed += record.failed
        self._latencies_ms.append(record.latency_s * 1000)

    def write(self) -> None:
        now_s = self._wall()
        before_s, before = self._last
        self._last = (now_s, self.done)
        snapshot = _Snapshot(
            state=self.state,
            pid=os.getpid(),
            started_at_s=self._started_at_s,
            at_s=now_s,
            offered=self.offered,
            sent=self.sent,
            done=self.done,
            failed=self.failed,
            feedback=self.feedback,
            in_flight=self.in_flight,
            saturated=self.saturated,
            rps=(self.done - before) / max(now_s - before_s, 1e-3),
            p99_ms=self._p99_ms(),
        )
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(orjson.dumps(asdict(snapshot)))
            temporary.replace(self._path)
        except OSError as error:
            raise from_os_error(error, doing=f"writing {self._path}") from error

    def _p99_ms(self) -> float | None:
        if not self._latencies_ms:
            return None
        # A copy: an array that numpy looks into cannot grow.
        return float(np.quantile(np.array(self._latencies_ms), 0.99, method="inverted_cdf"))
