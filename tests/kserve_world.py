"""A Kubernetes with KServe in memory, on a clock of its own: for tests of what the KServe target does, in what order.

Objects and their resource versions are kept as an API server keeps them; the InferenceServices are the stand-in
controller's (``tests/cluster/kserve_standin``); Deployments, autoscalers and the gateway are modelled here. Time passes
only when somebody waits. The same target runs on real ones in ``tests/cluster``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from endcap.errors import TargetError
from serving.targets.kserve.errors import ConflictError, RefusedError
from serving.targets.kserve.waits import Patience
from tests.cluster.kserve_standin.controller import StandIn

Json = dict[str, Any]
NAMESPACE, SERVICE = "shop", "recommender"
RUNTIME = {
    "apiVersion": "serving.kserve.io/v1alpha1", "kind": "ServingRuntime", "metadata": {"name": "endcap-cpu"},
    "spec": {"supportedModelFormats": [{"name": "endcap"}],
             "containers": [{"name": "kserve-container", "image": "endcap/server",
                             "ports": [{"name": "http1", "containerPort": 8080}]}]},
}  # fmt: skip

MLFLOW = {
    "apiVersion": "serving.kserve.io/v1alpha1", "kind": "ClusterStorageContainer",
    "metadata": {"name": "endcap-mlflow"},
    "spec": {"supportedUriFormats": [{"prefix": "mlflow://"}],
             "container": {"name": "storage-initializer", "image": "endcap/controller"}},
}  # fmt: skip


def service(*, version: str = "1", replicas: int | None = 2, most: int | None = None, scaler: str = "none",
            mode: str = "Standard", **more: Any) -> Json:  # fmt: skip
    """An InferenceService that can be rolled out on. ``more`` goes into the predictor."""
    predictor: Json = {
        "name": f"v{version}", "labels": {"endcap.dev/version": version},
        "model": {"modelFormat": {"name": "endcap"}, "runtime": "endcap-cpu",
                  "storageUri": f"pvc://models/recommender/{version}"},
        **more,
    }  # fmt: skip
    if replicas is not None:
        predictor["minReplicas"] = replicas
    if most is not None:
        predictor["maxReplicas"] = most
    return {
        "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
        "metadata": {"name": SERVICE, "namespace": NAMESPACE, "annotations": {
            "serving.kserve.io/deploymentMode": mode, "serving.kserve.io/autoscalerClass": scaler}},
        "spec": {"predictor": predictor},
    }  # fmt: skip


@dataclass
class Pods:
    """How the pods of one version come up. ``start_s``: from their making until they are ready."""

    start_s: float = 3.0
    unschedulable: str | None = None
    exit_code: int | None = None
    message: str = ""
    at_most: int | None = None
    """As many find a node."""


@dataclass
class World:
    """``now``: seconds. ``versions``: how pods of a version behave; others are well."""

    versions: dict[str, Pods] = field(default_factory=dict)
    hpa_wants: dict[str, int] = field(default_factory=dict)
    now_s: float = 1_000_000.0
    objects: dict[str, Json] = field(default_factory=dict)
    log: list[Json] = field(default_factory=list)
    """Specs of the service as they were written, in order."""
    served: list[dict[str, float]] = field(default_factory=list)
    """What each version received, whenever it was looked at."""
    before_write: Callable[[str, str], None] | None = None
    kserve_runs: bool = True
    gateway_runs: bool = True
    seed: int = 1
    _version: int = 0
    _applied: dict[str, Json] = field(default_factory=dict)
    _pods: dict[str, list[float]] = field(default_factory=dict)
    """By Deployment, when each pod was made."""

    def __post_init__(self) -> None:
        self.standin = StandIn(self, gateway="endcap-system/gateway")  # type: ignore[arg-type]
        runtimes = f"/apis/serving.kserve.io/v1alpha1/namespaces/{NAMESPACE}/servingruntimes"
        self.create(runtimes, copy.deepcopy(RUNTIME))
        self.create("/apis/serving.kserve.io/v1alpha1/clusterstoragecontainers", copy.deepcopy(MLFLOW))

    # ---- time ----

    @property
    def patience(self) -> Patience:
        return Patience(capacity_s=60, route_s=20, healthy_s=5, now=lambda: self.now_s, sleep=self.pass_time)

    def pass_time(self, seconds: float) -> None:
        """Controllers work while somebody waits."""
        self.now_s += max(seconds, 0.05)
        self.settle()

    def settle(self, times: int = 1) -> None:
        for _ in range(times):
            if self.kserve_runs:
                for one in self._of("inferenceservices"):
                    try:
                        self._reconcile(copy.deepcopy(one))
                    except ConflictError:
                        continue
            self._scale()
            self._run_pods()
            if self.gateway_runs:
                self._take_up_routes()
            self._look()

    def _reconcile(self, service: Json) -> None:
        self.standin.step(service)

    def until_serving(self) -> None:
        for _ in range(40):
            self.pass_time(1)

    # ---- the API ----

    def get(self, path: str) -> Json | None:
        return copy.deepcopy(self.objects.get(path))

    def items(self, path: str, *, labels: Mapping[str, str] | None = None, **query: str) -> list[Json] | None:
        if path.endswith("/pods"):
            return [pod for pod in self._pod_objects() if _labelled(pod, labels)]
        found = [one for key, one in self.objects.items() if key.rpartition("/")[0] == path and _labelled(one, labels)]
        return copy.deepcopy(found)

    def text(self, path: str) -> bytes:
        raise TargetError("not there", where=path)

    def create(self, path: str, body: Json) -> Json:
        name = body["metadata"]["name"]
        if f"{path}/{name}" in self.objects:
            raise ConflictError("already exists", where=path)
        made = copy.deepcopy(body)
        made["metadata"] |= {"uid": f"uid-{random.Random(f'{self.seed}{self._version}{name}').getrandbits(40):x}",
                             "generation": 1, "namespace": made["metadata"].get("namespace", NAMESPACE)}  # fmt: skip
        return self._put(f"{path}/{name}", made)

    def replace(self, path: str, body: Json) -> Json:
        target, of_status = _split(path)
        self._hook("replace", target)
        known = self._known(target, body)
        made = {**known, "status": copy.deepcopy(body.get("status") or {})} if of_status else copy.deepcopy(body)
        if not of_status and "status" in known:
            made["status"] = known["status"]
        return self._put(target, made)

    def apply(self, path: str, body: Json) -> Json:
        self._hook("apply", path)
        if path not in self.objects and "resourceVersion" not in body["metadata"]:
            return self.create(path.rpartition("/")[0], body)
        known = self._known(path, body)
        made = _without(copy.deepcopy(known), self._applied.get(path, {}), body)
        made = _laid_over(made, body)
        self._applied[path] = copy.deepcopy({"spec": body["spec"]})
        self._refuse(made)
        return self._put(path, made)

    def merge(self, path: str, body: Json) -> Json:
        target, _ = _split(path)
        self._hook("merge", target)
        known = self._known(target, body)
        return self._put(target, _laid_over(copy.deepcopy(known), body))

    def delete(self, path: str) -> None:
        self.objects.pop(path, None)
        self._applied.pop(path, None)

    def edit(self, path: str, change: Callable[[Json], None]) -> None:
        """By hand."""
        made = copy.deepcopy(self.objects[path])
        change(made)
        made["metadata"]["managedFields"] = [{"manager": "kubectl-edit", "time": "2026-11-30T20:00:00Z"}]
        self._refuse(made)
        self._put(path, made)

    def _hook(self, verb: str, path: str) -> None:
        if self.before_write is not None:
            self.before_write(verb, path)

    def _known(self, path: str, body: Json) -> Json:
        known = self.objects.get(path)
        if known is None:
            raise TargetError("it is gone", where=path)
        asked = body["metadata"].get("resourceVersion")
        if asked is not None and asked != known["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified", where=path)
        return known

    def _put(self, path: str, made: Json) -> Json:
        known = self.objects.get(path)
        if known is not None:
            same = {**made, "metadata": {**made["metadata"], "resourceVersion": 0, "generation": 0}}
            if same == {**known, "metadata": {**known["metadata"], "resourceVersion": 0, "generation": 0}}:
                return copy.deepcopy(known)
            if made.get("spec") != known.get("spec"):
                made["metadata"]["generation"] = known["metadata"]["generation"] + 1
        self._version += 1
        made["metadata"]["resourceVersion"] = str(self._version)
        self.objects[path] = made
        if "/inferenceservices/" in path and (known is None or known["spec"] != made["spec"]):
            self.log.append(copy.deepcopy(made["spec"]))
        return copy.deepcopy(made)

    def _refuse(self, made: Json) -> None:
        """The webhook's refusals that plans could run into."""
        if made.get("kind") != "InferenceService":
            return
        predictor, canaries = made["spec"]["predictor"], made["spec"].get("canary") or []
        least, most = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 0)
        names = [predictor.get("name", ""), *(one["predictor"]["name"] for one in canaries)]
        refused = (
            "MinReplicas cannot be greater than MaxReplicas" if most and least > most else
            "canary minReplicas must not exceed stable predictor minReplicas"
            if any(one["predictor"].get("minReplicas", 0) > least for one in canaries) else
            "sum of canary trafficPercent values must be <= 100"
            if sum(one["trafficPercent"] for one in canaries) > 100 else
            "canary predictor.name is duplicated" if len(set(names)) != len(names) else None
        )  # fmt: skip
        if refused:
            raise RefusedError(f"admission webhook denied the request: {refused}")

    # ---- controllers ----

    def _of(self, kind: str) -> list[Json]:
        return [one for key, one in self.objects.items() if f"/{kind}/" in key]

    def _deployment(self, name: str) -> Json | None:
        return next((one for one in self._of("deployments") if one["metadata"]["name"] == name), None)

    def _scale(self) -> None:
        for hpa in self._of("horizontalpodautoscalers"):
            found = self._deployment(hpa["spec"]["scaleTargetRef"]["name"])
            if found is None:
                continue
            wants = self.hpa_wants.get(_version_of(found), 0) or found["spec"].get("replicas", 1)
            found["spec"]["replicas"] = min(max(wants, hpa["spec"]["minReplicas"]), hpa["spec"]["maxReplicas"])

    def _run_pods(self) -> None:
        names = {one["metadata"]["name"] for one in self._of("deployments")}
        self._pods = {name: pods for name, pods in self._pods.items() if name in names}
        for found in self._of("deployments"):
            name, wanted = found["metadata"]["name"], int(found["spec"].get("replicas", 1))
            pods = self._pods.setdefault(name, [])
            del pods[wanted:]
            pods += [self.now_s] * (wanted - len(pods))
            ready = self._ready(found, pods)
            is_up = "True" if ready >= max(1, wanted * 0.75 // 1) else "False"
            found["status"] = {
                "observedGeneration": found["metadata"]["generation"], "availableReplicas": ready,
                "updatedReplicas": len(pods), "replicas": len(pods),
                "conditions": [{"type": "Available", "status": is_up}],
            }  # fmt: skip

    def _ready(self, found: Json, pods: list[float]) -> int:
        how = self.versions.get(_version_of(found), Pods())
        if how.exit_code is not None:
            return 0
        room = 0 if how.unschedulable and how.at_most is None else len(pods) if how.at_most is None else how.at_most
        return sum(self.now_s - made >= how.start_s for made in pods[:room])

    def _pod_objects(self) -> list[Json]:
        made = []
        for found in self._of("deployments"):
            how, pods = self.versions.get(_version_of(found), Pods()), self._pods.get(found["metadata"]["name"], [])
            ready = self._ready(found, pods)
            for place in range(len(pods)):
                status: Json = {"conditions": [{"type": "Ready", "status": "True" if place < ready else "False"}]}
                if place >= ready and how.unschedulable and (how.at_most is None or place >= how.at_most):
                    status["conditions"].append(
                        {"type": "PodScheduled", "status": "False", "message": how.unschedulable}
                    )
                elif how.exit_code is not None:
                    ended = {"exitCode": how.exit_code, "message": how.message}
                    age = int((self.now_s - pods[place]) // 5)
                    status["containerStatuses"] = [{"restartCount": age, "lastState": {"terminated": ended},
                                                    "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]  # fmt: skip
                labels = found["spec"]["template"]["metadata"]["labels"]
                made.append({"metadata": {"name": f"{found['metadata']['name']}-{place}", "namespace": NAMESPACE,
                                          "uid": f"{found['metadata']['uid']}-{place}", "labels": labels},
                             "status": status})  # fmt: skip
        return made

    def _take_up_routes(self) -> None:
        for route in self._of("httproutes"):
            generation = route["metadata"]["generation"]
            accepted = {"type": "Accepted", "status": "True", "observedGeneration": generation}
            route["status"] = {"parents": [{"conditions": [accepted]}]}

    def _look(self) -> None:
        """Note who receives what, and with how many pods."""
        routes = {one["metadata"]["name"]: one for one in self._of("httproutes")}
        route = routes.get(f"endcap-{SERVICE}", routes.get(SERVICE))
        if route is None:
            return
        received = {}
        for ref in route["spec"]["rules"][-1]["backendRefs"]:
            found = self._deployment(ref["name"])
            weight = ref.get("weight", 1) if len(route["spec"]["rules"][-1]["backendRefs"]) > 1 else 100
            if weight == 0:
                continue
            if found is None:
                received[f"gone {ref['name']}"] = weight / 100
            else:
                received[_version_of(found)] = weight / 100
                assert found["status"]["availableReplicas"] > 0, f"{ref['name']} gets {weight} % and has no pod"
        self.served.append(received)

    def replicas(self, version: str) -> tuple[int, int]:
        """Wanted and available."""
        for found in self._of("deployments"):
            if _version_of(found) == version:
                return int(found["spec"].get("replicas", 1)), int(found["status"]["availableReplicas"])
        return 0, 0


def _version_of(deployment: Json) -> str:
    return str(deployment["spec"]["template"]["metadata"]["labels"].get("endcap.dev/version"))


def _labelled(one: Json, labels: Mapping[str, str] | None) -> bool:
    has = one["metadata"].get("labels") or {}
    return all(has.get(key) == value for key, value in (labels or {}).items())


def _split(path: str) -> tuple[str, bool]:
    return (path.removesuffix("/status"), True) if path.endswith("/status") else (path, False)


def _laid_over(below: Json, above: Mapping[str, Any]) -> Json:
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            below[key] = _laid_over(below[key], value)
        else:
            below[key] = copy.deepcopy(value)
    return below


def _without(made: Json, applied: Mapping[str, Any], body: Mapping[str, Any]) -> Json:
    """Fields that were applied before, and are not now, are gone."""
    for key, value in applied.items():
        if key not in body:
            made.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(made.get(key), dict):
            made[key] = _without(made[key], value, body[key])
    return made
