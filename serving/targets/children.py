"""Waiting for child processes without polling, and for the server inside one to be ready."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

import httpx

__all__ = ["exit_of", "until_ready"]


async def exit_of(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a child, once it has ended (negative: the signal that ended it)."""
    if (code := process.poll()) is not None:
        return code
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    handle = os.pidfd_open(process.pid)  # a child not yet reaped: its pid cannot be another's
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    return process.wait()


async def until_ready(
    client: httpx.AsyncClient, url: str, process: subprocess.Popen[bytes], *, within_s: float, poll_s: float = 0.05
) -> bool:
    """True once ``url`` answers 200; False when the process ended or the time is over."""
    ends_at = time.monotonic() + within_s
    while process.poll() is None and time.monotonic() < ends_at:
        try:
            if (await client.get(url, timeout=1.0)).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        await asyncio.sleep(poll_s)
    return False
