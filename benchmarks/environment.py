"""Environments of opponents: each made once from its own hash-locked list, apart from ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from endcap.errors import EndcapError
from endcap.files import write_atomic

__all__ = ["opponent_python"]


def opponent_python(root: Path, name: str) -> Path:
    """The interpreter of ``.venv-<name>``, made from ``locks/<name>.txt`` or brought up to date with it first.

    Raises:
        EndcapError: uv is not there, or the environment cannot be installed (no network, say).
    """
    lock, folder = root / "locks" / f"{name}.txt", root / f".venv-{name}"
    python, mark = folder / "bin" / "python", folder / ".ready"
    wanted = hashlib.sha256(lock.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == wanted and python.exists():
        return python
    uv = root / ".tools" / "bin" / "uv"
    program = str(uv) if uv.exists() else shutil.which("uv")
    if program is None:
        raise EndcapError("uv is not installed", where=uv, next_step="run `make setup`")
    make = [program, "venv", "-q", "--clear", "--python", os.path.realpath(sys.executable), str(folder)]
    fill = [program, "pip", "sync", "-q", "--python", str(python), "--require-hashes", str(lock)]
    for argv in (make, fill):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EndcapError(f"{name} cannot be installed: {done.stderr.strip()[-400:]}", where=folder)
    write_atomic(mark, wanted)
    return python
