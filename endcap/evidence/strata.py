"""Counts, and counts taken side by side. Evidence is kept as strata, never as lifetime totals only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Counts", "Stratum", "counts_of"]

_NOTHING = (0, 0, 0, 0)


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


def counts_of(names: Sequence[str], look: Mapping[str, Stratum]) -> NDArray[np.float64]:
    """[4, names]: canary's bad and all events, control's bad and all events; zeros where nothing was seen."""
    rows = []
    for name in names:
        stratum = look.get(name)
        if stratum is None:
            rows.append(_NOTHING)
        else:
            canary, control = stratum.canary, stratum.control
            rows.append((canary.total - canary.good, canary.total, control.total - control.good, control.total))
    return np.array(rows, dtype=np.float64).T
