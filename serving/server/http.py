"""HTTP for the model server: uvicorn's protocol, and a short way out for requests that would be turned away.

When the server is crowded a request is refused as soon as its headers are read: no task, no body, no parsing. So
even several times more requests than it can answer leave the processor to those that it does answer.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.asgi import Headers

__all__ = ["SheddingProtocol", "Turnstile"]


class Turnstile(Protocol):
    """What the protocol asks of the application."""

    @property
    def crowded(self) -> bool:
        """Whether asking :meth:`turn_away` is worth it."""

    def turn_away(self, path: str, headers: Headers) -> tuple[int, bytes, Headers] | None:
        """Status, body and headers of the refusal of a POST, or None to let it in."""


class _Event:
    def set(self) -> None:
        """Nobody waits for more of a request that was answered."""


class _Refused:
    """In place of uvicorn's cycle: a request that is answered, whose body is skipped as it comes."""

    response_complete = True
    disconnected = False
    message_event = _Event()


_REFUSED = _Refused()


class SheddingProtocol(HttpToolsProtocol):
    """See the module."""

    def on_headers_complete(self) -> None:
        app = self.config.app
        if app.crowded and (self.cycle is None or self.cycle.response_complete) and not self.pipeline:  # type: ignore[union-attr]
            found = self._refusal(app)  # type: ignore[arg-type]
            if found is not None:
                # Who waits for "100 Continue" may or may not send the body after this: no next request could be told
                # from it.
                keep = (
                    self.parser.should_keep_alive()
                    and self.parser.get_http_version() == "1.1"
                    and not self.expect_100_continue
                )
                self.cycle = _REFUSED  # type: ignore[assignment]
                self.server_state.total_requests += 1
                self.transport.write(_raw(*found, keep=keep))
                if not keep:
                    self.transport.close()
                return
        super().on_headers_complete()

    def _refusal(self, app: Turnstile) -> tuple[int, bytes, Headers] | None:
        if self.parser.get_method() != b"POST" or self.parser.should_upgrade():
            return None
        return app.turn_away(self.url.partition(b"?")[0].decode("latin-1"), self.headers)


def _raw(status: int, body: bytes, headers: Headers, *, keep: bool) -> bytes:
    parts = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n".encode()
    ]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    if not keep:
        parts.append(b"connection: close\r\n")
    parts += (b"\r\n", body)
    return b"".join(parts)
