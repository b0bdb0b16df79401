"""Several worker processes on one port: a supervisor that listens, forks, restarts and drains, and serves nothing.

Every worker has a listening socket of its own on the shared port (``SO_REUSEPORT``: the kernel deals connections out),
which the supervisor holds open: connections that come while a worker is restarted wait for its successor.

The package is verified and loaded once, before the fork, so that all workers read one copy of the weights and a
restarted one is ready at once. That holds for graphs that run on the thread that asks: threads of onnxruntime's own
do not live through a fork, so with more than one a run, or on a GPU, each worker loads for itself.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence

from endcap.errors import InputError, from_os_error
from endcap.processes import bind_to_parent

__all__ = ["bind_all", "supervise"]

log = logging.getLogger("serving.server")

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
_LASTING_S = 5.0
"""A worker that lived longer is replaced at once, another after a pause that doubles up to ``_MOST_PAUSE_S``."""
_FIRST_PAUSE_S = 0.1
_MOST_PAUSE_S = 5.0
_FINISH_S = 15.0
"""Beyond the drain; a worker that has not ended by then is killed."""
REFUSED = (2, 3)
"""A worker's exit codes for what was asked for and cannot be had here, and for a package that must not be served: no
other worker will do better."""


def bind_all(host: str, port: int, count: int) -> list[socket.socket]:
    """``count`` sockets bound to one port, not listening yet: until they do, connections are refused.

    Raises:
        InputError: the port is in use, or not ours to open.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Another server's sockets with SO_REUSEPORT would let us in: look first whether the port is free.
    sockets: list[socket.socket] = []
    try:
        if port:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        for _ in range(count):
            one = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind((host, port))
            port = one.getsockname()[1]
            one.setblocking(False)
    except OSError as error:
        for one in sockets:
            one.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened"
            raise InputError(f"port {port} {why}", where=host, next_step="choose another --port (0: any)") from error
        raise from_os_error(error, doing=f"listening on {host}:{port}") from error
    return sockets


def supervise(sockets: Sequence[socket.socket], work: Callable[[int, socket.socket], int], *, drain_s: float) -> int:
    """Keep one worker a socket running until told to end; the exit code.

    Args:
        work: called in worker ``n`` with its socket; returns its exit code. It must end on SIGTERM, within
            ``drain_s`` and a few seconds, with every request answered.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    for one in sockets:
        one.listen(2048)
    workers: dict[int, tuple[int, float]] = {}
    pauses = [0.0] * len(sockets)
    due_s: dict[int, float] = dict.fromkeys(range(len(sockets)), 0.0)
    ending_s: float | None = None
    code = 0
    while True:
        now_s = time.monotonic()
        if ending_s is None:
            for number in [number for number, at_s in due_s.items() if at_s <= now_s]:
                del due_s[number]
                workers[_start(number, sockets[number], work)] = (number, now_s)
        elif not workers:
            return code
        elif now_s >= ending_s:
            log.error("%d workers did not end in time and are killed", len(workers))
            _send_all(workers, signal.SIGKILL)
            ending_s = now_s + _FINISH_S
        waits_s = [at_s - now_s for at_s in due_s.values()] if ending_s is None else [ending_s - now_s]
        found = signal.sigtimedwait(_SIGNALS, max(0.0, min([*waits_s, 60.0])))
        now_s = time.monotonic()
        if found is not None and found.si_signo in (signal.SIGTERM, signal.SIGINT):
            if ending_s is None:
                ending_s = now_s + drain_s + _FINISH_S
            _send_all(workers, signal.SIGTERM)
        for pid, status in _reaped(workers):
            number, since_s = workers.pop(pid)
            if ending_s is not None:
                code = code or max(status, 0)
                continue
            if status in REFUSED:
                code, ending_s = status, now_s + drain_s + _FINISH_S
                _send_all(workers, signal.SIGTERM)
                continue
            lasted = now_s - since_s >= _LASTING_S
            pauses[number] = 0.0 if lasted else min(_MOST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * pauses[number]))
            due_s[number] = now_s + pauses[number]
            log.error("worker %d ended (%d) after %.1f s, another follows", number, status, now_s - since_s)


def _start(number: int, one: socket.socket, work: Callable[[int, socket.socket], int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        bind_to_parent(parent_pid=parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        code = work(number, one)
    except Exception as error:  # noqa: BLE001 - the last thing that a worker says
        log.error("worker %d failed: %s: %s", number, type(error).__name__, error)
    finally:
        os._exit(code)  # nothing of the supervisor's runs in a worker, and a run that hangs does not hold it
    raise AssertionError


def _send_all(workers: dict[int, tuple[int, float]], number: signal.Signals) -> None:
    for pid in workers:
        os.kill(pid, number)  # ours until it is reaped: never another's


def _reaped(workers: dict[int, tuple[int, float]]) -> list[tuple[int, int]]:
    """Workers that have ended, each with its exit code or the negative of the signal that ended it."""
    ended: list[tuple[int, int]] = []
    for pid in workers:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended
