"""Objects of the cluster as frozen values, and where they lie. What people wrote is read by the models of the files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from pydantic import ValidationError

from endcap.documents import Document, describe_validation
from endcap.errors import InputError
from endcap.objectives import Objectives, ObjectivesDocument
from serving.rollout.spec import RolloutDocument, RolloutSpec

__all__ = [
    "ASK_PREFIX", "FINALIZER", "Json", "Key", "RolloutObject", "config_map_path", "events_path", "lease_path",
    "objectives_of", "objectives_path", "rollout_path", "spec_of",
]  # fmt: skip

Json = dict[str, Any]
D = TypeVar("D", bound=Document)
FINALIZER = "endcap.dev/traffic"
"""While canary may have a share: the object does not go before the traffic is stable's again."""
ASK_PREFIX = "endcap.dev/"
_GROUP = "/apis/endcap.dev/v1alpha1"


class Key(NamedTuple):
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class RolloutObject:
    """A Rollout as it was last seen. ``spec`` and ``status`` are as they lie there: nobody has validated them yet."""

    key: Key
    uid: str
    resource_version: str
    generation: int
    created_at: str
    spec: Mapping[str, Any]
    status: Mapping[str, Any] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    finalizers: tuple[str, ...] = ()
    is_deleted: bool = False
    """Somebody asked for it to be deleted; it is there until its finalizers are gone."""

    @staticmethod
    def of(document: Mapping[str, Any]) -> RolloutObject:
        """Of an API server's answer or event."""
        meta = document["metadata"]
        return RolloutObject(
            Key(str(meta["namespace"]), str(meta["name"])), str(meta["uid"]), str(meta["resourceVersion"]),
            int(meta.get("generation", 0)), str(meta.get("creationTimestamp", "")), document.get("spec") or {},
            document.get("status") or {}, meta.get("annotations") or {}, tuple(meta.get("finalizers") or ()),
            meta.get("deletionTimestamp") is not None,
        )  # fmt: skip

    @property
    def service(self) -> str:
        return str(self.spec.get("service", ""))

    @property
    def reference(self) -> Json:
        """For events."""
        return {"apiVersion": "endcap.dev/v1alpha1", "kind": "Rollout", "namespace": self.key.namespace,
                "name": self.key.name, "uid": self.uid, "resourceVersion": self.resource_version}  # fmt: skip


def spec_of(rollout: RolloutObject) -> RolloutSpec:
    """What a Rollout asks for. Raises InputError where the API server let pass what the models refuse."""
    document = _validated(RolloutDocument, rollout.key, rollout.spec)
    return document.to_domain()


def objectives_of(key: Key, document: Mapping[str, Any]) -> Objectives:
    """Raises InputError, as :func:`spec_of` does."""
    return _validated(ObjectivesDocument, key, document.get("spec") or {}).to_domain()


def _validated(model: type[D], key: Key, spec: Mapping[str, Any]) -> D:
    try:
        return model.model_validate({
            "apiVersion": "endcap.dev/v1alpha1", "kind": model.model_fields["kind"].default,
            "metadata": {"name": key.name}, "spec": dict(spec),
        })  # fmt: skip
    except ValidationError as error:
        raise InputError(describe_validation(error), where=f"{model.model_fields['kind'].default} {key}",
                         next_step="correct it and apply it again") from error  # fmt: skip


# ---- where they lie ----


def rollout_path(namespace: str, name: str = "", *, sub: str = "") -> str:
    return _path(_GROUP, namespace, "rollouts", name) + (f"/{sub}" if sub else "")


def objectives_path(namespace: str, name: str = "") -> str:
    return _path(_GROUP, namespace, "objectives", name)


def config_map_path(namespace: str, name: str = "") -> str:
    return _path("/api/v1", namespace, "configmaps", name)


def events_path(namespace: str) -> str:
    return _path("/api/v1", namespace, "events", "")


def lease_path(namespace: str, name: str = "") -> str:
    return _path("/apis/coordination.k8s.io/v1", namespace, "leases", name)


def _path(group: str, namespace: str, kind: str, name: str) -> str:
    path = f"{group}/namespaces/{quote(namespace, safe='')}/{kind}"
    return f"{path}/{quote(name, safe='')}" if name else path
