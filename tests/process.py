"""Starts our own programs for tests, waits on conditions with a deadline, and leaves none behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

DEADLINE_S = 60.0


def wait_until(
    condition: Callable[[], bool], what: str, *, deadline_s: float = DEADLINE_S, every_s: float = 0.01
) -> None:
    """Return as soon as ``condition`` holds; it is asked ``every_s``."""
    until_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < until_s, f"not within {deadline_s} s: {what}"
        time.sleep(every_s)


@dataclass
class Program:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10.0)

    def status(self, path: str) -> int:
        """0 when there is no answer."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.get(path).status_code
        except httpx.TransportError:
            return 0

    def wait_for(self, path: str) -> None:
        wait_until(lambda: self.status(path) == 200, f"{path} answers 200")


def run_to_end(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run ``python arguments`` to its end."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@contextmanager
def started(arguments: Sequence[str], port: int, log: Path, *,
            environment: Mapping[str, str] | None = None) -> Iterator[Program]:  # fmt: skip
    """``python arguments`` while the block runs; its output is in ``log``. ``environment``: beside our own."""
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, **(environment or {})})  # fmt: skip
    try:
        yield Program(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.kill()
        process.wait()
