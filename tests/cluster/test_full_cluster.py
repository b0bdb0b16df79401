"""The whole cluster: pods of our images, found by name and through Envoy Gateway; fake nodes that fill up."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.cluster import images, pods
from tests.cluster.access import Access
from tests.packages import ITEMS, make_package
from tests.process import wait_until

PATIENCE_S = 180.0


def test_a_server_pod_answers_through_the_gateway(full_cluster: Access, pod_namespace: str, tmp_path: Path) -> None:
    image = full_cluster.image("server")
    make_package(tmp_path / "package")
    full_cluster.apply(
        pods.config_map("package", tmp_path / "package"),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "keys"},
            "data": {"signing.pub": (tmp_path / "keys" / "signing.pub").read_text()},
        },
        *pods.server("recommender", image, "package", "keys", replicas=2),
        *pods.gateway("shop", full_cluster.gateway_class, "recommender"),
        namespace=pod_namespace,
    )
    full_cluster.wait("deployment/recommender", "condition=Available", pod_namespace)
    full_cluster.wait("gateway/shop", "condition=Programmed", pod_namespace)
    url = full_cluster.gateway_url("shop", pod_namespace)

    def answers() -> bool:
        try:
            return httpx.get(f"{url}/v2/health/ready", timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    wait_until(answers, "the gateway reaches the pods", deadline_s=PATIENCE_S)
    answer = httpx.post(f"{url}/v1/recommend", json={"shopper": "1", "history": [ITEMS[4]]}, timeout=30.0)
    assert answer.status_code == 200
    assert answer.json()["items"][:2] == [ITEMS[5], ITEMS[6]]

    # By its Service's name, from another pod: DNS and kube-proxy.
    asked = full_cluster.kubectl(
        *("exec", "deployment/recommender", f"--namespace={pod_namespace}", "--container=server", "--", "python", "-c"),
        "import urllib.request as r; print(r.urlopen('http://recommender/v2/health/ready', timeout=30).status)",
    )
    assert asked.strip() == "200"


def test_a_package_signed_by_another_is_not_served(full_cluster: Access, pod_namespace: str, tmp_path: Path) -> None:
    image = full_cluster.image("server")
    make_package(tmp_path / "one" / "package")
    make_package(tmp_path / "other" / "package")
    full_cluster.apply(
        pods.config_map("package", tmp_path / "one" / "package"),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "keys"},
            "data": {"signing.pub": (tmp_path / "other" / "keys" / "signing.pub").read_text()},
        },
        *pods.server("recommender", image, "package", "keys"),
        namespace=pod_namespace,
    )

    def refused() -> bool:
        found = full_cluster.get("pods", "--selector=app=recommender", f"--namespace={pod_namespace}")["items"]
        ended = [
            (status.get("lastState") or {}).get("terminated") or status["state"].get("terminated") or {}
            for pod in found
            for status in pod.get("status", {}).get("containerStatuses", [])
        ]
        return any(state.get("exitCode") == 3 for state in ended)

    wait_until(
        refused, "the server ends with the exit code of a package that must not be served", deadline_s=PATIENCE_S
    )


def test_gpu_pods_fill_the_fake_gpu_nodes_and_no_more(full_cluster: Access, pod_namespace: str) -> None:
    if full_cluster.cluster is None:
        return  # somebody's own nodes: nothing is promised of them
    tolerations = [{"key": key, "operator": "Exists"} for key in ("kwok.x-k8s.io/node", "nvidia.com/gpu")]
    full_cluster.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "hungry"},
            "spec": {
                "replicas": 17,
                "selector": {"matchLabels": {"app": "hungry"}},
                "template": {
                    "metadata": {"labels": {"app": "hungry"}},
                    "spec": {
                        "tolerations": tolerations,
                        "containers": [
                            {"name": "none", "image": "none", "resources": {"limits": {"nvidia.com/gpu": "1"}}}
                        ],
                    },
                },
            },
        },
        namespace=pod_namespace,
    )

    def placed() -> bool:
        found = full_cluster.get("pods", f"--namespace={pod_namespace}")["items"]
        phases = sorted(pod["status"].get("phase", "") for pod in found)
        return phases == ["Pending"] + ["Running"] * 16

    wait_until(placed, "16 GPUs are taken and one pod waits", deadline_s=PATIENCE_S)
    waiting = full_cluster.get("pods", f"--namespace={pod_namespace}", "--field-selector=status.phase=Pending")["items"]
    reasons = [condition.get("message", "") for condition in waiting[0]["status"]["conditions"]]
    assert any("Insufficient nvidia.com/gpu" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("role", "command", "phase", "said"),
    [
        # The pod has no account: the operator ends, and says what it misses.
        ("controller", ("python", "-m", "serving.operator"), "Failed", "no cluster is known"),
        ("load", ("python", "-m", "loadtests.run", "--help"), "Succeeded", "usage"),
    ],
)
def test_other_images_run_as_nobody_without_writing(
    full_cluster: Access, pod_namespace: str, role: str, command: tuple[str, ...], phase: str, said: str
) -> None:
    restricted = "pod-security.kubernetes.io/enforce=restricted"
    full_cluster.kubectl("label", "namespace", pod_namespace, restricted)
    full_cluster.apply(pods.once(role, full_cluster.image(role), *command), namespace=pod_namespace)

    def reached() -> str:
        return str(full_cluster.get("pod", role, f"--namespace={pod_namespace}")["status"].get("phase"))

    wait_until(lambda: reached() in {"Succeeded", "Failed"}, f"the pod of the image {role} ends", deadline_s=PATIENCE_S)
    log = full_cluster.kubectl("logs", role, f"--namespace={pod_namespace}")
    assert reached() == phase, log
    assert said in log


def test_the_server_image_is_small_and_carries_nothing_heavy(full_cluster: Access) -> None:
    archive = images.ensure("server")
    assert images.unpacked_bytes(archive) <= 400e6
    packages = images.packages(archive)
    assert {"onnxruntime", "uvicorn", "numpy"} <= packages
    assert not packages & {"torch", "kserve", "pandas", "pip", "mlflow"}
