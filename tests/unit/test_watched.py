"""A file that changes under a running server."""

from __future__ import annotations

import asyncio
from pathlib import Path

from serving.watched import Watched, keep_fresh, read_bounded


def read(path: Path) -> bytes:
    return read_bounded(path, limit=10, what="file")


def test_files_are_kept_fresh_and_failures_are_told_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        path.write_bytes(b"old")
    files = [Watched(path, read) for path in (first, second)]
    told: list[None] = []

    async def work() -> None:
        task = asyncio.create_task(keep_fresh(lambda: files, on_failure=lambda: told.append(None), every_s=0.001))
        first.write_bytes(b"x" * 11)
        second.write_bytes(b"new")
        async with asyncio.timeout(30.0):
            while not told or files[1].value != b"new":
                await asyncio.sleep(0.001)
            second.unlink()
            while len(told) < 2:
                await asyncio.sleep(0.001)
            first.write_bytes(b"better")
            while files[0].value != b"better":
                await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(work())
    assert len(told) == 2 and files[1].value == b"new"
