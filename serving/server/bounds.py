"""What all connections of this process may hold together, and how often something may happen, purely.

Limits of one connection bound one peer; thousands of connections that each keep to theirs are bounded here.
"""

from __future__ import annotations

import resource
from typing import Protocol

__all__ = ["HELD", "Allowance", "Held", "Holder", "connections"]

MAX_HELD_BYTES = 64 << 20
_MOST_CONNECTIONS = {"http": 8192, "grpc": 4096}
_SPARE_FILES = 128
"""Files that the process opens beside its connections."""


class Holder(Protocol):
    """Who holds bytes: a connection, of which ``number`` is a stream or a direction."""

    def make_way(self, number: int) -> None:
        """Let go of what is held, and tell :meth:`Held.drop`."""


class Held:
    """Bytes of requests that are not whole yet and of answers that are not read, over all connections.

    When they are too many, whoever has held theirs longest makes way: an honest sender's request is whole within
    milliseconds, so those that are long at it are slow or mean no good. The newest never makes way for itself, so
    that anything goes through that comes alone.
    """

    def __init__(self, most: int) -> None:
        self.bytes = 0
        self._most = most
        self._sizes: dict[tuple[Holder, int], int] = {}

    def set(self, holder: Holder, number: int, size: int) -> None:
        """``holder`` holds ``size`` bytes of ``number`` now; may call any holder's :meth:`Holder.make_way`."""
        key = (holder, number)
        self.bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size  # who is there already keeps their place
        while self.bytes > self._most and len(self._sizes) > 1:
            oldest, of = next(iter(self._sizes))
            oldest.make_way(of)
            self.drop(oldest, of)

    def drop(self, holder: Holder, number: int) -> None:
        """It holds no more of it."""
        self.bytes -= self._sizes.pop((holder, number), 0)


HELD = Held(MAX_HELD_BYTES)
"""This process's."""


class Allowance:
    """So many at once, and ``per_s`` of them a second after that; the clock is passed in."""

    __slots__ = ("_at_s", "_burst", "_left", "_per_s")

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = self._left = float(burst)
        self._per_s = per_s
        self._at_s = 0.0

    def spend(self, now_s: float) -> bool:
        """Whether one more is within it."""
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_s) - 1.0
        self._at_s = now_s
        return self._left >= 0.0


def connections(protocol: str) -> int:
    """How many connections a port of ``protocol`` (``http`` or ``grpc``) may have, of the files that we may open."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = _MOST_CONNECTIONS[protocol]
    return most if files == resource.RLIM_INFINITY else max(16, min(most, (files - _SPARE_FILES) // 2))
