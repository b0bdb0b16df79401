"""RecBole's environment, apart from ours because it needs an older NumPy."""

from __future__ import annotations

from pathlib import Path

from benchmarks.environment import opponent_python

__all__ = ["recbole_python"]


def recbole_python(root: Path) -> Path:
    """The interpreter of ``.venv-recbole``, which is made or brought up to date first.

    Raises:
        EndcapError: uv is not there, or the environment cannot be installed (no network, say).
    """
    return opponent_python(root, "recbole")
