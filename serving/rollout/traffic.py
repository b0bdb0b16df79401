"""Traffic for simulated rollouts: what thousands of targets would count, look by look, without any process.

Everything is a sum of independent draws: requests come as Poisson processes, each answer fails or comes late by chance,
and a shopper's click is decided when they are first seen. With a finite population every shopper is drawn by
themselves (their visits' rate, taste and place on the sticky hash), so heavy shoppers weigh as they do in a shop:
their first impressions are exact, and their later ones are Poisson sums of the same shoppers' rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.objectives import Good, Objective, Objectives

__all__ = ["Clicks", "Drift", "Outage", "Population", "Seen", "Stream", "Traffic"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.intp] | NDArray[np.bool_]

_GREATEST_TASTE = 0.95
"""No shopper clicks more often than this."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Shares of bad answers and of clicks swing to ``1 ± part`` of their mean in ``period_s``, of both versions alike.

    Where in the swing a rollout begins is drawn for each.
    """

    part: float = 0.5
    period_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Outage:
    """Of both versions alike: for ``duration_s`` this many more answers fail, and this many more come too late.

    It begins at a time drawn for each rollout, from its start to ``latest_s`` after it.
    """

    failed: float = 0.2
    late: float = 0.3
    duration_s: float = 120.0
    latest_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Population:
    """A finite number of shoppers with visit rates of very different sizes.

    ``spread``: standard deviation of the logarithm of a shopper's visit rate. ``heavy_taste``: how much more those who
    come often click (taste grows as their standardised log rate times this), ``taste_spread``: how much tastes
    differ among equals, as a standard deviation of the logarithm.
    """

    shoppers: int = 60_000
    spread: float = 1.5
    heavy_taste: float = 0.3
    taste_spread: float = 0.5


@dataclass(frozen=True, slots=True)
class Clicks:
    """``window_s``: how long after an impression a click counts; it is evidence when that is over, and not before.

    ``late_part`` of the clicks take an exponential time of mean ``late_mean_s``, the others none; a click after the
    window is lost. ``closing_every_s``: the collector closes windows this often.
    """

    window_s: float = 60.0
    late_part: float = 0.0
    late_mean_s: float = 60.0
    closing_every_s: float = 0.0

    @property
    def in_time(self) -> float:
        """The part of the clicks that come within the window."""
        return 1 - self.late_part * float(np.exp(-self.window_s / self.late_mean_s))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is true of both versions.

    ``good``: control's share of good events, by objective. ``canary``: the candidate's own, where it differs.
    ``new_shoppers_per_s``: requests that are a shopper's first in the rollout; a ``population`` replaces it.
    An answer that failed still counts as an impression here: of both versions alike, and far below what is judged.
    """

    good: Mapping[str, float]
    canary: Mapping[str, float] = field(default_factory=dict)
    requests_per_s: float = 200.0
    new_shoppers_per_s: float = 60.0
    population: Population | None = None
    drift: Drift | None = None
    outage: Outage | None = None
    clicks: Clicks = Clicks()

    def check(self, objectives: Objectives) -> None:
        """Raise InputError for rates that are no rates, or of objectives that are not declared."""
        names = {objective.name for objective in objectives.objectives}
        for name in (*self.good, *self.canary):
            if name not in names:
                raise InputError(f"no objective is called {name!r}", next_step=f"known: {', '.join(sorted(names))}")
        for name in sorted(names - set(self.good)):
            raise InputError(f"objective {name}: control's share of good events is not given")
        for name, share in (*self.good.items(), *self.canary.items()):
            if not 0 <= share <= 1:
                raise InputError(f"objective {name}: {share} is no share of events")
        if not 0 < self.requests_per_s <= 1e6:
            raise InputError("requests a second must be more than 0 and at most a million")
        if not 0 < self.new_shoppers_per_s <= self.requests_per_s:
            raise InputError("new shoppers a second must be more than 0 and no more than the requests")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look adds, of every run: events by objective [runs, objectives], attempts [runs].

    ``canary_failed``: attempts not answered; ``canary_late``: answers after the first latency objective's threshold.
    ``impressions``: [runs, 4] closed impressions however often a shopper came: canary's clicked and all, control's
    clicked and all; only where asked for.
    """

    canary_bad: Floats
    canary_total: Floats
    control_bad: Floats
    control_total: Floats
    canary_attempts: Ints
    control_attempts: Ints
    canary_failed: Ints
    canary_late: Ints
    impressions: Ints | None = None


@dataclass(frozen=True, slots=True)
class _Crowd:
    """A population's visits, drawn before the first look. Arrays are [runs, looks, bands] of the sticky hash."""

    fresh: NDArray[np.int16]
    control_clicks: NDArray[np.int16]
    canary_clicks: NDArray[np.int16]
    visits_per_look: NDArray[np.float32]
    """Expected visits a look of those who have been seen before."""
    clicks_per_look: NDArray[np.float32]
    """The same of their clicks, at control."""


class Stream:
    """The counts of ``runs`` targets, one look after another, for as long as somebody asks.

    ``shares``: canary's share in each step, growing. ``impressions``: count naive impressions too.
    """

    def __init__(
        self, objectives: Objectives, traffic: Traffic, *, shares: Sequence[float], runs: int, looks: int,
        look_s: float, seed: np.random.SeedSequence, population_seed: int = 0, impressions: bool = False,
    ) -> None:  # fmt: skip
        traffic.check(objectives)
        self._objectives, self._traffic, self._look_s = objectives.objectives, traffic, look_s
        self._shares = np.asarray(shares)
        self._rng = rng = np.random.default_rng(seed)
        self._look = 0
        self._rows: NDArray[np.intp] = np.arange(runs)
        self._phase = rng.uniform(0, 2 * np.pi, runs)
        outage = traffic.outage
        self._outage_s = rng.uniform(0, outage.latest_s, runs) if outage is not None else np.zeros(0)
        self._clicked = [o for o in self._objectives if o.good is Good.CLICKED]
        self._answered = next((o for o in self._objectives if _is_availability(o)), None)
        self._late_of = next((o for o in self._objectives if o.within_ms is not None), None)
        self._naive = impressions
        clicks = traffic.clicks
        self._closing_looks = max(1, round(clicks.closing_every_s / look_s))
        self._window_looks = round(clicks.window_s / look_s)
        slots = (self._window_looks + self._closing_looks - 1) // self._closing_looks + 1
        self._open = np.zeros((slots, runs, 8), dtype=np.int64)
        self._crowd = None
        if traffic.population is not None and self._clicked:
            self._crowd = self._draw_crowd(traffic.population, runs, looks, population_seed)

    def take(self, keep: Rows) -> None:
        """Go on with some of the runs only."""
        self._rows = self._rows[keep]
        self._phase = self._phase[keep]
        if self._traffic.outage is not None:
            self._outage_s = self._outage_s[keep]
        self._open = self._open[:, keep]

    def look(self, step: Ints) -> Seen:
        """The next look's counts. ``step`` [runs]: the step whose share was in force since the look before."""
        rng, share = self._rng, self._shares[step]
        at_s = (self._look + 0.5) * self._look_s
        swing = self._swing(at_s)
        fresh, visits, returning_clicks = self._visits(step, share, swing)
        canary_attempts, control_attempts = visits[0], visits[1]
        shape = (len(share), len(self._objectives))
        bad, total = (np.zeros(shape), np.zeros(shape)), (np.zeros(shape), np.zeros(shape))
        failed = [np.zeros_like(canary_attempts), np.zeros_like(control_attempts)]
        late = np.zeros_like(canary_attempts)
        extra_failed, extra_late = self._trouble(at_s)
        for version in (0, 1):
            attempts = visits[version]
            if self._answered is not None:
                failed[version] = rng.binomial(attempts, self._bad(self._answered, version, swing, extra_failed))
            answered = attempts - failed[version]
            for column, objective in enumerate(self._objectives):
                if objective is self._answered:
                    bad[version][:, column], total[version][:, column] = failed[version], attempts
                elif objective.good is not Good.CLICKED:
                    timed = objective.within_ms is not None
                    extra = extra_late if timed else extra_failed
                    events = answered if timed else attempts
                    found = rng.binomial(events, self._bad(objective, version, swing, extra))
                    bad[version][:, column], total[version][:, column] = found, events
                    if version == 0 and objective is self._late_of:
                        late = found
        closed = self._close(fresh, visits, returning_clicks)
        for column, objective in enumerate(self._objectives):
            if objective.good is Good.CLICKED:
                for version in (0, 1):
                    clicked, seen = closed[:, 2 * version], closed[:, 2 * version + 1]
                    bad[version][:, column], total[version][:, column] = seen - clicked, seen
        self._look += 1
        return Seen(
            bad[0], total[0], bad[1], total[1], canary_attempts, control_attempts, failed[0], late,
            closed[:, 4:] if self._naive else None,
        )  # fmt: skip

    def _swing(self, at_s: float) -> Floats | float:
        drift = self._traffic.drift
        if drift is None:
            return 1.0
        return np.asarray(1 + drift.part * np.sin(2 * np.pi * at_s / drift.period_s + self._phase))

    def _trouble(self, at_s: float) -> tuple[Floats | float, Floats | float]:
        outage = self._traffic.outage
        if outage is None:
            return 0.0, 0.0
        now = ((at_s >= self._outage_s) & (at_s < self._outage_s + outage.duration_s)).astype(float)
        return now * outage.failed, now * outage.late

    def _bad(self, objective: Objective, version: int, swing: Floats | float, extra: Floats | float) -> Floats | float:
        """The share of bad answers now: what is usual, swinging, and what an outage adds to it."""
        usual = np.minimum((1 - self._good(objective, version)) * swing, 1.0)
        return usual + (1 - usual) * extra

    def _good(self, objective: Objective, version: int) -> float:
        control = self._traffic.good[objective.name]
        return self._traffic.canary.get(objective.name, control) if version == 0 else control

    def _click_shares(self) -> tuple[float, float]:
        if not self._clicked:
            return 0.0, 0.0
        return self._good(self._clicked[0], 0), self._good(self._clicked[0], 1)

    def _visits(
        self, step: Ints, share: Floats, swing: Floats | float
    ) -> tuple[tuple[Ints, Ints, Ints, Ints], tuple[Ints, Ints], tuple[Floats | float, Floats | float]]:
        """First visits (canary's clicked and all, control's), all visits, and the clicks a returning visit brings."""
        rng, traffic, dt = self._rng, self._traffic, self._look_s
        canary_click, control_click = self._click_shares()
        in_time = traffic.clicks.in_time
        if self._crowd is None:
            new, again = traffic.new_shoppers_per_s * dt, (traffic.requests_per_s - traffic.new_shoppers_per_s) * dt
            seen = rng.poisson(new * share), rng.poisson(new * (1 - share))
            rates = [np.minimum(p * swing * in_time, 1.0) for p in (canary_click, control_click)]
            clicked = [rng.binomial(n, p) if self._clicked else n * 0 for n, p in zip(seen, rates, strict=True)]
            visits = seen[0] + rng.poisson(again * share), seen[1] + rng.poisson(again * (1 - share))
            return (clicked[0], seen[0], clicked[1], seen[1]), visits, (rates[0], rates[1])
        crowd, at = self._crowd, (self._rows, self._look)
        ours = np.arange(crowd.fresh.shape[2]) <= step[:, None]
        fresh, to_canary, to_control = crowd.fresh[at], crowd.canary_clicks[at], crowd.control_clicks[at]
        first = (
            np.where(ours, to_canary, 0).sum(1), np.where(ours, fresh, 0).sum(1),
            np.where(ours, 0, to_control).sum(1), np.where(ours, 0, fresh).sum(1),
        )  # fmt: skip
        weight, taste = crowd.visits_per_look[at], crowd.clicks_per_look[at]
        sums = [np.where(ours, weight, 0).sum(1), np.where(ours, 0, weight).sum(1)]
        tastes = [np.where(ours, taste, 0).sum(1), np.where(ours, 0, taste).sum(1)]
        visits = first[1] + rng.poisson(sums[0]), first[3] + rng.poisson(sums[1])
        better = canary_click / control_click if control_click > 0 else 1.0
        mean = [
            np.clip(t / np.maximum(w, 1e-9) * effect * swing, 0.0, 1.0)
            for t, w, effect in zip(tastes, sums, (better, 1.0), strict=True)
        ]
        return first, visits, (mean[0], mean[1])

    def _close(
        self, fresh: tuple[Ints, Ints, Ints, Ints], visits: tuple[Ints, Ints],
        returning_clicks: tuple[Floats | float, Floats | float],
    ) -> Ints:  # fmt: skip
        """Put this look's impressions where their windows close, and take out what closes now."""
        slots, every = len(self._open), self._closing_looks
        closes = (self._look + self._window_looks + every - 1) // every
        slot = self._open[closes % slots]
        for column, counts in enumerate(fresh):
            slot[:, column] += counts
        if self._naive:
            for version in (0, 1):
                again = visits[version] - fresh[2 * version + 1]
                clicks = self._rng.binomial(again, returning_clicks[version])
                slot[:, 4 + 2 * version] += fresh[2 * version] + clicks
                slot[:, 5 + 2 * version] += visits[version]
        if self._look % every:
            return np.zeros_like(slot)
        now = self._open[self._look // every % slots]
        closed: Ints = now.copy()
        now[:] = 0
        return closed

    def _draw_crowd(self, population: Population, runs: int, looks: int, population_seed: int) -> _Crowd:
        """Each run's first visit of each shopper. The shop is the same in all runs; who comes when is not."""
        rng, traffic, people = self._rng, self._traffic, population.shoppers
        shop = np.random.default_rng(population_seed)
        often = shop.standard_normal(people)
        rate = np.exp(population.spread * often)
        rate *= traffic.requests_per_s * self._look_s / rate.sum()
        taste = np.exp(population.heavy_taste * often + population.taste_spread * shop.standard_normal(people))
        canary_click, control_click = self._click_shares()
        in_time = traffic.clicks.in_time
        control_taste = np.minimum(taste * control_click * in_time / taste.mean(), _GREATEST_TASTE)
        effect = canary_click / control_click if control_click > 0 else 1.0
        edges = self._shares if self._shares[-1] == 1 else np.append(self._shares, 1.0)
        bands = len(edges)
        shape = (runs, looks, bands)
        crowd = _Crowd(
            np.zeros(shape, np.int16), np.zeros(shape, np.int16), np.zeros(shape, np.int16),
            np.zeros(shape, np.float32), np.zeros(shape, np.float32),
        )  # fmt: skip
        waiting = (1 / rate).astype(np.float32)
        cells = looks * bands
        for run in range(runs):
            first = rng.standard_exponential(people, dtype=np.float32) * waiting
            came = np.flatnonzero(first < looks)
            look = first[came].astype(np.int64)
            band = np.searchsorted(edges, rng.random(len(came)), side="right")
            cell = look * bands + band
            would = control_taste[came]
            if traffic.drift is not None:
                swing = 2 * np.pi / traffic.drift.period_s * (look + 0.5) * self._look_s + self._phase[run]
                would = would * (1 + traffic.drift.part * np.sin(swing))
            drawn = rng.random(len(came))
            crowd.fresh[run] = np.bincount(cell, minlength=cells).reshape(looks, bands)
            control = np.bincount(cell[drawn < would], minlength=cells).reshape(looks, bands)
            crowd.control_clicks[run] = control
            crowd.canary_clicks[run] = (
                control if effect == 1 else
                np.bincount(cell[drawn < would * effect], minlength=cells).reshape(looks, bands)
            )  # fmt: skip
            # Those who were seen come again from the next look on.
            for into, weights in ((crowd.visits_per_look, rate), (crowd.clicks_per_look, rate * control_taste)):
                started = np.bincount(cell, weights=weights[came], minlength=cells).reshape(looks, bands)
                into[run, 1:] = np.cumsum(started, axis=0)[:-1]
        return crowd


def _is_availability(objective: Objective) -> bool:
    return objective.good is Good.ANSWERED and objective.within_ms is None
