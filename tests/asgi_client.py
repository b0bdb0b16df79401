"""Calls an ASGI application in this process, one request at a time or many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, MutableMapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import orjson

from serving.asgi import Receive, Scope, Send

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class AsgiClient:
    """One event loop for all calls; use as a context manager."""

    def __init__(self, app: Any = None) -> None:
        self.app = app
        self._runner = asyncio.Runner()

    def __enter__(self) -> AsgiClient:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def get(self, path: str, *, query: bytes = b"") -> Answer:
        return self.run(call(self.app, "GET", path, query=query))

    def post(self, path: str, body: Any, *, headers: Sequence[tuple[bytes, bytes]] = ()) -> Answer:
        """``body``: bytes as they are, anything else as JSON."""
        return self.run(call(self.app, "POST", path, body, headers=headers))


async def call(
    app: Any,
    method: str,
    path: str,
    body: Any = b"",
    *,
    query: bytes = b"",
    headers: Sequence[tuple[bytes, bytes]] = (),
    part_bytes: int = 65536,
) -> Answer:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    parts = [raw[start : start + part_bytes] for start in range(0, len(raw), part_bytes)] or [b""]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope: Scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": list(headers)}
    typed_receive: Receive = receive
    typed_send: Send = send
    await app(scope, typed_receive, typed_send)
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message["body"] for message in sent[1:]))
