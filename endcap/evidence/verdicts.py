"""From strata to verdicts: per objective, and for a rollout as a whole.

**fail**: shown to be worse than control by more than the margin, or worse than the declared goal itself.
**pass**: shown to be no worse than control by more than the margin (non-inferiority).
**inconclusive**: neither. No data is inconclusive, never a pass.

``alpha`` bounds the chance that a rollout of a version that is in truth good enough is ever failed: it is shared over
all fail tests (union bound). ``beta`` bounds the chance that a version worse by more than the margin in any one
objective passes; all objectives must pass, so nothing is shared (intersection-union test).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from endcap.evidence.sequential import Boundary, ConfidenceSequence, SequentialTest
from endcap.evidence.strata import Counts, Stratum
from endcap.objectives import Objective, Objectives

__all__ = ["Evidence", "ObjectiveEvidence", "Verdict"]


class Verdict(StrEnum):
    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class ObjectiveEvidence:
    """All that was seen for one objective, and the tests on it."""

    objective: Objective
    worse_than_control: SequentialTest
    worse_than_goal: SequentialTest
    not_worse: SequentialTest
    difference: ConfidenceSequence
    canary: Counts = Counts()
    control: Counts = Counts()
    """Control's events in looks where canary had events too."""

    @staticmethod
    def start(objective: Objective, *, alpha: float) -> ObjectiveEvidence:
        boundary = (
            Boundary.margin(objective.margin)
            if objective.margin is not None
            else Boundary.relative_margin(objective.margin_relative or 0.1)
        )
        goal = objective.goal
        return ObjectiveEvidence(
            objective,
            SequentialTest(boundary, -1, goal),
            SequentialTest(Boundary.goal(goal), -1, goal),
            SequentialTest(boundary, +1, goal),
            ConfidenceSequence.start(goal, alpha=alpha),
        )

    def update(self, stratum: Stratum) -> ObjectiveEvidence:
        if stratum.canary.total == 0:
            return self
        return replace(
            self,
            worse_than_control=self.worse_than_control.update(stratum),
            worse_than_goal=self.worse_than_goal.update(Stratum(stratum.canary, Counts())),
            not_worse=self.not_worse.update(stratum),
            difference=self.difference.update(stratum),
            canary=self.canary + stratum.canary,
            control=self.control + stratum.control,
        )

    @property
    def margin(self) -> float:
        """The margin as an absolute share, at control's share so far (its goal before any)."""
        if self.objective.margin is not None:
            return self.objective.margin
        control = self.control.share
        return (self.objective.margin_relative or 0.1) * (self.objective.goal if control is None else control)


@dataclass(frozen=True)
class Evidence:
    """The evidence of a rollout: one :class:`ObjectiveEvidence` an objective. Immutable; folds over looks."""

    by_objective: Mapping[str, ObjectiveEvidence]
    alpha: float
    beta: float
    looks: int = field(default=0)

    @staticmethod
    def start(objectives: Objectives, *, alpha: float = 0.05, beta: float = 0.05) -> Evidence:
        return Evidence({o.name: ObjectiveEvidence.start(o, alpha=alpha) for o in objectives.objectives}, alpha, beta)

    def update(self, look: Mapping[str, Stratum]) -> Evidence:
        """The evidence after one more look. Objectives without a stratum saw nothing in it."""
        updated = {
            name: evidence.update(look[name]) if name in look else evidence
            for name, evidence in self.by_objective.items()
        }
        return replace(self, by_objective=updated, looks=self.looks + 1)

    @property
    def alpha_each(self) -> float:
        return self.alpha / (2 * len(self.by_objective))

    def verdict_of(self, name: str) -> Verdict:
        evidence = self.by_objective[name]
        if evidence.worse_than_control.rejects(self.alpha_each) or evidence.worse_than_goal.rejects(self.alpha_each):
            return Verdict.FAIL
        if evidence.not_worse.rejects(self.beta):
            return Verdict.PASS
        return Verdict.INCONCLUSIVE

    @property
    def verdict(self) -> Verdict:
        verdicts = {self.verdict_of(name) for name in self.by_objective}
        if Verdict.FAIL in verdicts:
            return Verdict.FAIL
        return Verdict.PASS if verdicts == {Verdict.PASS} else Verdict.INCONCLUSIVE

    def reason_of(self, name: str) -> str:
        """One objective's verdict in words, with its figures."""
        evidence = self.by_objective[name]
        canary, control = evidence.canary, evidence.control
        figures = f"{_share(canary)} of {canary.total} against {_share(control)} of {control.total}"
        verdict = self.verdict_of(name)
        if verdict is Verdict.FAIL:
            if evidence.worse_than_control.rejects(self.alpha_each):
                return f"{name}: worse than control by more than the margin ({figures})"
            return f"{name}: worse than its goal of {evidence.objective.goal:.4g} ({_share(canary)} of {canary.total})"
        if verdict is Verdict.PASS:
            return f"{name}: no worse than control within the margin ({figures})"
        return f"{name}: not enough evidence yet ({figures})"

    @property
    def reason(self) -> str:
        """Why the whole verdict is what it is: the objectives that decide it."""
        verdict = self.verdict
        names = [name for name in self.by_objective if self.verdict_of(name) is verdict]
        if verdict is Verdict.PASS:
            figures = ", ".join(
                f"{name} {_share(seen.canary)} (control {_share(seen.control)})"
                for name, seen in self.by_objective.items()
            )
            return f"no objective is worse than control by more than its margin: {figures}"
        return "; ".join(self.reason_of(name) for name in names)


def _share(counts: Counts) -> str:
    return "no data" if counts.share is None else f"{counts.share:.2%}"
