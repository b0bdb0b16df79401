"""JSON schemas for kubeconform, strict: Kubernetes' own out of the module that the test cluster is built from, the
Gateway API's out of its module's CRDs, KServe's out of its SDK's models (tests/cluster/kserve_standin).

The Prometheus operator is in no registry that is reached; of its three kinds the fields that the chart uses are
written down here, from its API reference (https://prometheus-operator.dev/docs/api-reference/api/).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import programs
from tests.cluster.kserve_standin import schemas as kserve

Json = dict[str, Any]
LOCATION = "{{.ResourceKind}}{{.KindSuffix}}.json"
_MODULES = Path(programs.__file__).parent
_STORAGE = "V1alpha1StorageContainerSpec"
_DEFINITIONS = "_definitions.json#/definitions/"


def folder() -> Path:
    """A folder of schemas named as :data:`LOCATION` says, made once."""
    swagger = _module("kubernetes", "k8s.io/kubernetes") / "api" / "openapi-spec" / "swagger.json"
    key = hashlib.sha256(Path(__file__).read_bytes() + Path(kserve.__file__).read_bytes() + str(swagger).encode())
    made = programs.cache() / f"schemas-{key.hexdigest()[:16]}"
    with programs.locked(made.with_name(".schemas.lock")):
        if not made.exists():
            unfinished = made.with_suffix(".unfinished")
            unfinished.mkdir(parents=True, exist_ok=True)
            for name, schema in _all(json.loads(swagger.read_text())):
                (unfinished / f"{name}.json").write_text(json.dumps(schema))
            unfinished.replace(made)
    return made


def _module(folder_of_go_mod: str, module: str) -> Path:
    found = subprocess.run(["go", "mod", "download", "-json", module], cwd=_MODULES / folder_of_go_mod,
                           capture_output=True, text=True, check=True)  # fmt: skip
    return Path(json.loads(found.stdout)["Dir"])


def _all(swagger: Json) -> Iterator[tuple[str, Json]]:
    yield "_definitions", {"definitions": {name: strict(one) for name, one in swagger["definitions"].items()}}
    for name, definition in swagger["definitions"].items():
        for kind in definition.get("x-kubernetes-group-version-kind", ()):
            if name.startswith("io.k8s.api"):
                yield (
                    _name(kind["group"], kind["version"], kind["kind"]),
                    {"$ref": f"{_DEFINITIONS}{name}"},
                )
    crds = [*_gateway(), *kserve.crds(), *({"spec": spec} for spec in _MONITORING)]
    for crd in crds:
        for version in crd["spec"]["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            if crd["spec"]["names"]["kind"] == "ClusterStorageContainer":
                schema = strict({"type": "object", "properties": {"spec": kserve._schema_of(_STORAGE)}})
            schema["properties"] |= {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": _METADATA,
            }
            yield _name(crd["spec"]["group"], version["name"], crd["spec"]["names"]["kind"]), schema


def _name(group: str, version: str, kind: str) -> str:
    """As kubeconform's ``KindSuffix`` has it: the first part of the group, none for the core's."""
    return "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)


_METADATA = {"$ref": f"{_DEFINITIONS}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}


def strict(schema: Any) -> Any:
    """OpenAPI as JSON schema in which what is not named is not allowed."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer"]}
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name.endswith("resource.Quantity"):
            return {"type": ["string", "number"]}
        return {"$ref": f"{_DEFINITIONS}{name}"}
    made = {key: strict(one) for key, one in schema.items() if not key.startswith("x-") and key != "properties"}
    made.pop("format", None)
    if "properties" in schema:
        made["properties"] = {key: strict(one) for key, one in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def _gateway() -> Iterator[Json]:
    module = _module("gateway", "sigs.k8s.io/gateway-api")
    for file in sorted((module / "config" / "crd" / "standard").glob("*httproutes.yaml")):
        yield from (one for one in yaml.safe_load_all(file.read_text()) if one)


def _monitoring(kind: str, spec: Json) -> Json:
    schema = {"type": "object", "required": ["spec"], "properties": {"spec": spec}}
    return {"group": "monitoring.coreos.com", "names": {"kind": kind},
            "versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}  # fmt: skip


_TEXT: Json = {"type": "string"}
_TEXTS: Json = {"type": "object", "additionalProperties": _TEXT}
_SELECTOR: Json = {"type": "object", "properties": {"matchLabels": _TEXTS}}
_RELABELINGS: Json = {"type": "array", "items": {"type": "object", "properties": {
    "sourceLabels": {"type": "array", "items": _TEXT}, "targetLabel": _TEXT, "replacement": _TEXT, "regex": _TEXT,
    "action": _TEXT, "separator": _TEXT}}}  # fmt: skip
_ENDPOINTS: Json = {"type": "array", "minItems": 1, "items": {"type": "object", "properties": {
    "port": _TEXT, "path": _TEXT, "interval": {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"},
    "relabelings": _RELABELINGS, "metricRelabelings": _RELABELINGS}}}  # fmt: skip
_NAMESPACES: Json = {"type": "object", "properties": {"any": {"type": "boolean"},
                                                      "matchNames": {"type": "array", "items": _TEXT}}}  # fmt: skip
_RULE: Json = {"type": "object", "required": ["expr"], "properties": {
    "record": _TEXT, "alert": _TEXT, "expr": {"type": ["string", "integer"]}, "for": _TEXT, "keep_firing_for": _TEXT,
    "labels": _TEXTS, "annotations": _TEXTS}}  # fmt: skip
_MONITORING = (
    _monitoring("ServiceMonitor", {"type": "object", "required": ["selector", "endpoints"], "properties": {
        "selector": _SELECTOR, "endpoints": _ENDPOINTS, "namespaceSelector": _NAMESPACES}}),
    _monitoring("PodMonitor", {"type": "object", "required": ["selector", "podMetricsEndpoints"], "properties": {
        "selector": _SELECTOR, "podMetricsEndpoints": _ENDPOINTS, "namespaceSelector": _NAMESPACES}}),
    _monitoring("PrometheusRule", {"type": "object", "properties": {"groups": {"type": "array", "items": {
        "type": "object", "required": ["name"], "properties": {
            "name": _TEXT, "interval": _TEXT, "rules": {"type": "array", "items": _RULE}}}}}}),
)  # fmt: skip
