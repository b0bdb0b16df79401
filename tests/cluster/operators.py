"""The operator's own process over simulated targets in a namespace, and rollouts for it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from serving.operator.objects import events_path, rollout_path
from serving.targets.kserve import open_cluster
from tests.cluster.access import Access
from tests.cluster.chart import CHART
from tests.operator_world import OBJECTIVES, ROLLOUT

PATIENCE_S = 240.0
GOOD, WORSE = {"clicked": 0.1}, {"clicked": 0.01}
FAST: dict[str, Any] = {
    "lookSeconds": 0.2,
    "steps": [
        {"share": 0.2, "minRequests": 50, "minSeconds": 0.2, "maxSeconds": 300},
        {"share": 1, "minRequests": 50, "minSeconds": 0, "maxSeconds": 300},
    ],
}  # fmt: skip
LAST = FAST["steps"][1]


def eventually(found: Callable[[], Any], what: str) -> Any:
    ends_s = time.monotonic() + PATIENCE_S
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < ends_s, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.1)


def install(access: Access) -> None:
    access.kubectl("apply", "--server-side", "-f", str(CHART / "crds"))
    for name in ("rollouts", "objectives"):
        access.kubectl("wait", "--for=condition=Established", f"crd/{name}.endcap.dev", "--timeout=60s")


class World:
    """A namespace, the services in it, and operators."""

    objectives: ClassVar[dict[str, Any]] = OBJECTIVES

    def __init__(self, access: Access, namespace: str, folder: Path) -> None:
        self.access, self.namespace, self.folder = access, namespace, folder
        self.api = open_cluster(kubeconfig=str(access.kubeconfig))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.behave({})

    def behave(self, behaviours: dict[str, Any]) -> None:
        (self.folder / "behaviours.json").write_text(json.dumps(behaviours))

    def operator(self, **settings: str) -> subprocess.Popen[bytes]:
        number = len(self.processes)
        environment = {
            **self.access.environment, "ENDCAP_NAMESPACE": self.namespace, "ENDCAP_WATCH_NAMESPACES": self.namespace,
            "ENDCAP_HTTP_HOST": "127.0.0.1", "ENDCAP_HTTP_PORT": "0", "ENDCAP_LEASE_SECONDS": "5",
            "ENDCAP_POD_NAME": f"operator-{number}", **settings,
        }  # fmt: skip
        log = (self.folder / f"operator-{number}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.simulated_operator", str(self.folder)], env=environment, stderr=log,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def log(self, number: int = 0) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"operator-{number}.log").read_text().splitlines() if line]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.api.close()

    def apply(self, name: str = "shop", **spec: Any) -> None:
        service = spec.pop("service", name)
        documents = [
            {"kind": "Objectives", "metadata": {"name": service}, "spec": {**self.objectives, "service": service}},
            {"kind": "Rollout", "metadata": {"name": name},
             "spec": {**ROLLOUT, **FAST, "service": service, "objectives": service, **spec}},
        ]  # fmt: skip
        text = yaml.safe_dump_all({"apiVersion": "endcap.dev/v1alpha1", **one} for one in documents)
        self.access.kubectl("apply", "--namespace", self.namespace, "-f", "-", stdin=text)

    def kubectl(self, *arguments: str) -> str:
        return self.access.kubectl(*arguments, "--namespace", self.namespace)

    def get(self, name: str = "shop") -> dict[str, Any]:
        # Not by kubectl: asked again and again it takes a whole core.
        found = self.api.get(rollout_path(self.namespace, name))
        assert found is not None, f"there is no rollout {name}"
        return found

    def status(self, name: str = "shop") -> dict[str, Any]:
        return dict(self.get(name).get("status") or {})

    def condition(self, kind: str, name: str = "shop") -> dict[str, Any]:
        found = [one for one in self.status(name).get("conditions", []) if one["type"] == kind]
        return found[0] if found else {}

    def until(self, phase: str, name: str = "shop") -> dict[str, Any]:
        return dict(eventually(lambda: (found := self.status(name)).get("phase") == phase and found, f"{name} {phase}"))

    def target(self, service: str = "shop") -> dict[str, Any]:
        found = self.folder / f"{self.namespace}.{service}.json"
        return dict(json.loads(found.read_text())) if found.exists() else {}

    def events(self, name: str = "shop") -> list[dict[str, Any]]:
        found = self.api.items(events_path(self.namespace)) or []
        return [one for one in found if one["involvedObject"]["name"] == name]
