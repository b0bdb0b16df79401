"""Packages as users bring them to pods: the chart's MLflow, S3, images; and the chart's other workloads at work.

One release of the chart serves the module: its MLflow keeps the packages, its ClusterStorageContainer fetches them, its
Redis keeps the answers, its load and its drill run against what is served. KServe is the stand-in or KServe itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from endcap.files import sha256_file
from endcap.package import MANIFEST_FILE
from endcap.processes import free_port
from endcap.registry import Registry
from serving.targets.kserve import Cluster, MLflowDelivery, Storage
from serving.targets.kserve.cluster import path_of
from tests.cluster import images, pods, programs
from tests.cluster.access import Access
from tests.cluster.chart import CHART, RELEASE, helm, keys_secret, values, volume
from tests.packages import ITEMS, make_package
from tests.process import wait_until

Json = dict[str, Any]
PATIENCE_S = 240.0
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
ROLES = ("server", "controller", "mlflow", "redis", "load", "drills")
OBJECTIVES = """
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: recommender}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.9, good: answered}
  - {name: latency, goal: 0.5, good: answered, withinMs: 2000}
"""
FAILING = ITEMS[40]
"""Where it is in a history, the graph of what is served fails."""


@dataclass(frozen=True)
class Shop:
    """``system``: the chart's namespace; ``namespace``: that of the services. ``key`` signs packages."""

    access: Access
    cluster: Cluster
    system: str
    namespace: str
    root: Path
    registry: Registry

    @property
    def key(self) -> Path:
        return self.root / "keys" / "signing.key"

    def package(self, name: str, **how: Any) -> Path:
        return make_package(self.root / name, key=self.key, **how)

    def register(self, package: Path) -> Storage:
        """The next version of the model, as a rollout is told of it."""
        version = self.registry.register(package, name="recommender", metrics={}, params={}, tags={})
        return MLflowDelivery(self.registry, "recommender").storage(version.version)

    def serve(self, service: str, storage: Storage, *, namespace: str = "", replicas: int = 1,
              annotations: Mapping[str, str] | None = None) -> None:  # fmt: skip
        """Ask KServe for a service of version 1."""
        namespace = namespace or self.namespace
        self.cluster.create(path_of("inferenceservices", namespace), {
            "apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService",
            "metadata": {"name": service, "namespace": namespace, "annotations": {
                "serving.kserve.io/deploymentMode": "Standard", "serving.kserve.io/autoscalerClass": "none"}},
            "spec": {"predictor": {
                "name": "v1", "minReplicas": replicas, "labels": {"endcap.dev/version": "1"},
                "annotations": {"endcap.dev/package-sha256": storage.digest or "", **(annotations or {})},
                "model": {"modelFormat": {"name": "endcap"}, "runtime": "endcap-cpu", "storageUri": storage.uri},
            }},
        })  # fmt: skip

    def serves(self, service: str, *, namespace: str = "", replicas: int = 1) -> list[str]:
        """URLs of the pods of a service, once so many are available."""
        namespace = namespace or self.namespace
        self.access.wait(f"deployment/{service}-v1-predictor", f"jsonpath={{.status.availableReplicas}}={replicas}",
                         namespace, deadline_s=PATIENCE_S)  # fmt: skip
        return [f"http://{pod['status']['podIP']}:8080" for pod in self.pods(service, namespace) if is_ready(pod)]

    def pods(self, service: str, namespace: str = "") -> list[Json]:
        found = self.cluster.items(path_of("pods", namespace or self.namespace),
                                   labels={"serving.kserve.io/inferenceservice": service})  # fmt: skip
        return [pod for pod in found or () if "deletionTimestamp" not in pod["metadata"]]

    def refused(self, service: str) -> str:
        """What the server said as it ended with the exit code of a package that must not be served."""
        wait_until(lambda: len(self.pods(service)) == 1, f"{service} has a pod", deadline_s=PATIENCE_S)
        name = self.pods(service)[0]["metadata"]["name"]
        ended = "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}"
        self.access.wait(f"pod/{name}", ended, self.namespace, deadline_s=PATIENCE_S)
        (pod,) = self.pods(service)
        last = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
        assert last["exitCode"] == 3 and not is_ready(pod), last
        return str(last["message"])


def is_ready(pod: Json) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


@pytest.fixture(scope="module")
def shop(
    full_cluster: Access, kserve_on: Callable[[Access], Cluster], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    access, root = full_cluster, tmp_path_factory.mktemp("shop")
    names = {role: access.image(role) for role in ROLES}
    keys = keys_secret(root)
    cluster = kserve_on(access)
    with access.namespace() as system, access.namespace() as namespace:
        access.apply(shoppers(*ITEMS[:20]), namespace=system)
        access.apply(keys, namespace=namespace)
        with volume(access, system, names["server"], "mlflow") as storage:
            for place in (system, namespace):
                access.kubectl("label", "namespace", place, RESTRICTED)
            settings = values(
                *(f"images.{role}={name}" for role, name in names.items()), storage,
                "operator.enabled=false", "collector.enabled=false", "mlflow.install=true", "redis.install=true",
                "runtimes.cache=true", "runtimes.gpu.enabled=false", "runtimes.cpu.resources.requests.cpu=20m",
                "runtimes.extraArgs={--workers=1,--threads=1}", f"networkPolicies.servicesFrom={{{namespace}}}",
                "loadTest.enabled=true", f"loadTest.url=http://recommender-v1-predictor.{namespace}.svc",
                "loadTest.configMap=shoppers", "loadTest.objectives=true", "loadTest.ratePerSecond=20",
                "loadTest.durationSeconds=4", "loadTest.resources.requests.cpu=20m",
                "drills.enabled=true", f"drills.namespace={namespace}", "drills.service=recommender",
            )  # fmt: skip
            helm(access, "install", RELEASE, str(CHART), "--namespace", system, "--wait", "--timeout=5m", *settings)
            try:
                with reached(access, system, "service/endcap-mlflow", 5000) as mlflow:
                    yield Shop(access, cluster, system, namespace, root, Registry(mlflow))
            finally:
                services = cluster.items(path_of("inferenceservices", namespace)) or ()
                for service in services:
                    cluster.delete(path_of("inferenceservices", namespace, service["metadata"]["name"]))
                access.helm("uninstall", RELEASE, "--namespace", system, "--wait")


@contextlib.contextmanager
def reached(access: Access, namespace: str, what: str, port: int) -> Iterator[str]:
    """A URL that leads to a port of a Service, as a user gets one."""
    command = (programs.path("kubectl"), "port-forward", f"--namespace={namespace}", what, f":{port}")
    with subprocess.Popen(command, env=access.environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found, "kubectl port-forward said nothing"
            yield f"http://127.0.0.1:{found[1]}"
        finally:
            process.kill()


def shoppers(*items: str) -> Json:
    """The ConfigMap of the chart's load: a shopper an item, and what is promised to them."""
    lines = "".join(f'{{"shopper": "s{item}", "history": ["{item}"]}}\n' for item in items)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "shoppers"},
            "data": {"shoppers.jsonl": lines, "objectives.yaml": OBJECTIVES}}  # fmt: skip


def recommend(url: str, item: str = ITEMS[4]) -> Json:
    answer = httpx.post(f"{url}/v1/recommend", json={"shopper": "1", "history": [item], "k": 3}, timeout=30.0)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def kept(url: str) -> float:
    """Answers that a server took from the cache."""
    text = httpx.get(f"{url}/metrics", timeout=30.0).text
    return sum(
        map(float, re.findall(r'^endcap_server_cache_total\{[^}]*result="hit"[^}]*\} (\S+)$', text, re.MULTILINE))
    )


def job_of(shop: Shop, cronjob: str, name: str) -> tuple[int, str]:
    """Exit code and output of a Job made of a CronJob by hand."""
    shop.access.kubectl("create", "job", f"--namespace={shop.system}", f"--from=cronjob/{cronjob}", name)
    shop.access.wait(f"job/{name}", "jsonpath={.status.conditions[0].type}", shop.system, deadline_s=PATIENCE_S)
    pods = shop.cluster.items(path_of("pods", shop.system), labels={"batch.kubernetes.io/job-name": name}) or ()
    (code,) = (pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] for pod in pods)
    return code, shop.access.kubectl("logs", f"job/{name}", f"--namespace={shop.system}")


def test_the_charts_mlflow_redis_load_and_drill_at_work_on_a_registered_version(shop: Shop) -> None:
    access, system = shop.access, shop.system
    storage = shop.register(shop.package("one", fails_on=[FAILING]))
    assert storage.uri == "mlflow://recommender/1" and storage.digest == sha256_file(shop.root / "one" / MANIFEST_FILE)
    shop.serve("recommender", storage, replicas=2)
    assert "Phase:          Succeeded" in helm(access, "test", RELEASE, "--namespace", system)

    first, second = shop.serves("recommender", replicas=2)
    address = access.get("service", "endcap-redis", f"--namespace={system}")["spec"]["clusterIP"]
    with redis.Redis(address) as store:  # a server that gets no answer from it in 5 ms makes its own
        wait_until(lambda: recommend(first) != {} and store.dbsize() == 1, "an answer is kept", deadline_s=PATIENCE_S)
    wait_until(lambda: recommend(second) != {} and kept(second) > 0, "another finds it", deadline_s=PATIENCE_S)
    assert recommend(first)["items"] == recommend(second)["items"] == [ITEMS[5], ITEMS[6], ITEMS[7]]

    code, said = job_of(shop, "endcap-load", "load-held")
    assert code == 0, said
    access.apply(shoppers(FAILING), namespace=system)
    code, said = job_of(shop, "endcap-load", "load-broken")
    assert code == 4 and "broken under this load: availability" in said, said

    before = {pod["metadata"]["uid"] for pod in shop.pods("recommender")}
    code, said = job_of(shop, "endcap-drill", "drill")
    assert code == 0, said
    after = {pod["metadata"]["uid"] for pod in shop.pods("recommender") if is_ready(pod)}
    assert len(after) == 2 and len(before & after) == 1


def test_another_package_than_the_registered_one_is_not_served_whatever_brought_it(shop: Shop) -> None:
    meant = shop.register(shop.package("meant", popular=ITEMS[:10]))
    delivered = shop.register(shop.package("delivered", popular=ITEMS[:11]))
    # The registry says one, the storage leads to the other, signed as well.
    shop.serve("another", Storage(delivered.uri, meant.digest))
    # And what was registered, changed in MLflow's own store.
    changed = shop.register(shop.package("changed"))
    folder = (
        "import pathlib; p = max(pathlib.Path('/data').rglob('popular.json'), key=lambda f: f.stat().st_mtime_ns); "
    )
    shop.access.kubectl("exec", "deployment/endcap-mlflow", f"--namespace={shop.system}", "--", "python", "-c",
                        folder + "p.write_text('[]')")  # fmt: skip
    shop.serve("altered", changed)
    assert "another package than the one meant" in shop.refused("another")
    assert "popular.json" in shop.refused("altered")


@pytest.fixture
def unrestricted(shop: Shop) -> Iterator[str]:
    """A namespace for pods that KServe gives containers without a security context: all but the chart's own."""
    with shop.access.namespace() as name:
        shop.access.apply(keys_secret_of(shop), namespace=name)
        yield name
        for service in shop.cluster.items(path_of("inferenceservices", name)) or ():
            shop.cluster.delete(path_of("inferenceservices", name, service["metadata"]["name"]))


def keys_secret_of(shop: Shop) -> Json:
    found = shop.access.get("secret", "endcap-keys", f"--namespace={shop.namespace}")
    return {**found, "metadata": {"name": "endcap-keys"}}


UPLOAD = """
import boto3, pathlib, sys
store = boto3.client("s3")
store.create_bucket(Bucket="models")
for file in pathlib.Path("/package").iterdir():
    if file.is_file():
        store.upload_file(str(file), "models", f"{sys.argv[1]}/{file.name}")
"""


@contextlib.contextmanager
def s3(access: Access, root: Path) -> Iterator[Json]:
    """Versity's gateway on this machine; the Secret by which KServe reaches it."""
    port, folder = free_port(access.host), root / "s3"
    folder.mkdir()
    user = {"ROOT_ACCESS_KEY_ID": secrets.token_hex(8), "ROOT_SECRET_ACCESS_KEY": secrets.token_hex(16)}
    command = (programs.ensure("versitygw"), "--port", f"{access.host}:{port}", "posix", folder)
    with (root / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **user})
    try:

        def answers() -> bool:
            assert process.poll() is None, (root / "s3.log").read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"http://{access.host}:{port}/").status_code == 403
            return False

        wait_until(answers, "the S3 gateway answers")
        yield {
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3", "annotations": {
                "serving.kserve.io/s3-endpoint": f"{access.host}:{port}", "serving.kserve.io/s3-usehttps": "0",
                "serving.kserve.io/s3-region": "us-east-1"}},
            "stringData": {"AWS_ACCESS_KEY_ID": user["ROOT_ACCESS_KEY_ID"],
                           "AWS_SECRET_ACCESS_KEY": user["ROOT_SECRET_ACCESS_KEY"]},
        }  # fmt: skip
    finally:
        process.kill()
        process.wait()


def test_a_package_from_s3_is_verified_and_served(shop: Shop, unrestricted: str, tmp_path: Path) -> None:
    access, package = shop.access, shop.package("from-s3")
    image = access.image(images.STORAGE_INITIALIZER)
    with s3(access, tmp_path) as secret:
        access.apply(secret, pods.config_map("package", package), namespace=unrestricted)
        upload = pods.once("upload", image, "python", "-c", UPLOAD, "recommender/7")
        container = upload["spec"]["containers"][0]
        endpoint = secret["metadata"]["annotations"]["serving.kserve.io/s3-endpoint"]
        container["env"] = [{"name": "AWS_ENDPOINT_URL", "value": f"http://{endpoint}"},
                            {"name": "AWS_DEFAULT_REGION", "value": "us-east-1"}]  # fmt: skip
        container["envFrom"] = [{"secretRef": {"name": "s3"}}]
        container["volumeMounts"].append({"name": "package", "mountPath": "/package"})
        upload["spec"]["volumes"].append({"name": "package", "configMap": {"name": "package"}})
        access.apply(upload, namespace=unrestricted)
        access.wait("pod/upload", "jsonpath={.status.phase}=Succeeded", unrestricted)
        shop.serve("from-s3", Storage("s3://models/recommender/7", sha256_file(package / MANIFEST_FILE)),
                   namespace=unrestricted, annotations={"serving.kserve.io/storageSecretName": "s3"})  # fmt: skip
        (url,) = shop.serves("from-s3", namespace=unrestricted)
    assert recommend(url)["items"] == [ITEMS[5], ITEMS[6], ITEMS[7]]


def test_a_package_that_is_an_image_is_verified_and_served(shop: Shop, unrestricted: str, tmp_path: Path) -> None:
    package, image = shop.package("as-image"), "docker.io/endcap/test-package:7"
    shutil.copytree(package, tmp_path / "package")
    archive = images.package_image(tmp_path / "package", image, tmp_path / "package.tar")
    assert shop.access.cluster is not None, "images are loaded into a cluster of ours"
    shop.access.cluster.node.load(archive)
    shop.serve("as-image", Storage(f"oci://{image}", sha256_file(package / MANIFEST_FILE)), namespace=unrestricted)
    (url,) = shop.serves("as-image", namespace=unrestricted)
    assert recommend(url)["items"] == [ITEMS[5], ITEMS[6], ITEMS[7]]
