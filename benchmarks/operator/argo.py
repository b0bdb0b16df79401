"""Argo Rollouts at the same cadence: as many Rollouts in a canary step, each with an analysis every so many seconds.

Its controller is built from its Go module (``peer/go.mod``). Its pods are kwok's. The metric is a page of this
process's, so the moment of a measurement is known exactly; that it is acknowledged is seen by a watch.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.operator.measure import percentile, requests_served, rounded, watched
from benchmarks.operator.ours import NAMESPACES, Asked, until
from endcap.errors import InputError, TargetError
from serving.targets.kserve.cluster import Cluster

__all__ = ["bench", "build", "crds"]

MODULE = "github.com/argoproj/argo-rollouts"
PEER = Path(__file__).parent / "peer"
_READY_S = 900.0
_GROUP = "/apis/argoproj.io/v1alpha1"
_FAKE = {"key": "kwok.x-k8s.io/node", "operator": "Exists"}


def build(folder: Path) -> Path:
    """The controller, built once. Raises InputError where Go cannot."""
    wanted = folder / "rollouts-controller"
    if not wanted.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ended = subprocess.run(
            ["go", "build", "-o", str(wanted), f"{MODULE}/cmd/rollouts-controller"], cwd=PEER, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise InputError(f"go build: {ended.stderr.strip()[-400:]}", where=PEER,
                             next_step="install Go, or leave the peer out: --only ours")  # fmt: skip
    return wanted


def crds() -> list[Path]:
    """Its definitions, as the module ships them."""
    found = subprocess.run(["go", "list", "-m", "-f", "{{.Dir}}", MODULE], cwd=PEER, capture_output=True, text=True,
                           check=True).stdout.strip()  # fmt: skip
    return sorted((Path(found) / "manifests" / "crds").glob("*-crd.yaml"))


class Page:
    """Answers every measurement, and notes when it came. Names in ``bad`` get a failing value from their time on."""

    def __init__(self) -> None:
        self.came: dict[str, list[float]] = {}
        self.bad_from_s: dict[str, float] = {}
        page = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                name, now_s = self.path.lstrip("/"), time.time()
                page.came.setdefault(name, []).append(now_s)
                good = now_s < page.bad_from_s.get(name, float("inf"))
                body = json.dumps({"data": {"good": 1 if good else 0}}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


class Acknowledged:
    """When each measurement of each rollout was seen in its AnalysisRun."""

    def __init__(self, kubeconfig: Path) -> None:
        self.seen: dict[str, list[float]] = {}
        self._stopping = False
        self._kubeconfig = kubeconfig
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from kubernetes import client, config, watch
        from urllib3.exceptions import HTTPError

        api = client.CustomObjectsApi(config.new_client_from_config(str(self._kubeconfig)))
        counts: dict[str, int] = {}
        while not self._stopping:
            try:
                for event in watch.Watch().stream(
                    api.list_cluster_custom_object, "argoproj.io", "v1alpha1", "analysisruns", timeout_seconds=600
                ):
                    self._take(event["object"], time.time(), counts)
                    if self._stopping:
                        return
            except (HTTPError, client.ApiException):  # it is begun again; at the end the API server goes first
                time.sleep(0.1)

    def _take(self, run: dict[str, Any], now_s: float, counts: dict[str, int]) -> None:
        results = (run.get("status") or {}).get("metricResults") or []
        name = next((arg["value"] for arg in run["spec"].get("args", ()) if arg["name"] == "name"), "")
        count = int(results[0].get("count", 0)) + int(results[0].get("error", 0)) if results else 0
        if count > counts.get(name, 0):
            counts[name] = count
            self.seen.setdefault(name, []).append(now_s)

    def stop(self) -> None:
        self._stopping = True


def bench(asked: Asked, cluster: Cluster, controller: Path, idle_per_s: float) -> dict[str, Any]:
    """The same figures as of endcap. A measurement is due ``look_s`` after the one before was taken."""
    page, seen = Page(), Acknowledged(asked.kubeconfig)
    names = {f"steady-{number}": f"argo-{number % NAMESPACES}" for number in range(asked.rollouts)}
    bad = {f"bad-{number}": f"argo-{number % NAMESPACES}" for number in range(asked.verdicts // 2)}
    environment = {**os.environ, "KUBECONFIG": str(asked.kubeconfig), "POD_NAMESPACE": "argo-0"}
    for number in range(NAMESPACES):
        cluster.create("/api/v1/namespaces", {"metadata": {"name": f"argo-{number}"}})
        cluster.create(f"{_GROUP}/namespaces/argo-{number}/analysistemplates", _template(page.url, asked.look_s))
    with (asked.out / "argo.log").open("wb") as log:
        started_s = time.monotonic()
        process = subprocess.Popen(
            [str(controller), f"--kubeconfig={asked.kubeconfig}", "--leader-elect=false", "--loglevel=error",
             "--qps=2000", "--burst=4000", "--metricsPort=0", "--healthzPort=0"],
            env=environment, stderr=log, stdout=log,
        )  # fmt: skip
        try:
            with watched(process.pid) as memory:
                _create(cluster, {**names, **bad})
                phases = _phases(cluster, "Healthy")
                until(lambda: phases() >= len(names) + len(bad), _READY_S, "all stable versions are healthy", process)
                _change(cluster, {**names, **bad})
                until(lambda: sum(len(came) >= 2 for came in page.came.values()) >= len(names) + len(bad), _READY_S,
                      "all rollouts are measured", process)  # fmt: skip
                taken_up_s = time.monotonic() - started_s
                asked.say(f"  Argo Rollouts: {len(names)} under way after {taken_up_s:.0f} s")
                time.sleep(2 * asked.look_s)
                begun, served, from_s = time.monotonic(), requests_served(cluster), time.time()
                for number, name in enumerate(bad):
                    page.bad_from_s[name] = from_s + asked.window_s * 0.7 * number / max(1, len(bad))
                time.sleep(asked.window_s)
                seconds, served, to_s = time.monotonic() - begun, requests_served(cluster) - served, time.time()
                wrong = _missed(cluster, bad, asked)
            usage = memory.usage
        finally:
            process.terminate()
            process.wait(timeout=60)
            seen.stop()
            page.server.shutdown()
    delays = _delays(page, seen, asked.look_s, from_s, to_s, set(names))
    minutes = asked.rollouts * seconds / 60
    return {
        "name": "Argo Rollouts", "rollouts": asked.rollouts,
        "reconcile_p99_s": rounded(percentile(delays, 0.99)), "rss_mb": usage.rss_mb, "missed_verdicts": len(wrong),
        "api_requests_per_rollout_minute": rounded((served - idle_per_s * seconds) / minutes, 2),
        "reconcile_p50_s": rounded(percentile(delays, 0.5)), "reconcile_max_s": rounded(percentile(delays, 1.0)),
        "looks": len(delays), "looks_due": round(minutes * 60 / asked.look_s), "verdicts": len(bad),
        "cpu_share": rounded(usage.cpu_s / (time.monotonic() - started_s), 2), "taken_up_s": round(taken_up_s, 1),
        "seconds": round(seconds, 1), "wrong": wrong,
        "target": "ReplicaSets of one pod by kwok, a web metric every look; client limit raised from 40 to 2000/s",
    }  # fmt: skip


def _delays(page: Page, seen: Acknowledged, look_s: float, from_s: float, to_s: float, names: set[str]) -> list[float]:
    found = []
    for name in names:
        came, acknowledged = page.came.get(name, []), seen.seen.get(name, [])
        for before_s, now_s in pairwise(came):
            if not from_s <= now_s <= to_s:
                continue
            told_s = next((at_s for at_s in acknowledged if at_s >= now_s), None)
            if told_s is not None:
                found.append(told_s - (before_s + look_s))
    return found


def _template(url: str, look_s: float) -> dict[str, Any]:
    web = {"url": f"{url}/{{{{args.name}}}}", "jsonPath": "{$.data.good}", "timeoutSeconds": 10}
    metric = {"name": "good", "interval": f"{look_s:g}s", "successCondition": "result == 1", "failureLimit": 0,
              "provider": {"web": web}}  # fmt: skip
    return {"apiVersion": "argoproj.io/v1alpha1", "kind": "AnalysisTemplate", "metadata": {"name": "good"},
            "spec": {"args": [{"name": "name"}], "metrics": [metric]}}  # fmt: skip


def _create(cluster: Cluster, names: dict[str, str]) -> None:
    def create(name: str) -> None:
        labels = {"app": name}
        pod = {"tolerations": [_FAKE], "containers": [{"name": "serve", "image": "none"}]}
        analysis = {"templates": [{"templateName": "good"}], "args": [{"name": "name", "value": name}]}
        spec = {
            "replicas": 1, "revisionHistoryLimit": 1, "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
            "strategy": {"canary": {"steps": [{"setWeight": 50}, {"pause": {}}], "analysis": analysis}},
        }  # fmt: skip
        cluster.create(f"{_GROUP}/namespaces/{names[name]}/rollouts", {
            "apiVersion": "argoproj.io/v1alpha1", "kind": "Rollout", "metadata": {"name": name}, "spec": spec,
        })  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, names))


def _change(cluster: Cluster, names: dict[str, str]) -> None:
    """Another template: a canary begins, and its analysis with it."""
    change = {"spec": {"template": {"metadata": {"annotations": {"version": "2"}}}}}

    def patch(name: str) -> None:
        cluster.merge(f"{_GROUP}/namespaces/{names[name]}/rollouts/{name}", change)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(patch, names))


def _phases(cluster: Cluster, phase: str) -> Any:
    def count() -> int:
        found: list[dict[str, Any]] = []
        with contextlib.suppress(TargetError):
            found = cluster.items(f"{_GROUP}/rollouts", resourceVersion="0") or []
        return sum((one.get("status") or {}).get("phase") == phase for one in found)

    return count


def _missed(cluster: Cluster, bad: dict[str, str], asked: Asked) -> list[str]:
    """Those that had to be aborted and are not; and those that were and had not."""

    def wrong() -> list[str]:
        listed: list[dict[str, Any]] = []
        with contextlib.suppress(TargetError):
            listed = cluster.items(f"{_GROUP}/rollouts", resourceVersion="0") or []
        found = {one["metadata"]["name"]: (one.get("status") or {}).get("phase", "?") for one in listed}
        wrong = [f"{name}: {phase}" for name, phase in found.items() if (name in bad) != (phase == "Degraded")]
        return wrong if found else ["not listed"]

    ends_s = time.monotonic() + 12 * asked.look_s
    while (missing := wrong()) and time.monotonic() < ends_s:
        time.sleep(2)
    return missing
