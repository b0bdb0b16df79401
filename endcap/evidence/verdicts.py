"""From strata to verdicts: per objective, and for a rollout as a whole.

**fail**: shown to be worse than control by more than the margin, or worse than the declared goal itself.
**pass**: shown to be no worse than control by more than the margin (non-inferiority); the primary objective of an A/B
rollout: shown to be better than control (superiority).
**inconclusive**: neither. No data is inconclusive, never a pass.

``alpha`` bounds the chance that a rollout of a version that is in truth good enough is ever failed: it is shared over
the objectives (union bound), and within one the mean of the two fail e-processes needs no further sharing. ``beta``
bounds the chance that a version worse by more than the margin in any one objective, or no better than control in the
primary one, passes: all must pass, so nothing is shared (intersection-union test, Berger 1982).

The tests are those of :mod:`endcap.evidence.kernel`, where the proof is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endcap.evidence.intervals import Interval, Intervals
from endcap.evidence.judgement import Judgement, Verdict
from endcap.evidence.kernel import BETTER, CONTROL, FAIL, GOAL, PASS, Kernel, State
from endcap.evidence.strata import Counts, Stratum, counts_of
from endcap.objectives import Objective, Objectives

__all__ = ["Evidence", "ObjectiveEvidence"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ObjectiveEvidence:
    """What was seen for one objective. ``control``: its events in looks where canary had events too."""

    objective: Objective
    canary: Counts
    control: Counts
    difference: Interval

    @property
    def margin(self) -> float:
        """The margin as an absolute share, at control's share so far (its goal before any)."""
        objective = self.objective
        if objective.margin is not None or objective.margin_relative is None:
            return objective.margin or 0.0
        control = self.control.share
        return objective.margin_relative * (objective.goal if control is None else control)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The evidence of a rollout, of constant size. Immutable; folds over looks.

    ``seen``: [4, objectives], canary's bad and all events, control's bad and all events, of looks where canary had any.
    """

    kernel: Kernel
    state: State
    seen: Floats
    alpha: float
    beta: float
    looks: int = 0
    intervals: Intervals | None = None

    @staticmethod
    def start(
        objectives: Objectives, *, alpha: float = 0.05, beta: float = 0.05, primary: str | None = None,
        intervals: bool = True,
    ) -> Evidence:  # fmt: skip
        """``primary``: the objective that has to be shown to be better (A/B mode).

        ``intervals``: keep the differences' confidence sequences too, for people; they decide nothing and cost several
        times what the tests do.

        Raises:
            InputError: an objective without a margin, or ``primary`` is none of them.
        """
        kernel = Kernel(objectives.objectives, primary=primary)
        return Evidence(
            kernel, kernel.start(), np.zeros((4, len(kernel.objectives))), alpha, beta,
            intervals=Intervals.start(objectives, alpha=alpha) if intervals else None,
        )  # fmt: skip

    def update(self, look: Mapping[str, Stratum]) -> Evidence:
        """The evidence after one more look. Objectives without a stratum saw nothing in it."""
        counts = counts_of(self.kernel.names, look)
        state = self.state.copy()
        canary_bad, canary_total, control_bad, control_total = counts
        self.kernel.update(state, canary_bad, canary_total, control_bad, control_total)
        return Evidence(
            self.kernel, state, self.seen + counts * (canary_total > 0), self.alpha, self.beta, self.looks + 1,
            None if self.intervals is None else self.intervals.update(look),
        )  # fmt: skip

    @property
    def alpha_each(self) -> float:
        """The chance of a false fail that each objective has."""
        return self.alpha / len(self.kernel.objectives)

    @property
    def by_objective(self) -> Mapping[str, ObjectiveEvidence]:
        canary_bad, canary_total, control_bad, control_total = self.seen.astype(np.int64).tolist()
        return {
            objective.name: ObjectiveEvidence(
                objective,
                Counts(canary_total[i] - canary_bad[i], canary_total[i]),
                Counts(control_total[i] - control_bad[i], control_total[i]),
                Interval() if self.intervals is None else self.intervals.interval_of(objective.name),
            )
            for i, objective in enumerate(self.kernel.objectives)
        }

    @property
    def verdict(self) -> Verdict:
        verdicts = self._verdicts()
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.INCONCLUSIVE if Verdict.INCONCLUSIVE in verdicts else Verdict.PASS

    def verdict_of(self, name: str) -> Verdict:
        return self._verdicts()[self._index(name)]

    @property
    def reason(self) -> str:
        """Why the whole verdict is what it is: the objectives that decide it."""
        return self.judgement.reason

    def reason_of(self, name: str) -> str:
        """One objective's verdict in words, with its figures."""
        return self._reason_of(self._index(name), self._verdicts()[self._index(name)])

    @property
    def judgement(self) -> Judgement:
        """All that a decision needs to know, without the numbers it came from."""
        objectives, verdicts, verdict = self.kernel.objectives, self._verdicts(), self.verdict
        reasons = {o.name: self._reason_of(i, verdicts[i]) for i, o in enumerate(objectives)}
        if verdict is Verdict.PASS:
            figures = ", ".join(self._figures(i) for i in range(len(objectives)))
            shown = "no objective is worse than control by more than its margin"
            if self.kernel.primary is not None:
                shown = f"{objectives[self.kernel.primary].name} is better than control, {shown}"
            reason = f"{shown}: {figures}"
        else:
            reason = "; ".join(reasons[o.name] for o, own in zip(objectives, verdicts, strict=True) if own is verdict)
        return Judgement(verdict, {o.name: own for o, own in zip(objectives, verdicts, strict=True)}, reason, reasons)

    def _index(self, name: str) -> int:
        return self.kernel.names.index(name)

    def _verdicts(self) -> list[Verdict]:
        fails, passes = len(self.kernel.objectives) / self.alpha, 1 / self.beta
        primary = self.kernel.primary
        return [
            Verdict.FAIL
            if peak[FAIL] >= fails
            else (Verdict.PASS if peak[BETTER if i == primary else PASS] >= passes else Verdict.INCONCLUSIVE)
            for i, peak in enumerate(self.state.peak.tolist())
        ]

    def _counts(self, i: int) -> tuple[Counts, Counts]:
        canary_bad, canary_total, control_bad, control_total = (int(count) for count in self.seen[:, i])
        return Counts(canary_total - canary_bad, canary_total), Counts(control_total - control_bad, control_total)

    def _figures(self, i: int) -> str:
        canary, control = self._counts(i)
        return f"{self.kernel.objectives[i].name} {_share(canary)} (control {_share(control)})"

    def _reason_of(self, i: int, verdict: Verdict) -> str:
        objective = self.kernel.objectives[i]
        name, (canary, control) = objective.name, self._counts(i)
        figures = f"{_of(canary)} against {_of(control)}"
        if verdict is Verdict.FAIL:
            if self.state.peak[i, CONTROL] >= self.state.peak[i, GOAL]:
                return f"{name}: worse than control by more than the margin ({figures})"
            return f"{name}: worse than its goal of {objective.goal:.4g} ({_of(canary)})"
        if verdict is Verdict.PASS:
            how = "better than control" if i == self.kernel.primary else "no worse than control within the margin"
            return f"{name}: {how} ({figures})"
        return f"{name}: not enough evidence yet ({figures})"


def _of(counts: Counts) -> str:
    return _share(counts) if counts.share is None else f"{_share(counts)} of {counts.total}"


def _share(counts: Counts) -> str:
    return "no data" if counts.share is None else f"{counts.share:.2%}"
