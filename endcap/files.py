"""Files that are never half-written: write, sync, rename; and one holder at a time.

Callers get :class:`~endcap.errors.StorageError` for a full disk and :class:`~endcap.errors.StateError`, which
names the file, for a damaged one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from endcap.errors import BusyError, StateError, from_os_error

__all__ = [
    "FolderLock",
    "JsonLines",
    "open_to_others",
    "read_json",
    "read_json_lines",
    "replaced_folder",
    "sha256_file",
    "write_atomic",
    "write_json",
]


def open_to_others(path: Path) -> bool:
    """Whether others than its owner may read the secret file ``path``. Raises OSError as ``stat`` does.

    On a read-only mount the mode says nothing: Kubernetes gives a mounted Secret to a group, or to everybody who sees
    the mount, and that is the pod alone.
    """
    return bool(path.stat().st_mode & 0o077) and not os.statvfs(path).f_flag & os.ST_RDONLY


def write_atomic(path: Path, data: bytes | str, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data`` so that a reader, or a crash, sees the old bytes or the new, never a mix."""
    raw = data.encode() if isinstance(data, str) else data
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise from_os_error(error, doing=f"writing {path}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, document: Any, *, mode: int = 0o644) -> None:
    """:func:`write_atomic` of ``document`` as indented JSON."""
    write_atomic(path, json.dumps(document, indent=2, sort_keys=False, allow_nan=False) + "\n", mode=mode)


def read_json(path: Path) -> Any:
    """The JSON document in ``path``.

    Raises:
        StateError: the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StateError("the file is missing", where=path) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise StateError(
            f"damaged, not JSON ({error})",
            where=path,
            next_step="restore the file from a backup, or move it away to start anew",
        ) from error


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder to be made beside ``folder``, which it replaces at the end of the block: whole or not at all.

    The scratch folder does not exist yet, its parent does. After an error ``folder`` is as it was.
    """
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class JsonLines:
    """An append-only file of one JSON object a line. With ``sync`` a line is on disk when :meth:`append` returns.

    A line that is synced brings those before it to disk too.
    """

    def __init__(self, path: Path, *, sync: bool = False) -> None:
        self.path = path
        self._sync = sync
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _drop_torn_tail(path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise from_os_error(error, doing=f"opening {path}") from error

    def append(self, record: Mapping[str, Any], *, sync: bool | None = None) -> None:
        """``sync``: for this line, other than for the file's."""
        line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - written)
                raise OSError(28, os.strerror(28), str(self.path))
            if self._sync if sync is None else sync:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise from_os_error(error, doing=f"appending to {self.path}") from error

    def sync(self) -> int:
        """Bring all lines to disk; returns how many bytes they are."""
        try:
            os.fsync(self._file.fileno())
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise from_os_error(error, doing=f"syncing {self.path}") from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop_torn_tail(path: Path) -> None:
    """A writer that was killed may leave half a line at the end; the record was never acknowledged: drop it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        position = size
        while position > 0:
            step = min(65536, position)
            position -= step
            file.seek(position)
            newline = file.read(step).rfind(b"\n")
            if newline >= 0:
                file.truncate(position + newline + 1)
                return
        file.truncate(0)


def read_json_lines(path: Path, *, from_byte: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a :class:`JsonLines` file. A torn last line is left out; any other damage is an error.

    ``from_byte``: where the first line of interest begins; lines are numbered from there.

    Raises:
        StateError: a line is not a JSON object; the message names file and line.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(from_byte)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError as error:
                raise StateError(f"line {number} is damaged, not JSON", where=path) from error
            if not isinstance(record, dict):
                raise StateError(f"line {number} is not a JSON object", where=path)
            yield record


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FolderLock:
    """One process at a time in a folder. The kernel lets go when the holder dies, however it dies.

    Raises:
        BusyError: another process holds the folder; the message says which.
    """

    def __init__(self, folder: Path, *, name: str = ".lock") -> None:
        self.path = folder / name
        self._handle: int | None = None

    def __enter__(self) -> FolderLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise from_os_error(error, doing=f"locking {self.path.parent}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise BusyError(f"in use by process {self.holder}", where=self.path.parent,
                            next_step="wait for it to end, or choose another folder") from error  # fmt: skip
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._handle = handle
        return self

    @property
    def holder(self) -> str:
        """The id of the process that holds it, or held it last; "unknown" where that cannot be read."""
        try:
            return self.path.read_bytes()[:64].decode(errors="replace").strip() or "unknown"
        except OSError:
            return "unknown"

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it now; asking changes nothing in the folder."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise from_os_error(error, doing=f"looking at {self.path}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
