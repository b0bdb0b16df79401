"""The chart on a cluster: installed for a block, and what its parts need beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving import impressions
from tests.cluster.access import PATIENCE_S, Access
from tests.cluster.kserve_standin import schemas as kserve
from tests.packages import make_package
from tests.process import wait_until

Json = dict[str, Any]
CHART = Path(__file__).parents[2] / "charts" / "endcap"
RELEASE = "endcap"
ACCOUNT = "endcap-operator"


def know_kserve(access: Access) -> None:
    """KServe's kinds; where there is no KServe, by the stand-in's CRDs."""
    for crd in kserve.crds():
        name = crd["metadata"]["name"]
        if access.try_kubectl("get", "crd", name).returncode != 0:
            access.apply(crd)
        wait_until(lambda name=name: access.try_kubectl("get", name).returncode == 0, name, deadline_s=PATIENCE_S)


def helm(access: Access, *arguments: str, fails: bool = False) -> str:
    """What helm said; whether it failed is as the caller expects."""
    ran = access.helm(*arguments, deadline_s=PATIENCE_S * 3)
    assert (ran.returncode != 0) is fails, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def values(*settings: str) -> list[str]:
    """As helm takes them."""
    return [argument for setting in settings for argument in ("--set", setting)]


@contextlib.contextmanager
def installed(access: Access, namespace: str, *settings: str) -> Iterator[str]:
    """The release in ``namespace``; what helm said. Gone afterwards, with the claims that it keeps."""
    said = helm(access, "install", RELEASE, str(CHART), "--namespace", namespace, *values(*settings))
    try:
        yield said
    finally:
        access.helm("uninstall", RELEASE, "--namespace", namespace, "--wait")
        access.try_kubectl("delete", "pvc", "--all", "--namespace", namespace, "--wait=false")


def keys_secret(folder: Path) -> Json:
    """The Secret that collector and servers mount: a signing key's public half and an impression key."""
    make_package(folder / "package")
    impressions.ensure_key(folder / "impression.key")
    return {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "endcap-keys"},
        "stringData": {"signing.pub": (folder / "keys" / "signing.pub").read_text(),
                       "impression.key": (folder / "impression.key").read_text()},
    }  # fmt: skip


@contextlib.contextmanager
def volume(access: Access, namespace: str, image: str, of: str = "collector") -> Iterator[str]:
    """The storage value of a part: of the cluster's own class where it has a default, else a folder of the node."""
    classes = access.get("storageclasses")["items"]
    default = "storageclass.kubernetes.io/is-default-class"
    if any((one["metadata"].get("annotations") or {}).get(default) == "true" for one in classes):
        yield f"{of}.storage.size=1Gi"
        return
    path = f"/var/lib/endcap-tests/{namespace}"
    open_it = f"import os; os.makedirs({path!r}, exist_ok=True); os.chmod({path!r}, 0o777)"
    access.apply(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "folder"}, "spec": {
            "restartPolicy": "Never", "containers": [{
                "name": "folder", "image": image, "imagePullPolicy": "IfNotPresent",
                "command": ["python", "-c", open_it],
                "securityContext": {"runAsUser": 0},
                "volumeMounts": [{"name": "node", "mountPath": "/var/lib/endcap-tests"}],
            }],
            "volumes": [{"name": "node", "hostPath": {"path": "/var/lib/endcap-tests", "type": "DirectoryOrCreate"}}],
        }},
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"data-{namespace}"}, "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain", "hostPath": {"path": path, "type": "Directory"},
        }},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "storageClassName": "", "volumeName": f"data-{namespace}",
            "resources": {"requests": {"storage": "1Gi"}},
        }},
        namespace=namespace,
    )  # fmt: skip
    access.wait("pod/folder", "jsonpath={.status.phase}=Succeeded", namespace)
    try:
        yield f"{of}.storage.existingClaim=data"
    finally:
        access.kubectl("delete", "pv", f"data-{namespace}", "--ignore-not-found", "--wait=false")
