"""Knative mode, at the level of objects: what is written into an InferenceService, and in what order."""

from typing import Any

import pytest

from endcap.errors import InputError, TargetError
from serving.targets.kserve import ServiceError
from serving.targets.kserve.knative import body_of, forward, promote, read_revisions, roll_back, share_out
from serving.targets.kserve.plan import Predictor

ONE, TWO = (Predictor(label, "", f"s3://models/{label}", "endcap-cpu") for label in ("1", "2"))


def document(
    *, version: str = "1", percent: int | None = None, ready: bool = True, mode: str = "Knative"
) -> dict[str, Any]:
    predictor: dict[str, Any] = {
        "labels": {"endcap.dev/version": version},
        "model": {"modelFormat": {"name": "endcap"}, "runtime": "endcap-cpu", "storageUri": f"s3://models/{version}"},
    }
    if percent is not None:
        predictor["canaryTrafficPercent"] = percent
    component = {
        "latestCreatedRevision": f"r{version}", "latestReadyRevision": f"r{version}" if ready else "r1",
        "latestRolledoutRevision": "r1",
        "traffic": [{"revisionName": "r1", "percent": 100 - (percent or 0)}],
    }  # fmt: skip
    return {
        "metadata": {"name": "recommender", "namespace": "shop", "resourceVersion": "7",
                     "annotations": {"endcap.dev/mode": "knative"}},
        "spec": {"predictor": predictor}, "status": {"deploymentMode": mode, "components": {"predictor": component}},
    }  # fmt: skip


def written(wish: Any) -> dict[str, Any]:
    return body_of(document()["metadata"], wish)["spec"]["predictor"]


def test_a_rollout_goes_from_a_revision_without_traffic_to_one_without_the_field() -> None:
    wish = forward(read_revisions(document()), TWO)
    assert written(wish) == {"labels": {"endcap.dev/version": "2"}, "canaryTrafficPercent": 0,
                             "model": {"storageUri": "s3://models/2", "runtime": "endcap-cpu"}}  # fmt: skip
    with pytest.raises(TargetError, match="no ready revision"):
        share_out(read_revisions(document(version="2", percent=0, ready=False)), {"2": 0.1, "1": 0.9}, stable="1")
    there = read_revisions(document(version="2", percent=0))
    assert written(share_out(there, {"2": 0.1, "1": 0.9}, stable="1"))["canaryTrafficPercent"] == 10
    there = read_revisions(document(version="2", percent=10))
    with pytest.raises(TargetError, match="still has a share"):
        promote(there)
    assert written(share_out(there, {"2": 1.0}, stable="1"))["canaryTrafficPercent"] == 100
    assert "canaryTrafficPercent" not in written(promote(read_revisions(document(version="2", percent=100))))


def test_the_way_back_returns_the_traffic_before_the_model() -> None:
    there = read_revisions(document(version="2", percent=30))
    with pytest.raises(TargetError, match="still has a share"):
        roll_back(there, ONE)
    wish = share_out(there, {"1": 1.0}, stable="1")
    assert (written(wish)["canaryTrafficPercent"], written(wish)["model"]["storageUri"]) == (0, "s3://models/2")
    wish = roll_back(read_revisions(document(version="2", percent=0)), ONE)
    assert (written(wish)["canaryTrafficPercent"], written(wish)["model"]["storageUri"]) == (0, "s3://models/1")
    assert "canaryTrafficPercent" not in written(roll_back(read_revisions(document(percent=0)), ONE))


def test_what_knative_cannot_do_is_refused() -> None:
    there = read_revisions(document(version="2", percent=10))
    with pytest.raises(InputError, match="two revisions"):
        share_out(there, {"2": 0.1, "1": 0.8, "1-baseline": 0.1}, stable="1")
    with pytest.raises(InputError, match="whole percents"):
        share_out(there, {"2": 0.005, "1": 0.995}, stable="1")
    with pytest.raises(TargetError, match="on its way already"):
        forward(there, Predictor("3", "", "s3://models/3"))


def test_a_service_in_standard_mode_is_not_given_a_field_that_is_ignored_there() -> None:
    with pytest.raises(ServiceError, match="ignores canaryTrafficPercent"):
        read_revisions(document(mode="Standard"))
