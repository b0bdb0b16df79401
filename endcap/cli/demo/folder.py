"""The demo's folder: one demo at a time, begun afresh, and never somebody else's files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from endcap.errors import InputError, StorageError, from_os_error
from endcap.files import FolderLock

__all__ = ["demo_folder"]

MARKER = ".endcap-demo"
_NEEDED_BYTES = 500 << 20


@contextmanager
def demo_folder(out: Path) -> Iterator[Path]:
    """``out``, emptied of an earlier demo and held while this one runs.

    Raises:
        BusyError: a demo runs in it. InputError: it holds something that no demo made.
        StorageError: too little space is left to begin.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise InputError("not a folder", where=out, next_step="choose another with --out")
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held - {".lock"} and MARKER not in held:
        raise InputError("holds files that no demo made", where=out, next_step="choose an empty folder with --out")
    with FolderLock(out):
        try:
            free = shutil.disk_usage(out).free
            if free < _NEEDED_BYTES:
                raise StorageError(f"{free >> 20} MB are free; the demo needs {_NEEDED_BYTES >> 20} MB", where=out,
                                   next_step="free some space, or choose another disk with --out")  # fmt: skip
            for path in out.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in (".lock", MARKER):
                    path.unlink()
            (out / MARKER).touch()
        except OSError as error:
            raise from_os_error(error, doing=f"preparing {out}") from error
        yield out
