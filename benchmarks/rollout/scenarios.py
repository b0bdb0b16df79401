"""The shop that is simulated, and what happens to it.

200 requests a second, a third of them by shoppers not seen before. Stable answers 99.95 % of the attempts where 99.9 %
are promised, 99 % of the answers within the threshold where 98 % are promised, and 8 % of the shoppers click.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from endcap.objectives import Good, Objective, Objectives
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.traffic import Clicks, Drift, Outage, Population, Traffic

__all__ = [
    "AA", "DETECTION", "FAILING", "FIXED", "HOUR_S", "OBJECTIVES", "PLAIN", "SPEC", "Detection", "line", "settings",
]  # fmt: skip

HOUR_S = 3600.0
AVAILABILITY = Objective("availability", 0.999, Good.ANSWERED, None, None, 0.002, None)
LATENCY = Objective("latency", 0.98, Good.ANSWERED, 100, None, 0.01, None)
CLICKS = Objective("click-through", 0.05, Good.CLICKED, None, 60.0, None, 0.1)
OBJECTIVES = Objectives("shop", "shop", (AVAILABILITY, LATENCY, CLICKS))
STABLE = {"availability": 0.9995, "latency": 0.99, "click-through": 0.08}

_ALPHA, _BETA = 0.01, 0.05
SPEC = RolloutSpec(
    "shop", "shop", "models:/shop/2", "shop",
    (Step(0.05, 500, 60, HOUR_S), Step(0.25, 1000, 60, HOUR_S), Step(0.5, 1000, 60, HOUR_S), Step(1, 500, 30, HOUR_S)),
    _ALPHA, _BETA, 1.0, hold_s=600,
)  # fmt: skip
FIXED = replace(SPEC, steps=(Step(0.1, 500, 10, HOUR_S), Step(1, 500, 30, HOUR_S)))
"""Canary keeps 10 % until there is a verdict."""

PLAIN = Traffic(STABLE, requests_per_s=200, new_shoppers_per_s=60, clicks=Clicks(window_s=60))
AA: Mapping[str, Traffic] = {
    "plain": PLAIN,
    "repeat shoppers": replace(PLAIN, population=Population(shoppers=150_000)),
    "drift": replace(PLAIN, drift=Drift(part=0.5, period_s=600)),
    "outages": replace(PLAIN, outage=Outage(failed=0.2, late=0.3, duration_s=120, latest_s=600)),
    "late clicks": replace(PLAIN, clicks=Clicks(window_s=600, late_part=0.3, late_mean_s=200, closing_every_s=5)),
}  # fmt: skip
"""Candidate and stable are the same in all of them."""
FAILING = replace(PLAIN, canary={"availability": 0.95})


@dataclass(frozen=True, slots=True)
class Detection:
    """One objective of the candidate's is worse. Its goal is what the candidate still keeps, so that only the
    comparison with control can tell, as for the oracle.

    ``control``, ``canary``: shares of good events. ``watched_s``: long enough for all tests to end.
    """

    case: str
    objective: str
    control: float
    canary: float
    watched_s: float

    @property
    def objectives(self) -> Objectives:
        judged = tuple(
            replace(o, goal=self.canary) if o.name == self.objective else o for o in OBJECTIVES.objectives
        )  # fmt: skip
        return replace(OBJECTIVES, objectives=judged)

    @property
    def column(self) -> int:
        return [o.name for o in OBJECTIVES.objectives].index(self.objective)

    @property
    def traffic(self) -> Traffic:
        good = {**STABLE, self.objective: self.control}
        return replace(PLAIN, good=good, canary={self.objective: self.canary}, clicks=Clicks(window_s=10))


DETECTION = (
    Detection("errors 0.1 % -> 1 %", "availability", 0.999, 0.99, 600),
    Detection("errors 1 % -> 5 %", "availability", 0.99, 0.95, 120),
    Detection("late answers 1 % -> 3 %", "latency", 0.99, 0.97, 900),
    Detection("click-through 8 % -> 6 %", "click-through", 0.08, 0.06, 3600),
)


def line(objective: Objective) -> tuple[float, float]:
    """Slope and constant of "canary's bad share = slope * control's + constant", the margin's boundary."""
    if objective.margin is not None:
        return 1.0, objective.margin
    relative = objective.margin_relative or 0.0
    return 1 - relative, relative


def settings() -> dict[str, object]:
    """What was simulated, for the record."""
    return {
        "requests_per_s": PLAIN.requests_per_s, "new_shoppers_per_s": PLAIN.new_shoppers_per_s, "stable": dict(STABLE),
        "objectives": [
            {"name": o.name, "goal": o.goal, "margin": o.margin, "margin_relative": o.margin_relative}
            for o in OBJECTIVES.objectives
        ],
        "steps": [{"share": s.share, "min_requests": s.min_requests, "min_s": s.min_s} for s in SPEC.steps],
        "alpha": SPEC.alpha, "beta": SPEC.beta, "look_s": SPEC.look_s, "horizon_s": HOUR_S,
    }  # fmt: skip
