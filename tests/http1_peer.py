"""One HTTP connection of ours, byte by byte, over a transport that only remembers, with an application that echoes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from serving.asgi import BodyTooLargeError, Headers, Receive, Scope, Send, read_body, send_answer
from serving.server.http import SheddingProtocol

__all__ = ["POST", "App", "Transport", "Work", "connected", "run", "settled"]

POST = b"POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


class Transport:
    def __init__(self) -> None:
        self.written = b""
        self.closed = self.aborted = self.paused = False
        self.unread = 0

    def get_extra_info(self, _: str) -> None:
        return None

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def get_write_buffer_size(self) -> int:
        return self.unread

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class App:
    """Answers every request with its body, when ``gate`` opens."""

    crowded = False

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()

    def turn_away(self, path: str, headers: Headers) -> tuple[int, bytes, Headers] | None:
        return (503, b'{"error":"no"}', ((b"retry-after", b"1"),)) if path == "/v1/recommend" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(scope, receive)
        except BodyTooLargeError:
            await send_answer(send, 413, b"{}")
            return
        await self.gate.wait()
        await send_answer(send, 200, body or b"-")


Work = Callable[[App, SheddingProtocol, Transport], Awaitable[None]]


def connected(app: App, transport: Transport, kind: type[SheddingProtocol], state: ServerState) -> SheddingProtocol:
    """One more connection of a server."""
    anything: Any = app
    config = uvicorn.Config(
        anything, http=kind, lifespan="off", log_config=None, interface="asgi3", proxy_headers=False
    )  # fmt: skip
    config.load()
    protocol = kind(config=config, server_state=state, app_state={})
    protocol.connection_made(transport)  # type: ignore[arg-type]
    return protocol


def run(work: Work, kind: type[SheddingProtocol] = SheddingProtocol) -> Transport:
    transport = Transport()

    async def main() -> None:
        app = App()
        protocol = connected(app, transport, kind, ServerState())
        await work(app, protocol, transport)
        ended = transport.closed
        protocol.connection_lost(None)
        transport.closed = ended

    asyncio.run(main())
    return transport


async def settled(transport: Transport, count: int = 1) -> None:
    async with asyncio.timeout(30):
        while transport.written.count(b"HTTP/1.1") < count or not transport.written.endswith((b"}", b"-")):
            await asyncio.sleep(0.001)
