"""What the gateway did, counted once over any number of supervisors."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from serving.gateway import GatewaySettings
from serving.targets.config import Kept
from serving.targets.counting import TALLY_FILE, Counting
from tests.unit.test_gateway_logs import line


def append(path: Path, *lines: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(one + b"\n" for one in lines))


class Logs:
    def __init__(self, folder: Path) -> None:
        self.settings = GatewaySettings(folder / "xds", folder / "records")
        self.folder = folder
        self.kept = Kept()

    def more(self, count: int) -> None:
        append(self.settings.attempts_log, *(line() for _ in range(count)))
        append(self.settings.access_log, *(line(attempts=1) for _ in range(count)))

    def counting(self, thresholds_ms: tuple[int, ...] = (100,)) -> Counting:
        return Counting(self.folder, self.settings, thresholds_ms, self.kept)

    def count(self, counting: Counting) -> tuple[int, int]:
        counts = asyncio.run(counting.read())
        version = counts.versions["2"]
        assert version.within_ms.keys() <= {100, 250}
        assert version.requests_total == counts.outcomes_total
        return version.total, version.requests_total


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_counts_go_on_from_where_they_were_kept_and_read_nothing_twice(logs: Logs) -> None:
    logs.more(5)
    first = logs.counting()
    assert logs.count(first) == (5, 5)
    asyncio.run(first.save())
    logs.more(2)
    assert logs.count(first) == (7, 7)  # killed here: what it read since is read again
    logs.more(1)
    # Only what stands after the kept place is read: the lines before it may as well say something else.
    raw = logs.settings.attempts_log.read_bytes()
    kept = json.loads((logs.folder / TALLY_FILE).read_text())
    with logs.settings.attempts_log.open("r+b") as file:
        file.write(b" " * (kept["attempts"]["offset"] - 1))
    assert logs.count(logs.counting()) == (8, 8)
    assert len(raw) == logs.settings.attempts_log.stat().st_size


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"format": 1}', b"\xff"])
def test_damaged_counts_are_counted_again(logs: Logs, damage: bytes) -> None:
    logs.more(3)
    first = logs.counting()
    logs.count(first)
    asyncio.run(first.save())
    (logs.folder / TALLY_FILE).write_bytes(damage)
    assert logs.count(logs.counting()) == (3, 3)


def test_counts_of_other_thresholds_or_of_other_logs_are_counted_again(logs: Logs) -> None:
    logs.more(3)
    first = logs.counting()
    logs.count(first)
    asyncio.run(first.save())
    assert logs.count(logs.counting((100, 250))) == (3, 3)
    raw = logs.settings.attempts_log.read_bytes()
    logs.settings.attempts_log.rename(logs.folder / "moved")
    logs.settings.attempts_log.write_bytes(raw)
    assert logs.count(logs.counting()) == (3, 3)


def test_an_earlier_target_s_lines_are_never_counted(logs: Logs) -> None:
    logs.more(4)
    size = [path.stat().st_size for path in (logs.settings.attempts_log, logs.settings.access_log)]
    logs.kept = Kept(attempts_offset=size[0], access_offset=size[1])
    logs.more(2)
    assert logs.count(logs.counting()) == (2, 2)
