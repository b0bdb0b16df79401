"""``python -m benchmarks.operator``: a thousand rollouts in one operator process, beside Argo Rollouts."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import ending
from benchmarks.operator import argo, ours
from benchmarks.operator.measure import requests_served
from benchmarks.operator.ours import Asked
from endcap.errors import OutcomeError
from endcap.files import FolderLock, write_json
from serving.operator.crds import crds
from serving.targets.kserve import Cluster, open_cluster

__all__ = ["main"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endcap" / "bench"
_IDLE_S = 20.0


def main() -> None:
    with ending():
        parser = argparse.ArgumentParser(prog="python -m benchmarks.operator", description=__doc__)
        parser.add_argument("--rollouts", type=int, default=1000, help="under way at once (1000)")
        parser.add_argument("--verdicts", type=int, default=100, help="of more, that end in the measured time (100)")
        parser.add_argument("--look-s", type=float, default=10.0, help="from one look to the next (10)")
        parser.add_argument("--window-s", type=float, default=300.0, help="measured seconds (300)")
        parser.add_argument("--only", choices=["ours", "peer"], help="leave the other out")
        parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where operator.json goes (out/bench)")
        given = parser.parse_args()
        given.out.mkdir(parents=True, exist_ok=True)
        with FolderLock(given.out), tempfile.TemporaryDirectory(prefix="endcap-bench-") as folder:
            document = _bench(given, Path(folder) / "cluster")
        wrong = _shortfalls(document)
        if wrong:
            raise OutcomeError("; ".join(wrong), where=given.out / "operator.json")


def _bench(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    controller = None if given.only == "ours" else argo.build(CACHE)
    document: dict[str, Any] = {}
    for name in ("ours", "peer"):
        if given.only not in (None, name):
            continue
        # Each has an API server of its own, fresh: what one leaves behind is not the other's to carry.
        with _ControlPlane(folder.with_name(name)) as plane:
            asked = Asked(given.rollouts, given.verdicts, given.look_s, given.window_s, given.out, plane.kubeconfig,
                          _say)  # fmt: skip
            idle_per_s = _idle(plane.cluster)
            if name == "ours":
                _say(f"endcap: {given.rollouts} rollouts, looked at every {given.look_s:g} s")
                plane.install(lambda: list(crds().values()))
                document |= ours.bench(asked, plane.cluster, idle_per_s)
            elif controller is not None:
                _say(f"Argo Rollouts: {given.rollouts} rollouts, measured every {given.look_s:g} s")
                plane.kubectl("apply", "--server-side", *(f"--filename={path}" for path in argo.crds()))
                plane.fake_nodes((given.rollouts * 2 + given.verdicts) // 200 + 2)
                document["peer"] = argo.bench(asked, plane.cluster, controller, idle_per_s)
        document |= {"look_s": given.look_s, "at_s": round(time.time()), "cpus": os.cpu_count(),
                     "load": [round(value, 1) for value in os.getloadavg()]}  # fmt: skip
        write_json(given.out / "operator.json", document)
        _table(document)
    return document


class _ControlPlane:
    """etcd, API server, controller manager and scheduler in a folder of their own; kwok where asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kubeconfig = folder, folder / "kubeconfig"
        self._kwok: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _ControlPlane:
        self._command("up", "--only", "control-plane")
        self.cluster: Cluster = open_cluster(kubeconfig=str(self.kubeconfig))
        return self

    def __exit__(self, *_: object) -> None:
        if self._kwok is not None:
            self._kwok.terminate()
            self._kwok.wait()
        self._command("down")

    def _command(self, *arguments: str) -> None:
        ended = subprocess.run([sys.executable, "-m", "tests.cluster", *arguments, "--folder", str(self.folder)],
                               capture_output=True, text=True, check=False)  # fmt: skip
        if ended.returncode:
            raise OutcomeError(f"the test cluster: {(ended.stderr or ended.stdout).strip()[-400:]}", where=self.folder)

    def install(self, documents: Callable[[], list[dict[str, Any]]]) -> None:
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        for crd in documents():
            self.cluster.create(path, crd)
        for crd in documents():
            self.kubectl("wait", "--for=condition=Established", f"crd/{crd['metadata']['name']}", "--timeout=60s")

    def kubectl(self, *arguments: str) -> None:
        from tests.cluster.programs import ensure

        subprocess.run([str(ensure("kubectl")), f"--kubeconfig={self.kubeconfig}", *arguments], check=True,
                       capture_output=True)  # fmt: skip

    def fake_nodes(self, number: int) -> None:
        from tests.cluster.programs import KWOK_STAGES, ensure, ensure_documents
        from tests.cluster.services import fake_node

        with (self.folder / "kwok.log").open("wb") as log:
            self._kwok = subprocess.Popen(
                [str(ensure("kwok")), f"--kubeconfig={self.kubeconfig}", "--server-address=",
                 f"--config={ensure_documents(KWOK_STAGES)}", "--node-lease-duration-seconds=40",
                 "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake"],
                stdout=log, stderr=log,
            )  # fmt: skip
        for node in range(number):
            self.cluster.create("/api/v1/nodes", fake_node(node))


def _idle(cluster: Cluster) -> float:
    """Requests a second that the control plane makes of itself."""
    time.sleep(5)
    begun, served = time.monotonic(), requests_served(cluster)
    time.sleep(_IDLE_S)
    return (requests_served(cluster) - served) / (time.monotonic() - begun)


def _shortfalls(document: dict[str, Any]) -> list[str]:
    if "reconcile_p99_s" not in document:
        return []
    wrong = []
    if document["reconcile_p99_s"] >= 1:
        wrong.append(f"p99 of the delay is {document['reconcile_p99_s']} s, and 1 s is most")
    if document["rss_mb"] >= 500:
        wrong.append(f"{document['rss_mb']} MB of memory, and 500 are most")
    if document["missed_verdicts"]:
        wrong.append(f"{document['missed_verdicts']} verdicts were missed: {document['wrong'][0]}")
    return wrong


_ROWS = {
    "rollouts under way": "rollouts", "delay p50, s": "reconcile_p50_s", "delay p99, s": "reconcile_p99_s",
    "delay max, s": "reconcile_max_s", "memory, MB": "rss_mb", "processor, cores": "cpu_share",
    "looks": "looks", "looks due": "looks_due", "API requests / rollout-minute": "api_requests_per_rollout_minute",
    "verdicts": "verdicts", "missed verdicts": "missed_verdicts", "all under way after, s": "taken_up_s",
}  # fmt: skip


def _table(document: dict[str, Any]) -> None:
    peer = document.get("peer", {})
    _say(f"{'':32}{'endcap':>12}{'Argo Rollouts':>16}")
    for told, name in _ROWS.items():
        _say(f"{told:32}{document.get(name, '-')!s:>12}{peer.get(name, '-')!s:>16}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
