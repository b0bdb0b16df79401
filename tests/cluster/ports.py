"""TCP ports for what tests start on this machine."""

from __future__ import annotations

import contextlib
import random
import socket

from tests.cluster.errors import ClusterError

_CHOICE = range(20_000, 32_000)
"""None that the system gives to connections: one of a client's may else have the port before its server does."""


def free_ports(count: int) -> list[int]:
    """Different ports of 127.0.0.1 that nobody has now.

    Raises:
        ClusterError: there are not so many.
    """
    found: list[int] = []
    for port in random.sample(_CHOICE, 50 * count):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ClusterError(f"no {count} free ports in {_CHOICE.start} to {_CHOICE.stop}")


def listens(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False
