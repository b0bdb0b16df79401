"""The access log: one JSON line a request, by which nobody learns who asked for what.

It holds no path, no query, no header but the gateway's request ID, no body and no answer: neither shopper nor history.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.server.lines import LineLog

__all__ = ["Access", "AccessLog"]


@dataclass(frozen=True, slots=True)
class Access:
    """``status``: HTTP's, for gRPC too. ``ms``: from the whole request read to the answer handed over.

    ``at_s``: when it was handed over, Unix seconds. ``answer_bytes``: of its body.
    """

    at_s: float
    request_id: str
    version: str
    zone: str
    route: str
    status: int
    outcome: str
    ms: float
    answer_bytes: int
    priority: str

    def line(self) -> bytes:
        """The JSON line."""
        return orjson.dumps(
            {
                "at_s": round(self.at_s, 6), "request_id": self.request_id, "version": self.version, "zone": self.zone,
                "route": self.route, "status": self.status, "outcome": self.outcome, "ms": round(self.ms, 3),
                "answer_bytes": self.answer_bytes, "priority": self.priority,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )  # fmt: skip


class AccessLog(LineLog):
    """See the module. ``path`` None: standard output."""

    def __init__(self, path: Path | None, **limits: int) -> None:
        super().__init__(path, what="requests", **limits)
