"""Asking for something over HTTP that may be slow, huge or nonsense: bounded in time and in size."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx

from endcap.errors import InputError, SourceError

__all__ = ["MAX_BODY_BYTES", "TooLargeError", "checked_url", "fetch"]

MAX_BODY_BYTES = 16 << 20
_EXCERPT_CHARS = 200


class TooLargeError(SourceError):
    """The answer is larger than what is read."""


def checked_url(url: str) -> str:
    """``url`` without a closing slash. Raises InputError where it is no http(s) URL, or holds a password."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise InputError(f"not a URL: {error}", next_step="write it as http://host:9090") from error
    if parsed.userinfo:
        raise InputError("a URL with a user or a password in it", where=parsed.host,
                         next_step="give a token by an environment variable or a file")  # fmt: skip
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"not an http(s) URL: {url!r}", next_step="write it as http://host:9090")
    return url.rstrip("/")


def fetch(
    client: httpx.Client,
    url: str,
    *,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    max_bytes: int = MAX_BODY_BYTES,
    answers: frozenset[int] = frozenset({200}),
) -> tuple[int, bytes]:
    """Status and body of a GET, whole within ``timeout_s`` (a server that drips bytes gets no longer).

    ``answers``: statuses whose body is wanted.

    Raises:
        SourceError: no answer, another status, too late, or too large.
    """
    ends_at = time.monotonic() + timeout_s
    body = bytearray()
    asked = {"accept-encoding": "identity", **(headers or {})}
    try:
        with client.stream("GET", url, params=params, headers=asked, timeout=timeout_s) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise SourceError("an answer that is packed, which was not asked for", where=url)
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > max_bytes:
                    raise TooLargeError(f"an answer larger than {max_bytes} bytes", where=url,
                                        next_step="select fewer series")  # fmt: skip
                if time.monotonic() > ends_at:
                    raise SourceError(f"no whole answer within {timeout_s:g} s", where=url,
                                      next_step="see whether it is overloaded")  # fmt: skip
            status = response.status_code
    except httpx.TimeoutException as error:
        raise SourceError(f"no answer within {timeout_s:g} s", where=url,
                          next_step="see whether it is overloaded") from error  # fmt: skip
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SourceError(f"it does not answer: {error!r}", where=url, next_step="see whether it runs") from error
    if status not in answers:
        raise SourceError(f"it answers {status}: {excerpt(bytes(body))}", where=url)
    return status, bytes(body)


def excerpt(body: bytes) -> str:
    """The beginning of a body, fit for an error's one line."""
    text = " ".join(body[: 4 * _EXCERPT_CHARS].decode("utf-8", "replace").split())
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable[:_EXCERPT_CHARS] or "(nothing)"
