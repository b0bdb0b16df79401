"""Events on disk: SQLite in WAL mode, synchronous=FULL, many requests a commit.

One thread of one process writes (a lock beside the file sees to that), so the counts of closed impressions, which can
never change, are kept in memory and only what closed since the last look is read, through an index. Counts of shoppers
are kept the same way, one running count for each time that they are asked from; one that is not kept (after a restart,
say) is read anew from what is on disk, and comes to the same.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import OrderedDict
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
_SCHEMA_VERSION = 2
# A shopper's impressions in order; ties are broken by the id, which the primary key adds to every index.
_BY_SHOPPER = "CREATE INDEX by_shopper ON impressions (shopper, issued_at_us) WHERE shown = 1;"
_STEPS = {1: _BY_SHOPPER}
"""What brings a schema version to the next one."""
_SCHEMA = f"""
CREATE TABLE impressions (
    id BLOB PRIMARY KEY,              -- 16 bytes
    version TEXT NOT NULL,
    shopper BLOB NOT NULL,            -- keyed hash, 8 bytes
    issued_at_us INTEGER NOT NULL,
    shown INTEGER NOT NULL,           -- counts: reported inside the window
    clicked INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX counted ON impressions (issued_at_us, version, clicked) WHERE shown = 1;
{_BY_SHOPPER}
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
_NEVER_US = 1 << 62
_MAX_SINCES = 8
_ROWS_AT_ONCE = 20_000
_Found = dict[str, tuple[int, int]]
"""By version label: how many, and how many of them were clicked."""


@dataclass(frozen=True, slots=True)
class Submission:
    """The sound events of one request, and when it came."""

    events: Sequence[Event]
    received_at_us: int


@dataclass(frozen=True, slots=True)
class VersionCounts:
    """``closed``: impressions whose window is over; ``clicked`` of them; ``open``: those whose window is not.

    ``shoppers``: those whose first closed impression since the asked time was this version's; ``shoppers_clicked``
    of them clicked it. Final, as ``closed`` is.
    """

    closed: int = 0
    clicked: int = 0
    open: int = 0
    shoppers: int = 0
    shoppers_clicked: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """Counts by version label at ``at_us``."""

    at_us: int
    window_us: int
    versions: Mapping[str, VersionCounts] = field(default_factory=dict)


@dataclass(slots=True)
class _Running:
    """Final counts of what was issued before ``before_us``."""

    before_us: int
    counts: _Found = field(default_factory=dict)

    def add(self, found: _Found, before_us: int) -> None:
        for version, (new, clicked) in found.items():
            old = self.counts.get(version, (0, 0))
            self.counts[version] = (old[0] + new, old[1] + clicked)
        self.before_us = before_us


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
        self._closed = _Running(-_NEVER_US)
        self._shoppers: OrderedDict[int, _Running] = OrderedDict()  # by the time asked from, last used last
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

    def evidence(self, now_us: int, *, shoppers_since_us: int | None = None) -> Evidence:
        """The counts as of now. Costs what happened since the last call (for the same ``shoppers_since_us``).

        Args:
            now_us: the clock; one that was set back counts as standing still.
            shoppers_since_us: count shoppers by their first closed impression issued at or after this time;
                None counts none. Up to eight different times are kept at hand.

        Raises:
            StorageError: the disk refuses to be read.
            StateError: the database is damaged.
        """
        self._last_us = now_us = max(self._last_us, now_us)
        horizon_us = closed_before_us(now_us, self.window_us)
        try:
            self._closed.add(self._count(self._closed.before_us, horizon_us), horizon_us)
            still_open = self._count(horizon_us, _NEVER_US)
            shoppers = {} if shoppers_since_us is None else self._shoppers_until(horizon_us, since_us=shoppers_since_us)
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        none, closed = (0, 0), self._closed.counts
        versions = {
            version: VersionCounts(*closed.get(version, none), still_open.get(version, none)[0],
                                   *shoppers.get(version, none))
            for version in sorted(closed.keys() | still_open.keys())
        }  # fmt: skip
        return Evidence(now_us, self.window_us, versions)

    def _count(self, from_us: int, before_us: int) -> _Found:
        rows = self._db.execute(
            "SELECT version, COUNT(*), SUM(clicked) FROM impressions INDEXED BY counted"
            " WHERE shown = 1 AND issued_at_us >= ? AND issued_at_us < ? GROUP BY version",
            (from_us, before_us),
        )
        return {version: (shown, clicked) for version, shown, clicked in rows}

    def catch_up(self, now_us: int, *, shoppers_since_us: int) -> bool:
        """Do a part of what :meth:`evidence` would do for a count that is not at hand; True when no more is left.

        Between the parts events can be recorded: a long rollout after a restart is many.

        Raises:
            StorageError, StateError: as for ``evidence``.
        """
        horizon_us = closed_before_us(max(self._last_us, now_us), self.window_us)
        running = self._shoppers.get(shoppers_since_us)
        from_us = shoppers_since_us if running is None else running.before_us
        try:
            row = self._db.execute(
                "SELECT issued_at_us FROM impressions INDEXED BY counted WHERE shown = 1 AND issued_at_us > ?"
                " AND issued_at_us < ? ORDER BY issued_at_us LIMIT 1 OFFSET ?",
                (from_us, horizon_us, _ROWS_AT_ONCE),
            ).fetchone()
            if row is not None:
                self._shoppers_until(row[0], since_us=shoppers_since_us)
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        return row is None

    def _shoppers_until(self, horizon_us: int, *, since_us: int) -> _Found:
        """Shoppers whose first impression since ``since_us`` is closed, by that impression's version."""
        running = self._shoppers.get(since_us) or _Running(since_us)
        if horizon_us > running.before_us:
            # Whatever was issued before a closed impression is closed too: that it is the first never changes.
            rows = self._db.execute(_FIRST_IMPRESSIONS, (running.before_us, horizon_us, since_us))
            running.add({version: (first, clicked) for version, first, clicked in rows}, horizon_us)
        self._shoppers[since_us] = running
        self._shoppers.move_to_end(since_us)
        if len(self._shoppers) > _MAX_SINCES:
            self._shoppers.popitem(last=False)
        return running.counts


_FIRST_IMPRESSIONS = """
SELECT i.version, COUNT(*), SUM(i.clicked) FROM impressions i INDEXED BY counted
WHERE i.shown = 1 AND i.issued_at_us >= ?1 AND i.issued_at_us < ?2
  AND NOT EXISTS (SELECT 1 FROM impressions e INDEXED BY by_shopper WHERE e.shown = 1 AND e.shopper = i.shopper
                  AND e.issued_at_us >= ?3 AND e.issued_at_us < i.issued_at_us)
  AND NOT EXISTS (SELECT 1 FROM impressions e INDEXED BY by_shopper WHERE e.shown = 1 AND e.shopper = i.shopper
                  AND e.issued_at_us = i.issued_at_us AND e.id < i.id)
GROUP BY i.version
"""


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
        if tables and (application != _APPLICATION_ID or schema not in (*_STEPS, _SCHEMA_VERSION)):
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
        for before in range(schema if tables else _SCHEMA_VERSION, _SCHEMA_VERSION):  # whole steps, or none
            db.executescript(f"BEGIN IMMEDIATE; {_STEPS[before]} PRAGMA user_version = {before + 1}; COMMIT;")
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
