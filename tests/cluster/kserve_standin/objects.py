"""Stand-in for KServe: the objects that it makes of an InferenceService. Pure."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

ISVC_LABEL = "serving.kserve.io/inferenceservice"
CLASS = "serving.kserve.io/autoscalerClass"
CONTAINER = "kserve-container"
_NOT_COPIED = {
    "autoscaling.knative.dev/min-scale", "autoscaling.knative.dev/max-scale",
    "internal.serving.kserve.io/storage-initializer-sourceuri", "kubectl.kubernetes.io/last-applied-configuration",
}  # fmt: skip
_OF_THE_COMPONENT = {
    "name", "model", "minReplicas", "maxReplicas", "scaleTarget", "scaleMetric", "scaleMetricType", "autoScaling",
    "labels", "annotations", "deploymentStrategy", "timeout", "canaryTrafficPercent", "containerConcurrency", "logger",
    "batcher", "workerSpec", "storageUris", "storageContainerName",
}  # fmt: skip
"""Fields of a predictor that are not its pods'."""


def workload_name(service: str, predictor: str) -> str:
    return f"{service}-{predictor}-predictor" if predictor else f"{service}-predictor"


def canary_replicas(spec: Json, canary: Json) -> int:
    """What it says, or else its share of stable's least."""
    said = canary["predictor"].get("minReplicas")
    if said is not None:
        return int(said)
    return math.ceil(spec["predictor"].get("minReplicas", 1) * canary["trafficPercent"] / 100)


def merged(stable: Json, canary: Json) -> Json:
    """Stable's predictor with what the canary's says laid over it; what it does not say is stable's."""
    return _over(copy.deepcopy(stable), canary)


def _over(below: Json, above: Mapping[str, Any]) -> Json:
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            below[key] = _over(below[key], value)
        elif value or value == 0 or key not in below:
            below[key] = copy.deepcopy(value)
    return below


def stable_replicas(spec: Json, ready: Mapping[str, bool]) -> int | None:
    """Stable's minReplicas less all replicas of canaries that are ready; None: it says none."""
    least = spec["predictor"].get("minReplicas")
    if least is None or not spec.get("canary"):
        return None if least is None else int(least)
    taken = sum(canary_replicas(spec, one) for one in spec["canary"] if ready.get(one["predictor"]["name"]))
    return max(least - taken, 1) if taken else int(least)


def deployment(service: Json, predictor: Json, runtime: Json, replicas: int | None) -> Json:
    meta = service["metadata"]
    name = workload_name(meta["name"], predictor.get("name", ""))
    kept = {k: v for k, v in (meta.get("annotations") or {}).items() if k not in _NOT_COPIED}
    labels = {
        **(runtime.get("labels") or {}), **(meta.get("labels") or {}), **(predictor.get("labels") or {}),
        ISVC_LABEL: meta["name"], "component": "predictor", "app": f"isvc.{name}",
    }  # fmt: skip
    annotations = {**(runtime.get("annotations") or {}), **kept, **(predictor.get("annotations") or {})}
    spec: Json = {
        "selector": {"matchLabels": {"app": f"isvc.{name}"}},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod(meta, predictor, runtime)},
        "strategy": predictor.get("deploymentStrategy")
        or {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}},
        "progressDeadlineSeconds": 600,
    }
    if annotations.get(CLASS) == "none" and replicas is not None:
        spec["replicas"] = replicas
    return {"apiVersion": "apps/v1", "kind": "Deployment",
            "metadata": _meta(service, name, labels, annotations), "spec": spec}  # fmt: skip


def pod(meta: Json, predictor: Json, runtime: Json) -> Json:
    """The runtime's pod with the predictor's fields over it, and the model's over its container; no model yet."""
    model = predictor["model"]
    spec = {key: copy.deepcopy(value) for key, value in runtime.items()
            if key in ("nodeSelector", "affinity", "tolerations", "volumes", "imagePullSecrets")}  # fmt: skip
    spec = _over(spec, {key: value for key, value in predictor.items() if key not in _OF_THE_COMPONENT})
    container = next(copy.deepcopy(one) for one in runtime["containers"] if one["name"] == CONTAINER)
    overlay = {key: value for key, value in model.items()
               if key not in ("modelFormat", "runtime", "runtimeVersion", "storageUri", "storage", "protocolVersion",
                              "name", "args", "env", "confidential")}  # fmt: skip
    container = _over(container, overlay)
    container["args"] = [*(container.get("args") or []), *(model.get("args") or [])]
    env = {one["name"]: one for one in [*(container.get("env") or []), *(model.get("env") or [])]}
    container["env"] = [*env.values(), {"name": "INFERENCE_SERVICE_NAME", "value": meta["name"]}]
    container["args"] = [one.replace("{{.Name}}", meta["name"]) for one in container["args"]]
    ports = container.get("ports") or [{"containerPort": 8080}]
    container.setdefault("readinessProbe", {
        "tcpSocket": {"port": ports[0]["containerPort"]}, "periodSeconds": 10, "failureThreshold": 3,
    })  # fmt: skip
    others = [copy.deepcopy(one) for one in runtime["containers"] if one["name"] != CONTAINER]
    spec["containers"] = [container, *others]
    return spec


def service_of(service: Json, predictor: Json, runtime: Json) -> Json:
    name = workload_name(service["metadata"]["name"], predictor.get("name", ""))
    made = deployment(service, predictor, runtime, None)
    ports = made["spec"]["template"]["spec"]["containers"][0].get("ports") or [{"containerPort": 8080}]
    listed = [{"name": ports[0].get("name") or name, "port": 80, "targetPort": ports[0]["containerPort"],
               "protocol": ports[0].get("protocol", "TCP")}]  # fmt: skip
    listed += [{"name": one["name"], "port": one["containerPort"], "targetPort": one["containerPort"],
                "protocol": one.get("protocol", "TCP")} for one in ports[1:]]  # fmt: skip
    return {"apiVersion": "v1", "kind": "Service", "metadata": made["metadata"],
            "spec": {"selector": {"app": f"isvc.{name}"}, "ports": listed}}  # fmt: skip


def autoscaler(service: Json, predictor: Json, runtime: Json, least: int | None, most: int) -> Json | None:
    made = deployment(service, predictor, runtime, None)["metadata"]
    if made["annotations"].get(CLASS, "hpa") != "hpa":
        return None
    least = max(1, least or 1)
    return {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": made,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": made["name"]},
            "minReplicas": least, "maxReplicas": max(most, least),
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": {
                "type": "Utilization", "averageUtilization": predictor.get("scaleTarget", 80)}}}],
        },
    }  # fmt: skip


def routes(service: Json, ready: Mapping[str, bool], gateway: str, domain: str) -> list[Json]:
    """Of a predictor that is ready; with the shares of the canaries that are."""
    meta, spec = service["metadata"], service["spec"]
    name, namespace = meta["name"], meta["namespace"]
    stable = workload_name(name, spec["predictor"].get("name", ""))

    def ref(backend: str, weight: int | None) -> Json:
        made = {"kind": "Service", "group": "", "name": backend, "namespace": namespace, "port": 80}
        return made if weight is None else {**made, "weight": weight}

    refs = [ref(stable, 1)]
    if spec.get("canary"):
        shown = [one for one in spec["canary"] if ready.get(one["predictor"]["name"])]
        left = 100 - sum(one["trafficPercent"] for one in shown)
        refs = [ref(stable, left)]
        refs += [ref(workload_name(name, one["predictor"]["name"]), one["trafficPercent"]) for one in shown]
    gateway_namespace, _, gateway_name = gateway.partition("/")
    labels = dict(meta.get("labels") or {})
    annotations = {k: v for k, v in (meta.get("annotations") or {}).items() if k not in _NOT_COPIED}
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": _meta(service, route, labels, annotations),
            "spec": {
                "hostnames": [f"{route}-{namespace}.{domain}"],
                "parentRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway",
                                "namespace": gateway_namespace, "name": gateway_name}],
                "rules": [{
                    "matches": [{"path": {"type": "RegularExpression", "value": "^/.*$"}}],
                    "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [
                        {"name": "KServe-Isvc-Name", "value": name},
                        {"name": "KServe-Isvc-Namespace", "value": namespace}]}}],
                    "backendRefs": refs, "timeouts": {"request": f"{spec['predictor'].get('timeout', 60)}s"},
                }],
            },
        }
        for route in (f"{name}-predictor", name)
    ]  # fmt: skip


def _meta(service: Json, name: str, labels: Mapping[str, str], annotations: Mapping[str, str]) -> Json:
    owner = service["metadata"]
    return {
        "name": name, "namespace": owner["namespace"], "labels": dict(labels), "annotations": dict(annotations),
        "ownerReferences": [{
            "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "name": owner["name"],
            "uid": owner["uid"], "controller": True, "blockOwnerDeletion": True,
        }],
    }  # fmt: skip
