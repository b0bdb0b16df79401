"""The operator's rights: each is used by a line of its code, and no line of its code uses another.

What the API server makes of them is asked in ``tests/cluster/test_chart.py``; the operator goes as that account in
``tests/cluster/test_chart_operator.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.charts.conftest import CHART

ROOT = Path(__file__).parents[2]
TARGET, GATEWAY = "serving/targets/kserve/target.py", "serving/targets/kserve/gateway.py"
SERVICE, KNATIVE = "serving/targets/kserve/service.py", "serving/targets/kserve/knative_target.py"
STORE, DRIVE, RUN = "serving/operator/store.py", "serving/operator/drive.py", "serving/operator/run.py"
Right = tuple[str, str, str]

USED: dict[Right, tuple[str, str]] = {
    ("endcap.dev", "rollouts", "list"): (RUN, 'kopf.on.event(GROUP, VERSION, "rollouts"'),
    ("endcap.dev", "rollouts", "watch"): (RUN, 'kopf.on.event(GROUP, VERSION, "rollouts"'),
    ("endcap.dev", "rollouts", "get"): (DRIVE, "_api.get(rollout_path("),
    ("endcap.dev", "rollouts", "patch"): (DRIVE, '_api.merge(rollout_path(*self.key), {"metadata"'),
    ("endcap.dev", "rollouts/status", "patch"): (DRIVE, '_api.merge(rollout_path(*self.key, sub="status")'),
    ("endcap.dev", "objectives", "list"): (RUN, 'kopf.on.event(GROUP, VERSION, "objectives"'),
    ("endcap.dev", "objectives", "watch"): (RUN, 'kopf.on.event(GROUP, VERSION, "objectives"'),
    ("endcap.dev", "objectives", "get"): (DRIVE, "_api.get(objectives_path("),
    ("", "configmaps", "get"): (STORE, "api.get(config_map_path("),
    ("", "configmaps", "create"): (STORE, "_api.create(config_map_path("),
    ("", "configmaps", "update"): (STORE, "_api.replace(path, made.to_object(rollout))"),
    ("", "events", "create"): ("serving/operator/events.py", "_api.create(events_path("),
    ("", "pods", "list"): (SERVICE, 'items(path_of("pods"'),
    ("coordination.k8s.io", "leases", "get"): (SERVICE, "_cluster.get(self._lease_path)"),
    ("coordination.k8s.io", "leases", "create"): (SERVICE, 'create(path_of("leases"'),
    ("coordination.k8s.io", "leases", "update"): (SERVICE, "replace(self._lease_path"),
    ("serving.kserve.io", "inferenceservices", "get"): (TARGET, "_cluster.get(self._path)"),
    ("serving.kserve.io", "inferenceservices", "patch"): (SERVICE, "_cluster.apply(self._path"),
    ("serving.kserve.io", "inferenceservices/status", "patch"): (SERVICE, 'f"{self._path}/status"'),
    ("serving.knative.dev", "revisions", "list"): (KNATIVE, 'items(path_of("revisions"'),
    ("apps", "deployments", "get"): (TARGET, '_cluster.get(path_of("deployments"'),
    ("apps", "deployments", "list"): (TARGET, 'items(path_of("deployments"'),
    ("autoscaling", "horizontalpodautoscalers", "get"): (TARGET, "_cluster.get(hpa)"),
    ("autoscaling", "horizontalpodautoscalers", "delete"): (TARGET, "_cluster.delete(hpa)"),
    ("gateway.networking.k8s.io", "httproutes", "get"): (TARGET, '_cluster.get(path_of("httproutes"'),
    ("gateway.networking.k8s.io", "httproutes", "list"): (TARGET, 'items(path_of("httproutes"'),
    # Server-side apply of an object that may not be there yet asks for both.
    ("gateway.networking.k8s.io", "httproutes", "create"): (TARGET, "_cluster.apply(self._own_path"),
    ("gateway.networking.k8s.io", "httproutes", "patch"): (TARGET, "_cluster.apply(self._own_path"),
    ("gateway.envoyproxy.io", "backendtrafficpolicies", "list"): (GATEWAY, "cluster.items(path)"),
    ("gateway.envoyproxy.io", "backendtrafficpolicies", "create"): (GATEWAY, 'cluster.apply(f"{path}/{name}"'),
    ("gateway.envoyproxy.io", "backendtrafficpolicies", "patch"): (GATEWAY, 'cluster.apply(f"{path}/{name}"'),
}


def granted() -> set[Right]:
    rules = yaml.safe_load((CHART / "files" / "operator-rules.yaml").read_text())
    return {(group, resource, verb) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]
            for verb in rule["verbs"]}  # fmt: skip


def test_what_is_granted_is_what_is_used() -> None:
    assert granted() == set(USED)


@pytest.mark.parametrize("right", USED, ids=" ".join)
def test_every_right_is_used_by_a_line_of_the_code(right: Right) -> None:
    file, text = USED[right]
    source = " ".join((ROOT / file).read_text().split())
    assert " ".join(text.split()) in source.replace("( ", "("), f"nothing in {file} uses {right} any more: take it away"


def test_every_kind_of_call_is_in_the_list() -> None:
    """A file that begins to change what it did not change before must be thought of here."""
    calls = re.compile(r"(?:_cluster|cluster|_api|api)\.(create|replace|apply|merge|delete)\(")
    found = {
        (path.relative_to(ROOT).as_posix(), method)
        for folder in ("serving/targets/kserve", "serving/operator") for path in (ROOT / folder).glob("*.py")
        for method in calls.findall(path.read_text())
    }  # fmt: skip
    assert found == {
        (SERVICE, "create"), (SERVICE, "replace"), (SERVICE, "merge"), (SERVICE, "apply"), (TARGET, "apply"),
        (TARGET, "delete"),
        (GATEWAY, "apply"), (STORE, "replace"), (STORE, "create"), (DRIVE, "merge"),
        ("serving/operator/events.py", "create"), ("serving/operator/lease.py", "create"),
        ("serving/operator/lease.py", "replace"),
    }  # fmt: skip
