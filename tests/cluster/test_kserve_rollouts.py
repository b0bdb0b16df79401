"""Rollouts on a real Kubernetes under open-loop load through Envoy Gateway: what shoppers see of them.

The engine is the one that runs on a laptop. The same tests run on the stand-in and on KServe itself
(:mod:`tests.cluster.kserve`); pods run the server's image, clients never try again.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from endcap.objectives import Good, Objective, Objectives
from endcap.processes import free_port
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome
from serving.targets import ModelVersion
from serving.targets.kserve import (
    Cluster,
    EnvoyGatewayCounts,
    Feedback,
    FixedDelivery,
    KServeTarget,
    Patience,
    PodScrapes,
    ServerTelemetry,
    Storage,
    Telemetry,
)
from serving.targets.kserve.cluster import path_of
from tests.cluster import images
from tests.cluster.access import Access
from tests.cluster.kserve import DOMAIN, GATEWAY, kserve
from tests.cluster.kserve_load import Shoppers
from tests.kserve_world import SERVICE, service
from tests.packages import ITEMS, make_package
from tests.process import started, wait_until

WINDOW_S = 2.0
OBJECTIVES = Objectives(
    "recommender", "recommender",
    (
        Objective("availability", 0.95, Good.ANSWERED, None, None, 0.03, None),
        Objective("latency", 0.5, Good.ANSWERED, 1000, None, 0.3, None),
        Objective("click-through", 0.1, Good.CLICKED, None, WINDOW_S, None, 0.5),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "recommender", "recommender", "models:/recommender/2", "recommender",
    (Step(0.2, 100, 5, 180), Step(0.5, 200, 5, 180), Step(1.0, 100, 3, 120)), 0.05, 0.05, 1.0,
)  # fmt: skip
LABELS = ("1", "2", "3", "wrong", "unsigned")


@dataclass(frozen=True)
class Shop:
    access: Access
    cluster: Cluster
    namespace: str
    url: str
    feedback: str
    root: Path

    @property
    def host(self) -> str:
        return f"{SERVICE}-{self.namespace}.{DOMAIN}"

    def load(self, **how: object) -> Shoppers:
        return Shoppers(self.url, self.host, feedback=self.feedback, **how)  # type: ignore[arg-type]

    def telemetry(self) -> ServerTelemetry:
        gateway = EnvoyGatewayCounts(self.cluster, SERVICE, self.namespace, direct=True)
        return ServerTelemetry(PodScrapes(), thresholds_ms=(1000,), feedback=Feedback(self.feedback), gateway=gateway)

    def target(self, telemetry: Telemetry | None = None) -> KServeTarget:
        delivery = FixedDelivery({label: Storage(f"pvc://models/{label}") for label in LABELS})
        return KServeTarget(
            self.cluster, SERVICE, self.namespace, delivery, telemetry=telemetry, policy=True,
            patience=Patience(capacity_s=240, route_s=120, healthy_s=60),
        )  # fmt: skip

    def roll_out(self, label: str, *, telemetry: ServerTelemetry | None = None) -> RolloutResult:
        counting = telemetry or self.telemetry()
        target = self.target(counting)
        stable = next(iter(target.observe().shares))
        with contextlib.closing(counting):
            return run_rollout(replace(SPEC, candidate=f"models:/recommender/{label}"), OBJECTIVES,
                           ModelVersion(label, Path()), target, self.root / f"rollout-{label}-{secrets.token_hex(3)}",
                           packages={stable: Path()})  # fmt: skip

    def stable(self) -> dict:
        found = self.cluster.get(path_of("inferenceservices", self.namespace, SERVICE)) or {}
        return found["spec"]

    def pods(self) -> list[dict]:
        found = self.cluster.items(path_of("pods", self.namespace)) or ()
        there = [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]
        return [pod for pod in there if pod["metadata"]["name"].startswith(SERVICE)]


def runtime(image: str) -> dict:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1", "kind": "ServingRuntime", "metadata": {"name": "endcap-cpu"},
        "spec": {
            "supportedModelFormats": [{"name": "endcap", "version": "1", "autoSelect": True}],
            "protocolVersions": ["v2"],
            "volumes": [{"name": "keys", "secret": {"secretName": "endcap-keys"}}],
            "containers": [{
                "name": "kserve-container", "image": image, "imagePullPolicy": "IfNotPresent",
                "args": ["--package=/mnt/models", "--public-key=/etc/endcap/keys/signing.pub",
                         "--impression-key=/etc/endcap/keys/impression.key", "--version=$(ENDCAP_VERSION)",
                         "--zone=node", "--host=0.0.0.0", "--port=8080", "--workers=1", "--threads=1", "--drain-s=8",
                         "--thresholds-ms=1000"],
                "env": [
                    {"name": "ENDCAP_VERSION",
                     "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['endcap.dev/version']"}}},
                    {"name": "ENDCAP_POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
                ],
                "ports": [{"name": "http1", "containerPort": 8080, "protocol": "TCP"}],
                "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": 8080}, "periodSeconds": 1,
                                   "failureThreshold": 3, "timeoutSeconds": 5},
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [{"name": "keys", "mountPath": "/etc/endcap/keys", "readOnly": True}],
                "resources": {"requests": {"cpu": "20m", "memory": "128Mi"}},
            }],
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def shop(full_cluster: Access, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    root = tmp_path_factory.mktemp("shop")
    models = root / "models"
    for label in ("1", "2", "3"):
        make_package(models / label, key=_key(root))
    wrong = list(ITEMS)
    random.Random(1).shuffle(wrong)
    make_package(models / "wrong", items=wrong, key=_key(root))
    make_package(models / "unsigned", sign=False)
    _readable(root)
    assert full_cluster.cluster is not None, "images are loaded into a cluster of ours"
    full_cluster.cluster.node.load(images.ensure("server"))
    key = root / "impression.key"
    key.write_bytes(secrets.token_bytes(32).hex().encode())
    key.chmod(0o600)
    gateway_namespace, _, gateway_name = GATEWAY.partition("/")
    full_cluster.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": gateway_namespace}},
        {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
         "metadata": {"name": gateway_name, "namespace": gateway_namespace},
         "spec": {"gatewayClassName": "envoy", "listeners": [
             {"name": "http", "port": 80, "protocol": "HTTP", "allowedRoutes": {"namespaces": {"from": "All"}}}]}},
    )  # fmt: skip

    def address() -> str | None:
        found = full_cluster.get("gateway", gateway_name, f"--namespace={gateway_namespace}")
        given = (found.get("status") or {}).get("addresses") or ()
        return str(given[0]["value"]) if given else None

    wait_until(lambda: address() is not None, "the gateway has an address", deadline_s=120)
    port = free_port("127.0.0.1")
    collector = ["-m", "serving.feedback", "--database", str(root / "feedback.sqlite"), "--impression-key", str(key),
                 "--window-s", f"{WINDOW_S:g}", "--port", str(port)]  # fmt: skip
    with (
        kserve(full_cluster) as cluster,
        full_cluster.namespace() as namespace,
        started(collector, port, root / "collector.log"),
    ):
        url = f"http://{_proxy(full_cluster, gateway_name)}:10080"
        shop = Shop(full_cluster, cluster, namespace, url, f"http://127.0.0.1:{port}", root)
        _set_up(shop, models, key)
        yield shop
        cluster.delete(f"/api/v1/persistentvolumes/models-{namespace}")


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


def _set_up(shop: Shop, models: Path, key: Path) -> None:
    namespace = shop.namespace
    keys = {"signing.pub": (shop.root / "keys" / "signing.pub").read_text(), "impression.key": key.read_text()}
    volume = f"models-{namespace}"
    shop.access.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": volume},
         "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "hostPath": {"path": str(models)},
                  "persistentVolumeReclaimPolicy": "Retain", "storageClassName": ""}},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models", "namespace": namespace},
         "spec": {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": volume,
                  "resources": {"requests": {"storage": "1Gi"}}}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "endcap-keys", "namespace": namespace},
         "stringData": keys},
    )  # fmt: skip
    shop.cluster.create(f"/apis/serving.kserve.io/v1alpha1/namespaces/{namespace}/servingruntimes",
                        runtime(images.name("server")))  # fmt: skip
    made = service(replicas=2)
    made["metadata"]["namespace"] = namespace
    made["spec"]["predictor"]["model"]["storageUri"] = "pvc://models/1"
    made["spec"]["predictor"]["terminationGracePeriodSeconds"] = 20
    shop.cluster.create(path_of("inferenceservices", namespace), made)
    with shop.load(rate=5) as shoppers:
        wait_until(lambda: shoppers.versions["1"] > 20, "version 1 serves", deadline_s=300)
        shop.target().acquire("the gateway's policy")
        asked = shoppers.asked
        wait_until(lambda: shoppers.asked > asked + 50, "the policy is in force", deadline_s=120)


def test_a_good_version_is_promoted_and_no_request_of_five_thousand_fails(shop: Shop) -> None:
    telemetry = shop.telemetry()
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 100, "shoppers ask", deadline_s=60)
        result = shop.roll_out("2", telemetry=telemetry)
        wait_until(lambda: shoppers.asked > 5_200, "five thousand asked", deadline_s=900)
    assert result.outcome is Outcome.PROMOTED, result.reason
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert shoppers.asked >= 5_000
    assert shop.stable()["predictor"]["name"] == "v2"
    assert not shop.stable().get("canary")
    servers = telemetry.servers()
    print("by the servers", servers, "as shoppers saw it", shoppers.versions)  # noqa: T201
    assert 100 <= servers["2"].total <= shoppers.versions["2"], "counted until the rollout ended"


def test_a_version_that_ends_at_its_start_is_given_up_and_stable_is_untouched(shop: Shop) -> None:
    before = {pod["metadata"]["uid"] for pod in shop.pods()}
    with shop.load(rate=50) as shoppers:
        result = shop.roll_out("unsigned")
    assert result.outcome is Outcome.REFUSED
    assert "code 3" in result.reason
    assert "sign" in result.reason
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert set(shoppers.versions) == {shop.stable()["predictor"]["labels"]["endcap.dev/version"]}
    assert before <= {pod["metadata"]["uid"] for pod in shop.pods()}
    assert not shop.stable().get("canary")


def test_a_fast_healthy_and_wrong_version_is_rolled_back_by_what_shoppers_click(shop: Shop) -> None:
    stable = shop.stable()["predictor"]
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 100, "shoppers ask", deadline_s=60)
        result = shop.roll_out("wrong")
    assert result.outcome is Outcome.ROLLED_BACK, result.reason
    assert "click-through" in result.reason
    assert shoppers.versions["wrong"] > 0
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert shop.stable()["predictor"] == stable
    assert not shop.stable().get("canary")


def test_a_server_that_is_killed_costs_no_shopper_a_request(shop: Shop) -> None:
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 300, "shoppers ask", deadline_s=60)
        victim = next(pod for pod in shop.pods())
        for number in _processes_of(victim["metadata"]["uid"]):
            os.kill(number, signal.SIGKILL)
        asked = shoppers.asked
        wait_until(lambda: shoppers.asked > asked + 1_500, "shoppers go on", deadline_s=120)

    def restarted() -> bool:
        now = next(pod for pod in shop.pods() if pod["metadata"]["uid"] == victim["metadata"]["uid"])
        return now["status"]["containerStatuses"][0]["restartCount"] > 0

    wait_until(restarted, "the container was started again", deadline_s=120)
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])


def _processes_of(pod: str) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                if f"ENDCAP_POD={pod}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:
                continue
    assert found, f"no process of pod {pod}"
    return found
