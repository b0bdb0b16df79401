"""The loop round the decisions: look, decide, write the decision, act, look again.

Killed at any point it resumes to the same end: what was decided is on disk before anything is done, every act is safe
to repeat, and the evidence is folded again from the raw looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from endcap.errors import EndcapError, FencedError, InputError, PackageError, StateError, StorageError, TargetError
from endcap.evidence import Counts, Evidence, SplitTest, Verdict, share_follows
from endcap.files import FolderLock
from endcap.objectives import Good, Objectives
from serving.rollout.audit import Decision, decision_record
from serving.rollout.decide import begin, decide
from serving.rollout.events import Acted, ActFailed, Event, Gated, Looked, Received, ShadowSeen
from serving.rollout.looks import Lately, Look, LookFold, shadow_strata
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Action, EnsureCapacity, Outcome, Phase, Retire, RunGates, SetShadow, SetShares, State
from serving.rollout.store import RolloutStore
from serving.sources.base import Reading, measured
from serving.targets.base import ModelVersion, Observation, ShadowObservation, Target

__all__ = ["Clock", "CountSource", "Engine", "Gatekeeper", "RolloutResult", "SystemClock", "run_rollout"]

_PATIENCE_BACK_S = 900.0
"""The same while traffic is on its way back: an engine that ends leaves a version that failed with its share."""
_PATIENCE_S = 120.0
"""How long a target or a disk may refuse or not answer at all before the engine ends: longer than capacity takes."""
_LISTEN_S = 1.0
"""How long a person waits at most until the engine notices what they asked for, while it waits for its next look."""
_MISMATCH_ALPHA = 0.001
_FEW_SHOPPERS_TOLERANCE = 4.0
"""With sticky assignment a few heavy shoppers are a share of their own: only a gross difference is no share at all."""


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
        engine = Engine(spec, spec.judged(objectives), candidate, target, store, dict(packages),
                        clock or SystemClock(), gates, source, on_decision)  # fmt: skip
        return engine.run()


class Engine:
    """One rollout in one folder that the caller holds. See :func:`run_rollout`."""

    def __init__(
        self, spec: RolloutSpec, objectives: Objectives, candidate: ModelVersion, target: Target,
        store: RolloutStore, packages: dict[str, Path], clock: Clock, gates: Gatekeeper | None,
        source: CountSource | None, on_decision: Callable[[Decision], None] | None,
    ) -> None:  # fmt: skip
        self._spec, self._objectives, self._target, self._store = spec, objectives, target, store
        self._packages = {**packages, candidate.label: candidate.package}
        self._candidate = candidate
        self._clock, self._gates, self._source, self._on_decision = clock, gates, source, on_decision
        self._sight = _Sight(spec, objectives, candidate.label, "")
        self._counted: dict[str, dict[str, Counts]] = {}
        self._source_trouble: str | None = None
        self._failing_since_s: float | None = None
        self._token = 0

    def run(self) -> RolloutResult:
        state = self._store.resume(self._spec)
        if state is None:
            state = self._begin()
        elif state.canary != self._candidate.label:
            raise InputError(f"this folder holds a rollout of version {state.canary}", where=self._store.folder)
        self._store.check_declared(self._spec, self._objectives)
        self._packages.setdefault(state.baseline, self._packages.get(state.stable, Path()))
        if not state.ended:
            self._token = self._target.acquire(f"rollout {self._spec.name}")
            self._recall(state)
        while not state.ended:
            try:
                state = self._obey(state)
                state = self._try_intent(state) if state.intent else self._look_and_decide(state)
            except StorageError as error:  # a full disk may be emptied, and until then nothing is done unwritten
                self._be_patient(state, error)
                self._clock.wait(self._spec.look_s)
        if state.outcome is None:
            raise StateError("the rollout ended with no verdict", where=self._store.folder)
        return RolloutResult(
            state.stable, state.canary, state.outcome, state.reason,
            (state.ended_at_s or state.started_at_s) - state.started_at_s,
        )  # fmt: skip

    # ---- beginning, and going on ----

    def _begin(self) -> State:
        seen = self._target.observe()
        served = [label for label, share in seen.shares.items() if share > 0]
        if served == [self._candidate.label]:
            raise InputError(f"version {self._candidate.label} is what is served already")
        if len(served) != 1:
            raise InputError(f"traffic is split over versions {', '.join(sorted(served)) or 'none'}",
                             next_step="end the rollout that split it: endcap rollout abort FOLDER; where that folder "
                             "is lost, endcap serve restore VERSION gives all of it to one version")  # fmt: skip
        if seen.shadow is not None:
            raise InputError(f"requests are copied to version {seen.shadow.version}",
                             next_step="end the rollout that copies them: endcap rollout abort FOLDER; where that "
                             "folder is lost, endcap serve restore VERSION ends the copying")  # fmt: skip
        stable = served[0]
        if stable not in self._packages:
            raise InputError(f"where version {stable}'s package is, is not known", where="what is served now")
        self._check_countable(seen, stable)
        state = begin(self._spec, stable=stable, canary=self._candidate.label, now_s=self._clock.now_s())
        self._store.declare(self._spec, self._objectives)
        self._record(Decision(None, None, state, state.started_at_s, self._sight.evidence))
        self._store.save_state(state)
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
                raise InputError(f"the target does not count answers within {objective.within_ms} ms", where=where,
                                 next_step=serve)  # fmt: skip

    def _recall(self, state: State) -> None:
        """Fold the looks of an earlier life of this rollout; take the first look where there is none."""
        self._sight = _Sight(self._spec, self._objectives, state.canary, state.baseline)
        seen: Observation | None = None
        for seen in self._store.looks():
            self._sight.take(seen)
            for label, version in seen.versions.items():
                for name, counts in version.measured.items():
                    self._counted.setdefault(name, {})[label] = counts
        if seen is None:
            self._look(state)

    # ---- one turn ----

    def _obey(self, state: State) -> State:
        for asked in self._store.new_commands(after=state.commands):
            state = self._decided(state, asked)
        return state

    def _look_and_decide(self, state: State) -> State:
        self._wait(state)
        look = self._look(state)
        return state if look is None else self._decided(state, self._judged(state, look))

    def _judged(self, state: State, look: Look) -> Looked:
        return self._sight.judge(state, look, self._source_trouble)

    def _wait(self, state: State) -> None:
        remaining_s = self._spec.look_s
        while remaining_s > 0 and not self._store.has_commands(after=state.commands):
            slice_s = min(_LISTEN_S, remaining_s)
            self._clock.wait(slice_s)
            remaining_s -= slice_s

    def _try_intent(self, state: State) -> State:
        if RunGates() in state.intent:
            return self._decided(state, self._check(state))
        for action in state.intent:
            if isinstance(action, SetShares) and state.phase is Phase.GROWING:
                # Capacity takes its time, and so does an engine that goes on: what failed by now gets no more.
                look = self._look(state)
                if look is not None and self._sight.evidence.verdict is Verdict.FAIL:
                    return self._decided(state, self._judged(state, look))
            try:
                self._act(action)
            except FencedError:
                raise
            except EndcapError as error:
                return self._after_failure(state, error)
        if self._look(state) is None and state.outcome is None:
            self._clock.wait(self._spec.look_s)
            return state  # from where on the step counts has to be seen; the acts are safe to repeat
        self._failing_since_s = None
        return self._decided(state, Acted(self._sight.received))

    def _after_failure(self, state: State, error: EndcapError) -> State:
        if state.outcome is not None:
            self._be_patient(state, error)
            self._clock.wait(self._spec.look_s)  # the same way is tried again
        elif type(error) is TargetError and self._is_patient(state):
            self._clock.wait(self._spec.look_s)
            return state  # a target or a gateway that is being started again is no fault of canary's
        else:
            self._failing_since_s = None
            self._look(state)  # did canary get any traffic?
        return self._decided(state, ActFailed(_line(error), isinstance(error, PackageError), self._sight.received))

    def _check(self, state: State) -> Gated:
        if self._gates is None:
            return Gated(True, "no checks were asked for")
        try:
            return self._gates(self._candidate.package, self._packages[state.stable])
        except PackageError as error:
            return Gated(False, _line(error))

    def _decided(self, state: State, event: Event) -> State:
        at_s = self._clock.now_s()
        after = decide(self._spec, state, event, at_s)
        # The log first: it is the truth, and what follows may be cut off anywhere. The checkpoint may lag behind.
        self._record(Decision(state, event, after, at_s, self._sight.evidence))
        if after is not state:
            try:
                self._store.save_state(after)
            except StorageError as error:
                self._be_patient(state, error)
        return after

    def _record(self, decided: Decision) -> None:
        record = decision_record(self._spec, decided, shadow=self._sight.shadow_json)
        self._store.add_decision(record, changed=decided.after is not decided.before)
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

    def _look(self, state: State) -> Look | None:
        """One more look; a target that does not answer is no data, and so is a source."""
        # Shoppers count once: those who came while it waited for checks, a person or a freeze are not used up by that.
        since_s = state.started_at_s if state.traffic_at_s is None else state.traffic_at_s
        try:
            seen = self._target.observe(shoppers_since_s=since_s)
        except EndcapError as error:
            self._be_patient(state, error)
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

    def _be_patient(self, state: State, error: EndcapError) -> None:
        """Raise ``error`` when nothing has worked for too long; the rollout then waits on disk to be gone on with."""
        if not self._is_patient(state):
            raise error

    def _is_patient(self, state: State) -> bool:
        now_s = self._clock.now_s()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        patience_s = _PATIENCE_BACK_S if state.phase is Phase.RETURNING else _PATIENCE_S
        return now_s - self._failing_since_s <= patience_s


class _Sight:
    """All that the looks so far come to. Its size does not depend on how many there were."""

    def __init__(self, spec: RolloutSpec, objectives: Objectives, canary: str, baseline: str) -> None:
        self._spec, self._objectives, self._canary = spec, objectives, canary
        self._fold = LookFold(objectives, canary=canary, baseline=baseline if spec.baseline else None)
        self.evidence = Evidence.start(objectives, alpha=spec.alpha, beta=spec.beta, primary=spec.primary)
        self._split = SplitTest()
        answered = tuple(objective for objective in objectives.objectives if objective.good is Good.ANSWERED)
        self._shadow_evidence = (
            Evidence.start(replace(objectives, objectives=answered), alpha=spec.alpha, beta=spec.beta, intervals=False)
            if answered and spec.shadow is not None else None
        )  # fmt: skip
        self._shadow: ShadowObservation | None = None
        self._lately = Lately(objectives)

    @property
    def received(self) -> Received:
        return self._fold.received

    def take(self, seen: Observation) -> Look:
        look = self._fold.fold(seen)
        self.evidence = self.evidence.update(look.strata)
        self._lately.take(look)
        if look.split is not None:
            self._split = self._split.update(look.split.canary, look.split.total, look.split.share)
        if seen.shadow is not None and seen.shadow.version == self._canary:
            if self._shadow_evidence is not None:
                strata = shadow_strata(self._objectives, self._shadow, seen.shadow)
                self._shadow_evidence = self._shadow_evidence.update(strata)
            self._shadow = seen.shadow
        return look

    def judge(self, state: State, look: Look, trouble: str | None) -> Looked:
        """The event that the looks so far make; ``look`` is the last one."""
        judged = self.evidence.judgement
        return Looked(
            verdict=judged.verdict,
            reason=judged.reason if trouble is None else f"{judged.reason}; {trouble}",
            received=self.received,
            canary_new=look.canary_new,
            control_new=look.control_new,
            follows=self._follows(state),
            mismatch=self._mismatch(),
            troubled=self._lately.troubled,
            shadow=self._shadow_seen(),
        )

    def _follows(self, state: State) -> bool:
        if state.phase not in (Phase.OBSERVING, Phase.HOLDING):
            return True
        canary = self.received.canary_requests - state.step_from.canary_requests
        requests = self.received.requests - state.step_from.requests
        share = self._spec.steps[state.step].share
        if share == 1:
            return True  # there the old version is waited for until it receives nothing
        tolerance = 1.5 if self._spec.sticky is None else _FEW_SHOPPERS_TOLERANCE
        return share_follows(canary, requests, share, tolerance=tolerance)

    def _mismatch(self) -> str | None:
        if not self._split.rejects(_MISMATCH_ALPHA):
            return None
        split = self._split
        due = f"{split.canary} of {split.total} new shoppers are canary's, {split.expected:.0f} were due"
        return f"sample-ratio mismatch: {due}"

    def _shadow_seen(self) -> ShadowSeen | None:
        if self._shadow is None:
            return None
        evidence = self._shadow_evidence
        verdict, reason = (Verdict.INCONCLUSIVE, "") if evidence is None else (evidence.verdict, evidence.reason)
        return ShadowSeen(verdict, reason, self._shadow.pairs, self._shadow.overlap)

    @property
    def shadow_json(self) -> dict[str, float | int] | None:
        seen = self._shadow
        if seen is None:
            return None
        return {"pairs": seen.pairs, "overlap": seen.overlap, "score_drift": seen.score_drift,
                "answered": seen.answered.good, "asked": seen.answered.total}  # fmt: skip


def _line(error: EndcapError) -> str:
    """What a replica said crosses processes as one line, `what; next: ...`: the next step is not a reason."""
    what = error.what.split("; next: ")[0]
    return what if error.where is None else f"{what} ({error.where.rsplit('/', 1)[-1]})"
