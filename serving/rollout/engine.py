"""The loop round the decisions: write the intent, act, look, decide again.

Killed at any point it resumes to the same end: the state is on disk before anything is done, every act is safe to
repeat, and the evidence is folded again from the raw looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from endcap.errors import EndcapError, FencedError, InputError, StateError, TargetError
from endcap.evidence import Evidence
from endcap.files import FolderLock
from endcap.objectives import Objectives
from serving.rollout.decide import Acted, ActFailed, Event, Looked, begin, decide
from serving.rollout.looks import strata
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Action, EnsureCapacity, Outcome, Phase, Retire, SetShares, State
from serving.rollout.store import RolloutStore
from serving.targets.base import ModelVersion, Observation, Target

__all__ = ["Clock", "RolloutResult", "SystemClock", "run_rollout"]

_PATIENCE_S = 120.0
"""How long a target may refuse or not answer at all before the engine ends: longer than capacity takes to come."""


class Clock(Protocol):
    def now_s(self) -> float: ...

    def wait(self, seconds: float) -> None: ...


class SystemClock:
    def now_s(self) -> float:
        return time.time()

    def wait(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))


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
    on_decision: Callable[[State, Evidence], None] | None = None,
) -> RolloutResult:
    """Run, or resume, a rollout to its end.

    ``packages`` says where the packages of versions served before are (by label), so that a way back is always known.

    Raises:
        InputError: the candidate is served already, what is served now cannot be told, or the folder's rollout was
            declared otherwise.
        BusyError: another engine runs in the folder.
        StateError: a file of the rollout is damaged.
        FencedError: another engine has taken over; nothing more was done here.
        TargetError: the target did not answer for two minutes; the same call goes on with the rollout.
    """
    ticking = clock or SystemClock()
    with FolderLock(folder), RolloutStore(folder) as store:
        return _Engine(spec, objectives, candidate, target, store, dict(packages), ticking, on_decision).run()


class _Engine:
    def __init__(
        self, spec: RolloutSpec, objectives: Objectives, candidate: ModelVersion, target: Target,
        store: RolloutStore, packages: dict[str, Path], clock: Clock,
        on_decision: Callable[[State, Evidence], None] | None,
    ) -> None:  # fmt: skip
        self._spec, self._objectives, self._target, self._store = spec, objectives, target, store
        self._packages = {**packages, candidate.label: candidate.package}
        self._candidate = candidate
        self._clock = clock
        self._on_decision = on_decision
        self._evidence = Evidence.start(objectives, alpha=spec.alpha, beta=spec.beta)
        self._last: Observation | None = None
        self._failing_since_s: float | None = None
        self._token = 0

    def run(self) -> RolloutResult:
        state = self._store.load_state()
        if state is None:
            state = self._begin()
        elif state.canary != self._candidate.label:
            raise InputError(f"this folder holds a rollout of version {state.canary}", where=self._store.folder)
        self._store.check_declared(self._spec, self._objectives)
        if state.phase is not Phase.DONE:
            self._token = self._target.acquire(f"rollout {self._spec.name}")
        for seen in self._store.load_looks():
            self._fold(seen, canary=state.canary)
        while state.phase is not Phase.DONE:
            state = self._advance(state)
        if state.outcome is None:
            raise StateError("the rollout ended with no verdict", where=self._store.state_file)
        return RolloutResult(
            state.stable, state.canary, state.outcome, state.reason,
            (state.ended_at_s or state.started_at_s) - state.started_at_s,
        )  # fmt: skip

    def _begin(self) -> State:
        seen = self._target.observe()
        served = [label for label, share in seen.shares.items() if share > 0]
        if served == [self._candidate.label]:
            raise InputError(f"version {self._candidate.label} is what is served already")
        if len(served) != 1:
            raise InputError(f"traffic is split over versions {', '.join(sorted(served)) or 'none'}",
                             next_step="give all of it to one version before a rollout starts")  # fmt: skip
        stable, label = served[0], self._candidate.label
        counted = seen.versions[stable].within_ms if stable in seen.versions else {}
        for objective in self._objectives.objectives:
            if objective.within_ms is not None and objective.within_ms not in counted:
                raise InputError(f"the target does not count answers within {objective.within_ms} ms",
                                 where=f"objective {objective.name}",
                                 next_step="start it with these objectives (endcap serve up --objectives)")  # fmt: skip
        state = begin(
            self._spec, stable=stable, canary=label, canary_attempts=_attempts(seen, label),
            now_s=self._clock.now_s(),
        )  # fmt: skip
        self._store.declare(self._spec, self._objectives)
        self._record(state, "start")
        self._store.save_state(state)
        self._store.add_look(seen)
        return state

    def _advance(self, state: State) -> State:
        if state.intent:
            return self._try_intent(state)
        self._clock.wait(self._spec.look_s)
        canary_before, control_before = self._received(state.canary)
        self._look(state)
        canary, control = self._received(state.canary)
        return self._decided(state, Looked(self._evidence, canary, canary - canary_before, control - control_before))

    def _try_intent(self, state: State) -> State:
        try:
            for action in state.intent:
                self._act(action)
        except FencedError:
            raise
        except EndcapError as error:
            self._be_patient(error)
            if state.outcome is not None:
                self._clock.wait(self._spec.look_s)  # the same way is tried again
            else:
                self._look(state)  # did canary get any traffic?
            return self._decided(state, ActFailed(error, self._received(state.canary)[0]))
        self._look(state)
        return self._decided(state, Acted(self._received(state.canary)[0]))

    def _decided(self, state: State, event: Event) -> State:
        after = decide(self._spec, state, event, self._clock.now_s())
        if after is not state:
            # Intent before act: what follows may be cut off anywhere.
            self._store.save_state(after)
        action = "look" if after is state else ("end" if after.phase is Phase.DONE else after.phase.value)
        self._record(after, action)
        return after

    def _act(self, action: Action) -> None:
        match action:
            case EnsureCapacity(shares):
                self._target.ensure_capacity(self._versions(shares), token=self._token)
            case SetShares(shares):
                self._target.set_shares(self._versions(shares), token=self._token)
            case Retire(label):
                self._target.retire(label, token=self._token)

    def _versions(self, shares: Mapping[str, float]) -> dict[ModelVersion, float]:
        found = {}
        for label, share in shares.items():
            if label not in self._packages:
                raise TargetError(f"where version {label}'s package is, is not known")
            found[ModelVersion(label, self._packages[label])] = share
        return found

    def _look(self, state: State) -> None:
        """One more look; a target that does not answer is no data."""
        try:
            seen = self._target.observe()
        except EndcapError as error:
            self._be_patient(error)
            return
        self._failing_since_s = None
        self._store.add_look(seen)
        self._fold(seen, canary=state.canary)

    def _be_patient(self, error: EndcapError) -> None:
        """Raise ``error`` when nothing has worked for too long; the rollout then waits on disk to be gone on with."""
        now_s = self._clock.now_s()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
        if now_s - self._failing_since_s > _PATIENCE_S:
            raise error

    def _received(self, label: str) -> tuple[int, int]:
        """All attempts so far: of version ``label``, and of all others."""
        if self._last is None:
            return 0, 0
        canary = _attempts(self._last, label)
        return canary, sum(_attempts(self._last, other) for other in self._last.versions) - canary

    def _fold(self, seen: Observation, *, canary: str) -> None:
        if self._last is not None:
            self._evidence = self._evidence.update(strata(self._objectives, self._last, seen, canary=canary))
        self._last = seen

    def _record(self, state: State, action: str) -> None:
        self._store.add_decision(decision_record(self._spec, state, self._evidence, action, self._clock.now_s()))
        if self._on_decision is not None:
            self._on_decision(state, self._evidence)


def _attempts(seen: Observation, label: str) -> int:
    version = seen.versions.get(label)
    return version.attempts.total if version else 0


def decision_record(spec: RolloutSpec, state: State, evidence: Evidence, action: str, now_s: float) -> dict[str, Any]:
    """One line of decisions.jsonl: what was decided, and the evidence it stood on."""
    objectives = {}
    for name, seen in evidence.by_objective.items():
        low, high = seen.difference.interval
        canary, control = seen.canary.share, seen.control.share
        objectives[name] = {
            "canary": {"good": seen.canary.good, "total": seen.canary.total},
            "control": {"good": seen.control.good, "total": seen.control.total},
            "difference": None if canary is None or control is None else canary - control,
            "low": low, "high": high, "margin": seen.margin, "verdict": evidence.verdict_of(name),
        }  # fmt: skip
    share = spec.steps[state.step].share if state.phase in (Phase.OBSERVING, Phase.GROWING) else None
    if state.outcome is not None:
        share = 1.0 if state.outcome is Outcome.PROMOTED else 0.0
    return {
        "at_s": now_s, "rollout": spec.name, "from": state.stable, "to": state.canary, "step": state.step + 1,
        "share": share, "phase": state.phase, "action": action, "verdict": evidence.verdict,
        "outcome": state.outcome, "reason": state.reason, "evidence": objectives,
    }  # fmt: skip
