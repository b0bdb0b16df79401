"""Drills on a cluster, as Chaos Toolkit actions and probes: a pod of a service is killed, and comes back.

    python -m chaos.pods EXPERIMENT      # exit code 4 where the drill was not held, one that never began among them

They run in a pod of the chart (CronJob ``endcap-drill``) as a ServiceAccount that may list and delete pods of one
namespace and nothing else; the API server and the token are where every pod finds them. A service is an
InferenceService; its pods carry KServe's label.
"""

from __future__ import annotations

import json
import os
import random
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from endcap.errors import EndcapError, InputError, OutcomeError, TargetError

__all__ = ["Pod", "choose_pod", "kill_pod", "main", "not_ready", "read_pods", "wait_until_ready", "why_not_held"]

FOLDER_VARIABLE = "ENDCAP_SERVICE_ACCOUNT_FOLDER"
_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_SERVICE_LABEL = "serving.kserve.io/inferenceservice"
_VERSION_LABEL = "endcap.dev/version"
_POLL_S = 0.5
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Pod:
    """``version`` is None where the pod's label does not say it."""

    name: str
    uid: str
    version: str | None
    ready: bool


def choose_pod(pods: Iterable[Pod], *, seed: int) -> Pod:
    """A ready pod, by seed. Pure.

    Raises:
        TargetError: there is none, or it is the only ready one of its version (that is another drill).
    """
    ready = sorted((pod for pod in pods if pod.ready), key=lambda pod: pod.name)
    several = [pod for pod in ready if sum(other.version == pod.version for other in ready) > 1]
    if not ready:
        raise TargetError("no ready pod to kill")
    if not several:
        raise TargetError("every version has one ready pod only", next_step="raise minReplicas above 1")
    return random.Random(f"pod-{seed}").choice(several)  # noqa: S311 - a choice, not a secret


def kill_pod(namespace: str, service: str, seed: int = 7) -> str:
    """Delete one ready pod of the service without grace; returns its name.

    Raises:
        TargetError: see :func:`choose_pod`; the API server does not answer, or refuses.
    """
    with _api() as api:
        pod = choose_pod(read_pods(api, namespace, service), seed=seed)
        # Of that pod alone: one of the same name that came in between is not meant.
        _ask(api, "DELETE", f"/api/v1/namespaces/{namespace}/pods/{pod.name}",
             json={"gracePeriodSeconds": 0, "preconditions": {"uid": pod.uid}})  # fmt: skip
        return pod.name


def not_ready(namespace: str, service: str, at_least: int = 2) -> int:
    """How many of the service's pods do not serve; those that are missing to ``at_least`` among them."""
    with _api() as api:
        pods = read_pods(api, namespace, service)
    ready = sum(pod.ready for pod in pods)
    return max(len(pods) - ready, at_least - ready)


def wait_until_ready(namespace: str, service: str, within_s: float, at_least: int = 2) -> float:
    """Return how many seconds it took until every pod of the service serves again.

    Raises:
        TargetError: it took longer.
    """
    begun_s = time.monotonic()
    while True:
        missing = not_ready(namespace, service, at_least)
        took_s = time.monotonic() - begun_s
        if missing == 0:
            return took_s
        if took_s > within_s:
            raise TargetError(f"{missing} pods do not serve after {within_s:g} s", where=f"{namespace}/{service}")
        time.sleep(_POLL_S)


def read_pods(api: httpx.Client, namespace: str, service: str) -> list[Pod]:
    """The service's pods that are not going away.

    Raises:
        TargetError: there is none, or the API server does not tell.
    """
    query = {"labelSelector": f"{_SERVICE_LABEL}={service}"}
    found = _ask(api, "GET", f"/api/v1/namespaces/{namespace}/pods", params=query).get("items") or []
    if not found:
        raise TargetError("the service has no pods", where=f"{namespace}/{service}",
                          next_step="check drills.service and drills.namespace")  # fmt: skip
    return [_pod(one) for one in found if "deletionTimestamp" not in one["metadata"]]


def _pod(document: Mapping[str, Any]) -> Pod:
    meta, conditions = document["metadata"], document.get("status", {}).get("conditions") or ()
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return Pod(str(meta["name"]), str(meta["uid"]), (meta.get("labels") or {}).get(_VERSION_LABEL), ready)


def _api() -> httpx.Client:
    """The API server as a pod finds it."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    folder = Path(os.environ.get(FOLDER_VARIABLE, _FOLDER))
    if not host:
        raise InputError("this is no pod of a Kubernetes", where="KUBERNETES_SERVICE_HOST",
                         next_step="run it by the chart's CronJob endcap-drill")  # fmt: skip
    try:
        token = (folder / "token").read_text().strip()
    except OSError as error:
        raise InputError(f"no token ({error.strerror})", where=folder / "token") from error
    address = f"[{host}]" if ":" in host else host
    return httpx.Client(base_url=f"https://{address}:{port}", headers={"authorization": f"Bearer {token}"},
                        verify=ssl.create_default_context(cafile=str(folder / "ca.crt")), timeout=_TIMEOUT_S,
                        trust_env=False)  # fmt: skip


def _ask(api: httpx.Client, method: str, path: str, **more: Any) -> dict[str, Any]:
    try:
        answer = api.request(method, path, **more)
    except httpx.TransportError as error:
        raise TargetError(f"the API server does not answer: {type(error).__name__}", where=path) from error
    if answer.is_success:
        document = answer.json()
        return document if isinstance(document, dict) else {}
    try:
        said = str(answer.json().get("message", ""))[:300]
    except ValueError:
        said = ""
    raise TargetError(f"the API server answers {answer.status_code}: {said}", where=path)


def why_not_held(journal: Mapping[str, Any]) -> str | None:
    """Of Chaos Toolkit's journal; None: it was held. Pure."""
    if ((journal.get("steady_states") or {}).get("before") or {}).get("steady_state_met") is not True:
        return "there was no steady state, and nothing was tried"
    for activity in journal.get("run") or ():
        if activity.get("status") != "succeeded":
            return f"{activity['activity']['name']} {activity.get('status')}"
    if journal.get("status") != "completed":
        return f"Chaos Toolkit's status is {journal.get('status')}"
    return "the steady state did not come back" if journal.get("deviated") else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run an experiment by Chaos Toolkit; the last line of standard output is its journal, as JSON.

    Chaos Toolkit's own status may be "completed" where there was no steady state to begin with and nothing was tried.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if len(arguments) != 1:
            raise InputError("one argument is needed: the experiment's file")
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "journal.json"
            ran = subprocess.run(
                [sys.executable, "-m", "chaostoolkit", "--no-version-check", "--no-log-file", "--settings",
                 str(Path(scratch) / "none.yaml"), "run", "--journal-path", str(path), arguments[0]], check=False,
            )  # fmt: skip
            if not path.exists():
                raise EndcapError(f"Chaos Toolkit ended with code {ran.returncode} and no journal", where=arguments[0])
            journal = json.loads(path.read_text())
        sys.stdout.write(json.dumps(journal) + "\n")
        if (reason := why_not_held(journal)) is not None:
            raise OutcomeError(
                f"the drill was not held: {reason}", where=arguments[0], next_step="see the journal above"
            )
    except EndcapError as error:
        sys.stdout.flush()
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
