"""What a rollout's steps and margins are worth: verdicts, times and harm, by how bad a candidate is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from endcap.objectives import Good, Objective, Objectives
from serving.rollout.simulate import SimulatedRuns, Traffic, simulate, upper_limit
from serving.rollout.spec import RolloutSpec

__all__ = ["Effect", "Power", "margin_of", "power_of", "usual_effects", "usual_shares"]

_MARGINS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
_LEAST_GOOD = 0.001


@dataclass(frozen=True, slots=True)
class Effect:
    """A candidate whose share of good events in one objective is ``canary``; ``objective`` None: as good as stable."""

    objective: str | None = None
    canary: float | None = None

    def on(self, traffic: Traffic) -> Traffic:
        if self.objective is None or self.canary is None:
            return replace(traffic, canary={})
        return replace(traffic, canary={self.objective: self.canary})


@dataclass(frozen=True, slots=True)
class Power:
    """How simulated rollouts of one kind of candidate ended.

    ``*_share``: of all runs; ``rolled_back_at_most``: the upper 95 % limit of its chance. ``median_s``, ``p90_s``:
    until a rollout had ended, counting those that had not with all of the simulated time. ``canary_requests``: the
    median. ``shoppers_hurt``, its median, and ``_p90``: requests that failed or came too late at canary, less what
    as many would have at stable.
    """

    effect: Effect
    runs: int
    promoted_share: float
    rolled_back_share: float
    rolled_back_at_most: float
    held_share: float
    undecided_share: float
    median_s: float
    p90_s: float
    canary_requests: float
    shoppers_hurt: float
    shoppers_hurt_p90: float


def usual_shares(objectives: Objectives) -> dict[str, float]:
    """Shares of good events of a stable version that keeps its goals with some room: half the bad ones, more clicks."""
    return {
        o.name: min(1.0, 1.5 * o.goal) if o.good is Good.CLICKED else (1 + o.goal) / 2 for o in objectives.objectives
    }  # fmt: skip


def margin_of(objective: Objective, control: float) -> float:
    """The margin as a share of events, at control's share of good ones."""
    return objective.margin if objective.margin is not None else (objective.margin_relative or 0.0) * control


def usual_effects(objectives: Objectives, good: Mapping[str, float]) -> list[Effect]:
    """As good as stable; then each objective alone worse by a few multiples of its margin."""
    effects = [Effect()]
    for objective in objectives.objectives:
        control = good[objective.name]
        shares = [control - times * margin_of(objective, control) for times in _MARGINS]
        effects += [Effect(objective.name, round(share, 6)) for share in shares if share >= _LEAST_GOOD]
    return effects


def power_of(
    objectives: Objectives, spec: RolloutSpec, traffic: Traffic, effect: Effect, *, runs: int, seed: int,
    horizon_s: float,
) -> Power:  # fmt: skip
    """Simulate ``runs`` rollouts of such a candidate. ``objectives`` with the rollout's margins in place.

    Raises:
        InputError: the traffic does not fit the objectives, or there is nothing to simulate.
    """
    done = simulate(objectives, spec, effect.on(traffic), runs=runs, seed=seed, horizon_s=horizon_s)
    return _summary(effect, done, _hurt_at_stable(objectives, traffic.good))


def _hurt_at_stable(objectives: Objectives, good: Mapping[str, float]) -> float:
    """The share of stable's requests that fail or come too late."""
    answered = [good[o.name] for o in objectives.objectives if o.good is Good.ANSWERED and o.within_ms is None]
    in_time = [good[o.name] for o in objectives.objectives if o.within_ms is not None]
    return 1 - (answered[0] if answered else 1.0) * (in_time[0] if in_time else 1.0)


def _summary(effect: Effect, done: SimulatedRuns, usual: float) -> Power:
    rolled_back = done.ended("rolled_back")
    hurt = np.maximum(0.0, done.failed + done.late - usual * done.attempts)
    return Power(
        effect, len(done), done.share("promoted"), float(rolled_back.mean()),
        upper_limit(int(rolled_back.sum()), len(done)), done.share("held"), done.share("undecided"),
        _quantile(done.seconds, 0.5), _quantile(done.seconds, 0.9), _quantile(done.attempts, 0.5),
        _quantile(hurt, 0.5), _quantile(hurt, 0.9),
    )  # fmt: skip


def _quantile(values: NDArray[np.float64] | NDArray[np.int64], part: float) -> float:
    return float(np.quantile(values, part))
