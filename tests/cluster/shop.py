"""A shop on a whole cluster: KServe, the chart with its operator and collector, one service, shoppers through Envoy
Gateway.

What a test does is what people do: it applies a Rollout and reads its status. The same tests run on the stand-in and on
KServe itself (:mod:`tests.cluster.kserve`).
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from serving.operator.objects import rollout_path
from serving.targets.kserve import Cluster
from serving.targets.kserve.cluster import path_of
from tests.cluster.access import Access
from tests.cluster.chart import CHART, RELEASE, helm, keys_secret, volume
from tests.cluster.kserve import DOMAIN, GATEWAY
from tests.cluster.kserve_load import Shoppers
from tests.kserve_world import SERVICE, service
from tests.packages import ITEMS, make_package
from tests.process import wait_until

Json = dict[str, Any]
PATIENCE_S = 300.0
WINDOW_S = 2.0
OBJECTIVES: Json = {
    "objectives": [
        {"name": "availability", "goal": 0.95, "good": "answered", "margin": 0.03},
        {"name": "latency", "goal": 0.5, "good": "answered", "withinMs": 1000, "margin": 0.3},
        {"name": "click-through", "goal": 0.1, "good": "clicked", "windowSeconds": WINDOW_S, "marginRelative": 0.5},
    ],
}  # fmt: skip
ROLLOUT: Json = {
    "lookSeconds": 1, "sticky": {},
    "steps": [
        {"share": 0.2, "minRequests": 100, "minSeconds": 5, "maxSeconds": 180},
        {"share": 0.5, "minRequests": 200, "minSeconds": 5, "maxSeconds": 180},
        {"share": 1, "minRequests": 100, "minSeconds": 3, "maxSeconds": 120},
    ],
}  # fmt: skip
GOOD, WRONG, UNSIGNED = ("1", "2", "3"), "4", "5"
LEASE_S = 5


@dataclass(frozen=True)
class Shop:
    """``system``: the release's namespace; ``namespace``: the service's. ``settings``: the release's values."""

    access: Access
    cluster: Cluster
    system: str
    namespace: str
    url: str
    root: Path
    settings: tuple[str, ...]
    service: str = SERVICE
    hostname: str | None = None
    """Of a route of endcap's own; None: KServe makes the service one."""

    @property
    def host(self) -> str:
        return self.hostname or f"{self.service}-{self.namespace}.{DOMAIN}"

    def load(self, **how: object) -> Shoppers:
        return Shoppers(self.url, self.host, feedback=self._feedback(), **how)  # type: ignore[arg-type]

    def _feedback(self) -> str:
        pods = self.access.get("pods", f"--namespace={self.system}", "-l", "app.kubernetes.io/name=endcap-collector")
        return f"http://{pods['items'][0]['status']['podIP']}:8080"

    # ---- what people do ----

    def start(self, label: str, **spec: Any) -> str:
        """Apply a Rollout of version ``label``; its name."""
        name = f"to-{label}-{secrets.token_hex(2)}"
        head = {"apiVersion": "endcap.dev/v1alpha1"}
        self.access.apply(
            {**head, "kind": "Objectives", "metadata": {"name": self.service},
             "spec": {**OBJECTIVES, "service": self.service}},
            {**head, "kind": "Rollout", "metadata": {"name": name},
             "spec": {**ROLLOUT, "service": self.service, "objectives": self.service,
                      "candidate": f"models:/{SERVICE}/{label}", **spec}},
            namespace=self.namespace,
        )  # fmt: skip
        return name

    def status(self, name: str) -> Json:
        # Not by kubectl: asked again and again it takes a whole core, and the servers are to have that.
        found = self.cluster.get(rollout_path(self.namespace, name)) or {}
        return dict(found.get("status") or {})

    def until(self, name: str, holds: Callable[[Json], bool], what: str, *, deadline_s: float = 600.0) -> Json:
        """The status, once ``holds`` of it."""
        seen: Json = {}

        def found() -> bool:
            seen.clear()
            seen.update(self.status(name))
            if seen.get("phase") == "refused":
                raise AssertionError(f"{name} was refused: {seen}")
            return holds(seen)

        wait_until(found, f"{name}: {what}", deadline_s=deadline_s, every_s=0.1)
        return dict(seen)

    def roll_out(self, label: str, **spec: Any) -> Json:
        """The status of a Rollout of version ``label`` that has ended."""
        name = self.start(label, **spec)
        return self.until(name, lambda seen: seen.get("phase") == "done", "ended")

    def upgrade(self, *settings: str) -> None:
        """``helm upgrade`` with further values; what is new runs when it returns."""
        more = [argument for one in settings for argument in ("--set", one)]
        helm(self.access, "upgrade", RELEASE, str(CHART), "--namespace", self.system, "--wait", "--timeout=5m",
             *self.settings, *more)  # fmt: skip

    def kill_operator(self) -> None:
        """Its process without a word, and its pod, so that no kubelet lets the next one wait."""
        pods = self.access.get("pods", f"--namespace={self.system}", "-l", "app.kubernetes.io/name=endcap-operator")
        for pod in pods["items"]:
            name = pod["metadata"]["name"]
            for number in processes_of(name):
                os.kill(number, signal.SIGKILL)
            self.access.kubectl("delete", "pod", name, f"--namespace={self.system}", "--grace-period=0", "--force",
                                "--ignore-not-found")  # fmt: skip

    def serve(self, name: str, *, hostname: str | None = None) -> Shop:
        """Another service beside it, of one replica, whose version 1 serves. ``hostname``: by a route of endcap's."""
        made = service(replicas=1 if hostname else 2)
        made["metadata"] |= {"name": name, "namespace": self.namespace}
        if hostname is not None:
            made["metadata"]["labels"] = {"networking.kserve.io/visibility": "cluster-local"}
            made["metadata"]["annotations"] |= {"endcap.dev/gateway": GATEWAY, "endcap.dev/hostnames": hostname}
        made["spec"]["predictor"]["model"]["storageUri"] = "pvc://models/1"
        made["spec"]["predictor"]["terminationGracePeriodSeconds"] = 20
        self.cluster.create(path_of("inferenceservices", self.namespace), made)
        return replace(self, service=name, hostname=hostname)

    # ---- what there is ----

    def spec(self) -> Json:
        found = self.cluster.get(path_of("inferenceservices", self.namespace, self.service)) or {}
        return dict(found["spec"])

    def serves(self) -> str:
        """The label of the stable version."""
        return str(self.spec()["predictor"]["labels"]["endcap.dev/version"])

    def pods(self) -> list[Json]:
        found = self.cluster.items(path_of("pods", self.namespace)) or ()
        there = [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]
        return [pod for pod in there if pod["metadata"]["name"].startswith(self.service)]


@contextlib.contextmanager
def open_shop(access: Access, cluster: Cluster, root: Path) -> Iterator[Shop]:
    """All of it, with version 1 serving."""
    models = root / "models"
    for label in GOOD:
        make_package(models / label, key=_key(root))
    wrong = list(ITEMS)
    random.Random(1).shuffle(wrong)
    make_package(models / WRONG, items=wrong, key=_key(root))
    make_package(models / UNSIGNED, sign=False)
    _readable(root)
    assert access.cluster is not None, "packages lie in a folder of this machine's"
    server, controller = access.image("server"), access.image("controller")
    gateway_namespace, _, gateway_name = GATEWAY.partition("/")
    access.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": gateway_namespace}},
        {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
         "metadata": {"name": gateway_name, "namespace": gateway_namespace},
         "spec": {"gatewayClassName": access.gateway_class, "listeners": [
             {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}]}},
    )  # fmt: skip
    with (
        access.namespace() as system,
        access.namespace() as namespace,
        volume(access, system, server) as storage,
    ):
        keys = keys_secret(root)
        for place in (system, namespace):
            access.apply(keys, namespace=place)
        values = root / "values.yaml"
        values.write_text(yaml.safe_dump(_values(server, controller, storage.partition("=")[2])))
        shop = Shop(access, cluster, system, namespace, f"http://{_proxy(access, gateway_name)}:10080", root,
                    ("--values", str(values)))  # fmt: skip
        helm(access, "install", RELEASE, str(CHART), "--namespace", system, "--wait", "--timeout=5m", *shop.settings)
        try:
            _serve_the_first(shop, models)
            yield shop
        finally:
            access.helm("uninstall", RELEASE, "--namespace", system, "--wait")
            cluster.delete(f"/api/v1/persistentvolumes/models-{namespace}")


def _values(server: str, controller: str, claim: str) -> Json:
    return {
        "images": {"server": server, "controller": controller},
        "operator": {"storageTemplate": "pvc://models/{version}", "leaseSeconds": LEASE_S,
                     "resources": {"requests": {"cpu": "20m"}}},
        "collector": {"windowSeconds": WINDOW_S, "storage": {"existingClaim": claim}},
        "runtimes": {"thresholdsMs": [1000], "drainSeconds": 8, "extraArgs": ["--workers=1", "--threads=1"],
                     "gpu": {"enabled": False}, "cpu": {"resources": {"requests": {"cpu": "20m", "memory": "128Mi"}}}},
    }  # fmt: skip


def _key(root: Path) -> Path:
    from endcap.package.signing import ensure_signing_key

    return ensure_signing_key(root / "keys")[0]


def _readable(root: Path) -> None:
    """Packages are read by a user of the image's own, through a folder of this machine's."""
    for place in (root, *root.parents):
        if place != Path("/") and not place.stat().st_mode & stat.S_IXOTH:
            place.chmod(place.stat().st_mode | 0o055)
    for place in (root / "models").rglob("*"):
        place.chmod(0o755 if place.is_dir() else 0o644)
    (root / "models").chmod(0o755)


def _proxy(access: Access, gateway: str) -> str:
    """The address of the gateway's Envoy itself. On a machine without idle cores the Service's address translation
    now and then resets a connection (Envoy: downstream_remote_disconnect), which is no rollout's doing."""

    def ready() -> list[str]:
        found = access.get(
            "pods", "--all-namespaces", f"--selector=gateway.envoyproxy.io/owning-gateway-name={gateway}"
        )
        return [
            str(pod["status"]["podIP"]) for pod in found["items"]
            if any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions") or ())
        ]  # fmt: skip

    wait_until(lambda: len(ready()) > 0, "the gateway's Envoy is ready", deadline_s=180)
    return ready()[0]


def _serve_the_first(shop: Shop, models: Path) -> None:
    namespace = shop.namespace
    name = f"models-{namespace}"
    shop.access.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name},
         "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "hostPath": {"path": str(models)},
                  "persistentVolumeReclaimPolicy": "Retain", "storageClassName": ""}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models", "namespace": namespace},
         "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": name,
                  "resources": {"requests": {"storage": "1Gi"}}}},
    )  # fmt: skip
    shop.serve(SERVICE)
    with shop.load(rate=5) as shoppers:
        wait_until(lambda: shoppers.versions["1"] > 20, "version 1 serves", deadline_s=PATIENCE_S)


def processes_of(pod: str) -> list[int]:
    """This machine's processes that run in the pod: its name is their host's."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if f"HOSTNAME={pod}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:
                continue
    assert found, f"no process of pod {pod}"
    return found
