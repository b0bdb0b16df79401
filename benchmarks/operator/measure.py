"""What is read while a controller works: its memory and processor time, the API server's count of requests."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from serving.targets.kserve.cluster import Cluster

__all__ = ["Usage", "percentile", "requests_served", "watched"]

_PAGE, _TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """``rss_mb``: the greatest seen. ``cpu_s``: processor time since the process began."""

    rss_mb: float
    cpu_s: float


class watched:  # noqa: N801 - used as a block
    """Reads a process's memory every half second until the block ends."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._cpu_s, self._begun_s = pid, 0, 0.0, 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> watched:
        self._begun_s = _cpu_s(self._pid)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def usage(self) -> Usage:
        return Usage(round(self._most * _PAGE / 1e6, 1), round(self._cpu_s - self._begun_s, 1))

    def _run(self) -> None:
        while not self._stopping.wait(0.5):
            try:
                self._most = max(self._most, int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]))
                self._cpu_s = _cpu_s(self._pid)
            except (OSError, IndexError, ValueError):
                return


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def requests_served(cluster: Cluster) -> float:
    """How many requests the API server has served, watches apart."""
    total = 0.0
    for family in text_string_to_metric_families(cluster.text("/metrics").decode()):
        if family.name == "apiserver_request":
            total += sum(
                one.value for one in family.samples
                if one.name.endswith("_total") and one.labels.get("verb") not in ("WATCH", "CONNECT")
            )  # fmt: skip
    return total


def percentile(values: Sequence[float], part: float) -> float | None:
    """The least value that ``part`` of them do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, int(part * len(ordered) + 0.999999) - 1))] if ordered else None


def rounded(value: float | None, digits: int = 3) -> Any:
    return None if value is None else round(value, digits)
