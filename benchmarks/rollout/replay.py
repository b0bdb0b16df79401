"""Simulated rollouts judged again, look by look, by what a real one is judged by: ``Evidence`` and ``decide``."""

from __future__ import annotations

import numpy as np

from endcap.evidence import Counts, Evidence, Stratum
from endcap.objectives import Objectives
from serving.rollout.decide import begin, decide
from serving.rollout.events import Acted, Gated, Looked, Received
from serving.rollout.simulate import UNDECIDED, RecordedRun
from serving.rollout.spec import RolloutSpec

__all__ = ["differences", "judged_again"]


def judged_again(objectives: Objectives, spec: RolloutSpec, run: RecordedRun) -> tuple[str, float]:
    """The outcome and when it was decided, seconds since the start, by ``Evidence`` and ``decide`` themselves."""
    names = [objective.name for objective in objectives.objectives]
    evidence = Evidence.start(objectives, alpha=spec.alpha, beta=spec.beta, primary=spec.primary, intervals=False)
    state = begin(spec, stable="1", canary="2", now_s=0.0)
    state = decide(spec, state, Gated(True, ""), 0.0)
    state = decide(spec, state, Acted(), 0.0)
    ours, everybody = 0, 0
    for look, (counts, attempts) in enumerate(zip(run.counts, run.attempts, strict=True), 1):
        now_s = look * spec.look_s
        bad, total, control_bad, control_total = np.asarray(counts, dtype=np.int64).tolist()
        evidence = evidence.update(
            {
                name: Stratum(
                    Counts(total[i] - bad[i], total[i]), Counts(control_total[i] - control_bad[i], control_total[i])
                )
                for i, name in enumerate(names)
            }
        )
        canary, control = (int(count) for count in attempts)
        ours, everybody = ours + canary, everybody + canary + control
        received = Received(canary_attempts=ours, canary_requests=ours, requests=everybody)
        seen = Looked(evidence.verdict, "", received=received, canary_new=canary, control_new=control)
        state = decide(spec, state, seen, now_s)
        if state.outcome is not None:
            return state.outcome.value, now_s
        if state.intent:
            state = decide(spec, state, Acted(received), now_s)
    return UNDECIDED, len(run.counts) * spec.look_s


def differences(objectives: Objectives, spec: RolloutSpec, runs: tuple[RecordedRun, ...]) -> list[str]:
    """What came out otherwise; empty where all verdicts and their times are the same."""
    found = []
    for number, run in enumerate(runs):
        outcome, seconds = judged_again(objectives, spec, run)
        if (outcome, seconds) != (run.outcome, run.seconds):
            found.append(f"run {number}: simulated {run.outcome} after {run.seconds:g} s, "
                         f"decided {outcome} after {seconds:g} s")  # fmt: skip
    return found
