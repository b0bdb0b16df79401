"""endcap's operator: so many Rollouts under way, some of them with a verdict to come to in the measured time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.operator.measure import percentile, requests_served, rounded, watched
from endcap.errors import OutcomeError, TargetError
from endcap.files import read_json_lines
from serving.operator.objects import objectives_path, rollout_path
from serving.targets.kserve.cluster import Cluster

__all__ = ["Asked", "bench", "until"]

NAMESPACES = 10
OBJECTIVES = [
    {"name": "availability", "goal": 0.99, "good": "answered", "margin": 0.02},
    {"name": "latency", "goal": 0.95, "good": "answered", "withinMs": 100, "margin": 0.05},
    {"name": "click-through", "goal": 0.05, "good": "clicked", "windowSeconds": 5, "marginRelative": 0.3},
]
_READY_S = 600.0


@dataclass(frozen=True, slots=True)
class Asked:
    """``rollouts``: under way at once. ``verdicts``: of more, which come to their end in the measured ``window_s``."""

    rollouts: int
    verdicts: int
    look_s: float
    window_s: float
    out: Path
    kubeconfig: Path
    say: Callable[[str], None]


def bench(asked: Asked, cluster: Cluster, idle_per_s: float) -> dict[str, Any]:
    """``idle_per_s``: requests that the API server serves while no operator runs."""
    looks = asked.out / "operator-looks.jsonl"
    looks.unlink(missing_ok=True)
    plans = _plans(asked)
    _create(cluster, plans, asked)
    environment = {
        **os.environ, "KUBECONFIG": str(asked.kubeconfig), "ENDCAP_NAMESPACE": "bench-0", "ENDCAP_HTTP_PORT": "0",
        "ENDCAP_HTTP_HOST": "127.0.0.1", "ENDCAP_WATCH_NAMESPACES": "", "ENDCAP_LOG_LEVEL": "WARNING",
    }  # fmt: skip
    with (asked.out / "operator.log").open("wb") as log:
        started_s = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.operator.process", str(looks)], env=environment, stderr=log
        )  # fmt: skip
        try:
            with watched(process.pid) as memory:
                until(lambda: _under_way(cluster) >= asked.rollouts, _READY_S, "all rollouts are under way", process)
                taken_up_s = time.monotonic() - started_s
                asked.say(f"  {asked.rollouts} under way after {taken_up_s:.0f} s; measured for {asked.window_s:g} s")
                time.sleep(2 * asked.look_s)  # all of them have a look behind them that was due
                begun, served, from_s = time.monotonic(), requests_served(cluster), time.time()
                time.sleep(asked.window_s)
                seconds, served = time.monotonic() - begun, requests_served(cluster) - served
                to_s = time.time()
                wrong = _wrong_verdicts(cluster, plans, asked, process)
            usage = memory.usage
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    taken = [
        (line["due_s"], line["acknowledged_s"]) for line in read_json_lines(looks)
        if from_s <= line["acknowledged_s"] <= to_s
    ]  # fmt: skip
    delays = [acknowledged_s - due_s for due_s, acknowledged_s in taken]
    minutes = asked.rollouts * seconds / 60
    return {
        "rollouts": asked.rollouts, "reconcile_p99_s": rounded(percentile(delays, 0.99)), "rss_mb": usage.rss_mb,
        "missed_verdicts": len(wrong),
        "api_requests_per_rollout_minute": rounded((served - idle_per_s * seconds) / minutes, 2),
        "reconcile_p50_s": rounded(percentile(delays, 0.5)), "reconcile_max_s": rounded(percentile(delays, 1.0)),
        "looks": len(delays), "looks_due": round(minutes * 60 / asked.look_s), "verdicts": asked.verdicts,
        "cpu_share": rounded(usage.cpu_s / (time.monotonic() - started_s), 2), "taken_up_s": round(taken_up_s, 1),
        "seconds": round(seconds, 1), "wrong": wrong,
        "target": "simulated behind the Target protocol (no pods): what is measured is the operator and its store",
    }  # fmt: skip


def _plans(asked: Asked) -> dict[tuple[str, str], dict[str, Any]]:
    """By namespace and name, what is to be created, and the outcome that is due (None: it goes on)."""
    plans: dict[tuple[str, str], dict[str, Any]] = {}
    for number in range(asked.rollouts):
        steps = [{"share": 0.2, "minRequests": 10**9, "maxSeconds": 86_400}, {"share": 1}]
        plans[f"bench-{number % NAMESPACES}", f"steady-{number}"] = {"steps": steps, "due": None}
    for number in range(asked.verdicts):
        after_s = round(3 * asked.look_s + asked.window_s * 0.7 * number / max(1, asked.verdicts))
        place = f"bench-{number % NAMESPACES}"
        if number % 2:
            steps = [{"share": 0.2, "minRequests": 10**9, "maxSeconds": 86_400}, {"share": 1}]
            plans[place, f"bad-{after_s}-{number}"] = {"steps": steps, "due": "rolled_back"}
        else:
            steps = [{"share": 0.5, "minRequests": 50, "minSeconds": after_s, "maxSeconds": 86_400}, {"share": 1}]
            plans[place, f"good-{number}"] = {"steps": steps, "due": "promoted"}
    return plans


def _create(cluster: Cluster, plans: dict[tuple[str, str], dict[str, Any]], asked: Asked) -> None:
    for number in range(NAMESPACES):
        cluster.create("/api/v1/namespaces", {"metadata": {"name": f"bench-{number}"}})

    def create(place: tuple[str, str]) -> None:
        namespace, name = place
        common = {"apiVersion": "endcap.dev/v1alpha1", "metadata": {"name": name, "namespace": namespace}}
        objectives = {**common, "kind": "Objectives", "spec": {"service": name, "objectives": OBJECTIVES}}
        spec = {
            "service": name, "candidate": f"models:/{name}/2", "lookSeconds": asked.look_s, "sticky": {},
            "steps": plans[place]["steps"],
        }  # fmt: skip
        cluster.create(objectives_path(namespace), objectives)
        cluster.create(rollout_path(namespace), {**common, "kind": "Rollout", "spec": spec})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(create, plans))


def _statuses(cluster: Cluster) -> dict[tuple[str, str], dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with contextlib.suppress(TargetError):  # a list of a thousand may take its time; it is asked for again
        found = cluster.items("/apis/endcap.dev/v1alpha1/rollouts", resourceVersion="0") or []
    return {(one["metadata"]["namespace"], one["metadata"]["name"]): one.get("status") or {} for one in found}


def _under_way(cluster: Cluster) -> int:
    return sum(status.get("phase") == "observing" for (_, name), status in _statuses(cluster).items()
               if name.startswith("steady-"))  # fmt: skip


def _wrong_verdicts(cluster: Cluster, plans: dict[tuple[str, str], dict[str, Any]], asked: Asked,
                    process: subprocess.Popen[bytes]) -> list[str]:  # fmt: skip
    """Rollouts that did not come to the end that was due by six looks after the last was, or to one that was not."""

    def wrong() -> list[str]:
        found = _statuses(cluster)
        return [f"{place[1]}: {found.get(place, {}).get('outcome')}, due {plan['due']}" for place, plan in plans.items()
                if found.get(place, {}).get("outcome") != plan["due"]]  # fmt: skip

    ends_s = time.monotonic() + 12 * asked.look_s
    while (missing := wrong()) and time.monotonic() < ends_s and process.poll() is None:
        time.sleep(2)
    return missing


def until(done: Callable[[], bool], within_s: float, what: str, process: subprocess.Popen[bytes]) -> None:
    """Raises OutcomeError when it is not within the time, or the process has ended."""
    ends_s = time.monotonic() + within_s
    while not done():
        if process.poll() is not None:
            raise OutcomeError(f"the process ended with {process.returncode} before {what}")
        if time.monotonic() > ends_s:
            raise OutcomeError(f"not within {within_s:g} s: {what}")
        time.sleep(5)
