"""The file of recorded shoppers, written by the pipeline: who asked, with which history, and what they bought next.

JSON lines of ``{"shopper": "12", "history": ["4", "59"], "next": "77"}``; ``next`` may be null or left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from endcap.errors import InputError

__all__ = ["MAX_LINE_BYTES", "Shopper", "iterate_shoppers", "read_shoppers"]

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Shopper:
    """``history``: item IDs, oldest first. ``next_item``: the purchase that followed, None where unknown."""

    shopper: str
    history: tuple[str, ...]
    next_item: str | None


def read_shoppers(path: Path) -> list[Shopper]:
    """All of :func:`iterate_shoppers`."""
    return list(iterate_shoppers(path))


def iterate_shoppers(path: Path) -> Iterator[Shopper]:
    """The shoppers of a file in its order, one line in memory at a time.

    Raises:
        InputError: missing, empty, or a line that is not of that form; the message names the line.
    """
    found = False
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise InputError(f"longer than {MAX_LINE_BYTES} bytes", where=f"{path}, line {number}")
                if line.strip():
                    found = True
                    yield _shopper(line, f"{path}, line {number}")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("no such file", where=path,
                         next_step="run the pipeline first; its split step writes it") from error  # fmt: skip
    except PermissionError as error:
        raise InputError("not allowed to read it", where=path) from error
    if not found:
        raise InputError("no shoppers in the file", where=path)


def _shopper(line: bytes, where: str) -> Shopper:
    try:
        raw = json.loads(line)
        shopper, history, following = raw["shopper"], raw["history"], raw.get("next")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError("not a JSON object with shopper, history and next", where=where) from error
    ids = [shopper, *history] if isinstance(history, list) else [None]
    if not all(isinstance(one, str) for one in ids) or not isinstance(following, str | None):
        raise InputError("shopper and next are strings, history is a list of strings", where=where)
    return Shopper(shopper, tuple(history), following)
