"""Where a cluster has no node: pods that say they are ready, and a gateway that says it took routes up.

Deployments, autoscalers, garbage collection, admission and server-side apply are Kubernetes' own; no request is served.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from endcap.errors import EndcapError
from serving.targets.kserve.cluster import Cluster, path_of

Json = dict[str, Any]


class Fakes:
    """Keeps a node, its pods and the routes of one namespace as real ones would, until :meth:`stop`.

    ``behaviour``: by version, None for a pod that gets ready, or its container's exit code.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, *, behaviour: Callable[[str], int | None] = lambda _: None
    ) -> None:
        self._cluster, self._namespace, self.behaviour = cluster, namespace, behaviour
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fakes", daemon=True)

    def __enter__(self) -> Fakes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._stopping.wait(0.2):
            for work in (self._node, self._pods, self._routes):
                with contextlib.suppress(EndcapError):
                    work()

    def _node(self) -> None:
        if self._cluster.get("/api/v1/nodes/fake") is None:
            self._cluster.create("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "fake"}})
        node = self._cluster.get("/api/v1/nodes/fake") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        room = {"cpu": "64", "memory": "256Gi", "pods": "500"}
        condition = {"type": "Ready", "status": "True", "reason": "Fake", "lastHeartbeatTime": now,
                     "lastTransitionTime": node["metadata"]["creationTimestamp"]}  # fmt: skip
        self._cluster.merge("/api/v1/nodes/fake/status", {"status": {
            "capacity": room, "allocatable": room, "conditions": [condition]}})  # fmt: skip
        taints = [one for one in node["spec"].get("taints") or () if not one["key"].startswith("node.kubernetes.io/")]
        if taints != (node["spec"].get("taints") or []):
            self._cluster.merge("/api/v1/nodes/fake", {"spec": {"taints": taints}})

    def _pods(self) -> None:
        for pod in self._cluster.items(path_of("pods", self._namespace)) or ():
            meta, path = pod["metadata"], path_of("pods", self._namespace, pod["metadata"]["name"])
            if meta.get("deletionTimestamp"):
                self._cluster.delete(f"{path}?gracePeriodSeconds=0")
                continue
            if not pod["spec"].get("nodeName"):
                continue  # the scheduler's
            code = self.behaviour((meta.get("labels") or {}).get("endcap.dev/version", ""))
            ready = "True" if code is None else "False"
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            known = {one["type"]: one["status"] for one in pod["status"].get("conditions") or ()}
            if known.get("Ready") == ready:
                continue
            kinds = ("Initialized", "ContainersReady", "Ready", "PodScheduled")
            conditions = [{"type": kind, "status": ready if "eady" in kind else "True", "lastTransitionTime": now}
                          for kind in kinds]  # fmt: skip
            state: Json = {"running": {"startedAt": now}}
            last: Json = {}
            if code is not None:
                state = {"waiting": {"reason": "CrashLoopBackOff"}}
                last = {"terminated": {"exitCode": code, "message": "it said so", "startedAt": now, "finishedAt": now}}
            container = pod["spec"]["containers"][0]
            self._cluster.merge(f"{path}/status", {"status": {
                "phase": "Running", "podIP": "127.0.0.1", "startTime": now, "conditions": conditions,
                "containerStatuses": [{
                    "name": container["name"], "image": container["image"], "imageID": "", "ready": code is None,
                    "restartCount": 0 if code is None else 5, "state": state, "lastState": last,
                }]}})  # fmt: skip

    def _routes(self) -> None:
        for route in self._cluster.items(path_of("httproutes", self._namespace)) or ():
            meta = route["metadata"]
            parents = (route.get("status") or {}).get("parents") or ()
            seen = [one["observedGeneration"] for parent in parents for one in parent["conditions"]]
            if seen == [meta["generation"]]:
                continue
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            condition = {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
                         "observedGeneration": meta["generation"], "lastTransitionTime": now}  # fmt: skip
            parent = {"parentRef": route["spec"]["parentRefs"][0], "controllerName": "endcap.dev/fake",
                      "conditions": [condition]}  # fmt: skip
            self._cluster.merge(f"{path_of('httproutes', self._namespace, meta['name'])}/status",
                                {"status": {"parents": [parent]}})  # fmt: skip
