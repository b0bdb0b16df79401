"""The operator over KServe where no pod runs: what it cannot roll out on, and what people do to a service meanwhile.

It is the operator's own process with the rights that the chart gives it, on a real API server; pods and the gateway say
that they are ready (:mod:`tests.cluster.kserve_fakes`). The same tests run on the stand-in and on KServe itself.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from serving.targets.kserve import Cluster, open_cluster
from serving.targets.kserve.cluster import path_of
from tests.cluster import cluster as clusters
from tests.cluster import programs
from tests.cluster.access import Access
from tests.cluster.chart import ACCOUNT, installed, know_kserve
from tests.cluster.kserve_fakes import furnished
from tests.cluster.operators import World, eventually, install
from tests.cluster.rights import as_account
from tests.kserve_world import SERVICE, service

Json = dict[str, Any]
NEVER_ENOUGH = [{"share": 0.2, "minRequests": 10**8, "minSeconds": 0, "maxSeconds": 10**5}, {"share": 1}]


class KServeWorld(World):
    """The same, with the operator that the chart runs."""

    objectives: ClassVar[Json] = {
        "objectives": [{"name": "availability", "goal": 0.99, "good": "answered", "margin": 0.02}]
    }

    def operator(self, **settings: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"operator-{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.operator"], stderr=log, cwd=Path(__file__).parents[2],
            env={**self.access.environment, "ENDCAP_NAMESPACE": self.namespace, "ENDCAP_POD_NAME": "operator",
                 "ENDCAP_HTTP_HOST": "127.0.0.1", "ENDCAP_HTTP_PORT": "0", "ENDCAP_LEASE_SECONDS": "5",
                 "ENDCAP_STORAGE_TEMPLATE": "pvc://models/{version}", **settings},
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def refused(self, name: str, reason: str, *, kind: str = "Accepted") -> str:
        """What its condition says, once there is one, and an Event that says the same."""
        found = self.eventually(lambda: (seen := self.condition(kind, name)).get("reason") == reason and seen,
                                f"{name} is refused: {reason}")  # fmt: skip
        self.eventually(lambda: reason in {one["reason"] for one in self.events(name)}, f"an event {reason}")
        return str(found["message"])

    def eventually(self, found: Any, what: str) -> Any:
        try:
            return eventually(found, what)
        except AssertionError as error:
            last = "\n".join(json.dumps(line) for line in self.log()[-5:])
            raise AssertionError(f"{error}\n{last}") from error


@pytest.fixture
def world(kserve_objects: Cluster, control_plane: Access, namespace: str, tmp_path: Path) -> Iterator[KServeWorld]:
    with (
        control_plane.namespace() as system,
        installed(control_plane, system, f"operator.watchNamespaces={{{namespace}}}"),
    ):
        operator = as_account(control_plane, system, ACCOUNT, tmp_path)
        found = KServeWorld(control_plane, namespace, tmp_path)
        found.operator(KUBECONFIG=str(operator.kubeconfig), ENDCAP_NAMESPACE=system, ENDCAP_WATCH_NAMESPACES=namespace)
        try:
            yield found
        finally:
            found.stop()


def create(cluster: Cluster, namespace: str, name: str, **how: Any) -> Json:
    made = service(**how)
    made["metadata"] |= {"namespace": namespace, "name": name}
    return cluster.create(path_of("inferenceservices", namespace), made)


def test_what_cannot_be_rolled_out_on_is_said_and_nothing_is_changed(
    world: KServeWorld, kserve_objects: Cluster
) -> None:
    cluster, namespace = kserve_objects, world.namespace
    raw, nameless, bare = (service() for _ in range(3))
    raw["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = "ModelMesh"
    del nameless["spec"]["predictor"]["name"]
    bare["spec"]["predictor"] = {"name": "v1", "containers": [{"name": "kserve-container", "image": "endcap/server"}]}
    kept = service()
    before = {}
    for name, made in {"raw": raw, "nameless": nameless, "bare": bare, "kept": kept}.items():
        made["metadata"] |= {"namespace": namespace, "name": name}
        before[name] = cluster.create(path_of("inferenceservices", namespace), made)["spec"]
    for name in ("gone", *before):
        world.apply(name, steps=NEVER_ENOUGH, sticky={"header": "x-bucket"} if name == "kept" else {})
    assert "create it" in world.refused("gone", "ServiceNotFound")
    assert "Standard" in world.refused("raw", "NotStandardMode")
    assert "spec.predictor.name" in world.refused("nameless", "PredictorWithoutModel")
    assert "ServingRuntime" in world.refused("bare", "PredictorWithoutModel")
    assert "sticky: {} in the Rollout" in world.refused("kept", "InvalidSpec")
    for name, was in before.items():
        assert spec(cluster, namespace, name) == was
        assert not world.get(name)["metadata"].get("finalizers")
        assert world.status(name)["phase"] == "refused"
        assert cluster.get(path_of("leases", namespace, f"endcap-{name}")) is None


def spec(cluster: Cluster, namespace: str, name: str = SERVICE) -> Json:
    return dict((cluster.get(path_of("inferenceservices", namespace, name)) or {})["spec"])


def until_ready(world: KServeWorld, cluster: Cluster, name: str) -> None:
    def ready() -> bool:
        found = cluster.get(path_of("inferenceservices", world.namespace, name)) or {}
        conditions = (found.get("status") or {}).get("conditions") or ()
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    world.eventually(ready, f"{name} is ready")


def test_a_service_that_people_edit_or_delete_meanwhile(world: KServeWorld, kserve_objects: Cluster) -> None:
    cluster, namespace = kserve_objects, world.namespace
    with furnished(cluster, namespace):
        for name in ("edited", "deleted", "rolling"):
            create(cluster, namespace, name)
        for name in ("edited", "deleted", "rolling"):
            until_ready(world, cluster, name)
        # A canary that somebody made by hand is nobody's to take over.
        by_hand = {"predictor": {"name": "v9", "minReplicas": 1, "model": {
            "modelFormat": {"name": "endcap"}, "storageUri": "pvc://models/9"}}, "trafficPercent": 10}  # fmt: skip
        cluster.merge(path_of("inferenceservices", namespace, "rolling"), {"spec": {"canary": [by_hand]}})
        was = spec(cluster, namespace, "rolling")
        for name in ("edited", "deleted", "rolling"):
            world.apply(name, steps=NEVER_ENOUGH, sticky={})
        for name in ("edited", "deleted"):
            world.until("observing", name)
            assert spec(cluster, namespace, name)["canary"][0]["trafficPercent"] == 20
        world.apply("second", service="edited", steps=NEVER_ENOUGH, sticky={})
        assert "abort" in world.refused("second", "ServiceBusy")

        canary = spec(cluster, namespace, "edited")["canary"]
        canary[0]["trafficPercent"] = 60
        world.kubectl(
            "patch", "inferenceservice", "edited", "--type=merge", "-p", json.dumps({"spec": {"canary": canary}})
        )
        world.kubectl("annotate", "rollout", "edited", "endcap.dev/promote=ann")
        ended = world.until("done", "edited")
        assert ended["outcome"] == "rolled_back"
        assert "somebody else changed" in ended["reason"] and "60 %" in ended["reason"]
        assert not spec(cluster, namespace, "edited").get("canary")
        assert any("somebody else changed" in one["message"] for one in world.events("edited"))

        world.kubectl("delete", "inferenceservice", "deleted", "--timeout=60s")
        world.kubectl("annotate", "rollout", "deleted", "endcap.dev/abort=ann")
        assert "create it" in world.refused("deleted", "ServiceNotFound")
        world.kubectl("delete", "rollout", "deleted", "--timeout=240s")

        assert spec(cluster, namespace, "rolling") == was
        assert "versions 1, 9" in world.refused("rolling", "AlreadyRolling")


def test_what_the_cluster_lacks_is_said(own_control_plane: clusters.Cluster, tmp_path: Path) -> None:
    """Without the Gateway API, and with a KServe that was not told of it: here no controller runs at all, and what it
    would leave behind is written by hand."""
    access = Access(own_control_plane.kubeconfig, cluster=own_control_plane)
    know_kserve(access)
    install(access)
    with (
        contextlib.closing(open_cluster(kubeconfig=str(access.kubeconfig))) as cluster,
        access.namespace() as namespace,
    ):
        world = KServeWorld(access, namespace, tmp_path)
        create(cluster, namespace, "shop")
        was = spec(cluster, namespace, "shop")
        world.operator(ENDCAP_WATCH_NAMESPACES=namespace)
        try:
            world.apply("shop", steps=NEVER_ENOUGH, sticky={})
            assert "install the Gateway API" in world.refused("shop", "NoGatewayAPI")
            crds = programs.ensure_documents(programs.GATEWAY_CRDS)
            access.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(crds))
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
            cluster.merge(
                f"{path_of('inferenceservices', namespace, 'shop')}/status", {"status": {"conditions": [ready]}}
            )
            world.apply("again", service="shop", steps=NEVER_ENOUGH, sticky={})
            assert "enableGatewayApi: true" in world.refused("again", "GatewayAPIDisabled")
            assert spec(cluster, namespace, "shop") == was
        finally:
            world.stop()
