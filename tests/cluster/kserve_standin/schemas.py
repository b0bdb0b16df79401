"""CRDs whose schemas are derived from the models of KServe's Python SDK, so that wrong fields are refused.

The SDK is generated from the same Go types as KServe's own CRDs. What it does not say (defaults, how lists merge, what
is required inside of Kubernetes' own types) is added here, as far as the controller relies on it.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import kserve
from kserve import models
from kubernetes import client as kubernetes_client

Json = dict[str, Any]

_PRIMITIVES: dict[str, Json] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "date": {"type": "string"},
    "datetime": {"type": "string", "format": "date-time"},
    "object": {"x-kubernetes-preserve-unknown-fields": True},
}
_LIST = re.compile(r"(?:list|List)\[(.+)]")
_MAP = re.compile(r"(?:dict|Dict)(?:\(|\[)str, (.+)(?:\)|])")
_MERGED_BY: dict[str, list[str]] = {"V1EnvVar": ["name"], "V1Container": ["name"]}
_QUANTITIES = {"limits", "requests"}


def crds() -> list[Json]:
    return [
        _crd("inferenceservices", "InferenceService", "v1beta1", _service_schema(), short=["isvc"], status=True),
        _crd("servingruntimes", "ServingRuntime", "v1alpha1", _runtime_schema()),
        _crd("clusterservingruntimes", "ClusterServingRuntime", "v1alpha1", _runtime_schema(), namespaced=False),
        _crd("clusterstoragecontainers", "ClusterStorageContainer", "v1alpha1", _storage_schema(), namespaced=False),
    ]  # fmt: skip


def _crd(
    plural: str, kind: str, version: str, schema: Json, *, short: list[str] | None = None, namespaced: bool = True,
    status: bool = False,
) -> Json:  # fmt: skip
    served: Json = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    if status:
        served["subresources"] = {"status": {}}
        served["additionalPrinterColumns"] = [
            {"name": "URL", "type": "string", "jsonPath": ".status.url"},
            {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Ready')].status"},
        ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.serving.kserve.io"},
        "spec": {
            "group": "serving.kserve.io", "scope": "Namespaced" if namespaced else "Cluster",
            "names": {"plural": plural, "singular": kind.lower(), "kind": kind, "shortNames": short or []},
            "versions": [served],
        },
    }  # fmt: skip


def _service_schema() -> Json:
    spec = _schema_of("V1beta1InferenceServiceSpec")
    canary = spec["properties"]["canary"]
    for one in (spec["properties"], canary["items"]["properties"]):
        one["predictor"]["properties"]["name"] = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}
    canary["x-kubernetes-list-type"] = "atomic"
    canary["items"]["properties"]["trafficPercent"] = {"type": "integer", "minimum": 0, "maximum": 100}
    canary["items"]["required"] = ["predictor", "trafficPercent"]
    status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {"type": "object", "properties": {"spec": spec, "status": status}}


def _runtime_schema() -> Json:
    status = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {"type": "object", "properties": {"spec": _schema_of("V1alpha1ServingRuntimeSpec"), "status": status}}


def _storage_schema() -> Json:
    spec = _schema_of("V1alpha1StorageContainerSpec")
    spec["required"] = ["container", "supportedUriFormats"]
    spec["properties"]["workloadType"]["default"] = "initContainer"
    return {"type": "object", "properties": {"spec": spec, "disabled": {"type": "boolean"}}}


def _model(name: str) -> Any:
    for module in (models, kserve, kubernetes_client):
        if hasattr(module, name):
            return getattr(module, name)
    return None


@cache
def _known(name: str) -> str:
    return name


def _schema_of(name: str, within: tuple[str, ...] = ()) -> Json:
    if name in _PRIMITIVES:
        return dict(_PRIMITIVES[name])
    if (match := _LIST.fullmatch(name)) is not None:
        items: Json = {"type": "array", "items": _schema_of(match[1], within)}
        keys = _MERGED_BY.get(match[1])
        if keys is not None:
            items |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys}
        return items
    if (match := _MAP.fullmatch(name)) is not None:
        return {"type": "object", "additionalProperties": _schema_of(match[1], within)}
    model = _model(name)
    if model is None or name in within or not hasattr(model, "openapi_types"):
        return {"x-kubernetes-preserve-unknown-fields": True}
    properties = {}
    for python_name, type_name in model.openapi_types.items():
        json_name = model.attribute_map[python_name]
        if json_name in _QUANTITIES and _MAP.fullmatch(type_name):
            properties[json_name] = {"type": "object", "additionalProperties": {
                "anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True}}  # fmt: skip
        else:
            properties[json_name] = _schema_of(type_name, (*within, name))
    schema: Json = {"type": "object", "properties": properties}
    if name in _MERGED_BY:
        schema["required"] = list(_MERGED_BY[name])
    if name == "V1beta1ModelSpec":
        schema["required"] = ["modelFormat"]
        properties["modelFormat"]["required"] = ["name"]
        properties["name"] = {"type": "string", "default": ""}
        schema["properties"] = properties
    return schema


def refusals() -> list[Json]:
    """The webhook's refusals of InferenceServices, in its words, as an admission policy."""
    canary = "(has(object.spec.canary) ? object.spec.canary : [])"
    least = "(has(object.spec.predictor.minReplicas) ? object.spec.predictor.minReplicas : 1)"
    mode = "object.metadata.?annotations[?'serving.kserve.io/deploymentMode'].orValue('')"
    stable = "(has(object.spec.predictor.name) ? object.spec.predictor.name : '')"
    uri = "{0}.spec.predictor.?model.?storageUri.orValue('')"
    named = f"{canary}.exists_one(d, d.predictor.?name.orValue('') == c.predictor.name)"
    scaled = "!has(c.predictor.scaleTarget) && !has(c.predictor.scaleMetric) && !has(c.predictor.autoScaling)"
    stable_before = "(has(oldObject.spec.predictor.name) ? oldObject.spec.predictor.name : '')"
    mode_before = "oldObject.status.?deploymentMode.orValue('')"
    rules = [
        (f"{canary}.size() == 0 || {mode} == 'Standard'", "canary is only supported in Standard deployment mode"),
        (f"{canary}.size() == 0 || has(object.spec.predictor.model)",
         "canary requires a stable predictor with a model (multi-model serving is not supported with canary)"),
        (f"{canary}.all(c, has(c.predictor.name) && c.predictor.name != '')", "canary predictor.name is required"),
        (f"{canary}.all(c, !has(c.predictor.name) || {named})", "canary predictor.name is duplicated"),
        (f"{canary}.all(c, !has(c.predictor.name) || c.predictor.name != {stable})",
         "canary predictor.name conflicts with stable predictor name"),
        (f"{canary}.all(c, has(c.predictor.model) || has(c.predictor.containers))",
         "canary predictor: exactly one implementation must be given"),
        (f"{canary}.all(c, !has(c.predictor.workerSpec))", "canary must not set workerSpec"),
        (f"{canary}.all(c, !has(c.predictor.maxReplicas) || c.predictor.maxReplicas == 0)",
         "canary must not set maxReplicas (canary uses fixed replicas)"),
        (f"{canary}.all(c, {scaled})",
         "canary must not set scaleTarget, scaleMetric or autoScaling (canary uses fixed replicas)"),
        (f"{canary}.all(c, !has(c.predictor.minReplicas) || c.predictor.minReplicas <= {least})",
         "canary minReplicas must not exceed stable predictor minReplicas"),
        (f"{canary}.map(c, c.trafficPercent).sum() <= 100", "sum of canary trafficPercent values must be <= 100"),
        ("has(object.spec.predictor.model) || has(object.spec.predictor.containers)",
         "exactly one predictor implementation must be given"),
        ("!has(object.spec.predictor.minReplicas) || object.spec.predictor.minReplicas >= 0",
         "MinReplicas cannot be less than 0"),
        (f"!has(object.spec.predictor.maxReplicas) || object.spec.predictor.maxReplicas == 0 || "
         f"{least} <= object.spec.predictor.maxReplicas", "MinReplicas cannot be greater than MaxReplicas"),
        (f"oldObject == null || {stable} == {stable_before} || "
         f"{uri.format('object')} != {uri.format('oldObject')}",
         "predictor.name change requires a model change (e.g. storageUri)"),
        (f"oldObject == null || !has(oldObject.status) || {mode_before} == '' || {mode} == '' || "
         f"{mode} == {mode_before}", "update rejected: deploymentMode cannot be changed"),
    ]  # fmt: skip
    name = "endcap-kserve-standin"
    return [
        {
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy",
            "metadata": {"name": name},
            "spec": {
                "failurePolicy": "Fail",
                "matchConstraints": {"resourceRules": [
                    {"apiGroups": ["serving.kserve.io"], "apiVersions": ["v1beta1"],
                     "operations": ["CREATE", "UPDATE"], "resources": ["inferenceservices"]},
                ]},
                "validations": [{"expression": rule, "message": said} for rule, said in rules],
            },
        },
        {
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding",
            "metadata": {"name": name}, "spec": {"policyName": name, "validationActions": ["Deny"]},
        },
    ]  # fmt: skip
