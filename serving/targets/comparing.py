"""Feeding the comparator with what replicas log of their answers, while a shadow gets copies of requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from serving.gateway import Mark, Tail
from serving.shadow import Comparator
from serving.targets.base import ShadowObservation
from serving.targets.config import KeptShadow
from serving.targets.counting import take

__all__ = ["Comparing", "answers_file", "answers_until_now", "drop_answers"]


def answers_file(folder: Path, replica: str) -> Path:
    """Where the replica of that name logs its answers, in a target's ``folder``."""
    return folder / "answers" / f"{replica}.jsonl"


def answers_until_now(folder: Path) -> dict[str, Mark]:
    """By file name, how far the answers of a target reach now: a shadow that begins has no part in them."""
    marks = {}
    for path in (folder / "answers").glob("*.jsonl"):
        status = path.stat()
        marks[path.name] = Mark(status.st_ino, status.st_size)
    return marks


def drop_answers(folder: Path, replica: str) -> None:
    """Forget what a replica that is gone for good answered."""
    path = answers_file(folder, replica)
    for one in (path, path.with_name(f"{path.name}.1")):
        with contextlib.suppress(OSError):
            one.unlink()


class Comparing:
    """The comparator of the shadow in force, if any. Use from one event loop.

    ``patience_s``: how long a copy's answer may take from the serving version's on.
    """

    def __init__(self, folder: Path, thresholds_ms: Sequence[int], *, patience_s: float) -> None:
        self._folder = folder / "answers"
        self._thresholds_ms = thresholds_ms
        self._patience_s = patience_s
        self._lock = asyncio.Lock()
        self._shadow: KeptShadow | None = None
        self._comparator: Comparator | None = None
        self._tails: dict[str, Tail] = {}

    async def read(self, shadow: KeptShadow | None) -> ShadowObservation | None:
        """Take in what was answered by now; what ``shadow`` did since its copies began, None where there is none.

        Raises:
            StorageError: an answers log cannot be read.
        """
        async with self._lock:
            self._follow(shadow)
            comparator = self._comparator
            if comparator is None:
                return None
            now_s = time.monotonic()
            for name, tail in self._found():
                self._tails[name] = tail
                await take(tail, lambda lines: comparator.add(lines, now_s))
            comparator.add((), now_s)
            return comparator.observe()

    def _follow(self, shadow: KeptShadow | None) -> None:
        began = None if shadow is None else (shadow.label, shadow.began_at_s)
        if began != (None if self._shadow is None else (self._shadow.label, self._shadow.began_at_s)):
            self._tails.clear()
            self._comparator = None if shadow is None else Comparator(
                shadow.label, thresholds_ms=self._thresholds_ms, patience_s=self._patience_s
            )  # fmt: skip
        self._shadow = shadow

    def _found(self) -> list[tuple[str, Tail]]:
        found = []
        for path in sorted(self._folder.glob("*.jsonl")):
            tail = self._tails.get(path.name)
            if tail is None:
                begin = Mark() if self._shadow is None else self._shadow.answers_from.get(path.name, Mark())
                tail = Tail(path, offset=begin.offset, inode=begin.inode)
            found.append((path.name, tail))
        return found
