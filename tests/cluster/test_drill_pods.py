"""The chart's drill on a real API server, run by Chaos Toolkit as the chart's own ServiceAccount.

Whether pods run is not promised here, so a thread of the test says of the pods of one Deployment that they are ready,
as a kubelet would; deleting and replacing them is the cluster's own work.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from chaos.pods import Pod, choose_pod
from endcap.errors import TargetError
from tests.cluster.access import Access
from tests.cluster.chart import CHART, installed, know_kserve
from tests.process import wait_until

Json = dict[str, Any]
EXPERIMENT = CHART / "files" / "drills" / "pod-kill.yaml"
PATIENCE_S = 180.0


def test_the_only_pod_of_a_version_is_never_chosen() -> None:
    pods = [Pod("a", "1", "7", True), Pod("b", "2", "7", True), Pod("c", "3", "8", True), Pod("d", "4", "8", False)]
    assert {choose_pod(pods, seed=seed).name for seed in range(50)} == {"a", "b"}
    with pytest.raises(TargetError, match="one ready pod only"):
        choose_pod(pods[1:], seed=7)
    with pytest.raises(TargetError, match="no ready pod"):
        choose_pod([pods[3]], seed=7)


def deployment(replicas: int) -> Json:
    labels = {"serving.kserve.io/inferenceservice": "recommender", "endcap.dev/version": "7"}
    container = {"name": "a", "image": "endcap/nothing:1", "resources": {"requests": {"cpu": "1m"}}}
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "recommender"},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels},
                 "template": {"metadata": {"labels": labels}, "spec": {"containers": [container],
                                                                       "nodeSelector": {"endcap.dev/none": "here"}}}},
    }  # fmt: skip


def names(access: Access, namespace: str) -> set[str]:
    found = access.get("pods", f"--namespace={namespace}")["items"]
    return {one["metadata"]["name"] for one in found if "deletionTimestamp" not in one["metadata"]}


@contextlib.contextmanager
def made_ready(access: Access, namespace: str, *, only_first: int = 1_000) -> Iterator[None]:
    """While in here, pods are said to be ready as they come; ``only_first``: so many of them, and no more."""
    ended, said = threading.Event(), set()
    ready = json.dumps({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}})

    def say() -> None:
        while not ended.wait(0.2):
            for name in sorted(names(access, namespace) - said)[: only_first - len(said)]:
                patched = access.try_kubectl("patch", "pod", name, f"--namespace={namespace}", "--subresource=status",
                                             f"--patch={ready}")  # fmt: skip
                if patched.returncode == 0:
                    said.add(name)

    thread = threading.Thread(target=say)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def drilled(control_plane: Access, namespace: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A namespace with a service of two pods, and the environment of a pod that drills it."""
    know_kserve(control_plane)
    with control_plane.namespace() as shop:
        control_plane.apply(deployment(2), namespace=shop)
        wait_until(lambda: len(names(control_plane, shop)) == 2, "two pods", deadline_s=PATIENCE_S)
        with installed(control_plane, namespace, "drills.enabled=true", f"drills.namespace={shop}",
                       "drills.service=recommender", "operator.enabled=false"):  # fmt: skip
            token = control_plane.kubectl("create", "token", "endcap-drill", "--namespace", namespace).strip()
            cluster = yaml.safe_load(control_plane.kubectl("config", "view", "--raw", "--minify"))["clusters"][0][
                "cluster"
            ]
            authority = cluster.get("certificate-authority-data")
            (tmp_path / "token").write_text(token)
            (tmp_path / "ca.crt").write_bytes(
                base64.b64decode(authority) if authority else Path(cluster["certificate-authority"]).read_bytes()
            )
            server = urlsplit(cluster["server"])
            yield shop, {
                "KUBERNETES_SERVICE_HOST": str(server.hostname), "KUBERNETES_SERVICE_PORT": str(server.port or 443),
                "ENDCAP_SERVICE_ACCOUNT_FOLDER": str(tmp_path), "ENDCAP_DRILL_NAMESPACE": shop,
                "ENDCAP_DRILL_SERVICE": "recommender", "HOME": str(tmp_path),
            }  # fmt: skip


def drill(environment: dict[str, str], **settings: str) -> tuple[int, Json]:
    """Exit code and journal of the chart's own command."""
    ran = subprocess.run([sys.executable, "-m", "chaos.pods", str(EXPERIMENT)], capture_output=True, text=True,
                         env={"PATH": os.environ["PATH"], **environment, **settings}, check=False)  # fmt: skip
    return ran.returncode, json.loads(ran.stdout.strip().splitlines()[-1])


def test_a_pod_is_killed_and_replaced(control_plane: Access, drilled: tuple[str, dict[str, str]]) -> None:
    shop, environment = drilled
    before = names(control_plane, shop)
    with made_ready(control_plane, shop):
        wait_until(lambda: ready(control_plane, shop) == 2, "both are ready", deadline_s=PATIENCE_S)
        code, journal = drill(environment)
    assert code == 0 and journal["status"] == "completed" and not journal["deviated"], journal
    killed = journal["run"][0]["output"]
    assert before - names(control_plane, shop) == {killed}
    assert journal["run"][1]["output"] < 120


def test_a_pod_that_is_not_replaced_in_time_is_a_drill_that_was_not_held(
    control_plane: Access, drilled: tuple[str, dict[str, str]]
) -> None:
    shop, environment = drilled
    with made_ready(control_plane, shop, only_first=2):
        wait_until(lambda: ready(control_plane, shop) == 2, "both are ready", deadline_s=PATIENCE_S)
        code, journal = drill(environment, ENDCAP_DRILL_WITHIN_S="3")
    assert code == 4
    assert "do not serve after 3 s" in json.dumps(journal["run"][1]["exception"])


def test_without_a_steady_state_nothing_is_killed_and_elsewhere_nothing_is_allowed(
    control_plane: Access, drilled: tuple[str, dict[str, str]], namespace: str
) -> None:
    shop, environment = drilled
    before = names(control_plane, shop)
    code, journal = drill(environment)
    assert (code, journal["run"]) == (4, []), journal
    assert names(control_plane, shop) == before
    code, journal = drill(environment | {"ENDCAP_DRILL_NAMESPACE": namespace})
    assert code == 4 and "403" in json.dumps(journal)


def ready(access: Access, namespace: str) -> int:
    found = access.get("pods", f"--namespace={namespace}")["items"]
    return sum(any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
               for pod in found)  # fmt: skip
