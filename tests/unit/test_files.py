"""Append-only records over a disk that fills up in the middle of a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from endcap.files import open_to_others, read_json_lines

WRITER = """
import resource, signal, sys
from pathlib import Path
from endcap.errors import StorageError
from endcap.files import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with JsonLines(Path(sys.argv[1])) as lines:
    lines.append({"kept": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # room for half of the next line
    try:
        lines.append({"lost": "a long line"})
    except StorageError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        lines.append({"kept": 2})
        sys.exit(7)
"""


def test_a_line_that_does_not_fit_leaves_no_half_for_the_next_to_be_written_behind(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert subprocess.run([sys.executable, "-c", WRITER, str(path)], check=False).returncode == 7
    assert list(read_json_lines(path)) == [{"kept": 1}, {"kept": 2}]


@pytest.mark.parametrize(
    ("mode", "read_only", "exposed"),
    [(0o600, False, False), (0o640, False, True), (0o644, False, True), (0o644, True, False)],
)
def test_a_secret_on_a_read_only_mount_is_as_open_as_the_mount(tmp_path, monkeypatch, mode, read_only, exposed):
    path = tmp_path / "key"
    path.write_text("secret")
    path.chmod(mode)
    seen = os.statvfs(path)
    flags = (seen.f_flag | os.ST_RDONLY) if read_only else (seen.f_flag & ~os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*seen[:8], flags, *seen[9:])))
    assert open_to_others(path) is exposed
