"""Events on disk: SQLite in WAL mode, synchronous=FULL, many requests a commit.

One thread of one process writes (a lock beside the file sees to that), so the counts of closed impressions, which can
never change, are kept in memory and only what closed since the last look is read, through an index.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endcap.errors import EndcapError, StateError, StorageError, from_os_error
from endcap.files import FolderLock
from serving.feedback.attribution import (
    NEW,
    EventType,
    ImpressionState,
    Outcome,
    attribute,
    closed_before_us,
    to_us,
)
from serving.feedback.events import Event

__all__ = ["Evidence", "FeedbackStore", "Submission", "VersionCounts", "export"]

_APPLICATION_ID = 0x656E6463  # "endc"
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE impressions (
    id BLOB PRIMARY KEY,              -- 16 bytes
    version TEXT NOT NULL,
    shopper BLOB NOT NULL,            -- keyed hash, 8 bytes
    issued_at_us INTEGER NOT NULL,
    shown INTEGER NOT NULL,           -- counts: reported inside the window
    clicked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX counted ON impressions (issued_at_us, version, clicked) WHERE shown = 1;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY,
    impression BLOB NOT NULL,
    type TEXT NOT NULL,
    item TEXT,
    received_at_us INTEGER NOT NULL,
    late INTEGER NOT NULL,
    UNIQUE (impression, type)
);
"""
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class Submission:
    """The sound events of one request, and when it came."""

    events: Sequence[Event]
    received_at_us: int


@dataclass(frozen=True, slots=True)
class VersionCounts:
    """``closed``: impressions whose window is over; ``clicked`` of them; ``open``: those whose window is not."""

    closed: int = 0
    clicked: int = 0
    open: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Counts by version label at ``at_us``."""

    at_us: int
    window_us: int
    versions: Mapping[str, VersionCounts] = field(default_factory=dict)


class FeedbackStore:
    """All methods belong to one thread at a time.

    Args:
        path: the database, made (mode 0600) if it is not there.
        window_us: the attribution window.

    Raises:
        StateError: the file is damaged or is not ours; it is left as it is.
        BusyError: another collector holds it.
        StorageError: it cannot be written.
    """

    def __init__(self, path: Path, *, window_us: int) -> None:
        self.path = path
        self.window_us = window_us
        self._closed: dict[str, tuple[int, int]] = {}
        self._closed_before_us = -(1 << 62)
        self._last_us = 0  # a clock that is set back must not open what was closed
        self._lock = FolderLock(path.parent, name=f"{path.name}.lock")
        self._lock.__enter__()
        try:
            self._db = _open(path)
            row = self._db.execute("SELECT received_at_us FROM events ORDER BY seq DESC LIMIT 1").fetchone()
            self._last_us = row[0] if row else 0
        except sqlite3.Error as error:
            self._lock.__exit__(None, None, None)
            raise _translate(error, path) from error
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    def close(self) -> None:
        """Fold the write-ahead log into the file and let go of it."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        self._lock.__exit__(None, None, None)

    def record(self, submissions: Sequence[Submission]) -> list[list[Outcome]]:
        """Keep all events in one transaction; on disk when this returns, and none of them kept if it raises.

        Raises:
            StorageError: the disk is full or refuses; the same submissions may be tried again.
            StateError: the database is damaged.
        """
        db = self._db
        try:
            db.execute("BEGIN IMMEDIATE")
            outcomes = [self._record_one(submission) for submission in submissions]
            db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
            raise _translate(error, self.path) from error
        return outcomes

    def _record_one(self, submission: Submission) -> list[Outcome]:
        self._last_us = received_at_us = max(self._last_us, submission.received_at_us)
        return [self._record_event(event, received_at_us) for event in submission.events]

    def _record_event(self, event: Event, received_at_us: int) -> Outcome:
        db, impression = self._db, event.impression
        identity, issued_at_us = bytes.fromhex(impression.id), to_us(impression.issued_at_s)
        before = self._state(identity)
        outcome, after = attribute(
            before or NEW, event.type,
            issued_at_us=issued_at_us, received_at_us=received_at_us, window_us=self.window_us,
        )  # fmt: skip
        if outcome is Outcome.REPEATED:
            return outcome
        db.execute(
            "INSERT INTO events (impression, type, item, received_at_us, late) VALUES (?, ?, ?, ?, ?)",
            (identity, event.type.value, event.item, received_at_us, outcome is Outcome.LATE),
        )
        if before is None:
            db.execute(
                "INSERT INTO impressions (id, version, shopper, issued_at_us, shown, clicked)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (identity, impression.version, bytes.fromhex(impression.shopper_hash), issued_at_us,
                 after.shown, after.clicked),
            )  # fmt: skip
        elif (before.shown, before.clicked) != (after.shown, after.clicked):
            db.execute("UPDATE impressions SET shown = ?, clicked = ? WHERE id = ?",
                       (after.shown, after.clicked, identity))  # fmt: skip
        return outcome

    def _state(self, identity: bytes) -> ImpressionState | None:
        row = self._db.execute("SELECT shown, clicked FROM impressions WHERE id = ?", (identity,)).fetchone()
        if row is None:
            return None
        types = self._db.execute("SELECT type FROM events WHERE impression = ?", (identity,))
        return ImpressionState(bool(row[0]), bool(row[1]), frozenset(EventType(kind) for (kind,) in types))

    def evidence(self, now_us: int) -> Evidence:
        """The counts as of ``now_us``. Costs what happened since the last call, not what ever happened.

        Raises:
            StorageError: the disk refuses to be read.
            StateError: the database is damaged.
        """
        self._last_us = now_us = max(self._last_us, now_us)
        horizon_us = closed_before_us(now_us, self.window_us)
        try:
            newly_closed = self._count(self._closed_before_us, horizon_us)
            still_open = self._count(horizon_us, 1 << 62)
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        for version, (shown, clicked) in newly_closed.items():
            closed = self._closed.get(version, (0, 0))
            self._closed[version] = (closed[0] + shown, closed[1] + clicked)
        self._closed_before_us = horizon_us
        versions = {
            version: VersionCounts(*self._closed.get(version, (0, 0)), still_open.get(version, (0, 0))[0])
            for version in sorted(self._closed.keys() | still_open.keys())
        }
        return Evidence(now_us, self.window_us, versions)

    def _count(self, from_us: int, before_us: int) -> dict[str, tuple[int, int]]:
        rows = self._db.execute(
            "SELECT version, COUNT(*), SUM(clicked) FROM impressions INDEXED BY counted"
            " WHERE shown = 1 AND issued_at_us >= ? AND issued_at_us < ? GROUP BY version",
            (from_us, before_us),
        )
        return {version: (shown, clicked) for version, shown, clicked in rows}


def export(path: Path, *, after: int = 0, rows_at_once: int = 1000) -> Iterator[list[dict[str, Any]]]:
    """All events with ``seq > after`` as of now, oldest first, in lists of at most ``rows_at_once``.

    Reads beside the writer, a short transaction a list, so that it never holds the log from being folded in.
    """
    try:
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    except sqlite3.Error as error:
        raise _translate(error, path) from error
    try:
        (last,) = db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        while after < last:
            rows = db.execute(
                "SELECT e.seq, hex(e.impression), i.version, hex(i.shopper), e.type, e.item, i.issued_at_us,"
                " e.received_at_us, e.late FROM events e JOIN impressions i ON i.id = e.impression"
                " WHERE e.seq > ? AND e.seq <= ? ORDER BY e.seq LIMIT ?",
                (after, last, rows_at_once),
            ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield [
                {
                    "seq": seq, "impression": impression.lower(), "version": version, "shopper": shopper.lower(),
                    "type": kind, "item": item, "issued_at_s": issued / 1e6, "received_at_s": received / 1e6,
                    "late": bool(late),
                }
                for seq, impression, version, shopper, kind, item, issued, received, late in rows
            ]  # fmt: skip
    except sqlite3.Error as error:
        raise _translate(error, path) from error
    finally:
        db.close()


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise from_os_error(error, doing=f"opening {path}") from error
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        # First of all, so that what is not ours is not touched.
        application, schema = (_pragma(db, "application_id"), _pragma(db, "user_version"))
        (tables,) = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if tables and (application, schema) != (_APPLICATION_ID, _SCHEMA_VERSION):
            raise StateError("not a feedback database of this release", where=path,
                             next_step="give another --database, or move this file away")  # fmt: skip
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        if not tables:
            db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )
        problem = _pragma(db, "quick_check(1)")
        if problem != "ok":
            raise _damaged(path, str(problem))
    except sqlite3.Error as error:
        db.close()
        raise _translate(error, path) from error
    except EndcapError:
        db.close()
        raise
    return db


def _pragma(db: sqlite3.Connection, name: str) -> Any:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def _translate(error: sqlite3.Error, path: Path) -> EndcapError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in _CORRUPT or (code == 0 and type(error) is sqlite3.DatabaseError):
        return _damaged(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        return StorageError("no space left for feedback", where=path, next_step="free some space; nothing kept is lost")
    return StorageError(f"the feedback database refuses ({error})", where=path,
                        next_step="look at the disk; nothing kept is lost")  # fmt: skip


def _damaged(path: Path, detail: str) -> StateError:
    return StateError(f"the feedback database is damaged ({detail})", where=path,
                      next_step="restore it from a backup, or move it away to start anew")  # fmt: skip
