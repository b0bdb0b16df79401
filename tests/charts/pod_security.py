"""The restricted Pod Security Standard, as far as a pod's text shows it
(https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted). Pure.

On a real API server the admission controller itself is asked (``tests/cluster/test_chart.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["violations"]

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SYSCTLS = "sysctls"


def violations(pod: dict[str, Any]) -> list[str]:
    """What a pod's spec has that ``restricted`` does not allow."""
    return list(_violations(pod))


def _violations(pod: dict[str, Any]) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield name
    for volume in pod.get("volumes", ()):
        for kind in set(volume) - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {kind}"
    of_pod = pod.get("securityContext") or {}
    if of_pod.get(_SYSCTLS):
        yield _SYSCTLS
    if of_pod.get("runAsUser") == 0:
        yield "runAsUser 0"
    if of_pod.get("seccompProfile", {}).get("type") == "Unconfined":
        yield "seccomp Unconfined"
    for container in (*pod.get("initContainers", ()), *pod["containers"], *pod.get("ephemeralContainers", ())):
        own = container.get("securityContext") or {}
        where = container["name"]
        if own.get("privileged"):
            yield f"{where}: privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{where}: allowPrivilegeEscalation"
        if "ALL" not in own.get("capabilities", {}).get("drop", ()):
            yield f"{where}: capabilities are not dropped"
        if set(own.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{where}: capabilities are added"
        if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield f"{where}: runAsNonRoot"
        if own.get("runAsUser") == 0:
            yield f"{where}: runAsUser 0"
        if own.get("procMount", "Default") != "Default":
            yield f"{where}: procMount"
        profile = own.get("seccompProfile", of_pod.get("seccompProfile")) or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield f"{where}: seccomp"
        if any("hostPort" in port for port in container.get("ports", ())):
            yield f"{where}: hostPort"
