"""Stand-in for KServe's controller: looks at the InferenceServices of a namespace where something changed, one step of
one at a time.

The order inside of a step is the real one's, and so are its gaps: canaries first, then orphans are deleted (a
Deployment and its Service, not its autoscaler) while the route still names them, then stable, then the route, the
status last. A step that fails is done again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from endcap.errors import EndcapError
from serving.targets.kserve.cluster import Cluster, path_of
from serving.targets.kserve.errors import ConflictError
from tests.cluster.kserve_standin import objects, storage
from tests.cluster.kserve_standin.changes import Changes

Json = dict[str, Any]
log = logging.getLogger("kserve.standin")

_ALL = "/apis/serving.kserve.io/v1beta1/inferenceservices"
WATCHED = (_ALL, "/apis/apps/v1/deployments", "/api/v1/services", "/apis/autoscaling/v2/horizontalpodautoscalers",
           "/apis/gateway.networking.k8s.io/v1/httproutes")  # fmt: skip
_TOGETHER_S = 0.1
"""Changes within it are looked at together."""
_EVERY_S = 3.0
"""All is looked at, changed or not: of what is not watched (runtimes, Secrets), and after a failure."""


class StandIn:
    """Runs in a thread between :meth:`start` and :meth:`stop`.

    ``splits``: False makes it KServe 0.20, whose canaries get pods and no traffic. ``routes``: False is
    ``enableGatewayApi: false``. ``settings``: how models are brought.
    """

    def __init__(self, cluster: Cluster, *, gateway: str, domain: str = "example.com", splits: bool = True,
                 routes: bool = True, settings: storage.Settings | None = None) -> None:  # fmt: skip
        self._cluster, self._gateway, self._domain = cluster, gateway, domain
        self.splits, self.routes, self._settings = splits, routes, settings or storage.Settings()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kserve-standin", daemon=True)

    def install(self) -> None:
        """CRDs and refusals. Safe to repeat."""
        from tests.cluster.kserve_standin.schemas import crds, refusals  # the SDK takes seconds to import

        for one in crds():
            self._put("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", one)
        for one in refusals():
            of_policy = one["kind"].endswith("Policy")
            plural = "validatingadmissionpolicies" if of_policy else "validatingadmissionpolicybindings"
            self._put(f"/apis/admissionregistration.k8s.io/v1/{plural}", one)

    def _put(self, path: str, one: Json) -> None:
        self._cluster.apply(f"{path}/{one['metadata']['name']}", one)

    def start(self, changes: Changes) -> None:
        """``changes``: of :data:`WATCHED`; it is started and stopped with this."""
        self._changes = changes
        changes.start()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._changes.stop()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        looked_s = 0.0
        while not self._stopping.is_set():
            changed = self._changes.take(wait_s=_EVERY_S)
            if self._stopping.wait(_TOGETHER_S):
                return
            changed |= self._changes.take(wait_s=0)
            if everything := time.monotonic() - looked_s >= _EVERY_S:
                looked_s = time.monotonic()
            try:
                services = self._cluster.items(_ALL) or []
            except EndcapError as error:
                log.warning("%s", error)
                continue
            for service in services:
                if everything or service["metadata"]["namespace"] in changed:
                    self._look(service)

    def _look(self, service: Json) -> None:
        meta = service["metadata"]
        try:
            self.step(service)
        except ConflictError:
            self._changes.note(meta["namespace"])  # again, on what is there then
        except (EndcapError, KeyError, StopIteration) as error:
            log.warning("%s: %r", meta["name"], error)

    def step(self, service: Json) -> None:
        """One reconciliation."""
        meta, spec = service["metadata"], service["spec"]
        if meta.get("deletionTimestamp") or (meta.get("annotations") or {}).get(
            "serving.kserve.io/deploymentMode"
        ) not in ("Standard", "RawDeployment"):
            return
        status: Json = dict(service.get("status") or {})
        canaries = spec.get("canary") or []
        for canary in canaries:
            count = objects.canary_replicas(spec, canary)
            predictor = objects.merged(spec["predictor"], canary["predictor"])
            for gone in ("maxReplicas", "scaleTarget", "scaleMetric", "autoScaling"):
                predictor.pop(gone, None)
            self._place(service, predictor, count, 0)
        ready = {one["predictor"]["name"]: self._available(meta, one["predictor"]["name"]) for one in canaries}
        if canaries:
            status["canaryStatuses"] = [
                {"name": one["predictor"]["name"], "ready": ready[one["predictor"]["name"]],
                 "trafficPercent": one["trafficPercent"]} for one in canaries
            ]  # fmt: skip
        else:
            status.pop("canaryStatuses", None)
        self._remove_orphans(service)
        stable = spec["predictor"]
        self._place(service, stable, objects.stable_replicas(spec, ready), int(stable.get("maxReplicas") or 0))
        conditions = {one["type"]: one for one in status.get("conditions") or ()}
        self._condition(conditions, "PredictorReady", self._is_up(meta, stable.get("name", "")))
        if canaries:
            self._condition(conditions, "CanaryPredictorReady", all(ready.values()))
        else:
            conditions.pop("CanaryPredictorReady", None)
        internal = (meta.get("labels") or {}).get("networking.kserve.io/visibility") == "cluster-local"
        routed = True
        if self.routes and not internal:
            routed = self._route(service, ready) if conditions["PredictorReady"]["status"] == "True" else False
        self._condition(conditions, "IngressReady", routed)
        ok = all(conditions[kind]["status"] == "True" for kind in ("PredictorReady", "IngressReady"))
        self._condition(conditions, "Ready", ok)
        status["conditions"] = sorted(conditions.values(), key=lambda one: str(one["type"]))
        status["deploymentMode"] = "Standard"
        if ok:
            status["url"] = f"http://{meta['name']}-{meta['namespace']}.{self._domain}"
        if status != (service.get("status") or {}):
            self._cluster.replace(f"{path_of('inferenceservices', meta['namespace'], meta['name'])}/status",
                                  {**service, "status": status})  # fmt: skip

    def _place(self, service: Json, predictor: Json, least: int | None, most: int) -> None:
        """Service, Deployment and autoscaler, in this order."""
        runtime = self._runtime(service["metadata"]["namespace"], predictor["model"])
        self._ensure("services", objects.service_of(service, predictor, runtime), ("selector", "ports"))
        made = objects.deployment(service, predictor, runtime, least)
        uri = predictor["model"].get("storageUri", "")
        self._bring(made["spec"]["template"], service["metadata"]["namespace"], uri)
        self._ensure("deployments", made, ("template", "replicas"))
        scaler = objects.autoscaler(service, predictor, runtime, least, most)
        if scaler is not None:
            self._ensure("horizontalpodautoscalers", scaler, ("minReplicas", "maxReplicas"))

    def _bring(self, template: Json, namespace: str, uri: str) -> None:
        """What KServe's webhook does to the pods."""
        if not uri:
            return
        known = self._cluster.items("/apis/serving.kserve.io/v1alpha1/clusterstoragecontainers") or []
        container = storage.container_for(uri, known)
        if (why := storage.refusal(uri, container)) is not None:
            raise EndcapError(why)
        account = template["spec"].get("serviceAccountName") or "default"
        names = [template["metadata"]["annotations"].get(storage.SECRET_ANNOTATION)]
        if names == [None]:
            found = self._cluster.get(f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}") or {}
            names = [one["name"] for one in found.get("secrets") or ()]
        secrets = [self._cluster.get(f"/api/v1/namespaces/{namespace}/secrets/{name}") for name in names]
        storage.inject(template["spec"], uri, container, [one for one in secrets if one], self._settings)

    def _ensure(self, kind: str, wanted: Json, fields: tuple[str, ...]) -> None:
        namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
        found = self._cluster.get(path_of(kind, namespace, name))
        if found is None:
            self._cluster.create(path_of(kind, namespace), wanted)
            return
        if all(_says(wanted["spec"][one], found["spec"].get(one)) for one in fields if one in wanted["spec"]):
            return
        spec = {**found["spec"], **{one: wanted["spec"][one] for one in fields if one in wanted["spec"]}}
        self._cluster.replace(path_of(kind, namespace, name), {**found, "spec": spec})

    def _runtime(self, namespace: str, model: Json) -> Json:
        """The one that is named, or the first whose format it is."""
        places = [f"/apis/serving.kserve.io/v1alpha1/namespaces/{namespace}/servingruntimes",
                  "/apis/serving.kserve.io/v1alpha1/clusterservingruntimes"]  # fmt: skip
        for place in places:
            for one in self._cluster.items(place) or []:
                formats = [known["name"] for known in one["spec"].get("supportedModelFormats") or ()]
                if model.get("runtime") in (None, one["metadata"]["name"]) and model["modelFormat"]["name"] in formats:
                    return dict(one["spec"])
        raise EndcapError(f"no runtime {model.get('runtime')} for {model['modelFormat']['name']}")

    def _available(self, meta: Json, predictor: str) -> bool:
        found = self._cluster.get(
            path_of("deployments", meta["namespace"], objects.workload_name(meta["name"], predictor))
        )
        return bool(found and (found.get("status") or {}).get("availableReplicas"))

    def _is_up(self, meta: Json, predictor: str) -> bool:
        found = self._cluster.get(
            path_of("deployments", meta["namespace"], objects.workload_name(meta["name"], predictor))
        )
        conditions = {one["type"]: one["status"] for one in ((found or {}).get("status") or {}).get("conditions") or ()}
        return conditions.get("Available") == "True"

    def _remove_orphans(self, service: Json) -> None:
        meta, spec = service["metadata"], service["spec"]
        predictors = [spec["predictor"], *(canary["predictor"] for canary in spec.get("canary") or ())]
        kept = {objects.workload_name(meta["name"], one.get("name", "")) for one in predictors}
        for kind in ("deployments", "services"):
            mine = {objects.ISVC_LABEL: meta["name"], "component": "predictor"}
            for one in self._cluster.items(path_of(kind, meta["namespace"]), labels=mine) or []:
                if one["metadata"]["name"] not in kept:
                    self._cluster.delete(path_of(kind, meta["namespace"], one["metadata"]["name"]))

    def _route(self, service: Json, ready: Mapping[str, bool]) -> bool:
        """Whether the gateway has taken both routes up."""
        shown = service if self.splits else {**service, "spec": {**service["spec"], "canary": []}}
        taken = True
        for wanted in objects.routes(shown, ready, self._gateway, self._domain):
            namespace, name = wanted["metadata"]["namespace"], wanted["metadata"]["name"]
            found = self._cluster.get(path_of("httproutes", namespace, name))
            if found is None:
                self._cluster.create(path_of("httproutes", namespace), wanted)
            elif not _says(wanted["spec"], found["spec"]):
                wanted["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
                self._cluster.replace(path_of("httproutes", namespace, name), wanted)  # what others put in it is gone
            parents = ((found or {}).get("status") or {}).get("parents") or ()
            said = [one for parent in parents for one in parent.get("conditions") or ()]
            taken = taken and bool(said) and all(one["status"] != "False" for one in said)
        return taken

    @staticmethod
    def _condition(conditions: dict[str, Json], kind: str, holds: bool) -> None:
        status = "True" if holds else "False"
        if conditions.get(kind, {}).get("status") != status:
            conditions[kind] = {"type": kind, "status": status}


def _says(wanted: Any, found: Any) -> bool:
    """Whether ``found`` says all that ``wanted`` does; defaults that were added do not matter."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_says(value, found.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(found, list) and len(wanted) == len(found) and all(map(_says, wanted, found))
    return bool(wanted == found) or (not wanted and found is None)
