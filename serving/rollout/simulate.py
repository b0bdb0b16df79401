"""Thousands of rollouts at once, without a target: what an engineer needs to choose steps and margins.

The same evidence as a rollout's own (the kernel, a batch at a time) and the same rules as
:func:`serving.rollout.decide.decide`, applied to arrays. Every act is instant and does what it should, no one pauses
or approves (an approval is given at once), the checks before traffic are passed, and a split of shoppers that is not
the one that was set does not occur. Of an engine's looks those right before and after an act, in which nothing is new,
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.evidence.kernel import Kernel
from endcap.objectives import Objectives
from serving.rollout.decide import COMPARISONS
from serving.rollout.looks import BESIDE_S, KEPT, TROUBLE_DEVIATIONS, TROUBLE_EVENTS
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Outcome
from serving.rollout.traffic import Clicks, Drift, Outage, Population, Seen, Stream, Traffic

__all__ = [
    "UNDECIDED", "Clicks", "Drift", "Outage", "Population", "RecordedRun", "SimulatedRuns", "Traffic", "Watcher",
    "simulate", "upper_limit", "watch",
]  # fmt: skip

UNDECIDED = "undecided"
"""Still running when the simulated time was over."""
_OUTCOMES = (UNDECIDED, Outcome.PROMOTED.value, Outcome.ROLLED_BACK.value, Outcome.HELD.value)
_UNDECIDED, _PROMOTED, _ROLLED_BACK, _HELD = range(4)
_CHUNK = 250
"""Runs simulated together: their evidence then fits into a core's cache."""
_CROWD_CELLS = 5_000_000
"""The most (run, look, step) of a finite population drawn together: 14 bytes each."""
_WORTH_PACKING = 0.9
"""Runs that ended are taken out when fewer than this part of the rows are still running."""

_KEPT_OF_A_RUN = ("attempts", "failed", "late", "step", "compared_again")

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Watcher(Protocol):
    """Another rule that sees the same traffic."""

    def look(self, runs: NDArray[np.intp], at_s: float, seen: Seen) -> None:
        """``runs``: which of all runs the rows of ``seen`` are; ``at_s``: since their rollouts began."""


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One simulated rollout, look by look, for others to judge again.

    ``counts`` [looks, 4, objectives]: canary's bad and all events, control's bad and all. ``attempts`` [looks, 2]:
    canary's and control's. ``outcome``, ``seconds``: the simulation's own verdict, on the last of these looks.
    """

    counts: Floats
    attempts: Ints
    outcome: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SimulatedRuns:
    """How simulated rollouts ended. Arrays have one entry a run.

    ``outcome``: index into :attr:`OUTCOMES`; ``seconds``: to the verdict; ``attempts``: at canary by then;
    ``events`` [runs, objectives]: canary's by then; ``failing`` [runs, objectives]: objectives shown to be bad;
    ``failed``, ``late``: canary's attempts not answered, and answered too late; ``step``: the last one, from 0;
    ``compared_again``: how often it went back from all the traffic to be compared again.
    """

    OUTCOMES = _OUTCOMES

    outcome: NDArray[np.int8]
    seconds: Floats
    attempts: Ints
    events: Floats
    failing: NDArray[np.bool_]
    failed: Ints
    late: Ints
    step: Ints
    compared_again: Ints
    recorded: tuple[RecordedRun, ...] = ()

    def __len__(self) -> int:
        return len(self.outcome)

    def ended(self, outcome: str) -> NDArray[np.bool_]:
        """Which runs ended so: an :class:`Outcome`'s value or ``UNDECIDED``."""
        return np.asarray(self.outcome == _OUTCOMES.index(outcome))

    def share(self, outcome: str) -> float:
        return float(self.ended(outcome).mean())


def simulate(
    objectives: Objectives, spec: RolloutSpec, traffic: Traffic, *, runs: int, seed: int, horizon_s: float = 3600.0,
    watcher: Watcher | None = None, record: int = 0, on_progress: Callable[[int], None] | None = None,
) -> SimulatedRuns:  # fmt: skip
    """Simulate ``runs`` rollouts of at most ``horizon_s`` each. ``objectives`` with the rollout's margins in place.

    The same arguments give the same runs. ``record`` keeps the first runs look by look. ``on_progress`` is told how
    many runs have ended.

    Raises:
        InputError: the traffic does not fit the objectives, or there is nothing to simulate.
    """
    if runs < 1 or horizon_s < spec.look_s:
        raise InputError("nothing to simulate: at least one run and one look are needed")
    parts = []
    for start, size, child in _chunks(traffic, runs, int(horizon_s / spec.look_s) * len(spec.steps), seed):
        batch = _Batch(objectives, spec, traffic, size, child, horizon_s, start, watcher, max(0, record - start), seed)
        parts.append(batch.run())
        if on_progress is not None:
            on_progress(start + size)
    return SimulatedRuns(
        outcome=np.concatenate([part.outcome for part in parts]),
        seconds=np.concatenate([part.seconds for part in parts]),
        attempts=np.concatenate([part.attempts for part in parts]),
        events=np.concatenate([part.events for part in parts]),
        failing=np.concatenate([part.failing for part in parts]),
        failed=np.concatenate([part.failed for part in parts]),
        late=np.concatenate([part.late for part in parts]),
        step=np.concatenate([part.step for part in parts]),
        compared_again=np.concatenate([part.compared_again for part in parts]),
        recorded=tuple(run for part in parts for run in part.recorded),
    )


def watch(
    objectives: Objectives, traffic: Traffic, watcher: Watcher, *, share: float, seconds: float, runs: int, seed: int,
    look_s: float = 1.0,
) -> None:  # fmt: skip
    """Show ``watcher`` the traffic of ``runs`` canaries that keep one share for ``seconds``; no evidence of ours."""
    looks = int(seconds / look_s)
    for start, size, child in _chunks(traffic, runs, 2 * looks, seed):
        stream = Stream(objectives, traffic, shares=(share,), runs=size, looks=looks, look_s=look_s, seed=child,
                        population_seed=seed, impressions=True)  # fmt: skip
        step, rows = np.zeros(size, dtype=np.int64), np.arange(start, start + size)
        for look in range(1, looks + 1):
            watcher.look(rows, look * look_s, stream.look(step))


def upper_limit(events: int, runs: int, *, level: float = 0.95) -> float:
    """The chance that ``events`` in ``runs`` leave possible at most: Clopper and Pearson's one-sided limit.

    Biometrika 26 (1934).
    """
    if events >= runs:
        return 1.0
    count = np.arange(events + 1)
    chosen = math.lgamma(runs + 1) - np.array([math.lgamma(k + 1) + math.lgamma(runs - k + 1) for k in count])
    low, high = events / runs, 1.0
    for _ in range(60):
        p = (low + high) / 2
        no_more = float(np.exp(chosen + count * math.log(p) + (runs - count) * math.log1p(-p)).sum())
        low, high = (p, high) if no_more > 1 - level else (low, p)
    return (low + high) / 2


def _chunks(traffic: Traffic, runs: int, cells: int, seed: int) -> list[tuple[int, int, np.random.SeedSequence]]:
    """Where each chunk begins, its size and its own seed."""
    size = _CHUNK if traffic.population is None else max(1, min(_CHUNK, _CROWD_CELLS // cells))
    starts = range(0, runs, size)
    seeds = np.random.SeedSequence(seed).spawn(len(starts))
    return [(start, min(size, runs - start), child) for start, child in zip(starts, seeds, strict=True)]


class _Beside:
    """Canary's events that wait for control's: :class:`serving.rollout.looks.LookFold`'s rule, as arrays."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._bad, self._total, self._since_s = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._any = False

    def canary(self, seen: Seen, alone: NDArray[np.bool_], now_s: float) -> tuple[Floats, Floats]:
        """Canary's bad and all events that are evidence now. ``alone``: which runs have no share for control."""
        nothing_beside = (seen.control_total == 0) & (seen.canary_total > 0) & ~alone[:, None]
        if not self._any and not nothing_beside.any():
            return seen.canary_bad, seen.canary_total
        since_s = np.where(self._total > 0, self._since_s, now_s)
        bad, total = self._bad + seen.canary_bad, self._total + seen.canary_total
        goes = (seen.control_total > 0) | (total == 0) | alone[:, None] | (now_s - since_s >= BESIDE_S)
        self._bad, self._total, self._since_s = np.where(goes, 0.0, bad), np.where(goes, 0.0, total), since_s
        self._any = not goes.all()
        return np.where(goes, bad, 0.0), np.where(goes, total, 0.0)

    def take(self, rows: NDArray[np.bool_]) -> None:
        self._bad, self._total, self._since_s = self._bad[rows], self._total[rows], self._since_s[rows]


class _Lately:
    """Canary's last ten looks against the goals alone: :class:`serving.rollout.looks.Lately`'s rule, as arrays."""

    def __init__(self, runs: int, bad_goals: Floats) -> None:
        self._bad_goals = bad_goals
        self._bad, self._total = np.zeros((runs, len(bad_goals))), np.zeros((runs, len(bad_goals)))

    def troubled(self, bad: Floats, total: Floats) -> NDArray[np.bool_]:
        """Which runs are in trouble with one more look's events. The same sums in the same order as there."""
        self._bad *= KEPT
        self._bad += total
        self._bad -= total - bad
        self._total *= KEPT
        self._total += total
        due = self._bad_goals * self._total
        return np.asarray((self._bad > due + TROUBLE_DEVIATIONS * np.sqrt(due) + TROUBLE_EVENTS).any(axis=1))

    def take(self, rows: NDArray[np.bool_]) -> None:
        self._bad, self._total = self._bad[rows], self._total[rows]


class _Batch:
    def __init__(
        self, objectives: Objectives, spec: RolloutSpec, traffic: Traffic, runs: int, seed: np.random.SeedSequence,
        horizon_s: float, first: int, watcher: Watcher | None, record: int, population_seed: int,
    ) -> None:  # fmt: skip
        self._spec, self._runs, self._first, self._watcher = spec, runs, first, watcher
        self._looks = int(horizon_s / spec.look_s)
        self._kernel = Kernel(objectives.objectives, primary=spec.primary)
        self._stream = Stream(
            objectives, traffic, shares=[step.share for step in spec.steps], runs=runs, looks=self._looks,
            look_s=spec.look_s, seed=seed, population_seed=population_seed, impressions=watcher is not None,
        )  # fmt: skip
        self._share = np.array([step.share for step in spec.steps])
        self._next_is_all = np.append(self._share[1:] == 1, [True])
        self._min_requests = np.array([step.min_requests for step in spec.steps])
        self._min_s = np.array([step.min_s for step in spec.steps])
        self._max_s = np.array([step.max_s for step in spec.steps])
        self._record = min(record, runs)
        self._taped: list[list[tuple[Floats, Ints]]] = [[] for _ in range(self._record)]
        count = len(objectives.objectives)
        self._outcome = np.full(runs, _UNDECIDED, dtype=np.int8)
        self._seconds = np.full(runs, self._looks * spec.look_s)
        self._final = {name: np.zeros(runs, dtype=np.int64) for name in _KEPT_OF_A_RUN}
        self._events = np.zeros((runs, count))
        self._failing = np.zeros((runs, count), dtype=np.bool_)

    def run(self) -> SimulatedRuns:
        rows: NDArray[np.intp] = np.arange(self._runs)
        running = np.ones(self._runs, dtype=np.bool_)
        step, attempts, step_from, failed, late, compared = (np.zeros(self._runs, dtype=np.int64) for _ in range(6))
        step_at, held_at = np.zeros(self._runs), np.full(self._runs, np.nan)
        events = np.zeros_like(self._events)
        state = self._kernel.start((self._runs,))
        beside, lately = _Beside(self._events.shape), _Lately(self._runs, self._kernel.bad_goals)
        for look in range(1, self._looks + 1):
            now_s = look * self._spec.look_s
            seen = self._stream.look(step)
            at_all = self._share[step] == 1
            canary_bad, canary_total = beside.canary(seen, at_all, now_s)
            self._kernel.update(state, canary_bad, canary_total, seen.control_bad, seen.control_total)
            troubled = lately.troubled(canary_bad, canary_total)
            attempts += seen.canary_attempts
            failed += seen.canary_failed
            late += seen.canary_late
            events += seen.canary_total
            self._tape(rows, running, seen)
            if self._watcher is not None:
                self._watcher.look(rows + self._first, now_s, seen)
            failing = self._kernel.failed(state, self._spec.alpha)
            passed = self._kernel.passed(state, self._spec.beta).all(axis=1)
            # What follows is decide() in its own order; rows that have ended take part and are not asked.
            fail = failing.any(axis=1)
            elapsed = now_s - step_at
            enough = (attempts - step_from >= self._min_requests[step]) & (elapsed >= self._min_s[step])
            again = ~fail & at_all & troubled
            back = again & (compared < COMPARISONS)
            promoted = ~fail & ~again & at_all & enough & (seen.canary_attempts > 0) & (seen.control_attempts == 0)
            grows = ~fail & ~at_all & enough & (passed | ~self._next_is_all[step])
            waits = grows & (compared > 0) & troubled
            grows &= ~waits
            moves = grows | back
            stays = ~(fail | again | promoted | grows | waits)
            held = stays & (now_s - held_at >= self._spec.hold_s)
            tired = stays & np.isnan(held_at) & (elapsed >= self._max_s[step])
            held |= tired if self._spec.hold_s == 0 else False
            held |= again & ~back
            held_at = np.where(moves, np.nan, np.where(tired, now_s, held_at))
            ending = running & (fail | promoted | held)
            if ending.any():
                which = rows[ending]
                self._outcome[which] = np.where(fail, _ROLLED_BACK, np.where(promoted, _PROMOTED, _HELD))[ending]
                self._seconds[which] = now_s
                self._keep(which, ending, (attempts, failed, late, step, compared), events, failing)
                running &= ~ending
                alive = int(running.sum())
                if alive == 0:
                    return self._result()
            step = step + grows - back
            compared = compared + back
            step_at = np.where(moves, now_s, step_at)
            step_from = np.where(moves, attempts, step_from)
            if ending.any() and alive < _WORTH_PACKING * len(rows):
                self._stream.take(running)
                state = state.take(running)
                beside.take(running)
                lately.take(running)
                rows, step, attempts, step_from = rows[running], step[running], attempts[running], step_from[running]
                failed, late, compared, events = failed[running], late[running], compared[running], events[running]
                step_at, held_at = step_at[running], held_at[running]
                running = np.ones(alive, dtype=np.bool_)
        self._keep(rows[running], running, (attempts, failed, late, step, compared), events, failing)
        return self._result()

    def _keep(
        self, which: NDArray[np.intp], of: NDArray[np.bool_], counted: Sequence[Ints], events: Floats,
        failing: NDArray[np.bool_],
    ) -> None:  # fmt: skip
        for name, values in zip(_KEPT_OF_A_RUN, counted, strict=True):
            self._final[name][which] = values[of]
        self._events[which] = events[of]
        self._failing[which] = failing[of]

    def _tape(self, rows: NDArray[np.intp], running: NDArray[np.bool_], seen: Seen) -> None:
        if not self._record:
            return
        for row in np.flatnonzero((rows < self._record) & running):
            counts = np.stack([seen.canary_bad[row], seen.canary_total[row], seen.control_bad[row],
                               seen.control_total[row]])  # fmt: skip
            attempts = np.array([seen.canary_attempts[row], seen.control_attempts[row]])
            self._taped[rows[row]].append((counts, attempts))

    def _result(self) -> SimulatedRuns:
        recorded = tuple(
            RecordedRun(
                np.stack([counts for counts, _ in tape]),
                np.stack([attempts for _, attempts in tape]),
                _OUTCOMES[self._outcome[run]],
                float(self._seconds[run]),
            )
            for run, tape in enumerate(self._taped)
        )
        return SimulatedRuns(
            self._outcome, self._seconds, self._final["attempts"], self._events, self._failing,
            self._final["failed"], self._final["late"], self._final["step"], self._final["compared_again"],
            recorded,
        )  # fmt: skip
