"""A Kubernetes with KServe in Knative mode in memory: for tests of what the target writes, in what order.

No Knative has run here. What its controllers and KServe's do is written down from their sources (KServe
``ksvc_reconciler.go`` and ``PropagateStatus``; Knative Serving's configuration, route, labeler and autoscaler): one
step of each between two looks, each on what the others had said before, so nothing follows at once. Where they have a
trap it is here: a revision that is split with itself gives its traffic to the one before it; without
``canaryTrafficPercent`` whatever is ready gets everything; a revision that no split names loses its pods; a change of
the template is a revision, whatever it says; another ``predictor.name`` is another service.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from endcap.evidence import Counts
from serving.targets.base import VersionObservation
from serving.targets.kserve.cluster import path_of
from serving.targets.kserve.names import ISVC_LABEL, VERSION_LABEL
from serving.targets.kserve.telemetry import Counted
from tests.kserve_world import NAMESPACE, SERVICE, Pods, World, service

__all__ = ["KnativeWorld", "ServedCounts", "knative_service"]

Json = dict[str, Any]
KSVCS = f"/apis/serving.knative.dev/v1/namespaces/{NAMESPACE}/services"
_IDLE_S = 60.0
_MIN_SCALE = "autoscaling.knative.dev/min-scale"
_REVISION = "serving.knative.dev/revision"


def knative_service(*, name: str | None = None, mode: str = "Knative", **how: Any) -> Json:
    """An InferenceService that Knative serves."""
    made = service(mode=mode, **how)
    del made["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"]
    del made["spec"]["predictor"]["name"]
    if name is not None:
        made["spec"]["predictor"]["name"] = name
    return made


@dataclass
class KnativeWorld(World):
    """``requests``: by version, good ones and all, since the beginning; ``held``: percents that found no pod, which
    Knative's activator keeps until one is there. ``rate``: requests a second."""

    rate: float = 200.0
    answered: dict[str, float] = field(default_factory=dict)
    requests: dict[str, list[float]] = field(default_factory=dict)
    held: list[tuple[str, float]] = field(default_factory=list)
    refuses_services: bool = False
    """KServe cannot write the Knative service: a webhook of Knative's is away."""
    configuration_lags: bool = False
    """A new split is told of before the new revision that it came with is: KServe takes it for a split of the old one
    with itself (Knative's ``service`` reconciler copies both statuses, each when it is new)."""
    _idle_since: dict[str, float] = field(default_factory=dict)
    _last_s: float | None = None

    def _reconcile(self, service: Json) -> None:
        self._kserve(service)
        for ksvc in [one for key, one in self.objects.items() if key.startswith(KSVCS)]:
            self._route(ksvc)
            self._configure(ksvc)
            self._autoscale(ksvc)

    # ---- KServe ----

    def _kserve(self, service: Json) -> None:
        predictor, status = service["spec"]["predictor"], copy.deepcopy(service.get("status") or {})
        component = status.setdefault("components", {}).setdefault("predictor", {})
        name = f"{SERVICE}-{predictor['name']}-predictor" if predictor.get("name") else f"{SERVICE}-predictor"
        percent, rolled = predictor.get("canaryTrafficPercent"), component.get("latestRolledoutRevision", "")
        traffic: list[Json] = [{"latestRevision": True, "percent": 100}]
        if percent is not None and rolled:
            traffic = [{"latestRevision": True, "percent": percent}]
            if percent < 100:
                traffic.append({"revisionName": rolled, "latestRevision": False, "percent": 100 - percent,
                                "tag": "prev"})  # fmt: skip
        template = {
            "labels": {**(service["metadata"].get("labels") or {}), **(predictor.get("labels") or {}),
                       ISVC_LABEL: SERVICE},
            "annotations": {**service["metadata"]["annotations"], **(predictor.get("annotations") or {}),
                            _MIN_SCALE: str(predictor.get("minReplicas", 1))},
            "model": predictor["model"],
        }  # fmt: skip
        known = self.get(f"{KSVCS}/{name}")
        if self.refuses_services:
            return
        if known is None:
            self.create(KSVCS, {"kind": "Service", "metadata": {"name": name},
                                "spec": {"template": template, "traffic": traffic}})  # fmt: skip
            return
        if known["spec"] != {"template": template, "traffic": traffic}:
            self.replace(f"{KSVCS}/{name}", {**known, "spec": {"template": template, "traffic": traffic}})
        self._propagate(component, known.get("status") or {})  # as it was before that write
        ready = "True" if (known.get("status") or {}).get("ready") else "False"
        routed = "True" if (known.get("status") or {}).get("routed") else "Unknown"
        status["conditions"] = [{"type": "Ready", "status": ready}, {"type": "PredictorRouteReady", "status": routed}]
        status["deploymentMode"] = "Knative"
        path = path_of("inferenceservices", NAMESPACE, SERVICE)
        self.replace(f"{path}/status", {**service, "status": status})

    @staticmethod
    def _propagate(component: Json, said: Json) -> None:
        """KServe's ``PropagateStatus``."""
        component["latestCreatedRevision"] = said.get("created", "")
        of_revision: dict[str, int] = {}
        for one in said.get("traffic") or ():
            of_revision[one["revisionName"]] = of_revision.get(one["revisionName"], 0) + one["percent"]
        for one in said.get("traffic") or ():
            newest = said.get("ready_revision", "")
            if one["revisionName"] != newest or not one.get("latestRevision"):
                continue
            if component.get("latestRolledoutRevision", "") != newest:
                if one["percent"] == 100:
                    component["previousRolledoutRevision"] = component.get("latestRolledoutRevision", "")
                    component["latestRolledoutRevision"] = newest
            elif newest == said.get("created") and one["percent"] < 100 and of_revision[newest] == 100:
                before = component.get("previousRolledoutRevision")
                component["latestRolledoutRevision"] = before or component["latestRolledoutRevision"]
        component["latestReadyRevision"] = said.get("ready_revision", "")
        component["traffic"] = copy.deepcopy(said.get("traffic") or [])

    # ---- Knative ----

    def _revisions(self) -> dict[str, Json]:
        folder = path_of("revisions", NAMESPACE)
        return {key.rpartition("/")[2]: one for key, one in self.objects.items() if key.startswith(f"{folder}/")}

    def _configure(self, ksvc: Json) -> None:
        """Configuration and revisions: a template that is not the newest revision's becomes one."""
        status = ksvc.setdefault("status", {})
        if self.configuration_lags and status.get("created") and status.pop("split_is_new", False):
            return
        revisions = self._revisions()
        mine = sorted(name for name in revisions if name.startswith(f"{ksvc['metadata']['name']}-0"))
        template = ksvc["spec"]["template"]
        if not mine or revisions[mine[-1]]["spec"] != template:
            name = f"{ksvc['metadata']['name']}-{len(mine) + 1:05d}"
            labels = {**template["labels"], _REVISION: name}
            self.create(path_of("revisions", NAMESPACE), {
                "kind": "Revision", "spec": copy.deepcopy(template),
                "metadata": {"name": name, "labels": labels, "annotations": template["annotations"]},
                "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]},
            })  # fmt: skip
            self.create(path_of("deployments", NAMESPACE), {
                "kind": "Deployment", "metadata": {"name": f"{name}-deployment", "labels": labels},
                "spec": {"replicas": max(1, int(template["annotations"][_MIN_SCALE])),
                         "template": {"metadata": {"labels": labels, "annotations": template["annotations"]}}},
            })  # fmt: skip
            mine.append(name)
        status["created"] = mine[-1]
        for name in mine:
            self._look_at(self.objects[path_of("revisions", NAMESPACE, name)])
        known = status.get("ready_revision", "")
        later = [name for name in mine if name >= known and _is_ready(self._revisions()[name])]
        status["ready_revision"] = later[-1] if later else known
        status["ready"] = _is_ready(self._revisions()[mine[-1]]) and bool(status.get("routed"))

    def _look_at(self, revision: Json) -> None:
        deployment = self._deployment(f"{revision['metadata']['name']}-deployment")
        assert deployment is not None
        how = self.versions.get(revision["metadata"]["labels"].get(VERSION_LABEL, ""), Pods())
        least = max(1, int(revision["spec"]["annotations"][_MIN_SCALE]))
        available = (deployment.get("status") or {}).get("availableReplicas", 0)
        conditions = revision["status"]["conditions"]
        pods = self._pods.get(deployment["metadata"]["name"]) or []
        if how.exit_code is not None and pods and self.now_s - pods[0] > 2:
            said = {"status": "False", "reason": f"ExitCode{how.exit_code}",
                    "message": f"Container failed with: {how.message}"}  # fmt: skip
            conditions = [{"type": "Ready", **said}, {"type": "ContainerHealthy", **said}]
        elif how.unschedulable and not _is_ready(revision):
            conditions = [{"type": "Ready", "status": "False", "reason": "Unschedulable",
                           "message": how.unschedulable}]  # fmt: skip
        elif available >= least:
            conditions = [{"type": "Ready", "status": "True"}]
        revision["status"]["conditions"] = conditions

    def _route(self, ksvc: Json) -> None:
        """The split, resolved; the routes are set up a step later, while the gateway runs."""
        status = ksvc.setdefault("status", {})
        if not status.get("ready_revision"):
            return
        resolved = [{**one, "revisionName": one.get("revisionName") or status["ready_revision"]}
                    for one in ksvc["spec"]["traffic"]]  # fmt: skip
        if status.get("traffic") != resolved:
            status["traffic"], status["routed"], status["split_is_new"] = resolved, False, True
        elif self.gateway_runs:
            status["routed"] = True
            status["in_force"] = resolved

    def _autoscale(self, ksvc: Json) -> None:
        """Revisions that the split names keep ``min-scale`` pods; others lose theirs after a while without requests."""
        status = ksvc["status"]
        named = {one["revisionName"] for one in [*status.get("traffic", ()), *status.get("in_force", ())]}
        named |= {one["revisionName"] for one in ksvc["spec"]["traffic"] if one.get("revisionName")}
        named.add(status["created"])
        receiving = {one["revisionName"] for one in status.get("in_force", ()) if one["percent"] > 0}
        for name, revision in self._revisions().items():
            deployment = self._deployment(f"{name}-deployment")
            assert deployment is not None
            least = int(revision["spec"]["annotations"][_MIN_SCALE])
            wanted = max(least if name in named else 0, 1 if name in receiving else 0,
                         max(1, least) if name == status["created"] and not _is_ready(revision) else 0)  # fmt: skip
            if wanted >= deployment["spec"]["replicas"]:
                self._idle_since.pop(name, None)
                deployment["spec"]["replicas"] = wanted
            elif self.now_s - self._idle_since.setdefault(name, self.now_s) > _IDLE_S:
                deployment["spec"]["replicas"] = wanted

    # ---- who receives what ----

    def _look(self) -> None:
        passed_s = 0.0 if self._last_s is None else self.now_s - self._last_s
        self._last_s = self.now_s
        for ksvc in [one for key, one in self.objects.items() if key.startswith(KSVCS)]:
            received: dict[str, float] = {}
            for one in (ksvc.get("status") or {}).get("in_force", ()):
                if one["percent"] == 0:
                    continue
                version = self._revisions()[one["revisionName"]]["metadata"]["labels"][VERSION_LABEL]
                received[version] = received.get(version, 0.0) + one["percent"] / 100
                deployment = self._deployment(f"{one['revisionName']}-deployment")
                if deployment is None or not (deployment.get("status") or {}).get("availableReplicas"):
                    self.held.append((version, one["percent"] / 100))
                    continue
                counts = self.requests.setdefault(version, [0.0, 0.0])
                asked = self.rate * passed_s * one["percent"] / 100
                counts[0] += asked * self.answered.get(version, 1.0)
                counts[1] += asked
            if received:
                self.served.append(received)


class ServedCounts:
    """What the world's servers counted, as telemetry tells it: the same to every process that asks."""

    def __init__(self, world: KnativeWorld) -> None:
        self._world = world

    def read(self, pods: Sequence[Json]) -> None: ...

    def observe(self, pods: Sequence[Json], *, shoppers_since_s: float | None = None) -> Counted:
        versions = {}
        for version, (good, total) in self._world.requests.items():
            counts = Counts(int(good), int(total))
            versions[version] = VersionObservation(attempts=counts, first_attempts=counts, requests=counts)
        outcomes = sum((one.requests for one in versions.values()), Counts())
        return Counted(versions, outcomes)


def _is_ready(revision: Json) -> bool:
    return any(one["type"] == "Ready" and one["status"] == "True" for one in revision["status"]["conditions"])


def template_of(world: KnativeWorld, revision: str) -> str:
    """A revision's template as text, to compare it by."""
    return json.dumps(world.objects[path_of("revisions", NAMESPACE, revision)]["spec"], sort_keys=True)
