"""The chart on a real API server: installed, upgraded, rolled back and uninstalled; its rights; its pods' security.

Where pods run (``full_cluster``) the collector of the chart runs too, keeps what it was told over the death of its pod,
and ``helm test`` passes.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.access import Access
from tests.cluster.chart import ACCOUNT, CHART, RELEASE, helm, installed, know_kserve, values
from tests.cluster.rights import as_account

Json = dict[str, Any]


@pytest.fixture(scope="module")
def with_kserve(control_plane: Access) -> Access:
    """A cluster that knows KServe's kinds; where there is no KServe, by the stand-in's CRDs."""
    know_kserve(control_plane)
    return control_plane


def mine(access: Access, namespace: str) -> set[str]:
    """What of the chart is there, as ``kind/name``."""
    kinds = ("deployments,services,serviceaccounts,configmaps,networkpolicies,poddisruptionbudgets,roles,rolebindings,"
             "cronjobs,persistentvolumeclaims")  # fmt: skip
    selector = "app.kubernetes.io/part-of=endcap"
    found = access.get(kinds, "--namespace", namespace, "-l", selector)["items"]
    found += access.get("clusterroles,clusterrolebindings,clusterservingruntimes,clusterstoragecontainers", "-l",
                        f"{selector},app.kubernetes.io/instance={RELEASE}")["items"]  # fmt: skip
    return {f"{one['kind']}/{one['metadata']['name']}" for one in found}


def test_install_upgrade_rollback_and_uninstall(with_kserve: Access, namespace: str) -> None:
    access = with_kserve

    def deployment() -> Json:
        return access.get("deployment", "endcap-operator", "--namespace", namespace)["spec"]

    before = mine(access, namespace)
    with installed(access, namespace, "mlflow.url=http://mlflow:5000") as said:
        notes = said.rpartition("NOTES:")[2]
        assert f"helm test {RELEASE} -n {namespace}" in notes and "kubectl get rollouts -A -w" in notes
        assert "create secret generic endcap-keys" in notes
        there = mine(access, namespace) - before
        assert {"Deployment/endcap-operator", "Deployment/endcap-collector", "ClusterServingRuntime/endcap-cpu",
                "ClusterServingRuntime/endcap-gpu", "ClusterStorageContainer/endcap-mlflow",
                "ClusterRole/endcap-operator", "PersistentVolumeClaim/endcap-collector"} <= there  # fmt: skip
        assert deployment()["replicas"] == 1

        with_more = ("operator.replicas=2", "redis.install=true", "runtimes.cache=true", "runtimes.gpu.enabled=false")
        helm(access, "upgrade", RELEASE, str(CHART), "--namespace", namespace,
             *values("mlflow.url=http://mlflow:5000", *with_more))  # fmt: skip
        changed = mine(access, namespace) - before
        assert changed - there == {"Deployment/endcap-redis", "Service/endcap-redis", "NetworkPolicy/endcap-redis",
                                   "PodDisruptionBudget/endcap-operator"}  # fmt: skip
        assert there - changed == {"ClusterServingRuntime/endcap-gpu"}
        assert deployment()["replicas"] == 2
        container = access.get("clusterservingruntime", "endcap-cpu")["spec"]["containers"][0]
        assert f"--cache=redis://endcap-redis.{namespace}.svc:6379/0" in container["args"]

        refused = helm(access, "upgrade", RELEASE, str(CHART), "--namespace", namespace,
                       *values("operator.replicas=many"), fails=True)  # fmt: skip
        assert "/operator/replicas" in refused and deployment()["replicas"] == 2

        helm(access, "rollback", RELEASE, "1", "--namespace", namespace)
        assert mine(access, namespace) - before == there
        assert deployment()["replicas"] == 1

        helm(access, "uninstall", RELEASE, "--namespace", namespace, "--wait")
        left = mine(access, namespace) - before
        assert left == {"PersistentVolumeClaim/endcap-collector"}, "what shoppers did is kept, and nothing else"
        # Installed again it takes up the volume that was kept.
        helm(access, "install", RELEASE, str(CHART), "--namespace", namespace, *values("mlflow.url=http://mlflow:5000"))
        assert mine(access, namespace) - before == there


def rendered(access: Access, namespace: str, *arguments: str) -> list[Json]:
    said = helm(access, "template", RELEASE, str(CHART), "--namespace", namespace, "--kube-version=1.34.4", *arguments)
    return [one for one in yaml.safe_load_all(said) if one is not None]


def test_every_pod_passes_the_admission_of_a_restricted_namespace(with_kserve: Access, namespace: str) -> None:
    access = with_kserve
    access.kubectl("label", "namespace", namespace, *(f"pod-security.kubernetes.io/{mode}=restricted"
                                                      for mode in ("enforce", "warn")))  # fmt: skip
    documents = rendered(access, namespace, "--values", str(CHART / "ci" / "full.yaml"))
    pods = [one for one in documents if one["kind"] in ("Deployment", "CronJob", "Pod")]
    for one in documents:
        if one["kind"] == "ClusterServingRuntime":
            spec = {key: one["spec"][key] for key in ("containers", "volumes")}
            pods.append(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": one["metadata"]["name"]}, "spec": spec}
            )
        if one["kind"] == "ClusterStorageContainer":
            spec = {"containers": [one["spec"]["container"]]}
            pods.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "storage"}, "spec": spec})
    assert len(pods) >= 9
    access.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "endcap-workload"}},
                 namespace=namespace)  # fmt: skip
    for pod in pods:
        for entry in pod["spec"].get("topologySpreadConstraints", ()):
            assert entry
        said = dry_run(access, namespace, pod)
        assert said.returncode == 0, said.stderr
        assert "PodSecurity" not in said.stderr, (pod["metadata"]["name"], said.stderr)
    loose = json.loads(json.dumps(pods[0]))
    loose["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert "would violate PodSecurity" in dry_run(access, namespace, loose).stderr


def dry_run(access: Access, namespace: str, document: Json) -> subprocess.CompletedProcess[str]:
    return access.try_kubectl("create", "--dry-run=server", "--validate=strict", "--namespace", namespace, "-f", "-",
                              stdin=yaml.safe_dump(document))  # fmt: skip


NEVER = [
    ("", "secrets", "get"), ("", "secrets", "list"), ("", "pods", "create"), ("", "pods", "delete"),
    ("", "pods/exec", "create"), ("", "pods/log", "get"), ("", "pods/proxy", "get"), ("", "services", "patch"),
    ("", "nodes", "get"), ("", "configmaps", "delete"), ("", "configmaps", "list"), ("apps", "deployments", "patch"),
    ("apps", "deployments", "delete"), ("serving.kserve.io", "inferenceservices", "delete"),
    ("serving.kserve.io", "inferenceservices", "create"), ("serving.kserve.io", "clusterservingruntimes", "patch"),
    ("endcap.dev", "rollouts", "delete"), ("endcap.dev", "objectives", "patch"),
    ("rbac.authorization.k8s.io", "clusterroles", "create"), ("coordination.k8s.io", "leases", "delete"),
    ("coordination.k8s.io", "leases", "list"), ("gateway.networking.k8s.io", "httproutes", "delete"),
]  # fmt: skip


def test_the_operator_may_do_what_its_rules_say_and_nothing_else(with_kserve: Access, namespace: str) -> None:
    access = with_kserve
    account = f"system:serviceaccount:{namespace}:{ACCOUNT}"
    workload = f"system:serviceaccount:{namespace}:endcap-workload"
    rules = [
        (group, resource, verb)
        for rule in yaml.safe_load((CHART / "files" / "operator-rules.yaml").read_text())
        for group in rule["apiGroups"] for resource in rule["resources"] for verb in rule["verbs"]
    ]  # fmt: skip
    assert len(rules) > 20 and not set(rules) & set(NEVER)
    leases = ("coordination.k8s.io", "leases", "update")
    with access.namespace() as shop, access.namespace() as other:
        questions = [
            *((True, Question(account, one, shop)) for one in rules),
            *((False, Question(account, one, other)) for one in rules),
            *((False, Question(account, one, where)) for one in NEVER for where in (shop, namespace)),
            (True, Question(account, leases, namespace, ACCOUNT)),
            (False, Question(account, leases, namespace, "other")),
            (False, Question(workload, ("", "pods", "get"), namespace)),
        ]  # fmt: skip
        with installed(access, namespace, f"operator.watchNamespaces={{{shop}}}"):
            for (expected, question), said in zip(questions, allowed(access, questions), strict=True):
                assert said is expected, question
        assert not any(allowed(access, questions)), "an uninstalled release leaves no rights"
        with installed(access, namespace):
            everywhere = [(True, Question(account, one, where)) for one in rules for where in (shop, other)]
            assert all(allowed(access, everywhere))


@dataclass(frozen=True)
class Question:
    """``right``: group, resource (with its subresource) and verb."""

    account: str
    right: tuple[str, str, str]
    namespace: str
    name: str = ""

    def review(self) -> Json:
        group, resource, verb = self.right
        resource, _, sub = resource.partition("/")
        return {
            "apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview",
            "spec": {"user": self.account, "groups": ["system:serviceaccounts", "system:authenticated"],
                     "resourceAttributes": {"group": group, "resource": resource, "subresource": sub, "verb": verb,
                                            "namespace": self.namespace, "name": self.name}},
        }  # fmt: skip


def allowed(access: Access, questions: list[tuple[bool, Question]]) -> list[bool]:
    """What the API server says to each, in one call."""
    said = access.kubectl("create", "-o", "json", "-f", "-",
                          stdin=yaml.safe_dump_all(question.review() for _, question in questions))  # fmt: skip
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(said.rstrip()):
        document, at = decoder.raw_decode(said, at + len(said[at:]) - len(said[at:].lstrip()))
        found += document["items"] if document["kind"] == "List" else [document]
    return [bool(one["status"]["allowed"]) for one in found]


def test_a_test_may_go_as_the_operators_account(with_kserve: Access, namespace: str, tmp_path: Path) -> None:
    with installed(with_kserve, namespace):
        operator = as_account(with_kserve, namespace, ACCOUNT, tmp_path)
        assert operator.get("deployments", "--namespace", namespace)["items"]
        refused = operator.try_kubectl("get", "secrets", "--namespace", namespace)
        assert refused.returncode != 0 and "forbidden" in refused.stderr
