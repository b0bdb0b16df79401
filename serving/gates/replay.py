"""Recorded requests, sent to one replica of the candidate and one of stable: real servers, one request at a time."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from endcap.errors import PackageError
from endcap.processes import free_port, last_line, spawn, stop
from endcap.shoppers import Shopper
from serving.gates.answers import Answer, Replayed, read_answer

__all__ = ["Replica", "ReplicaEndedError", "replay", "replica"]

log = logging.getLogger("serving.gates")

_READY_S = 60.0
_ANSWER_S = 5.0
"""Longer than the server allows a run of the graph."""
_WARM_UP = 10
_MOST_ERRORS = 20
"""After so many errors of the candidate nothing more is asked: the verdict stands."""
_PORT_TRIES = 3


@dataclass(frozen=True, slots=True)
class Replica:
    """A model server that is ready."""

    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client

    def ask(self, body: bytes) -> Answer:
        """Never raises for what the server does."""
        begun_s = time.perf_counter()
        try:
            response = self.client.post("/v1/recommend", content=body)
            ms = (time.perf_counter() - begun_s) * 1000
            return read_answer(response.status_code, response.content, ms)
        except httpx.TimeoutException:
            error = f"no answer within {_ANSWER_S:g} s"
        except httpx.HTTPError:
            error = "no answer"
        return Answer(0, (time.perf_counter() - begun_s) * 1000, error=error)


@contextlib.contextmanager
def replica(package: Path, public_key: Path, *, label: str, folder: Path) -> Iterator[Replica]:
    """A model server of ``package`` while the block runs; its log is ``<label>.log`` in ``folder``.

    Raises:
        PackageError: it ended, or did not become ready, with the server's own last words.
    """
    path = folder / f"{label}.log"
    path.unlink(missing_ok=True)  # last words are this replica's
    for attempt in range(1, _PORT_TRIES + 1):
        port = free_port()
        process = spawn(
            [sys.executable, "-m", "serving.server", "--package", str(package), "--public-key", str(public_key),
             "--version", label, "--zone", "gates", "--port", str(port), "--drain-s", "0"],
            log=path,
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=_ANSWER_S, trust_env=False) as client:
                problem = _until_ready(process, client, label)
                if problem is None:
                    yield Replica(process, path, client)
                    return
        finally:
            stop(process)
        words = last_line(path)
        if attempt == _PORT_TRIES or f"port {port} is in use" not in words:
            raise PackageError(f"the model server {problem}: {words}", where=package)


def _until_ready(process: subprocess.Popen[bytes], client: httpx.Client, label: str) -> str | None:
    """None once it is ready, else what became of it."""
    ends_at_s = time.monotonic() + _READY_S
    while time.monotonic() < ends_at_s:
        if (code := process.poll()) is not None:
            return f"ended with code {code}"
        with contextlib.suppress(httpx.HTTPError):
            answer = client.get("/v2/health/ready", timeout=1.0)
            # The version tells it from a stranger that took the port meanwhile.
            if answer.status_code == 200 and answer.headers.get("x-endcap-version") == label:
                return None
        time.sleep(0.02)
    return f"was not ready within {_READY_S:g} s"


class ReplicaEndedError(PackageError):
    """A server that was ready ended while it was asked."""

    def __init__(self, what: str, replica: Replica) -> None:
        super().__init__(what)
        self.replica = replica


def replay(requests: Sequence[Shopper], *, stable: Replica, candidate: Replica, k: int) -> Replayed:
    """Every request to both replicas in turn, then to the candidate once more.

    The first few are asked unjudged before: connections, caches. Ends early after :data:`_MOST_ERRORS` errors.

    Raises:
        ReplicaEndedError: a server ended.
    """
    bodies = [
        orjson.dumps({"shopper": request.shopper, "history": list(request.history), "k": k}) for request in requests
    ]
    for body in bodies[:_WARM_UP]:
        for one in (stable, candidate):
            _ask(one, body)
    answered: dict[Path, list[Answer]] = {stable.log: [], candidate.log: []}
    errors = 0
    for place, body in enumerate(bodies):
        if place % 100 == 0:
            log.info("replay: %d of %d requests", place, len(bodies))
        # Who is asked first alternates: neither always finds the machine as the other left it.
        for one in (stable, candidate) if place % 2 else (candidate, stable):
            answered[one.log].append(_ask(one, body))
        errors += answered[candidate.log][-1].error is not None
        if errors >= _MOST_ERRORS:
            break
    second: list[Answer] = []
    log.info("replay: once more")
    for body in bodies if errors < _MOST_ERRORS else ():
        second.append(_ask(candidate, body))
        errors += second[-1].error is not None
        if errors >= 2 * _MOST_ERRORS:
            break
    return Replayed(answered[stable.log], answered[candidate.log], second)


def _ask(one: Replica, body: bytes) -> Answer:
    answer = one.ask(body)
    if answer.status == 0 and (code := one.process.poll()) is not None:
        raise ReplicaEndedError(f"the model server ended with code {code}: {last_line(one.log)}", one)
    return answer
