"""Simulated rollouts judged again, look by look, by what judges a real one: its looks, its evidence, ``decide``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from endcap.evidence import Counts, Evidence
from endcap.objectives import Good, Objectives
from serving.rollout.decide import begin, decide, shares_of
from serving.rollout.events import Acted, Gated, Looked
from serving.rollout.looks import Lately, LookFold
from serving.rollout.simulate import UNDECIDED, RecordedRun
from serving.rollout.spec import RolloutSpec
from serving.targets.base import Observation, VersionObservation

__all__ = ["differences", "judged_again"]

_STABLE, _CANARY = "1", "2"


def judged_again(objectives: Objectives, spec: RolloutSpec, run: RecordedRun) -> tuple[str, float]:
    """The outcome and when it was decided, seconds since the start.

    By ``LookFold``, ``Lately``, ``Evidence`` and ``decide`` themselves, from what a target would have counted; of each
    kind of good event one objective (of answers in time, one a threshold).
    """
    fold, lately = LookFold(objectives, canary=_CANARY), Lately(objectives)
    evidence = Evidence.start(objectives, alpha=spec.alpha, beta=spec.beta, primary=spec.primary, intervals=False)
    state = begin(spec, stable=_STABLE, canary=_CANARY, now_s=0.0)
    state = decide(spec, state, Gated(True, ""), 0.0)
    state = decide(spec, state, Acted(), 0.0)
    counts = np.cumsum(np.asarray(run.counts, dtype=np.int64), axis=0)
    attempts = np.cumsum(run.attempts, axis=0)
    fold.fold(_observation(objectives, spec.steps[0].share, np.zeros_like(counts[0]), np.zeros_like(attempts[0]), 0.0))
    for look in range(1, len(counts) + 1):
        now_s = look * spec.look_s
        share = shares_of(spec, state, state.step)[_CANARY]
        seen = fold.fold(_observation(objectives, share, counts[look - 1], attempts[look - 1], now_s))
        evidence = evidence.update(seen.strata)
        lately.take(seen)
        event = Looked(
            evidence.verdict, "", received=seen.received, canary_new=seen.canary_new, control_new=seen.control_new,
            troubled=lately.troubled,
        )  # fmt: skip
        state = decide(spec, state, event, now_s)
        if state.outcome is not None:
            return state.outcome.value, now_s
        if state.intent:
            state = decide(spec, state, Acted(seen.received), now_s)
    return UNDECIDED, len(counts) * spec.look_s


def differences(objectives: Objectives, spec: RolloutSpec, runs: tuple[RecordedRun, ...]) -> list[str]:
    """What came out otherwise; empty where all verdicts and their times are the same."""
    found = []
    for number, run in enumerate(runs):
        outcome, seconds = judged_again(objectives, spec, run)
        if (outcome, seconds) != (run.outcome, run.seconds):
            found.append(f"run {number}: simulated {run.outcome} after {run.seconds:g} s, "
                         f"decided {outcome} after {seconds:g} s")  # fmt: skip
    return found


def _observation(
    objectives: Objectives, share: float, counts: NDArray[np.int64], attempts: NDArray[np.int64], at_s: float
) -> Observation:
    """What a target would tell. ``counts`` [4, objectives]: canary's bad and all events so far, control's."""
    canary, control = (
        _version(objectives, counts[first].tolist(), counts[first + 1].tolist(), int(attempts[first // 2]))
        for first in (0, 2)
    )
    shares = {_CANARY: share} if share == 1 else {_CANARY: share, _STABLE: 1 - share}
    return Observation(at_s, shares, {_STABLE: control, _CANARY: canary})


def _version(objectives: Objectives, bad: list[int], total: list[int], attempts: int) -> VersionObservation:
    first, shoppers = Counts(), Counts()
    within, measured = {}, {}
    for column, objective in enumerate(objectives.objectives):
        events = Counts(total[column] - bad[column], total[column])
        if objective.good is Good.COUNTED:
            measured[objective.name] = events
        elif objective.good is Good.CLICKED:
            shoppers = events
        elif objective.within_ms is None:
            first = events
        else:
            within[objective.within_ms] = events
    return VersionObservation(
        attempts=Counts(attempts, attempts), first_attempts=first, within_ms=within,
        requests=Counts(attempts, attempts), shoppers=shoppers, measured=measured,
    )  # fmt: skip
