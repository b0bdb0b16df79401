"""Stand-in for KServe's webhook of pods: what brings a model into a predictor's pods. Pure.

The real one changes each pod as it is made; here the Deployment's template is changed, with the same pods of it. S3 is
the one store whose credentials are known here.
"""

from __future__ import annotations

import base64
import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

SECRET_ANNOTATION = "serving.kserve.io/storageSecretName"
_CONTAINER = "kserve-container"
_INITIALIZER = "storage-initializer"
_VOLUME, _MODELS = "kserve-provision-location", "/mnt/models"
_PREFIXES = ("gs://", "s3://", "pvc://", "file://", "https://", "http://", "hdfs://", "webhdfs://", "oci://",
             "oci+native://", "oci+fetch://", "hf://")  # fmt: skip
_HUGGING_FACE = {"HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_XET_HIGH_PERFORMANCE": "1",
                 "HF_XET_NUM_CONCURRENT_RANGE_GETS": "8"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """Of KServe's ConfigMap ``inferenceservice-config``, ``storageInitializer``; its own defaults."""

    image: str = "kserve/storage-initializer:latest"
    uid_modelcar: int = 1010


def container_for(uri: str, known: Sequence[Json]) -> Json | None:
    """The container of the first ClusterStorageContainer that takes ``uri``."""
    for one in known:
        spec = one["spec"]
        if one.get("disabled") or spec.get("workloadType", "initContainer") != "initContainer":
            continue
        for form in spec["supportedUriFormats"]:
            prefix, pattern = form.get("prefix"), form.get("regex")
            if uri.startswith(prefix) if prefix else bool(pattern and re.search(pattern, uri)):
                return dict(spec["container"])
    return None


def refusal(uri: str, container: Json | None) -> str | None:
    """Why the controller makes nothing of a service that names ``uri``; None: it does."""
    if container is not None or not re.search(r"\w+?://", uri) or uri.startswith(_PREFIXES):
        return None
    return f"StorageURI not supported: storageUri, must be one of: [{', '.join(_PREFIXES)}]. [{uri}] is not supported"


def inject(pod: Json, uri: str, container: Json | None, secrets: Sequence[Json], settings: Settings) -> None:
    """Give the pod, its spec, the model of ``uri``.

    ``container``: of a ClusterStorageContainer. ``secrets``: of its account, or the one that is annotated.
    """
    server = next(one for one in pod["containers"] if one["name"] == _CONTAINER)
    if uri.startswith("pvc://"):
        claim, _, path = uri.removeprefix("pvc://").partition("/")
        _add(pod, "volumes", {"name": "kserve-pvc-source", "persistentVolumeClaim": {"claimName": claim}})
        _add(server, "volumeMounts",
             {"name": "kserve-pvc-source", "mountPath": _MODELS, "subPath": path, "readOnly": True})  # fmt: skip
        return
    if uri.startswith("oci://"):
        _modelcar(pod, server, uri.removeprefix("oci://"), settings)
        return
    if uri.startswith("oci+native://"):
        image = {"reference": uri.removeprefix("oci+native://"), "pullPolicy": "IfNotPresent"}
        _add(pod, "volumes", {"name": "mnt-models", "image": image})
        _add(server, "volumeMounts",
             {"name": "mnt-models", "mountPath": _MODELS, "subPath": "models", "readOnly": True})  # fmt: skip
        return
    mount = {"name": _VOLUME, "mountPath": _MODELS}
    initializer: Json = {
        "name": _INITIALIZER, "image": settings.image, "args": [uri, _MODELS],
        "terminationMessagePolicy": "FallbackToLogsOnError", "volumeMounts": [dict(mount)],
        "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "env": [variable for secret in secrets for variable in s3_variables(secret)],
    }  # fmt: skip
    if container is not None:
        initializer = merged_container(initializer, container)
    said = {one["name"] for one in initializer["env"]}
    initializer["env"] += [{"name": name, "value": value} for name, value in _HUGGING_FACE.items() if name not in said]
    _add(pod, "volumes", {"name": _VOLUME, "emptyDir": {}})
    _add(pod, "initContainers", initializer)
    _add(server, "volumeMounts", {**mount, "readOnly": True})


def merged_container(base: Json, over: Mapping[str, Any]) -> Json:
    """As a strategic merge patch: lists of named things by their names, other lists whole, maps by key."""
    made = copy.deepcopy(base)
    for key, value in over.items():
        by = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort"}.get(key)
        if by is not None:
            listed = {one[by]: one for one in made.get(key) or []}
            made[key] = list((listed | {one[by]: one for one in value}).values())
        elif isinstance(value, Mapping) and isinstance(made.get(key), dict):
            made[key] = merged_container(made[key], value)
        else:
            made[key] = copy.deepcopy(value)
    return made


def s3_variables(secret: Json) -> list[Json]:
    """What a Secret with S3 keys puts into the initializer's environment; none of another Secret."""
    meta, data = secret["metadata"], secret.get("data") or {}
    if "AWS_SECRET_ACCESS_KEY" not in data:
        return []
    annotations = meta.get("annotations") or {}

    def said(annotation: str, key: str) -> str:
        if (found := annotations.get(f"serving.kserve.io/{annotation}")) is not None:
            return str(found)
        return base64.b64decode(data[key]).decode() if key in data else ""

    variables: list[Json] = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": meta["name"], "key": name}}}
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    ]
    plain: dict[str, str] = {}
    if endpoint := said("s3-endpoint", "S3_ENDPOINT").strip():
        scheme, _, host = endpoint.rpartition("://")
        https = {"https": "1", "http": "0"}.get(scheme.lower(), said("s3-usehttps", "S3_USE_HTTPS"))
        plain["S3_USE_HTTPS"] = https
        plain["S3_ENDPOINT"] = host
        plain["AWS_ENDPOINT_URL"] = f"http{'' if https == '0' else 's'}://{host}"
    plain["S3_VERIFY_SSL"] = said("s3-verifyssl", "S3_VERIFY_SSL")
    plain["AWS_DEFAULT_REGION"] = said("s3-region", "AWS_DEFAULT_REGION")
    plain["S3_USER_VIRTUAL_BUCKET"] = said("s3-usevirtualbucket", "S3_USER_VIRTUAL_BUCKET")
    return variables + [{"name": name, "value": value} for name, value in plain.items() if value]


def _modelcar(pod: Json, server: Json, image: str, settings: Settings) -> None:
    """The image runs beside the server, which reads its files through the processes that they share."""
    small = {"cpu": "10m", "memory": "15Mi"}
    common = {"image": image, "resources": {"requests": small, "limits": small},
              "terminationMessagePolicy": "FallbackToLogsOnError"}  # fmt: skip
    server["env"] = [*(one for one in server.get("env") or [] if one["name"] != "MODEL_INIT_MODE"),
                     {"name": "MODEL_INIT_MODE", "value": "async"}]  # fmt: skip
    server["securityContext"] = {**(server.get("securityContext") or {}), "runAsUser": settings.uid_modelcar}
    _add(pod, "volumes", {"name": _VOLUME, "emptyDir": {}})
    _add(server, "volumeMounts", {"name": _VOLUME, "mountPath": "/mnt"})
    link = f"ln -sf /proc/$$$$/root/models {_MODELS} && sleep infinity"
    look = (
        f"echo 'Pre-fetching modelcar {image}: ' && [ -d /models ] && [ \"$$(ls -A /models)\" ] && "
        "echo 'OK ... Prefetched and valid (/models exists)' || "
        "(echo 'NOK ... Prefetched but modelcar is invalid (/models does not exist or is empty)' && exit 1)"
    )
    _add(pod, "containers", {
        "name": "modelcar", **common, "args": ["sh", "-c", link],
        "securityContext": {"runAsUser": settings.uid_modelcar},
        "volumeMounts": [{"name": _VOLUME, "mountPath": "/mnt"}],
    })  # fmt: skip
    _add(pod, "initContainers", {"name": "modelcar-init", **common, "args": ["sh", "-c", look]})
    pod["shareProcessNamespace"] = True


def _add(to: Json, key: str, one: Json) -> None:
    to[key] = [*(to.get(key) or []), one]
