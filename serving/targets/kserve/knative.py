"""What an InferenceService in Knative mode says, and has to say next: one predictor, and its revisions. Pure.

There is no second predictor here: a new version's model is written into the predictor, which makes a revision, and
``canaryTrafficPercent`` says how much of the traffic the newest revision gets; the last one that had all of it keeps
the rest. In Standard mode KServe ignores that field without a word, so it is never written there. What is reckoned with
(KServe's ``ksvc_reconciler.go`` and ``PropagateStatus``; Knative's revisions):

- without the field, or before any revision has had all the traffic, the newest one that is ready gets all of it; so a
  rollout begins only from a revision that has it, and the model and ``canaryTrafficPercent: 0`` are one write;
- what is *rolled out* changes when the newest revision has 100 %, and changes back when it then gets less;
- any change of the predictor's template is a revision, also one of ``minReplicas``, which is therefore left alone; the
  same model as an older revision's is a new revision all the same, unless the newest one has it;
- a revision that is ready has had as many pods as ``minReplicas``, and keeps them while the traffic's split names it,
  with 0 % too; one that the split does not name loses them, also stable's when the other has 100 %;
- ``predictor.name`` is the Knative service's: another name is another service, so it is never changed.

A rollout is told in the same words as in Standard mode (:class:`~serving.targets.kserve.plan.Spec`): stable, and the
newest revision's version as its canary. Where the canary is stable's own version, that is the way back's last part: a
new revision of stable's model, without traffic yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pydantic import Field, ValidationError

from endcap.documents import describe_validation
from endcap.errors import TargetError
from serving.targets.kserve.cluster import Json
from serving.targets.kserve.errors import Reason, ServiceError
from serving.targets.kserve.names import SHA256_ANNOTATION, VERSION_LABEL
from serving.targets.kserve.plan import Canary, Predictor, Spec
from serving.targets.kserve.reading import (
    ObjectModel,
    PredictorObject,
    model_body,
    predictor_of,
    token_of,
    writers_of,
)

__all__ = [
    "KNATIVE_MODES", "RevisedService", "Revision", "body_of", "forward", "is_rolled_out", "mode_of", "promote",
    "read_revised", "returned", "revisions_of", "share_out", "withdrawn",
]  # fmt: skip

KNATIVE_MODES = ("Knative", "Serverless")
_MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
_MIN_SCALE = "autoscaling.knative.dev/min-scale"
_EXIT = re.compile(r"ExitCode(\d+)")


class _Target(ObjectModel):
    revisionName: str = ""  # noqa: N815
    percent: int | None = None


class _Component(ObjectModel):
    latestCreatedRevision: str = ""  # noqa: N815
    latestReadyRevision: str = ""  # noqa: N815
    latestRolledoutRevision: str = ""  # noqa: N815
    traffic: list[_Target] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision of Knative's. ``version``: by its label; ``least``: pods it has at least while the split names it;
    ``reason``: why it is not ready, "" where that is not said; ``exit_code``: of the container that ended, where one
    did."""

    version: str
    least: int | None = None
    reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class RevisedService:
    """An InferenceService in Knative mode. ``least``: pods that each revision of the split has at least.

    ``created``, ``ready``, ``rolled_out``: the newest revision, the newest one that is ready, and the last one that
    had all the traffic, by Knative's names. ``traffic``: percents by revision, as Knative has set them; None while it
    has not set up its routes.
    """

    uid: str
    resource_version: str
    spec: Spec
    model_format: Mapping[str, str]
    name: str
    namespace: str
    least: int = 1
    created: str = ""
    ready: str = ""
    rolled_out: str = ""
    traffic: Mapping[str, int] | None = None
    token: int = 0
    writers: str = ""


def mode_of(document: Json | None) -> str:
    """How KServe serves it: what it says itself, or else what it is asked to. "" where nobody says."""
    if document is None:
        return ""
    annotations = (document.get("metadata") or {}).get("annotations") or {}
    return str((document.get("status") or {}).get("deploymentMode") or annotations.get(_MODE_ANNOTATION) or "")


def read_revised(document: Json | None, *, name: str, namespace: str, stable: Predictor | None) -> RevisedService:
    """What a rollout needs of an InferenceService.

    ``stable``: what a rollout under way began from, as its record says: the object itself no longer does.

    Raises:
        ServiceError: it is not there, in another mode, its predictor has no model or version, or its traffic is split
            by somebody else.
    """
    where = f"inferenceservice {namespace}/{name}"
    if document is None or document.get("metadata", {}).get("deletionTimestamp"):
        raise ServiceError(Reason.NOT_FOUND, "there is no such service", where=where,
                           next_step="create it first: a rollout changes what serves already")  # fmt: skip
    if (mode := mode_of(document)) not in KNATIVE_MODES:
        raise ServiceError(Reason.NOT_STANDARD, f"it was served by Knative, and its mode is {mode or 'unknown'} now",
                           where=where, next_step="start another rollout")  # fmt: skip
    meta, status = document["metadata"], document.get("status") or {}
    try:
        predictor = PredictorObject.model_validate((document.get("spec") or {}).get("predictor"))
        component = _Component.model_validate((status.get("components") or {}).get("predictor") or {})
    except ValidationError as error:
        raise ServiceError(Reason.NO_MODEL, describe_validation(error), where=where) from error
    model = predictor.model
    if model is None or model.modelFormat is None or not model.storageUri:
        raise ServiceError(Reason.NO_MODEL, "its predictor has no model with a storageUri", where=where,
                           next_step="serve it through a ServingRuntime: spec.predictor.model with modelFormat "
                           "(name: endcap), runtime and storageUri")  # fmt: skip
    if VERSION_LABEL not in predictor.labels:
        raise ServiceError(Reason.NO_MODEL, "its predictor does not say which version it is", where=where,
                           next_step=f"label it: spec.predictor.labels, {VERSION_LABEL}: \"7\" (which makes a "
                           "revision)")  # fmt: skip
    newest = predictor_of(predictor)
    percent = predictor.canaryTrafficPercent
    if percent is None or (percent == 100 and stable is None):
        spec = Spec(newest)
    elif stable is None:
        raise ServiceError(Reason.SPLIT, f"its canaryTrafficPercent is {percent}, and no rollout of endcap's wrote it",
                           where=where, next_step="end that split: remove spec.predictor.canaryTrafficPercent once "
                           "the predictor is what all shoppers are to get")  # fmt: skip
    else:
        spec = Spec(stable, canaries=(Canary(newest, 0, percent),))
    conditions = {one.get("type"): one.get("status") for one in status.get("conditions") or ()}
    traffic: dict[str, int] = {}
    for one in component.traffic:
        traffic[one.revisionName] = traffic.get(one.revisionName, 0) + (one.percent or 0)
    return RevisedService(
        uid=meta["uid"], resource_version=meta["resourceVersion"], spec=spec, name=name, namespace=namespace,
        model_format=model.format,
        least=1 if predictor.minReplicas is None else predictor.minReplicas,
        created=component.latestCreatedRevision, ready=component.latestReadyRevision,
        rolled_out=component.latestRolledoutRevision,
        traffic=traffic if conditions.get("PredictorRouteReady") == "True" else None,
        token=token_of(status), writers=writers_of(meta),
    )  # fmt: skip


def revisions_of(documents: Iterable[Json]) -> dict[str, Revision]:
    """Knative's revisions by their names."""
    found = {}
    for one in documents:
        reason, code = "", None
        for condition in (one.get("status") or {}).get("conditions") or ():
            if condition.get("status") != "False" or condition.get("type") not in ("Ready", "ContainerHealthy"):
                continue
            reason = reason or str(condition.get("message") or condition.get("reason") or "").strip()[:600]
            exited = _EXIT.fullmatch(str(condition.get("reason") or ""))
            code = int(exited[1]) if exited else code
        version = (one["metadata"].get("labels") or {}).get(VERSION_LABEL, "")
        least = str((one["metadata"].get("annotations") or {}).get(_MIN_SCALE, ""))
        found[str(one["metadata"]["name"])] = Revision(
            version, int(least) if least.isascii() and least.isdigit() else None, reason, code
        )
    return found


# ---- plans ----


def is_rolled_out(service: RevisedService) -> bool:
    """The newest revision is ready, and was the last to have all the traffic."""
    return service.created == service.ready == service.rolled_out != ""


def forward(service: RevisedService, candidate: Predictor) -> Spec:
    """The candidate's model as a revision without traffic: capacity first.

    Raises:
        TargetError: another version has a share, or stable's newest revision does not have all the traffic yet.
    """
    spec = service.spec
    for canary in spec.canaries:
        if canary.predictor == candidate:
            return spec
        if canary.percent > 0:
            raise TargetError(f"version {canary.predictor.label} is on its way already",
                              next_step="end its rollout first")  # fmt: skip
    if not spec.canaries and not is_rolled_out(service):
        raise TargetError(f"version {spec.stable.label} is not rolled out yet: revision {service.created or '(none)'} "
                          f"is the newest, {service.ready or 'none'} ready, and {service.rolled_out or 'none'} was the "
                          "last to have all the traffic", next_step="wait until the service is ready")  # fmt: skip
    return replace(spec, canaries=(Canary(candidate, 0, 0),))


def share_out(spec: Spec, given: Mapping[str, int]) -> Spec:
    """``canaryTrafficPercent`` for these percents.

    Raises:
        TargetError: the predictor is not the version that is to get a share.
    """
    others = [label for label, percent in given.items() if percent > 0 and label != spec.stable.label]
    if others and (not spec.canaries or others != [spec.canaries[0].predictor.label]):
        raise TargetError(f"version {', '.join(others)} is no revision of this service",
                          next_step="ensure its capacity first")  # fmt: skip
    if not spec.canaries or spec.canaries[0].predictor.label == spec.stable.label:
        return spec
    canary = spec.canaries[0]
    return replace(spec, canaries=(replace(canary, percent=given.get(canary.predictor.label, 0)),))


def returned(spec: Spec) -> Spec:
    """Where canary has all the traffic: one percent back to stable, whose pods Knative took away. Else as it is."""
    if not spec.canaries or spec.canaries[0].percent < 100:
        return spec
    return replace(spec, canaries=(replace(spec.canaries[0], percent=99),))


def promote(spec: Spec) -> Spec:
    """The canary that has all the traffic is stable from now on: no revision is made, and no pod starts again.

    Raises:
        TargetError: it has not all of it.
    """
    if not spec.canaries or spec.canaries[0].percent < 100:
        raise TargetError(f"version {spec.stable.label} still has a share", next_step="give its share to another first")
    return Spec(spec.canaries[0].predictor)


def withdrawn(spec: Spec) -> Spec:
    """Stable's model in the canary's place, without traffic: the first half of taking a canary away.

    Raises:
        TargetError: it has a share.
    """
    if not spec.canaries or spec.canaries[0].predictor == spec.stable:
        return spec
    canary = spec.canaries[0]
    if canary.percent > 0:
        raise TargetError(f"version {canary.predictor.label} still has a share",
                          next_step="give its share to another first")  # fmt: skip
    return replace(spec, canaries=(Canary(spec.stable, 0, 0),))


def body_of(service: RevisedService, wish: Spec) -> Json:
    """The fields that are ours in Knative mode, for a server-side apply that fails when the service has changed."""
    newest = wish.canaries[0].predictor if wish.canaries else wish.stable
    predictor: Json = {"labels": {VERSION_LABEL: newest.label}, "model": model_body(service.model_format, newest)}
    if newest.sha256 is not None:
        predictor["annotations"] = {SHA256_ANNOTATION: newest.sha256}
    if wish.canaries:
        predictor["canaryTrafficPercent"] = wish.canaries[0].percent
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": service.name, "namespace": service.namespace,
                     "resourceVersion": service.resource_version},
        "spec": {"predictor": predictor},
    }  # fmt: skip
