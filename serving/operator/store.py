"""The store of an engine in a cluster: its ConfigMap, written whole at each decision, with compare-and-swap."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol
from uuid import uuid4

from endcap.errors import FencedError, InputError, StateError, StorageError, TargetError
from endcap.objectives import Objectives
from serving.operator.asks import DELETION, Ask, asks_of, commanded
from serving.operator.checkpoint import Checkpoint, checkpoint_name, history_line
from serving.operator.crds import HISTORY
from serving.operator.objects import Json, RolloutObject, config_map_path
from serving.rollout.base import Kept
from serving.rollout.declared import declared_json, differing
from serving.rollout.events import Commanded
from serving.rollout.sight import Sight
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import State
from serving.targets.base import Observation
from serving.targets.kserve.errors import ConflictError, RefusedError

__all__ = ["Api", "ConfigMapStore", "read_checkpoint"]

log = logging.getLogger("endcap.operator")


class Api(Protocol):
    """As much of :class:`serving.targets.kserve.cluster.Cluster` as is used here."""

    def get(self, path: str) -> Json | None: ...

    def items(self, path: str, *, labels: Mapping[str, str] | None = None, **query: str) -> list[Json] | None: ...

    def create(self, path: str, body: Json) -> Json: ...

    def replace(self, path: str, body: Json) -> Json: ...

    def merge(self, path: str, body: Json) -> Json: ...

    def delete(self, path: str) -> None: ...


def read_checkpoint(api: Api, rollout: RolloutObject) -> Checkpoint | None:
    """None where the rollout has not begun.

    Raises:
        StateError: it is damaged, or another's. TargetError: the API server does not answer.
    """
    found = api.get(config_map_path(rollout.key.namespace, checkpoint_name(rollout.key.name)))
    return None if found is None else Checkpoint.of(found, rollout)


class ConfigMapStore:
    """Implements :class:`serving.rollout.base.Store` for one rollout.

    ``rollout``: gives the object as it was last seen, whose annotations are what people ask. ``before_first``: is
    called before the first decision is written. ``show``: is called with the checkpoint that a change led to.
    ``fence``: how often the Lease had changed hands when this process got it. ``anew``: what is there is of a run that
    has ended, and is written over.
    """

    def __init__(
        self, api: Api, rollout: Callable[[], RolloutObject], *, fence: int, before_first: Callable[[], None],
        show: Callable[[Checkpoint], None], anew: bool = False,
    ) -> None:  # fmt: skip
        self._api, self._rollout, self._fence = api, rollout, fence
        self._before_first, self._show, self._anew = before_first, show, anew
        self._writer = uuid4().hex
        self._declared: tuple[RolloutSpec, Objectives] | None = None
        self._held: Checkpoint | None = None
        self._asked: list[Ask] = []

    @property
    def where(self) -> str:
        return f"rollout {self._rollout().key}"

    @property
    def held(self) -> Checkpoint | None:
        """What was written last; None before the first decision."""
        return self._held

    # ---- beginning, and going on ----

    def declare(self, spec: RolloutSpec, objectives: Objectives) -> None:
        self._declared = spec, objectives

    def check_declared(self, spec: RolloutSpec, objectives: Objectives) -> None:
        if self._held is None:
            raise StateError("nothing is kept of it", where=self.where)
        kept = declared_json(self._held.spec, self._held.objectives)
        differ = differing(kept, declared_json(spec, objectives))
        if differ:
            raise InputError(f"the rollout was begun with other {', '.join(differ)}", where=self.where,
                             next_step="it goes on with what it was begun with")  # fmt: skip

    def resume(self, spec: RolloutSpec) -> State | None:
        """Take the checkpoint over: from here on its writer before is refused.

        Raises:
            FencedError: a process that got the Lease later has written it, or does so just now.
        """
        try:
            found = read_checkpoint(self._api, self._rollout())
        except TargetError as error:
            raise _storage(error) from error
        if found is not None and found.fence > self._fence:
            raise FencedError("another operator has taken over", where=self.where)
        if found is None or self._anew:
            self._held = None if found is None else found
            return None
        self._held = found
        if not found.state.ended:
            self._write(found)
        return found.state

    def recall(self, sight: Sight) -> bool:
        if self._held is None or not self._held.sight:
            return False
        try:
            sight.restore(self._held.sight)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"what the looks came to is damaged ({error!r})", where=self.where,
                             next_step="abort it: kubectl annotate rollout NAME endcap.dev/abort=YOU after "
                             "removing sight.json from its ConfigMap") from error  # fmt: skip
        return sight.looked_at_s is not None

    # ---- looks and decisions ----

    def add_look(self, seen: Observation) -> None:
        """Kept with the decision that follows, as a part of what all looks come to."""

    def keep(self, kept: Kept) -> None:
        held, record = self._held, kept.record
        line = history_line(record) if kept.changed else None
        heard, ask = dict(held.heard) if held is not None else {}, self._ask_of(record)
        if ask is not None:
            heard[ask.name] = ask.value
        elif held is not None:
            self._forget_removed(heard)
        seen = {"at_s": record["at_s"], "verdict": record["verdict"], "evidence": record["evidence"],
                "shadow": record.get("shadow")}  # fmt: skip
        history: tuple[Mapping[str, Any], ...] = ()
        if held is None or self._anew:
            if self._declared is None:
                raise StateError("nothing was declared", where=self.where)
            self._before_first()
            spec, objectives = self._declared
            made = Checkpoint(spec, objectives, kept.after, {}, resource_version=held.resource_version if held else "")
        else:
            made, history = held, held.history
        if line is not None:
            history = (*history, line)[-HISTORY:]
        self._write(replace(
            made, state=kept.after, sight=kept.sight(), seen=seen, history=history, heard=heard
        ))  # fmt: skip
        self._anew = False
        if ask is not None:
            self._asked.remove(ask)

    def publish(self, state: State) -> None:
        if self._held is not None:
            self._show(self._held)

    def _write(self, made: Checkpoint) -> None:
        """Whole, on top of what was read or written last.

        Raises:
            FencedError: somebody else has written it since. StorageError: it is not known to be kept.
        """
        made = replace(made, writer=self._writer, fence=self._fence)
        rollout = self._rollout()
        path = config_map_path(rollout.key.namespace, checkpoint_name(rollout.key.name))
        for again in (False, True):
            try:
                if made.resource_version:
                    answer = self._api.replace(path, made.to_object(rollout))
                else:
                    answer = self._api.create(config_map_path(rollout.key.namespace), made.to_object(rollout))
            except ConflictError as error:
                version = None if again else self._own_version(path)
                if version is None:
                    raise FencedError("somebody else has written its checkpoint", where=self.where) from error
                made = replace(made, resource_version=version)
            except RefusedError as error:
                raise StateError(f"its checkpoint cannot be written: {error.what}", where=error.where,
                                 next_step=error.next_step) from error  # fmt: skip
            except TargetError as error:
                raise _storage(error) from error
            else:
                self._held = replace(made, resource_version=str(answer["metadata"]["resourceVersion"]))
                return

    def _own_version(self, path: str) -> str | None:
        """The resource version that is there, where it was we who wrote it: an answer of ours was lost on its way.

        What such a write held was never acted on, so it is written over.
        """
        try:
            found = self._api.get(path)
        except TargetError as error:
            raise _storage(error) from error
        if found is None or (found["metadata"].get("annotations") or {}).get("endcap.dev/writer") != self._writer:
            return None
        return str(found["metadata"]["resourceVersion"])

    # ---- what people ask ----

    def has_commands(self, *, after: int) -> bool:
        held = self._held
        return held is not None and bool(asks_of(self._rollout(), held.state, held.heard))

    def new_commands(self, *, after: int) -> list[Commanded]:
        held = self._held
        if held is None:
            return []
        self._asked = asks_of(self._rollout(), held.state, held.heard)
        return [
            commanded(ask, held.spec, held.state, after + number) for number, ask in enumerate(self._asked, 1)
        ]  # fmt: skip

    def done_asks(self) -> list[tuple[str, str]]:
        """Annotations, with their values, that were heard and still stand on the object."""
        held = self._held
        if held is None:
            return []
        annotations = self._rollout().annotations
        return [
            (name, value) for name, value in held.heard.items()
            if name != DELETION and annotations.get(f"endcap.dev/{name}") == value
        ]  # fmt: skip

    def _ask_of(self, record: Mapping[str, Any]) -> Ask | None:
        event = record["event"]
        if event is None or event.get("kind") != "commanded":
            return None
        return self._asked[0] if self._asked else None

    def _forget_removed(self, heard: dict[str, str]) -> None:
        """What was removed since it was heard may be asked again in the same words."""
        annotations = self._rollout().annotations
        for name in [name for name in heard if name != DELETION and f"endcap.dev/{name}" not in annotations]:
            del heard[name]


def _storage(error: TargetError) -> StorageError:
    return StorageError(error.what, where=error.where, next_step="see whether the cluster's API server runs")
