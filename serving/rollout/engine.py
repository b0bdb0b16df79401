"""The turns round the decisions: look, decide, keep the decision, act, look again.

Killed at any point it resumes to the same end: what was decided is kept before anything is done, every act is safe to
repeat, and the evidence is gone on from. One turn at a time, so that one process can drive one rollout or a thousand.
"""

from __future__ import annotations

import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from endcap.errors import EndcapError, FencedError, InputError, PackageError, StateError, StorageError, TargetError
from endcap.evidence import Counts, Verdict
from endcap.files import FolderLock
from endcap.objectives import Good, Objectives
from serving.rollout.audit import Decision, decision_record
from serving.rollout.base import Kept, Store
from serving.rollout.decide import begin, decide
from serving.rollout.events import Acted, ActFailed, Event, Gated, Looked
from serving.rollout.looks import Look
from serving.rollout.sight import Sight
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Action, EnsureCapacity, Outcome, Phase, Retire, RunGates, SetShadow, SetShares, State
from serving.rollout.store import RolloutStore
from serving.sources.base import Reading, measured
from serving.targets.base import ModelVersion, Observation, Target

__all__ = ["Clock", "CountSource", "Engine", "Gatekeeper", "RolloutResult", "SystemClock", "run_rollout"]

_PATIENCE_BACK_S = 900.0
"""The same while traffic is on its way back: an engine that ends leaves a version that failed with its share."""
_PATIENCE_S = 120.0
"""How long a target or a disk may refuse or not answer at all before the engine ends: longer than capacity takes."""
_LISTEN_S = 1.0
"""How long a person waits at most until the engine notices what they asked for, while it waits for its next look."""
_NOW_S = 1e-6
"""Sums of times are off by their last digits."""


class Clock(Protocol):
    def now_s(self) -> float: ...

    def wait(self, seconds: float) -> None: ...


class SystemClock:
    """Unix time at its making, and from then on what really passed: a clock that is set does not reach a rollout.

    The time that the machine was suspended passed too: freezes go on meanwhile, and so does what sources count.
    """

    def __init__(self) -> None:
        self._at_s, self._from_s = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)

    def now_s(self) -> float:
        return self._at_s + time.clock_gettime(time.CLOCK_BOOTTIME) - self._from_s

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


class CountSource(Protocol):
    """Counts beside the target, cumulative since the source was made; nothing about a version is no data."""

    def read(self, now_s: float) -> Reading: ...


Gatekeeper = Callable[[Path, Path], Gated]
"""Checks a candidate before any traffic: given its package and stable's."""


@dataclass(frozen=True, slots=True)
class RolloutResult:
    stable: str
    canary: str
    outcome: Outcome
    reason: str
    seconds: float


def run_rollout(
    spec: RolloutSpec,
    objectives: Objectives,
    candidate: ModelVersion,
    target: Target,
    folder: Path,
    *,
    packages: Mapping[str, Path],
    clock: Clock | None = None,
    gates: Gatekeeper | None = None,
    source: CountSource | None = None,
    on_decision: Callable[[Decision], None] | None = None,
) -> RolloutResult:
    """Run, or resume, a rollout to its end.

    ``packages`` says where the packages of versions served before are (by label), so that a way back is always known.

    Raises:
        InputError: the candidate is served already, what is served now cannot be told, the objectives do not fit, or
            the folder's rollout was declared otherwise.
        BusyError: another engine runs in the folder.
        StateError: a file of the rollout is damaged.
        FencedError: another engine has taken over; nothing more was done here.
        TargetError, StorageError: the target did not answer, or the disk refused, for two minutes; the same call goes
            on with the rollout.
    """
    with FolderLock(folder), RolloutStore(folder) as store:
        engine = Engine(spec, spec.judged(objectives), candidate, target, store, dict(packages), clock=clock,
                        gates=gates, source=source, on_decision=on_decision)  # fmt: skip
        return engine.run()


class AlreadyRollingError(InputError):
    """Another rollout, or a person, has split the service's traffic."""

    reason = "AlreadyRolling"


_END_THE_OTHER = (
    "abort the rollout that did it; where its record is lost, give all traffic to one version: endcap serve restore "
    "VERSION, or on KServe take spec.canary out of the InferenceService"
)


class Engine:
    """One rollout, in a store that the caller holds. :meth:`run` it, or :meth:`open` it and :meth:`step` when due.

    Its errors are those of :func:`run_rollout`. Used by one thread at a time. ``intervals``: keep the confidence
    sequences for people too; they decide nothing, and are most of what is kept.
    """

    def __init__(
        self, spec: RolloutSpec, objectives: Objectives, candidate: ModelVersion, target: Target, store: Store,
        packages: MutableMapping[str, Path], *, clock: Clock | None = None, gates: Gatekeeper | None = None,
        source: CountSource | None = None, on_decision: Callable[[Decision], None] | None = None,
        intervals: bool = True,
    ) -> None:  # fmt: skip
        self._spec, self._objectives, self._target, self._store = spec, objectives, target, store
        self._packages = ChainMap({candidate.label: candidate.package}, packages)
        self._candidate = candidate
        self._clock = clock or SystemClock()
        self._gates, self._source, self._on_decision = gates, source, on_decision
        self._intervals = intervals
        self._sight = Sight(spec, objectives, candidate.label, "", intervals=intervals)
        self._counted: dict[str, dict[str, Counts]] = {}
        self._source_trouble: str | None = None
        self._failing_since_s: float | None = None
        self._due_s = -math.inf
        self._is_stuck = False
        """The store refuses: what people ask for cannot be taken up before it is due to be tried again."""
        self._token = 0
        self._state: State | None = None

    def run(self) -> RolloutResult:
        self.open()
        while (due_s := self.step()) is not None:
            self._rest(due_s)
        return self.result

    def open(self) -> State:
        """Begin the rollout, or take it up where it was left; from here on older engines are refused by the target."""
        state = self._store.resume(self._spec)
        if state is None:
            state = self._begin()
        elif state.canary != self._candidate.label:
            raise InputError(f"this folder holds a rollout of version {state.canary}", where=self._store.where)
        self._store.check_declared(self._spec, self._objectives)
        self._packages.setdefault(state.baseline, self._packages.get(state.stable, Path()))
        self._state = state
        if not state.ended:
            self._token = self._target.acquire(f"rollout {self._spec.name}")
            self._recall(state)
            self._due_in(0 if state.intent else self._spec.look_s)
        return state

    def step(self) -> float | None:
        """Take one turn: what people asked for, then what is due. Nothing here waits but the target's own calls.

        Returns when the next turn is due, by the engine's clock; None once the rollout has ended.
        """
        if self.state.ended:
            return None
        self._is_stuck = False
        try:
            self._obey()
            if self._due_s <= self._clock.now_s() + _NOW_S:
                if self.state.intent:
                    self._try_intent()
                else:
                    self._look_and_decide()
        except StorageError as error:  # a full disk may be emptied, and until then nothing is done unwritten
            self._be_patient(error)
            self._is_stuck = True
            self._due_in(self._spec.look_s)
        return None if self.state.ended else self._due_s

    @property
    def state(self) -> State:
        """Where the rollout stands, since :meth:`open`."""
        if self._state is None:
            raise StateError("the engine was not opened", where=self._store.where)
        return self._state

    @property
    def result(self) -> RolloutResult:
        state = self.state
        if state.outcome is None:
            raise StateError("the rollout ended with no verdict", where=self._store.where)
        return RolloutResult(
            state.stable, state.canary, state.outcome, state.reason,
            (state.ended_at_s or state.started_at_s) - state.started_at_s,
        )  # fmt: skip

    def _rest(self, due_s: float) -> None:
        """Until ``due_s``, or until somebody asks for something."""
        while self._is_stuck or not self._store.has_commands(after=self.state.commands):
            remaining_s = due_s - self._clock.now_s()
            if remaining_s <= _NOW_S:
                return
            self._clock.wait(min(_LISTEN_S, remaining_s))

    def _due_in(self, seconds: float) -> None:
        self._due_s = self._clock.now_s() + seconds

    # ---- beginning, and going on ----

    def _begin(self) -> State:
        seen = self._target.observe()
        served = [label for label, share in seen.shares.items() if share > 0]
        if served == [self._candidate.label]:
            raise InputError(f"version {self._candidate.label} is what is served already")
        if len(served) != 1:
            raise AlreadyRollingError(f"traffic is split over versions {', '.join(sorted(served)) or 'none'}",
                                      next_step=_END_THE_OTHER)  # fmt: skip
        if seen.shadow is not None:
            raise AlreadyRollingError(f"requests are copied to version {seen.shadow.version}",
                                      next_step=_END_THE_OTHER)  # fmt: skip
        stable = served[0]
        if stable not in self._packages:
            raise InputError(f"where version {stable}'s package is, is not known", where="what is served now")
        self._check_countable(seen, stable)
        state = begin(self._spec, stable=stable, canary=self._candidate.label, now_s=self._clock.now_s())
        self._store.declare(self._spec, self._objectives)
        self._keep(Decision(None, None, state, state.started_at_s, self._sight.evidence))
        self._store.publish(state)
        return state

    def _check_countable(self, seen: Observation, stable: str) -> None:
        counted = seen.versions[stable].within_ms if stable in seen.versions else {}
        for objective in self._objectives.objectives:
            where = f"objective {objective.name}"
            serve = "start it with these objectives (endcap serve up --objectives)"
            if objective.good is Good.COUNTED and self._source is None:
                raise InputError("nothing counts it", where=where, next_step="name its source, such as prometheus")
            if objective.good is Good.CLICKED and seen.window_s is None:
                raise InputError("the target collects no feedback", where=where, next_step=serve)
            if objective.good is Good.CLICKED and seen.window_s != objective.window_s:
                raise InputError(f"the target attributes clicks within {seen.window_s:g} s, and the objective asks for "
                                 f"{objective.window_s:g} s", where=where, next_step=serve)  # fmt: skip
            if objective.good is Good.ANSWERED and objective.within_ms not in (None, *counted):
                if stable in seen.versions and seen.versions[stable].ready_replicas == 0:
                    raise TargetError(f"version {stable} has no ready replica yet to tell what it counts", where=where,
                                      next_step="wait until it serves")  # fmt: skip
                raise InputError(f"the target does not count answers within {objective.within_ms} ms", where=where,
                                 next_step=serve)  # fmt: skip

    def _recall(self, state: State) -> None:
        """What an earlier life of this rollout saw; the first look where there was none."""
        self._sight = Sight(self._spec, self._objectives, state.canary, state.baseline, intervals=self._intervals)
        seen_before = self._store.recall(self._sight)
        self._counted = self._sight.counted()
        if not seen_before:
            self._look()

    # ---- one turn ----

    def _obey(self) -> None:
        before = self.state
        for asked in self._store.new_commands(after=before.commands):
            self._decided(asked)
        if self.state.intent != before.intent:
            self._due_in(0)

    def _look_and_decide(self) -> None:
        look = self._look()
        if look is not None:
            self._decided(self._judged(look))
        self._due_in(0 if self.state.intent else self._spec.look_s)

    def _judged(self, look: Look) -> Looked:
        return self._sight.judge(self.state, look, self._source_trouble)

    def _try_intent(self) -> None:
        state = self.state
        if RunGates() in state.intent:
            self._decided(self._check(state))
            self._due_in(0 if self.state.intent else self._spec.look_s)
            return
        for action in state.intent:
            if isinstance(action, SetShares) and state.phase is Phase.GROWING:
                # Capacity takes its time, and so does an engine that goes on: what failed by now gets no more.
                look = self._look()
                if look is not None and self._sight.evidence.verdict is Verdict.FAIL:
                    self._decided(self._judged(look))
                    return
            try:
                self._act(action)
            except FencedError:
                raise
            except EndcapError as error:
                self._after_failure(error)
                return
        if self._look() is not None or state.outcome is not None:
            self._failing_since_s = None
            self._decided(Acted(self._sight.received))
        # else from where on the step counts has yet to be seen; the acts are safe to repeat
        self._due_in(self._spec.look_s)

    def _after_failure(self, error: EndcapError) -> None:
        if self.state.outcome is not None:
            self._be_patient(error)
            self._due_in(self._spec.look_s)  # then the same way, or the other one, is tried
        elif type(error) is TargetError and self._is_patient():
            self._due_in(self._spec.look_s)
            return  # a target or a gateway that is being started again is no fault of canary's
        else:
            self._failing_since_s = None
            self._look()  # did canary get any traffic?
        self._decided(ActFailed(_line(error), isinstance(error, PackageError), self._sight.received))

    def _check(self, state: State) -> Gated:
        if self._gates is None:
            return Gated(True, "no checks were asked for")
        try:
            return self._gates(self._candidate.package, self._packages[state.stable])
        except PackageError as error:
            return Gated(False, _line(error))

    def _decided(self, event: Event) -> None:
        state, at_s = self.state, self._clock.now_s()
        after = decide(self._spec, state, event, at_s)
        # Kept first: that is the truth, and what follows may be cut off anywhere. What is shown may lag behind.
        self._keep(Decision(state, event, after, at_s, self._sight.evidence))
        self._state = after
        if after is not state:
            try:
                self._store.publish(after)
            except StorageError as error:
                self._be_patient(error)

    def _keep(self, decided: Decision) -> None:
        record = decision_record(self._spec, decided, shadow=self._sight.shadow_json)
        changed = decided.after is not decided.before
        self._store.keep(Kept(record, decided.after, changed, self._sight.to_json))
        if self._on_decision is not None:
            self._on_decision(decided)

    # ---- acts ----

    def _act(self, action: Action) -> None:
        match action:
            case EnsureCapacity(shares):
                self._target.ensure_capacity(self._versions(shares), token=self._token)
            case SetShares(shares):
                self._target.set_shares(self._versions(shares), token=self._token, sticky=self._spec.sticky)
            case SetShadow(label, share):
                version = None if label is None else self._version(label)
                self._target.set_shadow(version, share=share, token=self._token)
            case Retire(label):
                self._target.retire(label, token=self._token)
            case RunGates():
                pass

    def _versions(self, shares: Mapping[str, float]) -> dict[ModelVersion, float]:
        return {self._version(label): share for label, share in shares.items()}

    def _version(self, label: str) -> ModelVersion:
        if label not in self._packages:
            raise TargetError(f"where version {label}'s package is, is not known")
        return ModelVersion(label, self._packages[label])

    # ---- looks ----

    def _look(self) -> Look | None:
        """One more look; a target that does not answer is no data, and so is a source."""
        # Shoppers count once: those who came while it waited for checks, a person or a freeze are not used up by that.
        state = self.state
        since_s = state.started_at_s if state.traffic_at_s is None else state.traffic_at_s
        try:
            seen = self._target.observe(shoppers_since_s=since_s)
        except EndcapError as error:
            self._be_patient(error)
            return None
        if not state.intent:
            self._failing_since_s = None
        seen = self._with_counted(seen)
        self._store.add_look(seen)
        return self._sight.take(seen)

    def _with_counted(self, seen: Observation) -> Observation:
        """``seen`` with what the sources count; their counts go on from those of an engine that was here before."""
        self._source_trouble = None
        if self._source is None:
            return seen
        reading = self._source.read(self._clock.now_s())
        self._source_trouble = "; ".join(f"{name}: {note}" for name, note in reading.notes.items()) or None
        counts = {
            name: {label: self._counted.get(name, {}).get(label, Counts()) + new for label, new in by_version.items()}
            for name, by_version in reading.measured.items()
        }
        return measured(seen, counts)

    def _be_patient(self, error: EndcapError) -> None:
        """Raise ``error`` when nothing has worked for too long; the rollout then waits on disk to be gone on with.

        What only a person can put right (the service was deleted) is raised at once: waiting mends nothing.
        """
        if isinstance(error, InputError) or not self._is_patient():
            raise error

    def _is_patient(self) -> bool:
        now_s = self._clock.now_s()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        patience_s = _PATIENCE_BACK_S if self.state.phase is Phase.RETURNING else _PATIENCE_S
        return now_s - self._failing_since_s <= patience_s


def _line(error: EndcapError) -> str:
    """What a replica said crosses processes as one line, `what; next: ...`: the next step is not a reason."""
    what = error.what.split("; next: ")[0]
    return what if error.where is None else f"{what} ({error.where.rsplit('/', 1)[-1]})"
