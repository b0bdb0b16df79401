"""The raw records of a run: what the load saw, what the gateway logged, what broke, what the target did.

Reports and drills are computed from these files alone. Readers are forgiving about one thing only: a last line
that a killed writer left torn. Requests are JSON lines while a load runs and one ``requests.parquet`` after it;
:func:`convert_requests` makes the one from the other and may be repeated, also after a SIGKILL at any moment.
All times are Unix seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

from endcap.errors import StateError, from_os_error
from endcap.files import JsonLines, read_json_lines, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

__all__ = [
    "ACCESS_FILE",
    "ATTEMPTS_FILE",
    "FAULTS_FILE",
    "REQUESTS_FILE",
    "TARGET_FILE",
    "FaultRecord",
    "GatewayRecord",
    "RequestKind",
    "RequestRecord",
    "TargetEvent",
    "TargetEventKind",
    "append_fault",
    "convert_requests",
    "is_failure",
    "leftover_request_files",
    "lock_request_file",
    "read_access_since",
    "read_attempts",
    "read_faults",
    "read_request_lines",
    "read_requests",
    "read_target_events",
    "request_schema",
]

T = TypeVar("T")

REQUESTS_FILE = "requests.parquet"
ACCESS_FILE = "access.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
FAULTS_FILE = "faults.jsonl"
TARGET_FILE = "target.jsonl"
_LEFTOVERS = "requests-*.jsonl"
_LONGEST_S = 10.0
"""Longer than any request may take at the gateway."""

RequestKind = Literal["recommend", "feedback"]
TargetEventKind = Literal[
    "replica_started", "replica_ready", "replica_died", "replica_unhealthy", "replica_healthy",
    "replica_refused", "shares_set", "version_retired",
]  # fmt: skip


def is_failure(status: int) -> bool:
    """No answer (0), a server error, or a shed request (429). A 4xx otherwise is the client's own fault."""
    return status == 0 or status >= 500 or status == 429


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request as the client saw it.

    ``status``: HTTP status, 0 when no answer came (timeout, reset, refused; ``error`` says which).
    ``impression``: the impression's ID, not its token. ``clicked``: the shopper clicked an item of this answer
    (the click's delivery is a record of kind ``feedback`` of its own). ``fallback``: as the answer said.
    """

    request_id: str
    kind: RequestKind
    shopper: str
    intended_s: float
    sent_s: float
    done_s: float
    status: int
    error: str | None = None
    version: str | None = None
    impression: str | None = None
    clicked: bool = False
    fallback: str | None = None

    @property
    def latency_s(self) -> float:
        """From the intended send, so that a stalled service cannot hide the wait it causes."""
        return self.done_s - self.intended_s

    @property
    def failed(self) -> bool:
        return is_failure(self.status)


@dataclass(frozen=True, slots=True)
class GatewayRecord:
    """One line of Envoy's access log (an outcome) or upstream log (an attempt; ``attempts`` is 1 there).

    ``at_s``: start. ``cluster``: such as ``version-7``, None when no route matched. ``host``: ``address:port``
    of the replica, None when none was chosen. ``code``: 0 when there was none. ``flags``: Envoy's response
    flags, ``-`` for none.
    """

    at_s: float
    request_id: str | None
    route: str | None
    cluster: str | None
    host: str | None
    code: int
    flags: str
    duration_ms: float
    attempts: int
    details: str | None

    @property
    def version(self) -> str | None:
        """The model version that the cluster stands for."""
        if self.cluster is None or not self.cluster.startswith("version-"):
            return None
        return self.cluster.removeprefix("version-")

    @property
    def failed(self) -> bool:
        return is_failure(self.code)

    @property
    def cut_by_client(self) -> bool:
        """The client went away before an answer: nobody's failure and nobody's success."""
        return "DC" in self.flags.split(",")


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """A fault was injected or reverted. ``subject``: what it hit, such as ``zone a`` or ``7/a/0``."""

    at_s: float
    drill: str
    fault: str
    phase: Literal["injected", "reverted"]
    subject: str


@dataclass(frozen=True, slots=True)
class TargetEvent:
    """Something the target did or noticed. Fields that do not apply are None."""

    at_s: float
    event: TargetEventKind
    version: str | None = None
    zone: str | None = None
    replica: str | None = None
    detail: str | None = None


# ---- small JSON-lines files --------------------------------------------------------------------------


def append_fault(folder: Path, record: FaultRecord) -> None:
    """Append to ``faults.jsonl`` of a records folder; on disk when this returns."""
    with JsonLines(folder / FAULTS_FILE, sync=True) as lines:
        lines.append(asdict(record))


def read_faults(folder: Path) -> list[FaultRecord]:
    """All faults of a records folder in the order of time; empty when there is no file."""
    return sorted(_read(folder / FAULTS_FILE, _fault), key=lambda record: record.at_s)


def read_target_events(folder: Path) -> list[TargetEvent]:
    """All target events of a records folder in the order of time; empty when there is no file."""
    return sorted(_read(folder / TARGET_FILE, _target_event), key=lambda record: record.at_s)


def read_access_since(path: Path, since_s: float) -> list[GatewayRecord]:
    """The outcomes of an access log that began at or after ``since_s``, read from its end (it may be long)."""
    if not path.exists():
        return []
    chunk = 1 << 20
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            start = max(0, size - chunk)
            file.seek(start)
            lines = file.read(size - start).split(b"\n")[:-1]
            # Cut in the middle of a line, unless this is the file's beginning.
            found = [_access_line(path, line) for line in (lines if start == 0 else lines[1:])]
            # Lines stand in the order of their ends; nothing took longer than the margin.
            if start == 0 or (found and found[0].at_s < since_s - _LONGEST_S):
                return [record for record in found if record.at_s >= since_s]
            chunk *= 2


def _access_line(path: Path, line: bytes) -> GatewayRecord:
    try:
        return _gateway(json.loads(line))
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"a line is not a record ({error!r})", where=path) from error


def read_attempts(folder: Path) -> list[GatewayRecord]:
    """Envoy's upstream log in file order: one record an attempt."""
    return list(_read(folder / ATTEMPTS_FILE, _gateway))


def _read(path: Path, parse: Callable[[Mapping[str, Any]], T]) -> Iterator[T]:
    for number, raw in enumerate(read_json_lines(path), 1):
        try:
            yield parse(raw)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"line {number} is not a record ({error!r})", where=path) from error


def _text(value: Any) -> str | None:
    """Envoy writes null or ``-`` for what does not apply."""
    return None if value is None or value in ("-", "") else str(value)


def _gateway(raw: Mapping[str, Any]) -> GatewayRecord:
    return GatewayRecord(
        at_s=float(raw["at_s"]),
        request_id=_text(raw.get("request_id")),
        route=_text(raw.get("route")),
        cluster=_text(raw.get("cluster")),
        host=_text(raw.get("host")),
        code=int(raw.get("code") or 0),
        flags=str(raw.get("flags") or "-"),
        duration_ms=float(raw.get("duration_ms") or 0.0),
        attempts=int(_text(raw.get("attempts")) or 1),
        details=_text(raw.get("details")),
    )


def _fault(raw: Mapping[str, Any]) -> FaultRecord:
    if raw["phase"] not in ("injected", "reverted"):
        raise ValueError(f"phase is {raw['phase']!r}")
    return FaultRecord(float(raw["at_s"]), str(raw["drill"]), str(raw["fault"]), raw["phase"], str(raw["subject"]))


def _target_event(raw: Mapping[str, Any]) -> TargetEvent:
    # Kinds that a newer target may add are kept, so that an older report still opens its records.
    return TargetEvent(
        at_s=float(raw["at_s"]), event=raw["event"], version=_text(raw.get("version")),
        zone=_text(raw.get("zone")), replica=_text(raw.get("replica")), detail=_text(raw.get("detail")),
    )  # fmt: skip


def _request(raw: Mapping[str, Any]) -> RequestRecord:
    if raw["kind"] not in ("recommend", "feedback"):
        raise ValueError(f"kind is {raw['kind']!r}")
    return RequestRecord(**{name: raw[name] for name in _REQUEST_FIELDS if name in raw})


_REQUEST_FIELDS = tuple(field.name for field in fields(RequestRecord))


# ---- requests ----------------------------------------------------------------------------------------


def request_schema() -> pa.Schema:
    """The columns of ``requests.parquet``."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("request_id", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("shopper", pa.string(), nullable=False),
            pa.field("intended_s", pa.float64(), nullable=False),
            pa.field("sent_s", pa.float64(), nullable=False),
            pa.field("done_s", pa.float64(), nullable=False),
            pa.field("status", pa.int16(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("version", pa.string()),
            pa.field("impression", pa.string()),
            pa.field("clicked", pa.bool_(), nullable=False),
            pa.field("fallback", pa.string()),
        ]
    )


def lock_request_file(file: BinaryIO) -> None:
    """Mark an open ``requests-*.jsonl`` as still being written; the kernel lets go when its writer dies."""
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def leftover_request_files(folder: Path) -> list[Path]:
    """The ``requests-*.jsonl`` files that no load is writing any more, in the order of their names."""
    return [path for path in sorted(folder.glob(_LEFTOVERS)) if not _being_written(path)]


def _being_written(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return True
    return False


def convert_requests(folder: Path) -> int:
    """Move every left-over ``requests-*.jsonl`` of a records folder into its ``requests.parquet``.

    Atomic and repeatable: a crash between writing the one and deleting the other leaves records twice, and
    those are dropped by ID the next time. Files of a load that still runs are left alone.

    Returns:
        The number of records in ``requests.parquet`` afterwards.

    Raises:
        StateError: a file is damaged; nothing was changed.
        StorageError: no space; nothing was changed.
    """
    with _exclusive(folder):
        leftovers = leftover_request_files(folder)
        path = folder / REQUESTS_FILE
        if not leftovers:
            return _table(path).num_rows if path.exists() else 0
        records: dict[str, RequestRecord] = {}
        if path.exists():
            records.update((record.request_id, record) for record in _from_table(_table(path)))
        for leftover in leftovers:
            records.update((record.request_id, record) for record in _read(leftover, _request))
        _write_parquet(path, sorted(records.values(), key=lambda record: (record.intended_s, record.request_id)))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        return len(records)


def read_request_lines(path: Path) -> list[RequestRecord]:
    """The requests of one ``requests-*.jsonl`` in file order."""
    return list(_read(path, _request))


def read_requests(folder: Path) -> list[RequestRecord]:
    """All requests of a records folder by intended time, also those of a load that still runs.

    Raises:
        StateError: a file is damaged; the message names it.
    """
    records: dict[str, RequestRecord] = {}
    path = folder / REQUESTS_FILE
    # The lines first: a load that ends meanwhile moves them into the table, and none is missed that way.
    for lines in sorted(folder.glob(_LEFTOVERS)):
        with contextlib.suppress(FileNotFoundError):
            records.update((record.request_id, record) for record in _read(lines, _request))
    if path.exists():
        records.update((record.request_id, record) for record in _from_table(_table(path)))
    return sorted(records.values(), key=lambda record: (record.intended_s, record.request_id))


def _table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(path)
        return table.select(request_schema().names).cast(request_schema())
    except (pa.ArrowException, KeyError) as error:
        raise StateError(f"damaged, not a table of requests ({error})", where=path) from error


def _from_table(table: pa.Table) -> Iterator[RequestRecord]:
    columns = [table.column(name).to_pylist() for name in _REQUEST_FIELDS]
    for row in zip(*columns, strict=True):
        yield RequestRecord(*row)


def _write_parquet(path: Path, records: Sequence[RequestRecord]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: [getattr(record, name) for record in records] for name in _REQUEST_FIELDS}
    try:
        table = pa.Table.from_pydict(columns, schema=request_schema())
    except (pa.ArrowException, TypeError) as error:
        raise StateError(f"a record has a field of the wrong type ({error})", where=path) from error
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One converter at a time in a folder; a second one waits for the short time that the first needs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".requests.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise from_os_error(error, doing=f"locking {folder}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
