"""Append-only records over a disk that fills up in the middle of a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from endcap.files import read_json_lines

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
