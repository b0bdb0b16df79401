"""One rollout in the cluster, from the object that asks for it to its end: a turn at a time, whatever goes wrong.

Nothing here is remembered that another process would miss: the checkpoint says where the rollout stands, the object
what people ask.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from endcap.errors import EndcapError, FencedError, InputError, PackageError, StateError, TargetError
from endcap.objectives import Objectives
from serving.operator.checkpoint import Checkpoint
from serving.operator.events import Events
from serving.operator.metrics import Metrics
from serving.operator.objects import (
    ASK_PREFIX,
    FINALIZER,
    Json,
    Key,
    RolloutObject,
    objectives_of,
    objectives_path,
    rollout_path,
    spec_of,
)
from serving.operator.status import Condition, conditions_of, merged_conditions, status_of
from serving.operator.store import Api, ConfigMapStore, read_checkpoint
from serving.rollout.audit import LOOK, Decision, decision_record
from serving.rollout.declared import declared_json, differing
from serving.rollout.engine import Clock, CountSource, Engine, Gatekeeper
from serving.rollout.spec import RolloutSpec
from serving.targets.base import ModelVersion, Target
from serving.targets.kserve.errors import ConflictError, Reason

__all__ = ["Drive", "Equipment", "Outfit", "Surroundings"]

log = logging.getLogger("endcap.operator")
_AGAIN_S = (2.0, 5.0, 10.0, 30.0)
"""After an error of the cluster's or the target's: when it is tried again, the last for good."""
_REFUSED_S = 60.0
"""A refusal is looked at again at the latest then: what it lacked may have come without the object being touched."""
_BUSY_S = 5.0
_REPEATED_S = 600.0
"""The last decision's event is told again by who takes a rollout over, while it is young."""


@dataclass(frozen=True, slots=True)
class Equipment:
    """What an engine needs beside its spec. ``close`` lets go of connections.

    ``check`` is called before a rollout begins, and not when one is gone on with: it raises InputError for what the
    target lacks, or can never do, before anything is written.
    """

    target: Target
    candidate: ModelVersion
    gates: Gatekeeper | None = None
    source: CountSource | None = None
    tell: Callable[[Decision], None] | None = None
    check: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


class Outfit(Protocol):
    """Makes the equipment of a rollout. Raises InputError where it lacks something, TargetError for what may pass."""

    def __call__(self, namespace: str, spec: RolloutSpec, objectives: Objectives) -> Equipment: ...


class Surroundings(Protocol):
    """What a rollout knows of the others."""

    def object_of(self, key: Key) -> RolloutObject | None:
        """As it was last seen; None once it is gone."""

    def under_way(self, key: Key) -> Key | None:
        """The other Rollout of the same service that is under way; where there is none, it is this one from now on."""

    def release(self, key: Key) -> None:
        """It is not under way any more, or did not begin."""


class Anywhere(dict[str, Path]):
    """Where packages lie is the target's to know: any label will do."""

    def __contains__(self, label: object) -> bool:
        return True

    def __missing__(self, label: str) -> Path:
        return Path(label)


class Drive:
    """Used by one thread at a time. ``fence``: the Lease's transitions when this process got it."""

    def __init__(
        self, key: Key, api: Api, outfit: Outfit, around: Surroundings, *, fence: int, clock: Clock, events: Events,
        metrics: Metrics, refresh_s: float,
    ) -> None:  # fmt: skip
        self.key = key
        self._api, self._outfit, self._around, self._fence = api, outfit, around, fence
        self._clock, self._events, self._metrics, self._refresh_s = clock, events, metrics, refresh_s
        self._engine: Engine | None = None
        self._store: ConfigMapStore | None = None
        self._equipment: Equipment | None = None
        self._object: RolloutObject | None = None
        self._failures = 0
        self._refresh_at_s = float("inf")
        self._wants_refresh = False
        self.acknowledged_s = float("-inf")
        """When the API server had acknowledged the last decision or look, by the clock."""
        self._spec_generation = -1
        self._settled: tuple[int, bool] | None = None
        """The generation, and whether deleted, for which there is nothing more to be done."""

    # ---- what the conductor asks ----

    @property
    def is_under_way(self) -> bool:
        return self._engine is not None and not self._engine.state.ended

    @property
    def phase(self) -> str:
        return "waiting" if self._engine is None else self._engine.state.phase.value

    @property
    def may_take_long(self) -> bool:
        """The next turn acts, or writes for people: more than a look."""
        return self._engine is None or self._wants_refresh or bool(self._engine.state.intent)

    @property
    def is_open(self) -> bool:
        """It has an engine; else the next turn begins it, or takes it up."""
        return self._engine is not None

    def close(self) -> None:
        """Let go; the rollout stays as it is."""
        if self._equipment is not None:
            self._equipment.close()
        self._engine = self._store = self._equipment = None
        self._wants_refresh, self._refresh_at_s = False, float("inf")

    def turn(self) -> float | None:
        """Take one turn; when the next is due by the clock, None when nothing is until the object changes."""
        seen = self._around.object_of(self.key)
        if seen is None:
            self.close()
            return None
        self._object = seen
        try:
            due_s = self._step(seen) if self._engine is not None else self._open(seen)
        except FencedError as error:
            return self._fenced(error)
        except (InputError, PackageError) as error:
            return self._refused(error)
        except EndcapError as error:
            return self._failed(error)
        self._failures = 0
        return due_s

    # ---- the ways of a turn ----

    def _open(self, seen: RolloutObject) -> float | None:
        if self._settled == (seen.generation, seen.is_deleted):
            return None
        found = read_checkpoint(self._api, seen)
        anew = False
        if found is not None and found.state.ended:
            anew = not seen.is_deleted and _asks_for_another(seen, found)
            if not anew:
                self._settle(seen, found)
                return None
        if found is None and seen.is_deleted:
            self._release(seen)
            return None
        if found is None or anew:
            busy = self._around.under_way(self.key)
            if busy is not None:
                self._refuse("ServiceBusy", f"a rollout of {seen.service} is under way: {busy.name}",
                             "this one begins when that has ended; or abort it: "
                             f"kubectl annotate rollout {busy.name} endcap.dev/abort=YOU")  # fmt: skip
                return self._clock.now_s() + _BUSY_S
            spec = spec_of(seen)
            objectives = spec.judged(self._objectives(seen, spec))
        else:
            spec, objectives = _with_what_may_change(seen, found), found.objectives
        equipment = self._equipment = self._outfit(self.key.namespace, spec, objectives)
        if found is None or anew:
            equipment.check()
        self._store = ConfigMapStore(self._api, self._seen, fence=self._fence, before_first=self._hold,
                                     show=self._show, anew=anew)  # fmt: skip
        engine = Engine(spec, objectives, equipment.candidate, equipment.target, self._store, Anywhere(),
                        clock=self._clock, gates=equipment.gates, source=equipment.source,
                        on_decision=self._told(spec, equipment), intervals=False)  # fmt: skip
        engine.open()
        self._engine, self._spec_generation = engine, seen.generation
        held = self._store.held
        if held is not None:
            self._tell_again(seen, held)
            self._show(held)
        return self._clock.now_s()

    def _step(self, seen: RolloutObject) -> float | None:
        engine, store = self._engine, self._store
        assert engine is not None and store is not None  # noqa: S101 - the caller saw to it
        if seen.generation != self._spec_generation:
            self.close()  # a freeze may have been declared; what else differs is told
            return self._clock.now_s()
        self._drop_heard(seen, store)
        if self._wants_refresh and store.held is not None:
            self._show(store.held)
        due_s = engine.step()
        if self._clock.now_s() >= self._refresh_at_s:
            self._wants_refresh = True  # in a turn of its own: what people read delays nobody's look
            return self._clock.now_s()
        if due_s is None:
            outcome = engine.result.outcome
            self._metrics.endings.labels(outcome.value).inc()
            self.close()
            return self._clock.now_s()  # the next turn settles it
        return due_s

    def _settle(self, seen: RolloutObject, found: Checkpoint) -> None:
        """It has ended: the status says so, and the object may go."""
        if seen.status.get("seq") != found.state.seq or seen.status.get("phase") != found.state.phase.value:
            self._show(found)
        self._release(seen)
        self._settled = (seen.generation, seen.is_deleted)

    # ---- what goes wrong ----

    def _fenced(self, error: FencedError) -> float:
        """Somebody else has taken over, or acts on the service: whoever it is, this engine does nothing more."""
        log.warning("%s", error.what, extra={"rollout": str(self.key)})
        self._metrics.errors.labels("Fenced").inc()
        self.close()
        return self._again()

    def _refused(self, error: EndcapError) -> float:
        """What a person has to correct. Nothing was changed, or goes on as it was begun."""
        self.close()
        seen = self._seen()
        if not self._is_begun(seen):
            self._around.release(self.key)
        reason = str(getattr(error, "reason", "") or ("InvalidSpec" if isinstance(error, InputError) else "BadPackage"))
        self._metrics.errors.labels(reason).inc()
        if seen.is_deleted and reason == Reason.NOT_FOUND:
            self._release(seen)  # the service is gone: there is no traffic to be returned
        self._refuse(reason, error.what if error.where is None else f"{error.where}: {error.what}", error.next_step)
        return self._clock.now_s() + _REFUSED_S

    def _failed(self, error: EndcapError) -> float:
        """What may pass: the target or the cluster does not answer; or what a person has to mend without the spec."""
        self.close()
        reason = {StateError: "Damaged", TargetError: "TargetUnreachable"}.get(type(error), type(error).__name__)
        self._metrics.errors.labels(reason).inc()
        seen = self._seen()
        if not self._is_begun(seen):
            self._around.release(self.key)
        told = str(error).replace("\n  next: ", "; next: ")
        log.warning("%s", told, extra={"rollout": str(self.key), "reason": reason})
        self._patch_status(seen, {}, [Condition("Progressing", "Unknown", reason, told)])
        self._events.refused(seen, reason, told, at_s=time.time())
        return self._again()

    def _again(self) -> float:
        wait_s = _AGAIN_S[min(self._failures, len(_AGAIN_S) - 1)]
        self._failures += 1
        return self._clock.now_s() + wait_s

    def _refuse(self, reason: str, what: str, following: str | None) -> None:
        seen = self._seen()
        message = what if following is None else f"{what}; next: {following}"
        log.warning("%s", message, extra={"rollout": str(self.key), "reason": reason})
        phase = "waiting" if reason == "ServiceBusy" else "refused"
        fields = {} if self._is_begun(seen) else {"phase": phase, "message": what, "next": following}
        self._patch_status(seen, fields, [Condition("Accepted", "False", reason, message)])
        self._events.refused(seen, reason, message, at_s=time.time())

    def _is_begun(self, seen: RolloutObject) -> bool:
        return FINALIZER in seen.finalizers or bool(seen.status.get("seq"))

    # ---- the object ----

    def _seen(self) -> RolloutObject:
        seen = self._around.object_of(self.key) or self._object
        if seen is None:
            raise StateError("the object is gone", where=f"rollout {self.key}")
        return seen

    def _objectives(self, seen: RolloutObject, spec: RolloutSpec) -> Objectives:
        key = Key(self.key.namespace, spec.objectives)
        found = self._api.get(objectives_path(*key))
        if found is None:
            raise InputError(f"no Objectives {spec.objectives!r} here", where=f"rollout {seen.key}",
                             next_step="apply them, or name others in spec.objectives")  # fmt: skip
        return objectives_of(key, found)

    def _hold(self) -> None:
        """Before the first decision: from now on the object does not go before its traffic is stable's."""
        seen = self._fresh()
        if seen.is_deleted:
            raise StateError("it is being deleted", where=f"rollout {self.key}")
        if FINALIZER not in seen.finalizers:
            self._set_finalizers(seen, (*seen.finalizers, FINALIZER))

    def _release(self, seen: RolloutObject) -> None:
        if FINALIZER not in seen.finalizers:
            return
        seen = self._fresh()
        self._set_finalizers(seen, tuple(name for name in seen.finalizers if name != FINALIZER))

    def _set_finalizers(self, seen: RolloutObject, finalizers: tuple[str, ...]) -> None:
        self._api.merge(
            rollout_path(*self.key),
            {"metadata": {"resourceVersion": seen.resource_version, "finalizers": list(finalizers)}},
        )

    def _fresh(self) -> RolloutObject:
        found = self._api.get(rollout_path(*self.key))
        if found is None:
            raise StateError("the object is gone", where=f"rollout {self.key}")
        return RolloutObject.of(found)

    def _drop_heard(self, seen: RolloutObject, store: ConfigMapStore) -> None:
        """Take annotations away that were heard. One that says something else by now stays."""
        heard = store.done_asks()
        if not heard:
            return
        try:
            fresh = self._fresh()
            gone: Json = {
                f"{ASK_PREFIX}{name}": None for name, value in heard
                if fresh.annotations.get(f"{ASK_PREFIX}{name}") == value
            }  # fmt: skip
            if gone:
                meta = {"resourceVersion": fresh.resource_version, "annotations": gone}
                self._api.merge(rollout_path(*self.key), {"metadata": meta})
        except (ConflictError, StateError):
            pass  # somebody has just written it; what was heard is known anyway
        except TargetError as error:
            log.warning("what was heard stays on the object: %s", error.what, extra={"rollout": str(self.key)})

    # ---- what people read ----

    def _show(self, held: Checkpoint) -> None:
        seen = self._seen()
        conditions = [*conditions_of(held), Condition("Accepted", "True", "Begun", "the rollout was begun")]
        conditions.append(_up_to_date(seen, held))
        self._patch_status(seen, status_of(held, self.key.name), conditions)
        self._wants_refresh = False
        # Not all at once: those that were taken up together would be written together for ever.
        spread = 0.75 + (zlib.crc32(str(self.key).encode()) % 512) / 1024
        self._refresh_at_s = self._clock.now_s() + self._refresh_s * spread

    def _patch_status(self, seen: RolloutObject, fields: Mapping[str, Any], conditions: list[Condition]) -> None:
        merged = merged_conditions(seen.status.get("conditions") or (), conditions, at_s=time.time(),
                                   generation=seen.generation)  # fmt: skip
        now = {**fields, "conditions": merged, "observedGeneration": seen.generation}
        if all(seen.status.get(name) == value for name, value in now.items()):
            return
        try:
            self._api.merge(rollout_path(*self.key, sub="status"), {"status": now})
        except TargetError as error:  # it decides nothing, and is written again
            log.warning("the status was not written: %s", error.what, extra={"rollout": str(self.key)})

    def _told(self, spec: RolloutSpec, equipment: Equipment) -> Callable[[Decision], None]:
        def told(decided: Decision) -> None:
            self.acknowledged_s = self._clock.now_s()
            if equipment.tell is not None:
                equipment.tell(decided)
            if decided.action == LOOK:
                return
            self._metrics.decisions.labels(decided.action).inc()
            record = decision_record(spec, decided)
            log.info("%s: %s", decided.action, decided.after.waiting or decided.after.reason,
                     extra={"rollout": str(self.key), "decision": record})  # fmt: skip
            held = None if self._store is None else self._store.held
            if held is not None and held.history:
                self._events.decided(self._seen(), held.history[-1], begun_at_s=held.state.started_at_s)

        return told

    def _tell_again(self, seen: RolloutObject, held: Checkpoint) -> None:
        """Who took the last decision may have died before telling of it."""
        if held.history and time.time() - float(held.history[-1]["at_s"]) < _REPEATED_S:
            self._events.decided(seen, held.history[-1], begun_at_s=held.state.started_at_s)


def _asks_for_another(seen: RolloutObject, ended: Checkpoint) -> bool:
    candidate = seen.spec.get("candidate")
    return isinstance(candidate, str) and candidate != ended.spec.candidate


def _with_what_may_change(seen: RolloutObject, found: Checkpoint) -> RolloutSpec:
    """What it was begun with; a freeze and addresses may have been changed since."""
    try:
        now = spec_of(seen)
    except InputError:
        return found.spec
    return replace(found.spec, freeze=now.freeze, webhook_from=now.webhook_from, prometheus_url=now.prometheus_url)


def _up_to_date(seen: RolloutObject, held: Checkpoint) -> Condition:
    try:
        asked = spec_of(seen)
    except InputError as error:
        return Condition("UpToDate", "False", "InvalidSpec", f"{error.what}; it goes on with what it was begun with")
    objectives = held.objectives
    differ = differing(declared_json(held.spec, objectives), declared_json(asked, objectives))
    if not differ:
        return Condition("UpToDate", "True", "AsBegun", "it is what the object asks for")
    again = "another candidate begins when it has ended" if "candidate" in differ else "abort it to begin otherwise"
    return Condition("UpToDate", "False", "SpecChanged", f"{', '.join(differ)} changed since it was begun, and it goes "
                     f"on with what it was begun with; {again}")  # fmt: skip
