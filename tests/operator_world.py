"""An API server in memory, and what surrounds one rollout's drive: so that each of its writes can be cut off."""

from __future__ import annotations

import copy
import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endcap.errors import InputError, TargetError
from endcap.objectives import Objectives
from serving.operator.drive import Drive, Equipment
from serving.operator.events import Events
from serving.operator.metrics import Metrics
from serving.operator.objects import FINALIZER, Json, Key, RolloutObject, objectives_path, rollout_path
from serving.operator.store import Api
from serving.rollout.engine import Gatekeeper
from serving.rollout.spec import RolloutSpec
from serving.targets.base import ModelVersion
from serving.targets.kserve.errors import ConflictError
from tests.simulated import WINDOW_S, Behaviour, Killed, SimulatedClock, SimulatedTarget

__all__ = ["KEY", "OBJECTIVES", "ROLLOUT", "Cut", "MemoryApi", "Shop", "drive_to_end", "objectives_document", "rollout"]

KEY = Key("shop", "recommender")
OBJECTIVES: Json = {
    "service": "recommender",
    "objectives": [
        {"name": "availability", "goal": 0.99, "good": "answered", "margin": 0.02},
        {"name": "click-through", "goal": 0.05, "good": "clicked", "windowSeconds": WINDOW_S, "marginRelative": 0.3},
    ],
}  # fmt: skip
ROLLOUT: Json = {
    "service": "recommender", "candidate": "models:/recommender/2", "lookSeconds": 1,
    "steps": [
        {"share": 0.2, "minRequests": 50, "minSeconds": 2, "maxSeconds": 60},
        {"share": 0.5, "minRequests": 50, "minSeconds": 1, "maxSeconds": 60},
        {"share": 1, "minRequests": 50, "minSeconds": 0, "maxSeconds": 60},
    ],
}  # fmt: skip


def rollout(key: Key = KEY, **spec: Any) -> Json:
    """A Rollout to be created."""
    return {"apiVersion": "endcap.dev/v1alpha1", "kind": "Rollout",
            "metadata": {"name": key.name, "namespace": key.namespace}, "spec": {**ROLLOUT, **spec}}  # fmt: skip


def objectives_document(namespace: str = KEY.namespace) -> Json:
    return {"apiVersion": "endcap.dev/v1alpha1", "kind": "Objectives",
            "metadata": {"name": "recommender", "namespace": namespace}, "spec": OBJECTIVES}  # fmt: skip


class MemoryApi:
    """As strict as the real one about resource versions, finalizers and the status subresource."""

    def __init__(self) -> None:
        self.objects: dict[str, Json] = {}
        self._versions = itertools.count(1)
        self.away = False
        self.calls: list[tuple[str, str]] = []

    def get(self, path: str) -> Json | None:
        self._call("GET", path)
        return copy.deepcopy(self.objects.get(path))

    def items(self, path: str, *, labels: Mapping[str, str] | None = None, **query: str) -> list[Json] | None:
        self._call("GET", path)
        return [copy.deepcopy(one) for other, one in sorted(self.objects.items()) if other.startswith(f"{path}/")]

    def create(self, path: str, body: Json) -> Json:
        self._call("POST", path)
        place = f"{path}/{body['metadata']['name']}"
        if place in self.objects:
            raise ConflictError("already exists", where=place)
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": "2026-01-01T00:00:00Z"}
        return self._put(place, made)

    def replace(self, path: str, body: Json) -> Json:
        self._call("PUT", path)
        known = self._known(path, body)
        return self._put(path, {**copy.deepcopy(body), "metadata": {**known["metadata"], **body["metadata"]}})

    def merge(self, path: str, body: Json) -> Json:
        self._call("PATCH", path)
        place, is_status = path.removesuffix("/status"), path.endswith("/status")
        known = self._known(place, body)
        made = _merged(known, {k: v for k, v in body.items() if is_status == (k == "status")})
        if made.get("spec") != known.get("spec"):
            made["metadata"]["generation"] += 1
        found = self._put(place, made)
        if made["metadata"].get("deletionTimestamp") and not made["metadata"].get("finalizers"):
            self._remove(place)
        return found

    def delete(self, path: str) -> None:
        self._call("DELETE", path)
        found = self.objects.get(path)
        if found is not None and found["metadata"].get("finalizers"):
            found["metadata"]["deletionTimestamp"] = "2026-01-01T01:00:00Z"
            self._put(path, found)
        elif found is not None:
            self._remove(path)

    def annotate(self, key: Key, **annotations: str | None) -> None:
        """As a person does: ``pause="ann"``."""
        asked = {f"endcap.dev/{name}": value for name, value in annotations.items()}
        self.merge(rollout_path(*key), {"metadata": {"annotations": asked}})

    def events(self) -> list[Json]:
        return [one for one in self.objects.values() if one["kind"] == "Event"]

    def conditions(self, key: Key = KEY) -> dict[str, tuple[str, str, str]]:
        """By type: status, reason and message."""
        found = self.objects[rollout_path(*key)].get("status", {}).get("conditions", [])
        return {one["type"]: (one["status"], one["reason"], one["message"]) for one in found}

    def _call(self, method: str, path: str) -> None:
        self.calls.append((method, path))
        if self.away:
            raise TargetError("the API server does not answer: ConnectionRefusedError", where=path)

    def _known(self, path: str, body: Json) -> Json:
        known = self.objects.get(path)
        if known is None:
            raise TargetError("it is gone", where=path)
        version = body.get("metadata", {}).get("resourceVersion")
        if version is not None and version != known["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified", where=path)
        return copy.deepcopy(known)

    def _put(self, path: str, made: Json) -> Json:
        made["metadata"]["resourceVersion"] = str(next(self._versions))
        self.objects[path] = made
        return copy.deepcopy(made)

    def _remove(self, path: str) -> None:
        gone = self.objects.pop(path)
        for other, one in list(self.objects.items()):
            if gone["metadata"]["uid"] in [ref["uid"] for ref in one["metadata"].get("ownerReferences", ())]:
                del self.objects[other]


def _merged(below: Any, above: Mapping[str, Any]) -> Any:
    made = dict(below) if isinstance(below, dict) else {}
    for key, value in above.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _merged(made.get(key), value) if isinstance(value, Mapping) else copy.deepcopy(value)
    return made


class Cut:
    """An API server that this process does not survive writing to: it dies before or after the n-th write."""

    def __init__(self, api: Api, die_at: int | None) -> None:
        self._api, self._die_at = api, die_at
        self.points = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._api, name)
        if name not in ("create", "replace", "merge", "delete"):
            return real

        def cut(*arguments: Any) -> Any:
            self._point()
            found = real(*arguments)
            self._point()
            return found

        return cut

    def _point(self) -> None:
        self.points += 1
        if self.points == self._die_at:
            raise Killed


@dataclass
class Shop:
    """One service in one namespace: its target and clock outlive any operator. Implements Surroundings and Outfit."""

    api: Api
    clicked: float = 0.1
    rate: float = 4000.0
    clock: SimulatedClock = field(default_factory=SimulatedClock)
    gates: Gatekeeper | None = None
    refuse: Exception | None = None
    key: Key = KEY

    def __post_init__(self) -> None:
        behaviours = {"1": Behaviour(clicked=0.1), "2": Behaviour(clicked=self.clicked), "3": Behaviour(clicked=0.1)}
        self.target = SimulatedTarget(behaviours, self.clock, self.rate)

    def object_of(self, key: Key) -> RolloutObject | None:
        found = self.api.get(rollout_path(*key))
        return None if found is None else RolloutObject.of(found)

    def under_way(self, key: Key) -> Key | None:
        for one in self.api.items(rollout_path(key.namespace)) or ():
            other = RolloutObject.of(one)
            if other.key != key and other.service == "recommender" and FINALIZER in other.finalizers:
                return other.key
        return None

    def release(self, key: Key) -> None: ...

    def __call__(self, namespace: str, spec: RolloutSpec, objectives: Objectives) -> Equipment:
        if self.refuse is not None:
            raise self.refuse
        label = spec.candidate.rpartition("/")[2]
        if not label.isdigit():
            raise InputError(f"{spec.candidate!r} names no model version", next_step="write models:/NAME/VERSION")
        return Equipment(self.target, ModelVersion(label, Path(label)), self.gates)

    def drive(self, api: Api | None = None, *, fence: int = 1, key: Key | None = None) -> Drive:
        """A new process takes the rollout up."""
        given = api or self.api
        return Drive(key or self.key, given, self, self, fence=fence, clock=self.clock, events=Events(given, "test"),
                     metrics=Metrics(), refresh_s=60.0)  # fmt: skip

    def apply(self, **spec: Any) -> None:
        """The objectives and the Rollout, if they are not there."""
        for path, document in (
            (objectives_path(self.key.namespace), objectives_document(self.key.namespace)),
            (rollout_path(self.key.namespace), rollout(self.key, **spec)),
        ):
            if self.api.get(f"{path}/{document['metadata']['name']}") is None:
                self.api.create(path, document)

    def turns(self, drive: Drive, *, until_s: float = 5_000.0) -> Iterator[float]:
        """Turns as they are due, time passing in between; ends when none is. What a person does between, is heard."""
        while (due_s := drive.turn()) is not None:
            assert self.clock.now_s() < until_s, "it does not end"
            yield due_s
            self.clock.wait(max(0.0, due_s - self.clock.now_s()))

    @property
    def status(self) -> Json:
        found = self.api.get(rollout_path(*self.key))
        assert found is not None
        return dict(found.get("status") or {})


def drive_to_end(shop: Shop, drive: Drive, *, at: Mapping[float, Callable[[], None]] | None = None) -> Json:
    """Its status when nothing is due any more. ``at``: what happens at which second since the start."""
    todo, begun_s = sorted((at or {}).items(), key=lambda item: item[0]), shop.clock.now_s()
    for _ in shop.turns(drive):
        while todo and shop.clock.now_s() - begun_s >= todo[0][0]:
            todo.pop(0)[1]()
    return shop.status
