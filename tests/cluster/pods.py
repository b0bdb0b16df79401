"""Objects that tests put on a cluster: a replica of our server with a package, and a Gateway before it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESTRICTED: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def config_map(name: str, folder: Path) -> dict[str, Any]:
    """The files of ``folder`` (flat, at most a megabyte in all)."""
    data = {
        file.name: base64.b64encode(file.read_bytes()).decode() for file in sorted(folder.iterdir()) if file.is_file()
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data}


def server(
    name: str, image: str, package: str, keys: str, *, version: str = "1", replicas: int = 1
) -> list[dict[str, Any]]:
    """A Deployment of the server image and its Service ``name`` (port 80).

    ``package`` and ``keys`` name ConfigMaps. The package is copied first: a ConfigMap's files are links, which the
    server takes for tampering.
    """
    labels = {"app": name}
    copy = "import shutil; shutil.copytree('/given', '/models/package', ignore=shutil.ignore_patterns('..*'))"
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": {**labels, "endcap.dev/version": version}},
                    "spec": {
                        "automountServiceAccountToken": False,
                        "securityContext": {"runAsUser": 65532, "fsGroup": 65532},
                        "initContainers": [
                            {
                                "name": "deliver",
                                "image": image,
                                "imagePullPolicy": "IfNotPresent",
                                "command": ["python", "-c", copy],
                                "securityContext": RESTRICTED,
                                "volumeMounts": [
                                    {"name": "given", "mountPath": "/given"},
                                    {"name": "models", "mountPath": "/models"},
                                ],
                            }
                        ],
                        "containers": [
                            {
                                "name": "server",
                                "image": image,
                                "imagePullPolicy": "IfNotPresent",
                                "args": [
                                    *("--package", "/models/package", "--public-key", "/keys/signing.pub"),
                                    *("--version", version, "--zone", "zone-a", "--host", "0.0.0.0", "--port", "8080"),  # noqa: S104
                                ],
                                "ports": [{"name": "http1", "containerPort": 8080}],
                                "readinessProbe": {
                                    "httpGet": {"path": "/v2/health/ready", "port": "http1"},
                                    "periodSeconds": 1,
                                    "failureThreshold": 300,
                                },
                                "securityContext": RESTRICTED,
                                "volumeMounts": [
                                    {"name": "models", "mountPath": "/models", "readOnly": True},
                                    {"name": "keys", "mountPath": "/keys", "readOnly": True},
                                    {"name": "tmp", "mountPath": "/tmp"},
                                ],
                            }
                        ],
                        "volumes": [
                            {"name": "given", "configMap": {"name": package}},
                            {"name": "keys", "configMap": {"name": keys}},
                            {"name": "models", "emptyDir": {}},
                            {"name": "tmp", "emptyDir": {}},
                        ],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http1"}]},
        },
    ]


def once(name: str, image: str, *command: str) -> dict[str, Any]:
    """A pod that runs ``command`` once, as nobody in particular, with nothing to write to but ``/tmp``."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [
                {
                    "name": name,
                    "image": image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": list(command),
                    "securityContext": RESTRICTED,
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }


def gateway(name: str, gateway_class: str, *services: str) -> list[dict[str, Any]]:
    """A Gateway on port 80 and a route that shares everything equally among ``services``."""
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": name},
            "spec": {
                "gatewayClassName": gateway_class,
                "listeners": [{"name": "http", "port": 80, "protocol": "HTTP"}],
            },
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {"name": name},
            "spec": {
                "parentRefs": [{"name": name}],
                "rules": [{"backendRefs": [{"name": service, "port": 80} for service in services]}],
            },
        },
    ]
