"""Counts, and counts taken side by side. Evidence is kept as strata, never as lifetime totals only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Counts", "Stratum"]


@dataclass(frozen=True, slots=True)
class Counts:
    """Good events out of all events."""

    good: int = 0
    total: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.good + other.good, self.total + other.total)

    def since(self, earlier: Counts) -> Counts:
        """What came after ``earlier``. A counter that went back was restarted: all it holds is new."""
        if self.total < earlier.total or self.good < earlier.good:
            return self
        total = self.total - earlier.total
        return Counts(min(self.good - earlier.good, total), total)

    @property
    def share(self) -> float | None:
        """Good out of all; None where there is nothing (no data is not a share)."""
        return self.good / self.total if self.total else None


@dataclass(frozen=True, slots=True)
class Stratum:
    """One look: what canary and control did in the same moments, so that drift and outages hit both alike."""

    canary: Counts
    control: Counts
