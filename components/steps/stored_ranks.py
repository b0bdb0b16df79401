"""Each model's ranks and lists between the steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from components.data.storage import read_arrays, write_arrays
from components.evaluation import Ranked

__all__ = ["load_ranked", "save_ranked"]


def save_ranked(path: Path, ranked: Mapping[str, Ranked]) -> None:
    """Write what each model did for every shopper."""
    arrays = {f"ranks/{name}": entry.ranks for name, entry in ranked.items()}
    arrays |= {f"top/{name}": entry.top for name, entry in ranked.items()}
    write_arrays(path, arrays, {"models": list(ranked)})


def load_ranked(path: Path) -> dict[str, Ranked]:
    """The inverse of :func:`save_ranked`.

    Raises:
        StateError: missing or damaged.
    """
    arrays, about = read_arrays(path)
    return {name: Ranked(name, arrays[f"ranks/{name}"], arrays[f"top/{name}"]) for name in about["models"]}
