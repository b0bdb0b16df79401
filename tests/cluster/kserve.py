"""Which KServe the tests run on: the stand-in, the real controller run here, or one that the cluster has.

``ENDCAP_TEST_KSERVE``: nothing is the stand-in; ``installed`` is what the cluster of ``ENDCAP_TEST_KUBECONFIG`` has;
else a folder with the real controller: ``FOLDER/manager`` (``go build ./cmd/manager``) and ``FOLDER/src`` (its source,
for CRDs, webhooks and settings). See docs/testing.md. None of KServe's own files are in this repository.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from endcap.errors import TargetError
from serving.targets.kserve.cluster import Cluster, open_cluster
from tests.cluster import images
from tests.cluster.access import Access
from tests.cluster.kserve_standin.changes import Changes
from tests.cluster.kserve_standin.controller import WATCHED, StandIn
from tests.cluster.kserve_standin.storage import Settings
from tests.cluster.pki import Authority
from tests.cluster.ports import free_ports, listens
from tests.process import wait_until

SETTING = "ENDCAP_TEST_KSERVE"
GATEWAY = "kserve/kserve-ingress-gateway"
DOMAIN = "example.com"


@contextlib.contextmanager
def kserve(access: Access, *, gateway: str = GATEWAY) -> Iterator[Cluster]:
    """KServe at work in the cluster, for the block."""
    with contextlib.closing(open_cluster(kubeconfig=str(access.kubeconfig))) as cluster:
        yield from _at_work(access, cluster, gateway)


def _at_work(access: Access, cluster: Cluster, gateway: str) -> Iterator[Cluster]:
    chosen = os.environ.get(SETTING, "")
    if chosen == "installed":
        yield cluster
        return
    if not chosen:
        settings = Settings(image=images.name(images.STORAGE_INITIALIZER))
        standin = StandIn(cluster, gateway=gateway, domain=DOMAIN, settings=settings)
        standin.install()
        _until_served(cluster)
        standin.start(Changes(access.kubeconfig, WATCHED))
        try:
            yield cluster
        finally:
            standin.stop()
        return
    with tempfile.TemporaryDirectory(prefix="endcap-kserve-") as scratch, _real(access, Path(chosen), Path(scratch),
                                                                               gateway):  # fmt: skip
        _until_served(cluster)
        yield cluster


def _until_served(cluster: Cluster) -> None:
    paths = ("/apis/serving.kserve.io/v1beta1/inferenceservices", "/apis/serving.kserve.io/v1alpha1/servingruntimes")

    def served() -> bool:
        with contextlib.suppress(TargetError):  # "storage is (re)initializing", for a second
            return all(cluster.items(path) is not None for path in paths)
        return False

    wait_until(served, "KServe's kinds are served", deadline_s=120)


@contextlib.contextmanager
def _real(access: Access, folder: Path, scratch: Path, gateway: str) -> Iterator[None]:
    source, host = folder / "src" / "config", access.host
    crds = [path for place in ("crd/full", "crd/full/localmodel", "crd/full/clusterstoragecontainer")
            for path in sorted((source / place).glob("serving.kserve.io_*.yaml"))]  # fmt: skip
    for path in crds:
        access.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(path))
    with contextlib.closing(open_cluster(kubeconfig=str(access.kubeconfig))) as cluster:
        _until_served(cluster)
    # Discovery, which the controller begins with, learns of a kind later than the kind is served.
    told = "/apis/serving.kserve.io/v1beta1"
    wait_until(lambda: '"inferenceservices"' in access.try_kubectl("get", "--raw", told).stdout,
               "KServe's kinds are told of", deadline_s=120)  # fmt: skip
    access.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kserve"}})
    access.apply(_settings(source / "configmap" / "inferenceservice.yaml", gateway))
    authority = Authority(scratch / "pki")
    authority.create()
    certificate, key = authority.issue("webhook", "kserve-webhook", addresses=(host,))
    serving = scratch / "k8s-webhook-server" / "serving-certs"
    serving.mkdir(parents=True)
    (serving / "tls.crt").write_bytes(certificate.read_bytes())
    (serving / "tls.key").write_bytes(key.read_bytes())
    port, metrics, health = free_ports(3)
    log = scratch / "manager.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(folder / "manager"), "--webhook-port", str(port), "--metrics-addr", f"127.0.0.1:{metrics}",
             "--health-probe-addr", f"127.0.0.1:{health}"],
            stdout=output, stderr=subprocess.STDOUT, cwd=scratch,
            env={**access.environment, "TMPDIR": str(scratch), "POD_NAMESPACE": "kserve"},
        )  # fmt: skip
        try:
            wait_until(lambda: listens(host, port) or _ended(process, log), "KServe's webhooks answer", deadline_s=120)
            for one in _webhooks(source / "webhook" / "manifests.yaml", f"https://{host}:{port}", authority):
                access.apply(one)
            yield
        finally:
            try:  # of a cluster that goes on; one of the tests' own may have ended before
                access.try_kubectl("delete", "mutatingwebhookconfiguration,validatingwebhookconfiguration",
                                   "inferenceservice.serving.kserve.io", "--ignore-not-found")  # fmt: skip
            finally:
                process.terminate()
                process.wait(timeout=30)
            if kept := os.environ.get("ENDCAP_TEST_KSERVE_LOG"):
                Path(kept).write_bytes(log.read_bytes())


def _ended(process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-2000:]
    return False


def _settings(path: Path, gateway: str) -> dict[str, Any]:
    """KServe's own ConfigMap, for the Gateway API and Standard mode."""
    settings: dict[str, Any] = yaml.safe_load(path.read_text())
    settings["metadata"] = {"name": "inferenceservice-config", "namespace": "kserve"}
    data = settings["data"]
    data.pop("_example", None)
    ingress = json.loads(data["ingress"])
    data["ingress"] = json.dumps(ingress | {
        "enableGatewayApi": True, "kserveIngressGateway": gateway, "disableIstioVirtualHost": True,
        "ingressDomain": DOMAIN,
    })  # fmt: skip
    initializer = json.loads(data["storageInitializer"])
    data["storageInitializer"] = json.dumps(initializer | {"image": images.name(images.STORAGE_INITIALIZER)})
    data["deploy"] = json.dumps({"defaultDeploymentMode": "Standard"})
    return settings


def _webhooks(path: Path, url: str, authority: Authority) -> list[dict[str, Any]]:
    """Those of InferenceServices and their pods, at a process instead of a Service."""
    bundle = base64.b64encode(authority.certificate.read_bytes()).decode()
    found = []
    for one in yaml.safe_load_all(path.read_text().replace("$(", "").replace(")", "")):
        if one is None or one["metadata"]["name"] != "inferenceservice.serving.kserve.io":
            continue
        one["metadata"].pop("creationTimestamp", None)
        for hook in one["webhooks"]:
            where = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": url + where, "caBundle": bundle}
            hook["admissionReviewVersions"] = ["v1", "v1beta1"]
        found.append(one)
    return found
