"""What the stand-in for KServe makes of a storage URI, held against what KServe's webhook was seen to do."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from tests.cluster.kserve_standin.storage import Settings, container_for, inject, merged_container, refusal

Json = dict[str, Any]
SETTINGS = Settings(image="initializer:1", uid_modelcar=1010)


def storage(*formats: Json, **more: Any) -> Json:
    container = {"name": "storage-initializer", "image": "ours:1", "command": ["fetch"],
                 "env": [{"name": "A", "value": "ours"}], "resources": {"requests": {"cpu": "7m"}}}  # fmt: skip
    return {"spec": {"supportedUriFormats": list(formats), "container": container, **more}}


def pod() -> Json:
    return {
        "containers": [{"name": "kserve-container", "image": "server:1", "securityContext": {"runAsNonRoot": True}}]
    }


def test_the_first_container_whose_format_it_is_takes_a_uri() -> None:
    regex = storage({"regex": "^ftps?://"})
    disabled = {**storage({"prefix": "mlflow://"}), "disabled": True}
    jobs = storage({"prefix": "mlflow://"}, workloadType="localModelDownloadJob")
    assert container_for("mlflow://a/1", [regex, disabled, jobs]) is None
    assert container_for("mlflow://a/1", [jobs, storage({"prefix": "mlflow://"})]) is not None
    assert container_for("ftps://a/1", [regex]) is not None


@pytest.mark.parametrize(
    ("uri", "refused"),
    [
        ("mlflow://a/1", True),
        ("oci+modelcar://a:1", True),
        ("s3://a/1", False),
        ("oci+native://a:1", False),
        ("/a", False),
    ],
)
def test_what_nobody_fetches_is_refused_unless_a_container_takes_it(uri: str, refused: bool) -> None:
    assert (refusal(uri, None) is not None) is refused
    assert refusal(uri, {"name": "storage-initializer"}) is None


def test_the_chosen_container_is_laid_over_kserves_own() -> None:
    made, secret = pod(), {"metadata": {"name": "s3", "annotations": {"serving.kserve.io/s3-endpoint": "http://a:1"}},
                           "data": {"AWS_SECRET_ACCESS_KEY": base64.b64encode(b"no").decode()}}  # fmt: skip
    inject(made, "mlflow://a/1", storage({"prefix": "mlflow://"})["spec"]["container"], [secret], SETTINGS)
    (initializer,) = made["initContainers"]
    assert initializer["image"] == "ours:1" and initializer["command"] == ["fetch"]
    assert initializer["args"] == ["mlflow://a/1", "/mnt/models"]
    assert initializer["resources"]["requests"] == {"cpu": "7m", "memory": "100Mi"}
    env = {one["name"]: one.get("value") for one in initializer["env"]}
    assert env["A"] == "ours" and env["AWS_ENDPOINT_URL"] == "http://a:1" and env["S3_USE_HTTPS"] == "0"
    assert "no" not in str(initializer), "keys are referred to"
    assert made["containers"][0]["volumeMounts"][0]["readOnly"] is True


def test_an_image_runs_beside_the_server_as_the_same_user_and_shares_its_processes() -> None:
    made = pod()
    inject(made, "oci://models/a:1", None, [], SETTINGS)
    server, car = made["containers"]
    assert server["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1010}
    assert {"name": "MODEL_INIT_MODE", "value": "async"} in server["env"]
    assert car["image"] == "models/a:1" and car["securityContext"]["runAsUser"] == 1010
    assert made["shareProcessNamespace"] is True and made["initContainers"][0]["name"] == "modelcar-init"
    assert "securityContext" not in made["initContainers"][0], "so a restricted namespace refuses such pods"


def test_lists_of_named_things_are_merged_by_name_and_others_replaced() -> None:
    base = {"args": ["a"], "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}
    over = {"args": ["b"], "env": [{"name": "B", "value": "3"}]}
    assert merged_container(base, over) == {
        "args": ["b"], "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "3"}]}  # fmt: skip
