"""Rules that others decide by, on the same traffic: each a watcher that notes when it would first have rolled back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from endcap.objectives import Good, Objectives
from serving.rollout.traffic import Seen

__all__ = ["PEERS", "All", "Rule", "Thresholds", "ZTest", "peers"]

_NORMAL_99 = 2.3263478740408408
"""A standard normal deviate is below this with a chance of 99 %."""
_LEAST_EVENTS = 30
"""Nobody trusts a normal approximation of fewer events of canary's."""


class Rule(Protocol):
    name: str
    rolled_back_s: NDArray[np.float64]
    """[runs]: when, since the rollout began; infinite where it never would."""

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None: ...


class ZTest:
    """Pooled one-sided two-sample z-tests at 1 %, one an objective, on all events so far, repeated at every look.

    Click-through is per impression, as dashboards count it.
    """

    name = "z-test at 1 %, repeated each second"

    def __init__(self, objectives: Objectives, runs: int) -> None:
        self._objectives = objectives.objectives
        self._sums = np.zeros((runs, len(self._objectives), 4))
        self.rolled_back_s = np.full(runs, np.inf)

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None:
        counts = np.stack([seen.canary_bad, seen.canary_total, seen.control_bad, seen.control_total], axis=2)
        if seen.impressions is not None:
            canary_clicked, canary, control_clicked, control = seen.impressions.T
            for column, objective in enumerate(self._objectives):
                if objective.good is Good.CLICKED:
                    parts = [canary - canary_clicked, canary, control - control_clicked, control]
                    counts[:, column] = np.stack(parts, axis=1)
        sums = self._sums[runs] = self._sums[runs] + counts
        bad, total, control_bad, control_total = np.moveaxis(sums, 2, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            pooled = (bad + control_bad) / (total + control_total)
            deviation = np.sqrt(pooled * (1 - pooled) * (1 / total + 1 / control_total))
            z = (bad / total - control_bad / control_total) / deviation
        worse = ((z > _NORMAL_99) & (total >= _LEAST_EVENTS) & np.isfinite(z)).any(axis=1)
        self.rolled_back_s[runs] = np.where(worse, np.minimum(self.rolled_back_s[runs], at_s), self.rolled_back_s[runs])


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Canary's last minute against fixed thresholds, checked once a minute.

    ``answered``, ``in_time``: least shares (None: not checked). ``failures``: rolled back at so many failed checks.
    """

    name: str
    answered: float
    in_time: float | None
    failures: int


class _Threshold:
    def __init__(self, rule: Thresholds, objectives: Objectives, runs: int) -> None:
        self.name, self._rule = rule.name, rule
        columns = {
            "answered": [o.good is Good.ANSWERED and o.within_ms is None for o in objectives.objectives].index(True),
            "in_time": [o.within_ms is not None for o in objectives.objectives].index(True),
        }
        wanted = {"answered": rule.answered, "in_time": rule.in_time}
        self._checks = [(columns[what], least) for what, least in wanted.items() if least is not None]
        self._bad, self._total = np.zeros((runs, len(self._checks))), np.zeros((runs, len(self._checks)))
        self._failed = np.zeros(runs, dtype=np.int64)
        self.rolled_back_s = np.full(runs, np.inf)

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None:
        columns = [column for column, _ in self._checks]
        self._bad[runs] += seen.canary_bad[:, columns]
        self._total[runs] += seen.canary_total[:, columns]
        if round(at_s) % 60:
            return
        least = np.array([least for _, least in self._checks])
        with np.errstate(invalid="ignore", divide="ignore"):
            short = (1 - self._bad[runs] / self._total[runs] < least).any(axis=1)  # no data: no failure
        self._bad[runs], self._total[runs] = 0.0, 0.0
        self._failed[runs] += short
        back = self._failed[runs] >= self._rule.failures
        self.rolled_back_s[runs] = np.where(back, np.minimum(self.rolled_back_s[runs], at_s), self.rolled_back_s[runs])


PEERS: Sequence[Thresholds] = (
    # Argo Rollouts fails an analysis when more than failureLimit measurements failed, Flagger when threshold did.
    Thresholds("Argo Rollouts, its documentation's: success >= 95 %, failureLimit 3", 0.95, None, 4),
    Thresholds("Argo Rollouts at the goals: success >= 99.9 %, in time >= 98 %, failureLimit 3", 0.999, 0.98, 4),
    Thresholds("Flagger, its documentation's: success >= 99 %, threshold 5", 0.99, None, 5),
    Thresholds("Flagger at the goals: success >= 99.9 %, in time >= 98 %, threshold 5", 0.999, 0.98, 5),
)


def peers(objectives: Objectives, runs: int) -> list[Rule]:
    return [ZTest(objectives, runs), *(_Threshold(rule, objectives, runs) for rule in PEERS)]


class All:
    """Several watchers as one."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = rules

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None:
        for rule in self.rules:
            rule.look(runs, at_s, seen)
