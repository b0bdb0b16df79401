"""All tests of all objectives as one array update, for one rollout or for thousands of simulated ones at once.

Every event is bad or not. A hypothesis is a half-plane of (control's bad share, canary's bad share) bounded by the line
``canary = slope * control + constant``: no worse than control by more than a margin, worse by at least the margin, no
worse than a fixed goal. A bet on one look with ``n_k`` control and ``n_c`` canary events is a point ``(x, y)`` on that
line and stakes ``r`` and ``q``; with Z = 1 for a bad event and 0 for a good one it multiplies its wealth by::

    product over control's events (1 + r (Z - x))  *  product over canary's events (1 + q (Z - y))

**It is an e-value** (expectation at most 1 wherever the hypothesis holds) when, before the look's outcomes are known,

1. all factors are positive,
2. ``n_k r + slope n_c q = 0``, and
3. ``q`` has the sign of the alternative (positive where canary is suspected to be above the line).

Proof. At true shares (u, v) the expectation's logarithm is ``n_k log(1 + r (u - x)) + n_c log(1 + q (v - y))``: concave
in (u, v), 0 at (x, y), its gradient there ``(n_k r, n_c q)``, which by 2 is ``n_c q (-slope, 1)``: by 3 the outward
normal of the half-plane. A concave function lies below its tangent plane, which is at most 0 on all of the half-plane.
How well x was chosen plays no part, so one step of a fixed-point iteration a look suffices: with
``a = x + r x (1 - x)`` and ``b = y + q y (1 - y)`` the wealth's factor is the likelihood ratio of (a, b) to (x, y),
condition 2 says that (x, y) is the Kullback-Leibler projection of (a, b) onto the line, and the iteration steers ``a``
towards control's running estimate; its remaining error costs a little power and no validity. The numbers of events of
a look may be looked at (they are independent of what becomes of the events), its outcomes may not. Hence requests by
their first attempt and not attempts: a retry makes the number hang on the outcome, and what fails whoever tries it
would be several failures of one cause (measured, of answers that fail at every retry: alpha missed ten to forty times).

Products of a bet over looks, and weighted means of several bets, are e-processes, so the chance that one ever reaches
1/alpha under its hypothesis is at most alpha, however often and whenever it is looked at (Ville, *Étude critique de la
notion de collectif*, 1939). Each look may have true shares of its own: drift that hits both sides costs no validity.

Sources: Turner, Ly, Grünwald, "Generic E-variables for exact sequential k-sample tests that allow for optional
stopping", J. Stat. Plan. Inference 230 (2024), for the two-sample e-value and its projection; Waudby-Smith, Ramdas,
"Estimating means of bounded random variables by betting", JRSS B 86 (2024), for the form as bets; Farrington,
Manning, Stat. Med. 9 (1990), for the projection under a margin; Howard et al., "Time-uniform, nonparametric,
nonasymptotic confidence sequences", Ann. Stat. 49 (2021); Wald, *Sequential Analysis* (1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.objectives import Objective

__all__ = ["BETTER", "CONTROL", "FAIL", "GOAL", "PASS", "Bets", "BetsState", "Kernel", "State", "put_in"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FAIL, CONTROL, GOAL, PASS, BETTER = range(5)
"""Columns of :attr:`State.peak`."""

_FLOOR = 1e-6
"""Shares are kept this far from 0 and 1: rarer events than these no rollout sees."""
_GREATEST_STAKE = 0.95
"""The part of its wealth that a bet may lose to one of control's events at most."""
_PRIOR_EVENTS = 20.0
"""Weight of the expected share in the running estimate of control's share, in events."""
_GREATEST_LOOK = 20.0
"""A look with this many times more control events than were seen before (and the prior's) is not bet on but learnt
from: the estimate is too crude for so much at once."""
_FIRST_STEPS = 4
"""Fixed-point steps before the first bet; afterwards one a look, from where the last one ended."""
_NONE = 1e-9
"""Added to numbers of events that are divided by: far below one event."""
_GREATEST_LOG = 300.0
"""Wealth is not counted beyond e to this (the least of an e-process and a constant is one): sums stay finite."""

_RECENT_LOOKS, _LONG_LOOKS = 10.0, 600.0
"""Looks over which control's trouble, and its usual share, are taken (exponentially weighted)."""
_RECENT_KEEP, _LONG_IN_RECENT = 1 - 1 / _RECENT_LOOKS, _LONG_LOOKS / _RECENT_LOOKS
_TROUBLE_EVENTS, _USUAL_DEVIATIONS = 2.0, 1.5
"""Control is in trouble when its recent bad events exceed those that its goal allows by two, and those that are usual
by one and a half times their root: early, so that an outage that comes and goes about this line is seen to be one.
Trouble that is none costs canary's goal a few looks; an outage that is not noticed fails it."""
_AT_ONCE_DEVIATIONS, _AT_ONCE_EVENTS = 3.0, 1.0
"""So too of one look alone: by three times the due events' root, and one more. An outage's first look is lost in the
good ones before it, and a bet that was put in lately needs no second one."""

_LEAST_CONTROL = 0.5
"""Control with fewer events than this for one of canary's (and any at all) is too thin to notice an outage in time."""

_CONTROL_STEPS = ((0.22, 1.0), (0.45, 1.0), (0.9, 1.0), (1.6, 0.7), (3.0, 0.3))
_GOAL_STEPS = ((0.5, 0.3), (1.3, 0.6), (2.5, 1.0), (3.6, 2.0))
_BETTER_STEPS = ((0.03, 1.0), (0.06, 1.0), (0.12, 1.0), (0.24, 1.0), (0.5, 0.7), (1.0, 0.5))
"""How far beyond the line the alternatives lie, in log-odds, each with its weight: from a hint to a catastrophe."""
_PASS_FRACTIONS = ((0.6, 0.3), (1.0, 0.7))
"""Where between the line (0) and control's own share (1) a canary that is good enough is supposed to be."""
_FROM_THE_START = 0.9
"""Of a fail bet's wealth, the part that is staked from the first look on. The rest is put in look by look
(:func:`put_in`), so that a canary that was well for an hour and then breaks has not lost what is bet against it by
then. A mixture over starting times is an e-process too; keeping the greater of what is left and what is put in, instead
of their sum, only makes it less."""
_CONTROL_WEIGHT = 0.5
"""Weight of "worse than control" in the mean of the two fail e-processes; "worse than its goal" has the rest."""


@dataclass
class BetsState:
    """Log wealth of each bet and control's share on its line. Changed in place by :meth:`Bets.update`."""

    log_e: Floats
    x: Floats
    settled: bool = False

    def copy(self) -> BetsState:
        return BetsState(self.log_e.copy(), self.x.copy(), self.settled)

    def take(self, rows: NDArray[np.intp] | Bools) -> BetsState:
        return BetsState(self.log_e[rows], self.x[rows], self.settled)


class Bets:
    """A fixed set of bets, of shape [objectives, bets]; the first ``len(steps)`` of an objective are by log-odds.

    ``slope``, ``constant``: the line in bad shares, of each bet. ``side``: +1 where canary is suspected above the line.
    ``steps``: log-odds beyond the line of the first bets. ``fractions``: of the others, how far the alternative lies
    from the line on the way to a share given at each look.
    """

    def __init__(self, slope: Floats, constant: Floats, side: Floats, steps: Floats, fractions: Floats) -> None:
        self.shape = slope.shape
        self._slope, self._constant, self._side = slope, constant, side
        self._steps = steps.shape[-1]
        cut = self._steps
        self._odds = np.exp(side[..., :cut] * steps)
        self._odds_less_one = self._odds - 1
        self._fractions = fractions
        safe = np.where(slope > 0, slope, 1.0)
        self._low = np.where(slope > 0, np.clip((_FLOOR - constant) / safe, _FLOOR, 1 - _FLOOR), _FLOOR)
        self._high = np.where(slope > 0, np.clip((1 - _FLOOR - constant) / safe, _FLOOR, 1 - _FLOOR), 1 - _FLOOR)
        self._room, self._room_slope = (1 + side) / 2, -side  # 1 - x where side is +1, x where it is -1
        # Constants as arrays: on small arrays an operation on two of one shape costs half of one with a number.
        self._one, self._one_odds, self._zero = np.ones(self.shape), np.ones(steps.shape), np.zeros(self.shape)
        self._least, self._greatest = np.full(self.shape, _FLOOR), np.full(self.shape, 1 - _FLOOR)
        self._tiny, self._greatest_stake = np.full(self.shape, 1e-12), np.full(self.shape, _GREATEST_STAKE)

    def start(self, batch: tuple[int, ...], expected: Floats) -> BetsState:
        """``expected``: control's bad share before any data, of each objective."""
        x = np.clip(np.broadcast_to(expected[:, None], self.shape), self._low, self._high)
        return BetsState(np.zeros(batch + self.shape), np.broadcast_to(x, batch + self.shape).copy())

    def update(
        self, state: BetsState, wanted: Floats, towards: Floats, usual_ratio: Floats, ratio: Floats,
        canary: tuple[Floats, Floats], control: tuple[Floats, Floats],
    ) -> Floats:  # fmt: skip
        """What each bet gains by a look, in log wealth, not yet added; ``state.x`` is moved.

        All arguments are [..., objectives]. ``wanted``: control's share as estimated; ``towards``: the share that
        ``fractions`` lead to; ``usual_ratio``: canary's events for one of control's, lately; ``ratio``: in this look;
        ``canary``, ``control``: bad and good events of this look.
        """
        slope, constant, one, cut = self._slope, self._constant, self._one, self._steps
        a = wanted[..., None]
        line = slope * a
        line += constant
        np.minimum(line, self._greatest, out=line)
        np.maximum(line, self._least, out=line)
        b = np.empty_like(line)
        first = line[..., :cut]
        scaled = first * self._odds_less_one
        scaled += self._one_odds
        np.divide(first * self._odds, scaled, out=b[..., :cut])
        if cut < self.shape[-1]:
            rest = b[..., cut:]
            np.subtract(towards[..., None], line[..., cut:], out=rest)
            rest *= self._fractions
            rest += line[..., cut:]

        x, steps = state.x, 1 if state.settled else _FIRST_STEPS
        state.settled = True
        leaning = slope * usual_ratio[..., None]
        aim = b - constant
        y = slope * x
        y += constant
        for _ in range(steps):
            v_y = one - y
            v_y *= y
            pull = one - x
            pull *= x
            pull *= leaning
            np.multiply(v_y, a, out=x)
            x += pull * aim
            pull *= slope
            v_y += pull
            x /= v_y
            np.maximum(x, self._low, out=x)
            np.minimum(x, self._high, out=x)
            np.multiply(slope, x, out=y)
            y += constant

        # The stake on canary's events moves y to b; it is cut where control's share a would leave (0, 1).
        stake = b
        stake -= y
        stake *= self._side
        np.subtract(one, y, out=v_y)
        v_y *= y
        stake /= v_y
        np.maximum(stake, self._zero, out=stake)
        against = np.multiply(slope, ratio[..., None], out=aim)
        bound = np.multiply(self._room_slope, x, out=pull)
        bound += self._room
        bound *= against
        bound += self._tiny
        np.minimum(stake, np.divide(self._greatest_stake, bound, out=bound), out=stake)
        q = stake
        q *= self._side
        r = against  # of the other sign than the proof's
        r *= q
        # 1 - q y, and with q added 1 + q (1 - y); 1 + r x, and with r taken away 1 - r (1 - x).
        y *= q
        good = np.subtract(one, y, out=y)
        q += good
        gain = np.log(q, out=q)
        gain *= canary[0][..., None]
        np.log(good, out=good)
        good *= canary[1][..., None]
        gain += good
        good = np.multiply(r, x, out=bound)
        good += one
        bad = np.subtract(good, r, out=r)
        np.log(bad, out=bad)
        bad *= control[0][..., None]
        gain += bad
        np.log(good, out=good)
        good *= control[1][..., None]
        gain += good
        return gain


@dataclass
class State:
    """All that a rollout's tests remember: of constant size. Changed in place by :meth:`Kernel.update`.

    All arrays are [..., objectives] but ``bets`` and ``peak``. ``recent_*`` are exponentially weighted over about ten
    looks, ``usual_share`` (control's bad share, beginning at the goal's) over about 600.
    """

    bets: BetsState
    control_bad: Floats
    control_total: Floats
    recent_bad: Floats
    recent_total: Floats
    recent_canary: Floats
    usual_share: Floats
    peak: Floats
    """[..., objectives, 5]: the greatest value so far of each e-process: FAIL, CONTROL, GOAL, PASS, BETTER."""
    looks: int = 0

    def copy(self) -> State:
        return State(
            self.bets.copy(), self.control_bad.copy(), self.control_total.copy(), self.recent_bad.copy(),
            self.recent_total.copy(), self.recent_canary.copy(), self.usual_share.copy(), self.peak.copy(),
            self.looks,
        )  # fmt: skip

    def take(self, rows: NDArray[np.intp] | Bools) -> State:
        """The state of some of the runs of a batch."""
        return State(
            self.bets.take(rows), self.control_bad[rows], self.control_total[rows], self.recent_bad[rows],
            self.recent_total[rows], self.recent_canary[rows], self.usual_share[rows], self.peak[rows],
            self.looks,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return self.bets.log_e.nbytes + self.bets.x.nbytes + 6 * self.control_bad.nbytes + self.peak.nbytes


class Kernel:
    """The tests of a rollout's objectives. Holds no state: one serves any number of rollouts.

    Of each objective, in columns of :attr:`State.peak`: CONTROL, against "no worse than control by more than the
    margin"; GOAL, against "no worse than its goal"; FAIL, their weighted mean (the mean of e-processes is one, and it
    dominates halving alpha between them); PASS, against "worse than control by the margin or more"; BETTER, against
    "no better than control" (0 unless an objective is ``primary``).

    **Shared outages.** Control in trouble out of the ordinary vetoes the goal's bets of a look: when its bad events of
    this look, or of about ten with this one among them, exceed by far what the greater of
    the goal's bad share and control's own over about ten minutes explains. Control's events of the look may
    decide this, since given both versions' shares of the look canary's are independent of them, and
    the goal's bets depend on nothing else. So both versions at 20 % errors for two minutes cost canary nothing, and
    what lasts a quarter of an hour is no outage but a broken objective. The goal's bets also rest while control has
    some events but fewer than half of canary's: canary's first bad look would weigh more than control's could warn.
    Worse than control by more than the margin still fails then. What this cannot see: an outage that spares control,
    one at a time without any control, and, with a few events a look, one's first look.
    """

    def __init__(self, objectives: Sequence[Objective], *, primary: str | None = None) -> None:
        """``primary``: the objective that passes only when shown to be better (A/B mode).

        Raises:
            InputError: an objective without a margin, or ``primary`` is none of them.
        """
        columns = [_bets_of(objective, better=primary is not None) for objective in objectives]
        self.objectives = tuple(objectives)
        self.names = tuple(objective.name for objective in objectives)
        if primary is not None and primary not in self.names:
            raise InputError(f"no objective named {primary!r}", next_step=f"the primary one is one of {self.names}")
        self.primary = None if primary is None else self.names.index(primary)
        self.bad_goals: Floats = np.array([1 - objective.goal for objective in objectives])
        self._prior_bad = _PRIOR_EVENTS * self.bad_goals

        def each(value: float) -> Floats:
            return np.full(len(objectives), value)

        self._prior_events, self._greatest_look, self._none = each(_PRIOR_EVENTS), each(_GREATEST_LOOK), each(_NONE)
        self._recent_keep, self._long_in_recent = each(_RECENT_KEEP), each(_LONG_IN_RECENT)
        self._usual_deviations = each(_USUAL_DEVIATIONS)
        self._at_once_deviations = each(_AT_ONCE_DEVIATIONS)
        self._least_control = each(_LEAST_CONTROL)
        self._greatest_log = np.full((len(objectives), len(columns[0])), _GREATEST_LOG)
        ordered = columns[0]
        steps = sum(bet.test is not PASS for bet in ordered)
        self._bets = Bets(
            slope=np.array([[bet.slope for bet in column] for column in columns]),
            constant=np.array([[bet.constant for bet in column] for column in columns]),
            side=np.array([[bet.side for bet in column] for column in columns]),
            steps=np.array([[bet.reach for bet in column[:steps]] for column in columns]),
            fractions=np.array([bet.reach for bet in ordered[steps:]]),
        )
        self._tests = [bet.test for bet in ordered]
        goal = self.bets_of(GOAL)
        self._goal_bets = slice(goal[0], goal[-1] + 1)
        self._fail_bets = slice(0, goal[-1] + 1)
        self._is_goal = np.array([own == GOAL for own in self._tests])
        self._weights = np.zeros((len(ordered), 5))
        for index, bet in enumerate(ordered):
            self._weights[index, bet.test] = bet.weight
        self._weights[:, FAIL] = (
            _CONTROL_WEIGHT * self._weights[:, CONTROL] + (1 - _CONTROL_WEIGHT) * self._weights[:, GOAL]
        )

    def bets_of(self, test: int) -> list[int]:
        """Which bets of an objective (the last axis of ``state.bets``) a test consists of."""
        return [index for index, own in enumerate(self._tests) if own == test]

    def start(self, batch: tuple[int, ...] = ()) -> State:
        shape = (*batch, len(self.objectives))
        bets = self._bets.start(batch, self.bad_goals)
        bets.log_e[..., self._fail_bets] = math.log(put_in(1))
        return State(
            bets, np.zeros(shape), np.zeros(shape), np.zeros(shape),
            np.zeros(shape), np.zeros(shape), np.broadcast_to(self.bad_goals, shape).copy(), np.zeros((*shape, 5)),
        )  # fmt: skip

    def update(
        self, state: State, canary_bad: Floats, canary_total: Floats, control_bad: Floats, control_total: Floats
    ) -> None:
        """One more look: counts of events since the last one, floats of shape [..., objectives]."""
        state.recent_canary *= self._recent_keep
        state.recent_canary += canary_total
        calm = self._follow_control(state, control_bad, control_total)
        wanted = state.control_bad + self._prior_bad
        trusted = state.control_total + self._prior_events
        wanted /= trusted
        gain = self._bets.update(
            state.bets, wanted, wanted, state.recent_canary / (state.recent_total + self._none),
            canary_total / (control_total + self._none), (canary_bad, canary_total - canary_bad),
            (control_bad, control_total - control_bad),
        )  # fmt: skip
        if _any_false(calm):
            gain[..., self._goal_bets] *= calm[..., None]
        trusted *= self._greatest_look
        known = control_total <= trusted
        if _any_false(known):
            gain *= known[..., None] | self._is_goal
        state.control_bad += control_bad
        state.control_total += control_total
        log_e = state.bets.log_e
        state.looks += 1
        if state.looks > 1:
            failing = log_e[..., self._fail_bets]
            np.maximum(failing, math.log(put_in(state.looks)), out=failing)
        log_e += gain
        np.minimum(log_e, self._greatest_log, out=log_e)
        np.maximum(state.peak, np.exp(log_e, out=gain) @ self._weights, out=state.peak)

    def _follow_control(self, state: State, bad: Floats, total: Floats) -> Bools:
        """Where control vouches for the moment: its recent bad events are no more than its usual share explains."""
        state.recent_bad *= self._recent_keep
        state.recent_bad += bad
        state.recent_total *= self._recent_keep
        state.recent_total += total
        due = np.maximum(state.usual_share, self.bad_goals)
        usual = state.usual_share * state.recent_total
        spread = np.sqrt(usual)
        spread *= self._usual_deviations
        usual += spread
        explained = self.bad_goals * state.recent_total
        explained += _TROUBLE_EVENTS
        np.maximum(explained, usual, out=explained)
        due *= total
        at_once = np.sqrt(due)
        at_once *= self._at_once_deviations
        at_once += due
        at_once += _AT_ONCE_EVENTS
        change = bad - total * state.usual_share
        change /= self._long_in_recent * state.recent_total + self._none
        state.usual_share += change
        lacking = state.recent_canary * self._least_control
        vouched = (state.recent_total >= lacking) | (state.recent_total == 0)
        return np.asarray((state.recent_bad <= explained) & (bad <= at_once) & vouched)

    def failed(self, state: State, alpha: float) -> Bools:
        """[..., objectives]: which are shown to be bad, at ``alpha`` shared over all of them."""
        return np.asarray(state.peak[..., FAIL] >= len(self.objectives) / alpha)

    def passed(self, state: State, beta: float) -> Bools:
        """[..., objectives]: which are shown to be good enough; the primary one, shown to be better."""
        shown = state.peak[..., PASS] >= 1 / beta
        if self.primary is not None:
            shown[..., self.primary] = state.peak[..., self.primary, BETTER] >= 1 / beta
        return np.asarray(shown)


def put_in(look: int) -> float:
    """What is put into each fail bet before ``look`` (from 1 on); over all looks it sums to 1."""
    return _FROM_THE_START if look == 1 else (1 - _FROM_THE_START) / (look * (look - 1))


def _any_false(flags: Bools) -> bool:
    """``not flags.all()`` at a tenth of the price for a few flags."""
    return b"\0" in flags.tobytes()


@dataclass(frozen=True, slots=True)
class _Bet:
    test: int
    slope: float
    constant: float
    side: int
    reach: float
    weight: float


def _bets_of(objective: Objective, *, better: bool) -> list[_Bet]:
    """All bets on an objective, those by log-odds first; the weights of each test's bets sum to one."""
    slope, constant = _margin_line(objective)
    groups = [(CONTROL, slope, constant, 1, _CONTROL_STEPS), (GOAL, 0.0, 1 - objective.goal, 1, _GOAL_STEPS)]
    if better:
        groups.append((BETTER, 1.0, 0.0, -1, _BETTER_STEPS))
    groups.append((PASS, slope, constant, -1, _PASS_FRACTIONS))
    return [
        _Bet(test, slope, constant, side, reach, weight / sum(weight for _, weight in reaches))
        for test, slope, constant, side, reaches in groups
        for reach, weight in reaches
    ]


def _margin_line(objective: Objective) -> tuple[float, float]:
    """Slope and constant, in bad shares, of "worse than control by the margin"."""
    if objective.margin is not None:
        return 1.0, objective.margin
    if objective.margin_relative is None:
        raise InputError(f"objective {objective.name} has no margin")
    return 1 - objective.margin_relative, objective.margin_relative
