"""One HTTP client for the whole load: connections are kept alive, nothing is retried, and time is bounded."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

import gevent  # type: ignore[import-untyped]
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError

__all__ = ["SHOPPER_HEADER", "Answer", "Client"]

SHOPPER_HEADER = "x-endcap-shopper"


@dataclass(frozen=True, slots=True)
class Answer:
    """``status`` 0: no answer came, and ``error`` says why."""

    status: int
    body: bytes
    error: str | None = None


class Client:
    """POSTs of JSON to one service.

    ``timeout_s`` bounds a whole request, connecting included. ``concurrency``: most connections at once.
    """

    def __init__(self, url: str, *, timeout_s: float, concurrency: int) -> None:
        self._timeout_s = timeout_s
        self._client = HTTPClient.from_url(
            url,
            concurrency=concurrency,
            connection_timeout=timeout_s,
            network_timeout=timeout_s,
            headers={"content-type": "application/json", "accept": "application/json"},
        )

    def post(self, path: str, body: bytes, *, request_id: str, shopper: str | None = None) -> Answer:
        """The answer, or what there was instead of one. Never raises for a failing service.

        ``shopper``: sent as ``x-endcap-shopper``, by which the gateway keeps a shopper at a version. A header takes
        no other characters than ASCII, and those of an id that are not plain are percent-encoded.
        """
        headers = {"x-request-id": request_id}
        if shopper is not None:
            headers[SHOPPER_HEADER] = quote(shopper, safe="", errors="surrogatepass")
        timer = gevent.Timeout.start_new(self._timeout_s)
        try:
            # POST is not idempotent, so the library does not send it again after it may have been received.
            response = self._client.post(path, body=body, headers=headers)
            return Answer(response.status_code, response.read())
        except gevent.Timeout as error:
            if error is not timer:
                raise
            return Answer(0, b"", "timeout")
        except TimeoutError:
            return Answer(0, b"", "timeout")
        except ConnectionRefusedError:
            return Answer(0, b"", "refused")
        except (HTTPConnectionClosed, ConnectionError):
            return Answer(0, b"", "reset")
        except HTTPParseError:
            return Answer(0, b"", "not HTTP")
        except OSError as error:
            return Answer(0, b"", error.strerror or type(error).__name__)
        finally:
            timer.close()

    def close(self) -> None:
        self._client.close()
