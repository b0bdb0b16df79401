"""What the chart becomes: sound by strict schemas, restricted by Pod Security, refusing what it cannot mean."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from endcap.processes import free_port
from tests.charts.conftest import CHART, KUBERNETES, VALUES, Helm, values_of
from tests.charts.pod_security import violations
from tests.charts.schemas import LOCATION
from tests.process import wait_until

Json = dict[str, Any]
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")


def pods(documents: list[Json]) -> Iterator[tuple[str, Json]]:
    """Every pod that comes of the documents, KServe's of a runtime among them: (what it is, its spec)."""
    for one in documents:
        kind, name = one["kind"], one["metadata"]["name"]
        if kind in WORKLOADS:
            yield f"{kind} {name}", one["spec"]["template"]["spec"]
        elif kind == "CronJob":
            yield f"{kind} {name}", one["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        elif kind == "Pod" or kind in ("ServingRuntime", "ClusterServingRuntime"):
            yield f"{kind} {name}", one["spec"]
        elif kind == "ClusterStorageContainer":
            yield f"{kind} {name}", {"containers": [one["spec"]["container"]]}


def named(documents: list[Json], kind: str, name: str) -> Json:
    found = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    assert len(found) == 1, (kind, name)
    return found[0]


@pytest.mark.parametrize("values", VALUES)
def test_it_is_linted(helm: Helm, values: str) -> None:
    ran = helm.run("lint", "--strict", f"--kube-version={KUBERNETES}", str(CHART), *values_of(values))
    assert ran.returncode == 0 and "[WARNING]" not in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize("values", VALUES)
def test_every_document_keeps_to_its_schema(helm: Helm, kubeconform: Path, known_schemas: Path, values: str) -> None:
    documents = helm.template(values=values)
    assert len(documents) > 8
    ran = conform(kubeconform, known_schemas, documents)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def conform(kubeconform: Path, schemas: Path, documents: list[Json]) -> subprocess.CompletedProcess[str]:
    location = f"{schemas}/{LOCATION}"
    return subprocess.run([str(kubeconform), "-strict", "-output=pretty", "-schema-location", location, "-"],
                          input=yaml.safe_dump_all(documents), capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [("Deployment", "endcap-operator", {"replica": 2}), ("NetworkPolicy", "endcap-collector", {"ingres": []}),
     ("ClusterServingRuntime", "endcap-cpu", {"container": []}), ("PodMonitor", "endcap-servers", {"port": "x"}),
     ("HTTPRoute", "endcap-collector", {"hostname": "x"}), ("Deployment", "endcap-operator", {"replicas": "two"})],
)  # fmt: skip
def test_the_schemas_refuse_what_is_wrong(helm, kubeconform, known_schemas, kind, name, change):
    one = named(helm.template(values="full"), kind, name)
    one["spec"] |= change
    assert conform(kubeconform, known_schemas, [one]).returncode != 0


@pytest.mark.parametrize("values", VALUES)
def test_every_pod_is_restricted_and_writes_nowhere_but_its_volumes(helm: Helm, values: str) -> None:
    seen = dict(pods(helm.template(values=values)))
    assert seen
    for what, pod in seen.items():
        own = {} if "ServingRuntime" in what or "Storage" in what else None
        assert violations(pod) == [], what
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, what
            assert "limits" in container["resources"] and "requests" in container["resources"], what
            assert ":latest" not in container["image"] and ":" in container["image"].rpartition("/")[2], what
        if own is None and what not in ("Deployment endcap-operator", "CronJob endcap-drill"):
            assert pod["automountServiceAccountToken"] is False, what


@pytest.mark.parametrize(
    ("change", "says"),
    [({"hostNetwork": True}, "hostNetwork"), ({"hostPID": True}, "hostPID"),
     ({"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "hostPath"),
     ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccomp")],
)  # fmt: skip
def test_the_check_of_pod_security_finds_faults(change, says):
    security = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
    good: Json = {"containers": [{"name": "a", "securityContext": security}]}
    assert violations(good) == []
    assert any(says in one for one in violations(good | change))
    for key in security:
        container = {"name": "a", "securityContext": {name: one for name, one in security.items() if name != key}}
        assert violations({"containers": [container]}), key


WRONG = [
    ("operator.replicas=two", "/operator/replicas"), ("operator.replicas=0", "/operator/replicas"),
    ("operator.replica=2", "replica"), ("operator.enabled=maybe", "/operator/enabled"),
    ("collector.windowSeconds=soon", "/collector/windowSeconds"), ("collector.storage.size=large", "size"),
    ("images.pullPolicy=Sometimes", "/images/pullPolicy"), ("images.tag=a b", "/images/tag"), ("typo=1", "typo"),
    ("runtimes.thresholdsMs=100", "/runtimes/thresholdsMs"), ("runtimes.thresholdsMs={0}", "/runtimes/thresholdsMs"),
    ("mlflow.url=mlflow", "/mlflow/url"), ("mlflow.url=http://me:pw@mlflow", "/mlflow/url"),
    ("redis.url=redis://:pw@cache:6379/0", "/redis/url"), ("networkPolicies.metricsFrom=ops", "metricsFrom"),
    ("loadTest.schedule=daily", "/loadTest/schedule"), ("operator.resources.limits.cpu=1 core", "cpu"),
    ("operator.tolerations[0].effekt=NoSchedule", "effekt"), ("prometheusRules.groups[0].name=a", "rules"),
    ("keysSecret=Keys", "/keysSecret"), ("monitoring.interval=15", "/monitoring/interval"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "where"), WRONG)
def test_values_of_the_wrong_type_are_refused_by_name(helm: Helm, wrong: str, where: str) -> None:
    ran = helm.run("template", "endcap", str(CHART), f"--kube-version={KUBERNETES}", "--set", wrong)
    assert ran.returncode != 0 and where in ran.stderr, ran.stderr


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("mlflow.install=true,mlflow.url=http://mlflow", "not both"),
     ("redis.install=true,redis.url=redis://cache:6379/0", "not both"),
     ("runtimes.cache=true", "needs a Redis"), ("collector.route.enabled=true", "collector.route.gateway.name"),
     ("redis.install=true,redis.passwordSecret=x", "no password"), ("loadTest.enabled=true", "loadTest needs url"),
     ("drills.enabled=true,drills.namespace=shop", "drills needs")],
)  # fmt: skip
def test_values_that_contradict_each_other_are_told_apart(helm: Helm, wrong: str, says: str) -> None:
    ran = helm.run("template", "endcap", str(CHART), f"--kube-version={KUBERNETES}", "--set", wrong)
    assert ran.returncode != 0 and says in ran.stderr, ran.stderr


def test_every_default_is_in_the_schema_and_nothing_else() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def compare(value: Any, described: Json, where: str) -> None:
        if "$ref" in described or not isinstance(value, dict) or "properties" not in described:
            return
        assert described["additionalProperties"] is False, where
        assert set(value) == set(described["properties"]) - {"global"}, where
        for key, one in value.items():
            compare(one, described["properties"][key], f"{where}.{key}")

    compare(values, schema, "values")


def test_with_namespaces_named_nothing_is_granted_in_the_whole_cluster(helm: Helm) -> None:
    documents = helm.template(values="namespaced")
    kinds = [one["kind"] for one in documents]
    assert "ClusterRoleBinding" not in kinds and "ClusterServingRuntime" not in kinds
    bound = [one["metadata"]["namespace"] for one in documents if one["kind"] == "RoleBinding"]
    assert sorted(bound) == ["endcap-system", "search", "shop"]
    runtimes = [one for one in documents if one["kind"] == "ServingRuntime"]
    assert sorted(one["metadata"]["namespace"] for one in runtimes) == ["search", "shop"]
    kept = [one["metadata"]["name"] for one in documents if one["kind"] == "PersistentVolumeClaim"]
    assert kept == []


def test_nothing_is_granted_with_a_star_and_secrets_never(helm: Helm) -> None:
    for one in helm.template(values="full"):
        for rule in one.get("rules", ()) if one["kind"] in ("Role", "ClusterRole") else ():
            assert "*" not in rule["apiGroups"] + rule["resources"] + rule["verbs"], one["metadata"]["name"]
            assert not {"secrets", "pods/exec", "clusterroles", "nodes"} & set(rule["resources"])


def test_every_workload_has_its_network_policy(helm: Helm) -> None:
    documents = helm.template(values="full")
    selected = {one["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/name"]
                for one in documents if one["kind"] == "NetworkPolicy"}  # fmt: skip
    assert {one["metadata"]["name"] for one in documents if one["kind"] == "Deployment"} == selected
    for one in documents:
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] != "endcap-operator":
            assert one["spec"]["egress"] == [], one["metadata"]["name"]


def test_selectors_find_the_pods_they_are_for(helm: Helm) -> None:
    documents = helm.template(values="full")
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in documents if one["kind"] == "Deployment"]
    for one in documents:
        if one["kind"] in ("Service", "PodDisruptionBudget", "Deployment"):
            spec = one["spec"]["selector"]
            wanted = spec.get("matchLabels", spec)
            assert sum(wanted.items() <= pod.items() for pod in labels) == 1, (one["kind"], one["metadata"]["name"])


def test_two_replicas_have_a_budget_and_stand_in_different_zones_and_one_has_none(helm: Helm) -> None:
    documents = helm.template(values="full")
    named(documents, "PodDisruptionBudget", "endcap-operator")
    spread = named(documents, "Deployment", "endcap-operator")["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    assert "PodDisruptionBudget" not in [one["kind"] for one in helm.template()]


def test_images_are_by_one_tag_or_each_by_its_own(helm: Helm) -> None:
    digest = "sha256:" + "a" * 64
    documents = helm.template("--set", f"images.controller=other.example:5000/c@{digest}", "--set", "images.tag=v9",
                              "--set", "images.server=localhost:5000/s")  # fmt: skip
    operator = named(documents, "Deployment", "endcap-operator")["spec"]["template"]["spec"]["containers"][0]
    collector = named(documents, "Deployment", "endcap-collector")["spec"]["template"]["spec"]["containers"][0]
    assert operator["image"] == f"other.example:5000/c@{digest}" and collector["image"] == "localhost:5000/s:v9"
    full = named(helm.template(values="full"), "Deployment", "endcap-operator")["spec"]["template"]["spec"]
    assert full["containers"][0]["image"] == "registry.example/team/endcap/controller:1.2.3"


def test_the_collector_has_one_writer_and_keeps_its_volume(helm: Helm) -> None:
    documents = helm.template()
    collector = named(documents, "Deployment", "endcap-collector")["spec"]
    assert collector["replicas"] == 1 and collector["strategy"] == {"type": "Recreate"}
    claim = named(documents, "PersistentVolumeClaim", "endcap-collector")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_the_programs_take_the_arguments_that_they_are_given(helm: Helm) -> None:
    """Our own argument parsers, on what the chart passes them."""
    from loadtests.run import config_from_argv
    from serving.feedback.__main__ import _arguments as feedback
    from serving.server.__main__ import _arguments as server

    documents = helm.template(values="full")
    runtimes = [one for one in documents if one["kind"] == "ClusterServingRuntime"]
    assert {one["metadata"]["name"] for one in runtimes} == {"endcap-cpu", "endcap-gpu"}
    variables = {"ENDCAP_VERSION": "7", "ENDCAP_ZONE": "a", "ENDCAP_PACKAGE_SHA256": ""}
    for one in runtimes:
        container = one["spec"]["containers"][0]
        assert set(variables) <= {variable["name"] for variable in container["env"]}
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], text) for text in container["args"]]
        asked = server(arguments)
        assert (asked.version, asked.port, asked.thresholds_ms) == ("7", 8080, (50.0, 100.5))
        assert container["name"] == "kserve-container" and container["ports"][0]["containerPort"] == 8080
    collector = named(documents, "Deployment", "endcap-collector")["spec"]["template"]["spec"]["containers"][0]
    assert feedback(collector["args"]).window_s == 30
    job = named(documents, "CronJob", "endcap-load")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert config_from_argv(job["args"]).url == "http://shop.example"


def test_a_load_that_nobody_scheduled_waits_to_be_asked_for(helm: Helm) -> None:
    assert named(helm.template(values="namespaced"), "CronJob", "endcap-load")["spec"]["suspend"] is True
    assert named(helm.template(values="full"), "CronJob", "endcap-load")["spec"]["suspend"] is False


def test_what_is_installed_keeps_its_names_over_an_upgrade(helm: Helm) -> None:
    """Selectors cannot be changed in place: no version may stand in them."""
    one = named(helm.template(), "Deployment", "endcap-operator")
    assert set(one["spec"]["selector"]["matchLabels"]) == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}


def test_redis_takes_the_arguments_that_it_is_given(helm: Helm, tmp_path: Path) -> None:
    program = shutil.which("redis-server")
    assert program, "install Debian's package redis-server (.ci/run does)"
    pod = named(helm.template(values="full"), "Deployment", "endcap-redis")["spec"]["template"]["spec"]
    port = free_port()
    arguments = [*pod["containers"][0]["args"], "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    process = subprocess.Popen([program, *arguments], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_until(answers, "Redis answers")
        settings = client.config_get("maxmemory*")
        assert settings["maxmemory-policy"] == "allkeys-lru" and int(settings["maxmemory"]) == 256 << 20
        assert client.config_get("save") == {"save": ""} and client.config_get("appendonly") == {"appendonly": "no"}
        client.close()
    finally:
        process.terminate()
        process.wait(30)
