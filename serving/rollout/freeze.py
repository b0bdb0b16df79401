"""Times in which no version is given more traffic. Taking traffic away is always allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

__all__ = ["DateFreeze", "Freeze", "Frozen", "WeeklyFreeze", "frozen"]


@dataclass(frozen=True, slots=True)
class DateFreeze:
    """Once, from ``from_s`` up to ``until_s`` (Unix time)."""

    from_s: float
    until_s: float
    reason: str

    def end_s(self, now_s: float) -> float | None:
        """When the window that ``now_s`` lies in ends; None outside of it."""
        return self.until_s if self.from_s <= now_s < self.until_s else None


@dataclass(frozen=True, slots=True)
class WeeklyFreeze:
    """On each of ``days`` (0 is Monday) from ``from_minute`` on, in minutes of the day in ``timezone``.

    It ends at ``until_minute`` of the same day, or of the next where that is not later than its beginning.
    """

    days: tuple[int, ...]
    from_minute: int
    until_minute: int
    timezone: str
    reason: str

    def end_s(self, now_s: float) -> float | None:
        zone = ZoneInfo(self.timezone)
        today = datetime.fromtimestamp(now_s, UTC).astimezone(zone).date()
        overnight = self.until_minute <= self.from_minute
        for day in (today - timedelta(days=1), today):
            if day.weekday() not in self.days:
                continue
            begins = datetime.combine(day, _time(self.from_minute), zone)
            ends = datetime.combine(day + timedelta(days=overnight), _time(self.until_minute), zone)
            if begins.timestamp() <= now_s < ends.timestamp():
                return ends.timestamp()
        return None


Freeze = DateFreeze | WeeklyFreeze


@dataclass(frozen=True, slots=True)
class Frozen:
    until_s: float
    reason: str

    def __str__(self) -> str:
        until = datetime.fromtimestamp(self.until_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return f"frozen until {until}: {self.reason}"


def frozen(windows: Sequence[Freeze], now_s: float) -> Frozen | None:
    """The window in force that ends last; None where there is none."""
    found = [Frozen(end_s, window.reason) for window in windows if (end_s := window.end_s(now_s)) is not None]
    return max(found, key=lambda window: window.until_s, default=None)


def _time(minute: int) -> time:
    return time(minute // 60, minute % 60)
