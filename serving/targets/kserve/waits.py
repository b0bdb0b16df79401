"""Waiting for what controllers do, with a deadline and a clock that is passed in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Patience"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited for what, in seconds.

    ``capacity_s``: pods scheduled, fetched, verified, loaded and ready. ``route_s``: a route written by KServe and
    taken up by the gateway. ``node_s``: a GPU node, where there is a runtime without one. ``restarts``: a server that
    ended so often while it started is given up at once.
    """

    capacity_s: float = 300.0
    route_s: float = 60.0
    healthy_s: float = 10.0
    node_s: float = 30.0
    poll_s: float = 0.5
    restarts: int = 2
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def until(self, look: Callable[[], T | None], *, within_s: float) -> T | None:
        """What ``look`` finds first that is not None; None when the time is over. It is looked at least once."""
        ends_at = self.now() + within_s
        while True:
            found = look()
            if found is not None:
                return found
            left = ends_at - self.now()
            if left <= 0:
                return None
            self.sleep(min(self.poll_s, left))
