"""From the objects of a service, as the API server tells them, to what a plan needs; and back to what is applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from endcap.documents import describe_validation
from endcap.errors import StateError
from serving.targets.kserve.cluster import Json
from serving.targets.kserve.errors import Reason, ServiceError
from serving.targets.kserve.names import FENCE_ANNOTATION, SHA256_ANNOTATION, VERSION_LABEL, label_of, workload_name
from serving.targets.kserve.plan import Canary, Predictor, Rest, Spec, Workload
from serving.targets.kserve.routes import OwnRoute

__all__ = [
    "ObjectModel", "PredictorObject", "Record", "Service", "accepted", "body_of", "model_body", "predictor_of",
    "read_record", "read_service", "token_of", "trouble_of", "weights_of", "workload_of", "writers_of",
]  # fmt: skip

_STANDARD = "Standard"
_MODE_ANNOTATION = "serving.kserve.io/deploymentMode"


class ObjectModel(BaseModel):
    """Of another's objects: what we do not need is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Format(ObjectModel):
    name: str
    version: str | None = None


class _ModelSpec(ObjectModel):
    modelFormat: _Format | None = None  # noqa: N815 - as it is in the object
    runtime: str | None = None
    storageUri: str | None = None  # noqa: N815

    @property
    def format(self) -> dict[str, str]:
        """As it is written."""
        return {} if self.modelFormat is None else self.modelFormat.model_dump(exclude_none=True)


class PredictorObject(ObjectModel):
    """``canaryTrafficPercent``: only in Knative mode; in Standard mode KServe ignores it."""

    name: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    minReplicas: int | None = None  # noqa: N815
    maxReplicas: int | None = None  # noqa: N815
    canaryTrafficPercent: int | None = None  # noqa: N815
    model: _ModelSpec | None = None


class _Canary(ObjectModel):
    predictor: PredictorObject
    trafficPercent: int = 0  # noqa: N815


class _Spec(ObjectModel):
    predictor: PredictorObject
    canary: list[_Canary] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Service:
    """An InferenceService in Standard mode. ``token``: the fence; ``ready``: canaries that KServe holds for ready."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    spec: Spec
    model_format: Mapping[str, str]
    ready: frozenset[str] = frozenset()
    token: int = 0
    is_ready: bool = False
    seen_by_kserve: bool = False
    own_route: OwnRoute | None = None
    """KServe makes it no route (it is cluster-local), and endcap does."""
    local: bool = False
    writers: str = ""
    """Who wrote it last, beside us and KServe."""

    @property
    def where(self) -> str:
        return f"inferenceservice {self.namespace}/{self.name}"


def read_service(document: Json | None, *, name: str, namespace: str) -> Service:
    """What a rollout needs of an InferenceService.

    Raises:
        ServiceError: it is not there, not in Standard mode, or its predictor is nothing that a canary can stand beside.
    """
    where = f"inferenceservice {namespace}/{name}"
    if document is None or document.get("metadata", {}).get("deletionTimestamp"):
        raise ServiceError(Reason.NOT_FOUND, "there is no such service", where=where,
                           next_step="create it first: a rollout changes what serves already")  # fmt: skip
    meta, status = document["metadata"], document.get("status") or {}
    annotations = meta.get("annotations") or {}
    mode = annotations.get(_MODE_ANNOTATION) or status.get("deploymentMode") or "unknown"
    if annotations.get(_MODE_ANNOTATION) != _STANDARD:
        raise ServiceError(Reason.NOT_STANDARD, f"its deployment mode is {mode}, and KServe splits traffic only where "
                           f"the annotation {_MODE_ANNOTATION} says {_STANDARD}", where=where,
                           next_step=f"make it anew with that annotation ({_MODE_ANNOTATION} cannot be changed): "
                           f"{_STANDARD}, or Knative where the cluster has Knative")  # fmt: skip
    try:
        spec = _Spec.model_validate(document.get("spec"))
    except ValidationError as error:
        raise ServiceError(Reason.NO_MODEL, describe_validation(error), where=where) from error
    model = spec.predictor.model
    if model is None or model.modelFormat is None or not model.storageUri:
        raise ServiceError(Reason.NO_MODEL, "its predictor has no model with a storageUri", where=where,
                           next_step="serve it through a ServingRuntime: spec.predictor.model with modelFormat "
                           "(name: endcap), runtime and storageUri; containers have no canary")  # fmt: skip
    if not spec.predictor.name:
        raise ServiceError(Reason.NO_MODEL, "its predictor has no name", where=where,
                           next_step="give spec.predictor.name the version that serves, such as v7, and label it "
                           f"{VERSION_LABEL}: \"7\" (its pods restart once)")  # fmt: skip
    statuses = status.get("canaryStatuses") or ()
    ready = {str(one.get("name")) for one in statuses if one.get("ready") is True}
    conditions = {one.get("type"): one.get("status") for one in status.get("conditions") or ()}
    canaries = tuple(Canary(predictor_of(one.predictor), 0 if one.predictor.minReplicas is None
                            else one.predictor.minReplicas, one.trafficPercent) for one in spec.canary)  # fmt: skip
    return Service(
        name=name, namespace=namespace, uid=meta["uid"], resource_version=meta["resourceVersion"],
        spec=Spec(predictor_of(spec.predictor), spec.predictor.minReplicas, spec.predictor.maxReplicas, canaries),
        model_format=model.format,
        ready=frozenset(one.predictor.label for one in canaries if one.predictor.name in ready),
        token=token_of(status),
        is_ready=conditions.get("Ready") == "True",
        seen_by_kserve=bool(status.get("conditions")),
        own_route=_own_route(annotations),
        local=(meta.get("labels") or {}).get("networking.kserve.io/visibility") == "cluster-local",
        writers=writers_of(meta),
    )  # fmt: skip


def predictor_of(one: PredictorObject) -> Predictor:
    model = one.model or _ModelSpec()
    labelled = VERSION_LABEL in one.labels
    return Predictor(label_of(one.name, one.labels), one.name, model.storageUri, model.runtime, labelled=labelled,
                     sha256=one.annotations.get(SHA256_ANNOTATION))  # fmt: skip


def _own_route(annotations: Mapping[str, str]) -> OwnRoute | None:
    gateway, hosts = annotations.get("endcap.dev/gateway", ""), annotations.get("endcap.dev/hostnames", "")
    names = tuple(one.strip() for one in hosts.split(",") if one.strip())
    return OwnRoute(gateway, names) if "/" in gateway and names else None


def token_of(status: Json) -> int:
    """The fence."""
    text = (status.get("annotations") or {}).get(FENCE_ANNOTATION)
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() else 0


def writers_of(meta: Json) -> str:
    """Who wrote the spec, newest first."""
    others = [
        (str(one.get("time", "")), str(one.get("manager", "?"))) for one in meta.get("managedFields") or ()
        if one.get("manager") not in ("endcap", "manager") and not one.get("subresource")
    ]  # fmt: skip
    return ", ".join(f"{manager} at {at}" for at, manager in sorted(others, reverse=True)[:2])


def body_of(service: Service, spec: Spec) -> Json:
    """The fields of ``spec`` that are ours, for a server-side apply that fails when the service has changed since."""
    stable: Json = {
        "name": spec.stable.name,
        "model": model_body(service.model_format, spec.stable),
    }
    if spec.stable.labelled:  # a label that it did not have would restart its pods
        stable["labels"] = {VERSION_LABEL: spec.stable.label}
    if spec.stable.sha256 is not None:
        stable["annotations"] = {SHA256_ANNOTATION: spec.stable.sha256}
    if spec.min_replicas is not None:
        stable["minReplicas"] = spec.min_replicas
    if spec.max_replicas is not None:
        stable["maxReplicas"] = spec.max_replicas
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": service.name, "namespace": service.namespace, "resourceVersion": service.resource_version,
        },
        "spec": {"predictor": stable, "canary": [_canary_body(service, canary) for canary in spec.canaries]},
    }  # fmt: skip


def _canary_body(service: Service, canary: Canary) -> Json:
    one = canary.predictor
    return {
        "predictor": {
            "name": one.name, "labels": {VERSION_LABEL: one.label}, "minReplicas": canary.replicas,
            "annotations": {SHA256_ANNOTATION: one.sha256 or "none"}, "model": model_body(service.model_format, one),
        },
        "trafficPercent": canary.percent,
    }  # fmt: skip


def model_body(model_format: Mapping[str, str], one: Predictor) -> Json:
    body: Json = {"modelFormat": dict(model_format), "storageUri": one.storage_uri}
    return body if one.runtime is None else {**body, "runtime": one.runtime}


def workload_of(document: Json) -> Workload:
    """A Deployment."""
    spec, status = document.get("spec") or {}, document.get("status") or {}
    serving = int(status.get("availableReplicas") or 0)
    newest = int(status.get("observedGeneration") or 0) >= int(document["metadata"].get("generation") or 0)
    updated = min(serving, int(status.get("updatedReplicas") or 0)) if newest else 0
    wanted = spec.get("replicas")
    return Workload(1 if wanted is None else int(wanted), updated, serving)


def accepted(route: Json) -> bool:
    """Whether a gateway has taken up a route's newest form."""
    parents = (route.get("status") or {}).get("parents") or ()
    generation = int(route["metadata"].get("generation") or 0)
    return any(
        one.get("type") == "Accepted" and one.get("status") == "True"
        and int(one.get("observedGeneration") or 0) >= generation
        for parent in parents for one in parent.get("conditions") or ()
    )  # fmt: skip


def weights_of(route: Json, service: str, spec: Spec) -> dict[str, int] | None:
    """What a route of KServe's sends to each version, when the gateway has taken its newest form up; else None.

    Versions that the route names and ``spec`` does not are listed by the name of their Service.
    """
    if not accepted(route):
        return None
    labels = {workload_name(service, one.name): one.label
              for one in (spec.stable, *(canary.predictor for canary in spec.canaries))}  # fmt: skip
    rules = (route.get("spec") or {}).get("rules") or ()
    refs = rules[-1].get("backendRefs") or () if rules else ()
    names = [str(ref["name"]) for ref in refs]
    weights = [100] if len(refs) == 1 else [int(ref.get("weight", 1)) for ref in refs]
    return {labels.get(name, name): weight for name, weight in zip(names, weights, strict=True)}


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    uid: str
    rest: Rest | None = None
    wishes: tuple[Spec, ...] = ()


_KEPT = TypeAdapter(_Kept)


@dataclass(frozen=True, slots=True)
class Record:
    """What the Lease of a service keeps of a rollout under way, for whoever goes on with it.

    ``wishes``: what was applied last, and what was about to be: anything else was written by somebody else.
    """

    uid: str = ""
    rest: Rest | None = None
    wishes: tuple[Spec, ...] = field(default_factory=tuple)

    def to_text(self) -> str:
        return _Kept(uid=self.uid, rest=self.rest, wishes=self.wishes).model_dump_json()


def read_record(text: str | None, *, uid: str, where: str) -> Record:
    """The record of the service ``uid``; one of a service that was deleted since says nothing.

    Raises:
        StateError: it is damaged.
    """
    if not text:
        return Record(uid)
    try:
        kept = _KEPT.validate_json(text)
    except ValidationError as error:
        again = "delete the Lease; the next rollout starts from what the service is then"
        raise StateError(f"damaged: {describe_validation(error)}", where=where, next_step=again) from error
    return Record(uid, kept.rest, kept.wishes) if kept.uid == uid else Record(uid)


def trouble_of(pods: Iterable[Json]) -> tuple[str, int, int | None]:
    """Of pods that are not ready: why, how often one restarted at most, and the exit code of the last one that ended.

    The scheduler's reason before a container's: without a node there is no container.
    """
    reasons: list[str] = []
    restarts, code = 0, None
    for pod in pods:
        status = pod.get("status") or {}
        for one in status.get("conditions") or ():
            if one.get("type") == "PodScheduled" and one.get("status") == "False" and one.get("message"):
                reasons.insert(0, str(one["message"]))
        for one in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
            restarts = max(restarts, int(one.get("restartCount") or 0))
            ended = (one.get("lastState") or {}).get("terminated") or (one.get("state") or {}).get("terminated")
            waiting = (one.get("state") or {}).get("waiting")
            if ended and ended.get("exitCode") not in (None, 0):
                code = int(ended["exitCode"])
                last = str(ended.get("message") or "").strip().splitlines()
                reasons.append(f"its server ended with code {code}" + (f": {last[-1][:300]}" if last else ""))
            elif waiting and waiting.get("reason") not in ("ContainerCreating", "PodInitializing", None):
                said = f": {waiting['message'][:300]}" if waiting.get("message") else ""
                reasons.append(f"{waiting['reason']}{said}")
    return (reasons[0] if reasons else "its pods are not ready"), restarts, code
