"""The KServe target on a real API server with real controllers: what is refused, applied, owned and left behind.

Pods and the gateway only say that they are ready (:mod:`tests.cluster.kserve_fakes`); requests are in
``test_kserve_rollouts``. The same tests run on the stand-in and on KServe itself (:mod:`tests.cluster.kserve`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from endcap.errors import FencedError, VerificationError
from serving.targets import ModelVersion
from serving.targets.kserve import Cluster, FixedDelivery, KServeTarget, Patience, Reason, ServiceError, Storage
from serving.targets.kserve.cluster import path_of
from serving.targets.kserve.errors import RefusedError
from tests.cluster.kserve_fakes import Fakes, furnished
from tests.kserve_world import RUNTIME, SERVICE, service
from tests.process import wait_until

ONE, TWO, BASELINE = (ModelVersion(label, Path()) for label in ("1", "2", "1-baseline"))
DELIVERY = FixedDelivery({label: Storage(f"pvc://models/recommender/{label}") for label in ("1", "2", "3")})
PATIENCE = Patience(capacity_s=180, route_s=120, healthy_s=60)


@pytest.fixture
def cluster(kserve_objects: Cluster) -> Cluster:
    return kserve_objects


@pytest.fixture
def fakes(cluster: Cluster, namespace: str) -> Iterator[Fakes]:
    with furnished(cluster, namespace) as found:
        yield found


def create(cluster: Cluster, namespace: str, **how: object) -> None:
    made = service(**how)
    made["metadata"]["namespace"] = namespace
    cluster.create(path_of("inferenceservices", namespace), made)


def spec(cluster: Cluster, namespace: str) -> dict:
    return (cluster.get(path_of("inferenceservices", namespace, SERVICE)) or {})["spec"]


def serving(cluster: Cluster, namespace: str, **how: object) -> KServeTarget:
    create(cluster, namespace, **how)
    path = path_of("inferenceservices", namespace, SERVICE)

    def is_ready() -> bool:
        conditions = ((cluster.get(path) or {}).get("status") or {}).get("conditions") or ()
        return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)

    wait_until(is_ready, "the service is ready", deadline_s=90)
    return KServeTarget(cluster, SERVICE, namespace, DELIVERY, patience=PATIENCE)


def names(cluster: Cluster, kind: str, namespace: str) -> set[str]:
    return {one["metadata"]["name"] for one in cluster.items(path_of(kind, namespace)) or ()
            if one["metadata"]["name"].startswith(SERVICE)}  # fmt: skip


def test_a_version_goes_from_nothing_to_stable(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = serving(cluster, namespace)
    before = spec(cluster, namespace)["predictor"]
    token = target.acquire("test")
    for shares in ({TWO: 0.1, ONE: 0.8, BASELINE: 0.1}, {TWO: 0.5, ONE: 0.5}, {TWO: 1.0}):
        target.ensure_capacity(shares, token=token)
        target.set_shares(shares, token=token)
        assert target.observe().shares == {version.label: pytest.approx(share) for version, share in shares.items()}
    pods = {one["metadata"]["uid"] for one in target._pods_of(target._now()[0].spec, "2")}
    assert len(pods) == 2
    target.retire("1", token=token)
    target.retire("1-baseline", token=token)
    after = spec(cluster, namespace)
    assert after.get("canary") in (None, [])
    assert after["predictor"]["name"] == "v2"
    assert after["predictor"]["labels"] == {"endcap.dev/version": "2"}
    assert after["predictor"]["minReplicas"] == before["minReplicas"]
    only = {f"{SERVICE}-v2-predictor"}
    wait_until(lambda: names(cluster, "deployments", namespace) == only, "one Deployment", deadline_s=120)
    assert {one["metadata"]["uid"] for one in target._pods_of(target._now()[0].spec, "2")} == pods, "no pod restarted"
    wait_until(
        lambda: names(cluster, "services", namespace) == {f"{SERVICE}-v2-predictor"}, "one Service", deadline_s=120
    )
    assert target.observe().shares == {"2": 1.0}


def test_back_to_stable_and_the_bounds_of_an_autoscaler(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = serving(cluster, namespace, replicas=2, most=4, scaler="hpa")
    before = spec(cluster, namespace)["predictor"]
    token = target.acquire("test")
    shares = {TWO: 0.5, ONE: 0.5}
    target.ensure_capacity(shares, token=token)
    target.set_shares(shares, token=token)
    hpa = cluster.get(path_of("horizontalpodautoscalers", namespace, f"{SERVICE}-v1-predictor"))
    assert hpa is not None
    assert hpa["spec"]["minReplicas"] >= 2, "stable keeps what it had"
    target.ensure_capacity({ONE: 1.0}, token=token)
    target.set_shares({ONE: 1.0}, token=token)
    target.retire("2", token=token)
    after = spec(cluster, namespace)["predictor"]
    assert {key: after[key] for key in before} == before
    wait_until(lambda: names(cluster, "horizontalpodautoscalers", namespace) == {f"{SERVICE}-v1-predictor"},
               "the canary's autoscaler is gone", deadline_s=120)  # fmt: skip


def test_only_our_fields_are_ours(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = serving(cluster, namespace)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    found = cluster.get(path_of("inferenceservices", namespace, SERVICE)) or {}
    mine = next(one for one in found["metadata"]["managedFields"]
                if one["manager"] == "endcap" and one["operation"] == "Apply")  # fmt: skip
    fields = mine["fieldsV1"]["f:spec"]
    assert set(fields) == {"f:canary", "f:predictor"}
    assert set(fields["f:predictor"]) == {"f:name", "f:labels", "f:minReplicas", "f:model"}
    assert set(fields["f:predictor"]["f:model"]) <= {"f:modelFormat", "f:storageUri", "f:runtime"}


def test_a_writer_that_was_overtaken_writes_nothing(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = serving(cluster, namespace)
    other = KServeTarget(cluster, SERVICE, namespace, DELIVERY, patience=PATIENCE)
    token = target.acquire("first")
    there, read = target._there(token)
    newer = other.acquire("second")
    assert newer == token + 1
    with pytest.raises(FencedError):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    with pytest.raises(FencedError):
        target._apply(read, there.spec, token)
    assert not spec(cluster, namespace).get("canary")


def test_the_fence_outlives_what_kserve_writes_to_the_status(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = serving(cluster, namespace)
    token = target.acquire("test")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)  # KServe wrote conditions and canary statuses
    path = path_of("inferenceservices", namespace, SERVICE)

    def status() -> dict:
        return (cluster.get(path) or {})["status"]

    wait_until(lambda: status()["canaryStatuses"][0]["ready"], "KServe holds the canary for ready", deadline_s=90)
    assert status()["annotations"]["endcap.dev/fencing-token"] == str(token)


def test_a_server_that_refuses_its_package_is_given_up(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    fakes.behaviour = lambda version: 3 if version == "2" else None
    target = serving(cluster, namespace)
    before = spec(cluster, namespace)["predictor"]
    token = target.acquire("test")
    with pytest.raises(VerificationError, match="ended with code 3: it said so"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    after = spec(cluster, namespace)
    assert not after.get("canary")
    assert {key: after["predictor"][key] for key in before} == before


def test_a_node_that_is_not_there_is_the_reason(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    serving(cluster, namespace)
    runtimes = f"/apis/serving.kserve.io/v1alpha1/namespaces/{namespace}/servingruntimes"
    gpu = {**RUNTIME, "metadata": {"name": "endcap-gpu"}}
    gpu["spec"] = {**RUNTIME["spec"], "containers": [{
        **RUNTIME["spec"]["containers"][0],
        "resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}}}]}  # fmt: skip
    cluster.create(runtimes, gpu)
    delivery = FixedDelivery({"2": Storage("pvc://models/recommender/2", runtime="endcap-gpu")})
    target = KServeTarget(cluster, SERVICE, namespace, delivery, patience=Patience(capacity_s=12, route_s=120))
    token = target.acquire("test")
    with pytest.raises(Exception, match=r"\d+ of \d+ nodes are available: .*nvidia\.com/gpu"):
        target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert not spec(cluster, namespace).get("canary")
    target = KServeTarget(cluster, SERVICE, namespace, delivery, fallback_runtime="endcap-cpu",
                          patience=Patience(capacity_s=120, node_s=5, route_s=120))  # fmt: skip
    token = target.acquire("again")
    target.ensure_capacity({TWO: 0.1, ONE: 0.9}, token=token)
    assert spec(cluster, namespace)["canary"][0]["predictor"]["model"]["runtime"] == "endcap-cpu"


def canary(**over: object) -> dict:
    return {"predictor": {"name": "v2", "minReplicas": 1, "model": {
        "modelFormat": {"name": "endcap"}, "storageUri": "pvc://models/2"}, **over}, "trafficPercent": 10}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"canary": [canary(name="")]}, "name"),
        ({"canary": [canary(name="7")]}, "should match"),
        ({"canary": [canary(name="v1")]}, "conflicts with stable"),
        ({"canary": [canary(), canary()]}, "duplicated"),
        ({"canary": [canary(maxReplicas=3)]}, "fixed replicas"),
        ({"canary": [canary(minReplicas=3)]}, "must not exceed stable"),
        ({"canary": [{**canary(), "trafficPercent": 60}, {**canary(name="v3"), "trafficPercent": 60}]}, "<= 100"),
        ({"canary": [{**canary(), "trafficPercent": 101}]}, "100"),
        ({"predictor": {"minReplicas": 5, "maxReplicas": 3}}, "MaxReplicas"),
        ({"predictor": {"name": "v2"}}, "requires a model change"),
    ],
)  # fmt: skip
def test_what_kserve_refuses(cluster: Cluster, namespace: str, fakes: Fakes, change: dict, said: str) -> None:
    """Nothing of the target's: that the stand-in is no kinder than KServe."""
    create(cluster, namespace)
    path = path_of("inferenceservices", namespace, SERVICE)
    with pytest.raises(RefusedError, match=said):
        cluster.merge(path, {"spec": change})


def test_fields_that_kserve_does_not_know_are_refused(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    create(cluster, namespace)
    body = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": SERVICE},
            "spec": {"canary": [{**canary(), "weight": 3}]}}  # fmt: skip
    with pytest.raises(RefusedError, match="not declared in schema"):
        cluster.apply(path_of("inferenceservices", namespace, SERVICE), body)


def test_what_is_no_service_to_roll_out_on(cluster: Cluster, namespace: str, fakes: Fakes) -> None:
    target = KServeTarget(cluster, SERVICE, namespace, DELIVERY, patience=PATIENCE)
    with pytest.raises(ServiceError) as refused:
        target.acquire("test")
    assert refused.value.reason is Reason.NOT_FOUND
    made = service()
    made["metadata"]["namespace"] = namespace
    del made["spec"]["predictor"]["name"]
    cluster.create(path_of("inferenceservices", namespace), made)
    with pytest.raises(ServiceError, match="has no name") as refused:
        target.acquire("test")
    assert refused.value.reason is Reason.NO_MODEL
    assert cluster.get(path_of("leases", namespace, f"endcap-{SERVICE}")) is None
