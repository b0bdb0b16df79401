"""Knative mode, chosen by the annotation ``endcap.dev/mode: knative``: one predictor, and Knative's revisions of it.

There is no second predictor here: the new version's model is written into the predictor, and
``canaryTrafficPercent`` says how much of the traffic its newest revision gets; the last one that was rolled out keeps
the rest. In Standard mode KServe ignores that field without a word, so it is never written there. What follows from
it: two versions at most (no baseline, no shadow), whole percents, and a way back that writes the old model again and
waits for its revision. Knative's own autoscaler gives both revisions their pods.

What is tested are the objects; no test here has run on a Knative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from endcap.errors import InputError, TargetError
from serving.targets.kserve.cluster import Json
from serving.targets.kserve.errors import Reason, ServiceError
from serving.targets.kserve.names import VERSION_LABEL, label_of
from serving.targets.kserve.plan import Predictor, percents

__all__ = ["MODE_ANNOTATION", "Revisions", "body_of", "forward", "promote", "read_revisions", "roll_back", "share_out"]

MODE_ANNOTATION = "endcap.dev/mode"
_MODES = ("Knative", "Serverless")


@dataclass(frozen=True, slots=True)
class Revisions:
    """``newest``: what the predictor says. ``percent``: of its newest revision; None: all of the traffic.

    ``rolled_out``: the revision that has the rest, by Knative's name; ``ready``: the newest one has pods that are.
    """

    newest: Predictor
    percent: int | None
    rolled_out: str | None = None
    latest_created: str | None = None
    latest_ready: str | None = None
    traffic: Mapping[str, int] | None = None
    """What each revision is sent, as Knative says."""

    @property
    def ready(self) -> bool:
        return self.latest_created is not None and self.latest_created == self.latest_ready


def read_revisions(document: Json) -> Revisions:
    """An InferenceService in Knative mode.

    Raises:
        ServiceError: it is in another mode, or its predictor has no model.
    """
    meta, spec, status = document["metadata"], document["spec"]["predictor"], document.get("status") or {}
    where = f"inferenceservice {meta.get('namespace')}/{meta['name']}"
    mode = status.get("deploymentMode") or (meta.get("annotations") or {}).get("serving.kserve.io/deploymentMode")
    if mode not in _MODES:
        raise ServiceError(Reason.NOT_STANDARD, f"it is annotated with {MODE_ANNOTATION}: knative, and KServe serves "
                           f"it in mode {mode}", where=where, next_step="remove the annotation: in Standard mode "
                           "KServe ignores canaryTrafficPercent without a word")  # fmt: skip
    model = spec.get("model") or {}
    if not model.get("storageUri"):
        raise ServiceError(Reason.NO_MODEL, "its predictor has no model with a storageUri", where=where)
    labels = spec.get("labels") or {}
    component = (status.get("components") or {}).get("predictor") or {}
    traffic = {one["revisionName"]: int(one.get("percent") or 0) for one in component.get("traffic") or ()
               if one.get("revisionName")}  # fmt: skip
    return Revisions(
        Predictor(label_of(spec.get("name", ""), labels), spec.get("name", ""), model["storageUri"],
                  model.get("runtime"), labelled=VERSION_LABEL in labels),
        spec.get("canaryTrafficPercent"), component.get("latestRolledoutRevision"),
        component.get("latestCreatedRevision"), component.get("latestReadyRevision"), traffic,
    )  # fmt: skip


def forward(there: Revisions, candidate: Predictor) -> Revisions:
    """The candidate's model as a revision without traffic: capacity first.

    Raises:
        TargetError: another version is on its way already.
    """
    if there.newest.label == candidate.label:
        return there
    if there.percent is not None:
        raise TargetError(f"version {there.newest.label} is on its way already",
                          next_step="end its rollout first")  # fmt: skip
    return Revisions(candidate, 0)


def share_out(there: Revisions, shares: Mapping[str, float], *, stable: str) -> Revisions:
    """``canaryTrafficPercent`` for these shares.

    Raises:
        InputError: more than two versions, or no whole percents.
        TargetError: the newest revision is not the candidate's, or not ready: Knative would wait, and stable serve.
    """
    given = percents(shares, stable)
    others = [label for label, percent in given.items() if label != stable and percent > 0]
    if len(others) > 1:
        raise InputError("Knative splits traffic between two revisions", where=", ".join(others),
                         next_step="leave the baseline out")  # fmt: skip
    if not others:
        return Revisions(there.newest, 0) if there.newest.label != stable else Revisions(there.newest, None)
    if there.newest.label != others[0] or not there.ready:
        raise TargetError(f"version {others[0]} has no ready revision", next_step="ensure its capacity first")
    return Revisions(there.newest, given[others[0]])


def promote(there: Revisions) -> Revisions:
    """The newest revision is the one that is rolled out. Only once it has all the traffic.

    Raises:
        TargetError: it has not.
    """
    if there.percent not in (None, 100):
        raise TargetError("the old version still has a share", next_step="give its share to another first")
    return Revisions(there.newest, None)


def roll_back(there: Revisions, stable: Predictor) -> Revisions:
    """Stable's model again. Its traffic has to be back first: the newest revision has none.

    Raises:
        TargetError: it has some.
    """
    if there.newest.label == stable.label:
        return Revisions(stable, None)
    if there.percent != 0:
        raise TargetError(f"version {there.newest.label} still has a share",
                          next_step="give its share to another first")  # fmt: skip
    return Revisions(stable, 0)


def body_of(meta: Json, wish: Revisions) -> Json:
    """The fields that are ours in Knative mode, for a server-side apply."""
    model: Json = {"storageUri": wish.newest.storage_uri}
    if wish.newest.runtime is not None:
        model["runtime"] = wish.newest.runtime
    predictor: Json = {"labels": {VERSION_LABEL: wish.newest.label}, "model": model}
    if wish.percent is not None:
        predictor["canaryTrafficPercent"] = wish.percent
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": meta["name"], "namespace": meta["namespace"], "resourceVersion": meta["resourceVersion"]},
        "spec": {"predictor": predictor},
    }  # fmt: skip
