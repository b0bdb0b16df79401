"""Where a cluster has no node: pods that say they are ready, and a gateway that says it took routes up.

Deployments, autoscalers, garbage collection, admission and server-side apply are Kubernetes' own; no request is served.
"""

from __future__ import annotations

import contextlib
import http.server
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from endcap.errors import EndcapError
from serving.targets.kserve.cluster import Cluster, path_of
from tests.kserve_world import RUNTIME

Json = dict[str, Any]
METRICS_PORT = 8080
_EVERY_S = 0.2
_HEARTBEAT_S = 1.0


@contextlib.contextmanager
def furnished(cluster: Cluster, namespace: str) -> Iterator[Fakes]:
    """A namespace with what services need to get ready: a runtime, the volume with models, and the fakes."""
    cluster.create(f"/apis/serving.kserve.io/v1alpha1/namespaces/{namespace}/servingruntimes", RUNTIME)
    volume = {"accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": f"models-{namespace}"}
    cluster.create("/api/v1/persistentvolumes", {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": f"models-{namespace}"},
        "spec": {"capacity": {"storage": "1Gi"}, "accessModes": ["ReadOnlyMany"], "hostPath": {"path": "/tmp"},
                 "persistentVolumeReclaimPolicy": "Retain", "storageClassName": ""}})  # fmt: skip
    cluster.create(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
        "spec": {**volume, "resources": {"requests": {"storage": "1Gi"}}}})  # fmt: skip
    with Fakes(cluster, namespace) as found:
        yield found
    cluster.delete(f"/api/v1/persistentvolumes/models-{namespace}")


class _Metrics(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'endcap_server_attempts_total{route="recommend",outcome="answered"} 0\n'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Fakes:
    """Keeps a node, its pods and the routes of one namespace as real ones would, until :meth:`stop`.

    ``behaviour``: by version, None for a pod that gets ready, or its container's exit code. What its pods tell of
    themselves is that nobody has asked them anything.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, *, behaviour: Callable[[str], int | None] = lambda _: None
    ) -> None:
        self._cluster, self._namespace, self.behaviour = cluster, namespace, behaviour
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fakes", daemon=True)
        self._address = f"127.{secrets.randbelow(250) + 2}.{secrets.randbelow(250) + 2}.2"
        """An address of this machine's own, for a port that is always the same."""
        self._metrics = http.server.ThreadingHTTPServer((self._address, METRICS_PORT), _Metrics)

    def __enter__(self) -> Fakes:
        self._thread.start()
        threading.Thread(target=self._metrics.serve_forever, name="metrics", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(timeout=30)
        self._metrics.shutdown()
        self._metrics.server_close()

    def _run(self) -> None:
        heard_s = 0.0
        while not self._stopping.wait(_EVERY_S):
            if time.monotonic() - heard_s > _HEARTBEAT_S:
                with contextlib.suppress(EndcapError):
                    self._node()
                    heard_s = time.monotonic()
            for work in (self._pods, self._routes):
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
                "phase": "Running", "podIP": self._address, "startTime": now, "conditions": conditions,
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
