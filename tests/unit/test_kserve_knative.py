"""Knative mode's objects: what is read of them, and what is written into an InferenceService."""

from typing import Any

import pytest

from endcap.errors import TargetError
from serving.targets.kserve import ServiceError
from serving.targets.kserve.knative import (
    RevisedService,
    body_of,
    forward,
    promote,
    read_revised,
    returned,
    revisions_of,
    share_out,
    withdrawn,
)
from serving.targets.kserve.plan import Canary, Predictor, Spec

ONE, TWO, THREE = (Predictor(label, "", f"s3://models/{label}", "endcap-cpu") for label in ("1", "2", "3"))


def document(*, version: str = "1", percent: int | None = None, ready: bool = True) -> dict[str, Any]:
    predictor: dict[str, Any] = {
        "labels": {"endcap.dev/version": version},
        "model": {"modelFormat": {"name": "endcap"}, "runtime": "endcap-cpu", "storageUri": f"s3://models/{version}"},
    }
    if percent is not None:
        predictor["canaryTrafficPercent"] = percent
    component = {
        "latestCreatedRevision": f"r{version}", "latestReadyRevision": f"r{version}" if ready else "r0",
        "latestRolledoutRevision": "r1",
        "traffic": [{"revisionName": "r1", "percent": 90}, {"revisionName": "r1", "percent": 10, "tag": "prev"}],
    }  # fmt: skip
    return {
        "metadata": {"name": "recommender", "namespace": "shop", "uid": "u", "resourceVersion": "7"},
        "spec": {"predictor": predictor},
        "status": {"deploymentMode": "Knative", "components": {"predictor": component},
                   "conditions": [{"type": "PredictorRouteReady", "status": "True"}]},
    }  # fmt: skip


def read(stable: Predictor | None = None, **how: Any) -> RevisedService:
    return read_revised(document(**how), name="recommender", namespace="shop", stable=stable)


def written(wish: Spec) -> dict[str, Any]:
    body = body_of(read(), wish)
    assert body["metadata"] == {"name": "recommender", "namespace": "shop", "resourceVersion": "7"}
    return body["spec"]["predictor"]


def test_a_service_is_told_as_stable_and_its_newest_revision_as_a_canary() -> None:
    assert read().spec == Spec(ONE)
    assert read(percent=100).spec == Spec(ONE), "all of it, and no rollout: that is stable"
    assert read(ONE, version="2", percent=10).spec == Spec(ONE, canaries=(Canary(TWO, 0, 10),))
    assert read(ONE, version="2").spec == Spec(TWO), "without a percentage it has everything"
    assert read(ONE, version="2", percent=10).spec.percents == {"2": 10, "1": 90}
    assert read(ONE, percent=0).spec.percents == {"1": 100}
    assert read().traffic == {"r1": 100}
    with pytest.raises(ServiceError, match="no rollout of endcap's wrote it"):
        read(version="2", percent=10)
    bare = document()
    bare["status"] = {"deploymentMode": "Knative"}
    fresh = read_revised(bare, name="recommender", namespace="shop", stable=None)
    assert (fresh.created, fresh.traffic) == ("", None)


def test_a_revision_says_its_version_its_pods_and_what_is_wrong_with_it() -> None:
    said = {"status": "False", "reason": "ExitCode3", "message": "Container failed with: boom"}
    found = revisions_of([
        {"metadata": {"name": "r1", "labels": {"endcap.dev/version": "1"},
                      "annotations": {"autoscaling.knative.dev/min-scale": "3"}},
         "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Active", "status": "False"}]}},
        {"metadata": {"name": "r2"}, "status": {"conditions": [{"type": "ContainerHealthy", **said}]}},
    ])  # fmt: skip
    assert (found["r1"].version, found["r1"].least, found["r1"].reason) == ("1", 3, "")
    assert (found["r2"].version, found["r2"].exit_code, found["r2"].reason) == ("", 3, "Container failed with: boom")


def test_model_and_percentage_are_one_write_and_a_promotion_only_drops_the_percentage() -> None:
    wish = forward(read(), TWO)
    assert written(wish) == {
        "labels": {"endcap.dev/version": "2"}, "canaryTrafficPercent": 0,
        "model": {"modelFormat": {"name": "endcap"}, "storageUri": "s3://models/2", "runtime": "endcap-cpu"},
    }  # fmt: skip
    wish = share_out(wish, {"2": 10, "1": 90})
    assert written(wish)["canaryTrafficPercent"] == 10
    with pytest.raises(TargetError, match="still has a share"):
        promote(wish)
    whole = share_out(wish, {"2": 100, "1": 0})
    assert {**written(promote(whole)), "canaryTrafficPercent": 100} == written(whole)
    assert written(returned(whole))["canaryTrafficPercent"] == 99
    assert returned(wish) == wish


def test_a_version_comes_only_where_the_newest_revision_has_everything_or_another_has_nothing() -> None:
    with pytest.raises(TargetError, match="not rolled out yet"):
        forward(read(ready=False), TWO)
    with pytest.raises(TargetError, match="on its way already"):
        forward(read(ONE, version="2", percent=10), THREE)
    idle = read(ONE, version="2", percent=0)
    assert forward(idle, TWO) == idle.spec
    assert forward(idle, THREE).canaries == (Canary(THREE, 0, 0),)
    with pytest.raises(TargetError, match="no revision of this service"):
        share_out(idle.spec, {"3": 10, "1": 90})


def test_a_canary_is_taken_away_by_stables_model_once_it_has_no_traffic() -> None:
    spec = read(ONE, version="2", percent=30).spec
    with pytest.raises(TargetError, match="still has a share"):
        withdrawn(spec)
    wish = withdrawn(share_out(spec, {"1": 100}))
    assert written(wish) == {**written(Spec(ONE)), "canaryTrafficPercent": 0}
    assert withdrawn(wish) == wish
    assert share_out(wish, {"1": 100}) == wish, "stable's own new revision has no share to be taken away"
