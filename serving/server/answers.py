"""The answers log: what this replica answered to requests that a shadow answered too, for a comparator to join.

One JSON line an answer, no history and no shopper in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.server.lines import LineLog

__all__ = ["MAX_ITEMS", "AnswerLog", "LoggedAnswer"]

MAX_ITEMS = 50


@dataclass(frozen=True, slots=True)
class LoggedAnswer:
    """``ms``: from the whole request read to the answer handed over, by this server's clock.

    ``items`` and ``scores``: best first, empty where the answer is an error; only the first 50 are written.
    """

    request_id: str
    version: str
    shadow: bool
    code: int
    ms: float
    items: Sequence[str] = ()
    scores: Sequence[float] = ()

    def line(self) -> bytes:
        """The JSON line."""
        return orjson.dumps(
            {
                "request_id": self.request_id, "version": self.version, "shadow": self.shadow, "code": self.code,
                "ms": self.ms, "items": self.items[:MAX_ITEMS], "scores": self.scores[:MAX_ITEMS],
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )  # fmt: skip


class AnswerLog(LineLog):
    """One writer a file. A full file becomes ``FILE.1``; the one before it is gone."""

    def __init__(self, path: Path, **limits: int) -> None:
        super().__init__(path, what="answers", **limits)
