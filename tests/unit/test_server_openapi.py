"""The OpenAPI document: valid, and what the server really takes and answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from openapi_spec_validator import OpenAPIV31SpecValidator

from endcap.package import read_manifest
from serving.server import openapi
from serving.server.app import Replica, ServerApp
from serving.server.service import load_service
from tests.asgi_client import Answer, AsgiClient
from tests.packages import make_package

HISTORY = {"name": "history", "datatype": "INT64", "shape": [1, 3], "data": [[1, 2, 3]]}
BODIES: dict[str, list[Any]] = {
    "/v1/recommend": [
        {"shopper": "1", "history": ["104"]},
        {"shopper": "1", "history": [], "k": 3, "context": {}, "filters": {"exclude": ["105"]}, "diversity": {}},
        {"shopper": "1", "history": ["104"], "context": {"scene": "home"}, "explain": True},
    ],
    "/v1/models/recommender:predict": [{"instances": [[1, 2, 3]]}, {"inputs": {"history": [[1, 2, 3]]}}],
    "/v2/models/recommender/infer": [
        {"inputs": [HISTORY]},
        {"id": "q", "inputs": [HISTORY], "outputs": [{"name": "scores"}], "parameters": {"binary_data_output": False}},
    ],
    "/v2/models/recommender/versions/7/infer": [{"inputs": [HISTORY]}],
}
BAD: dict[str, Any] = {
    "/v1/recommend": {"shopper": "1", "history": [1]},
    "/v1/models/recommender:predict": {},
    "/v2/models/recommender/infer": {"inputs": [HISTORY | {"name": 7}]},
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("packages") / "good")


@pytest.fixture(scope="module")
def client(package: Path) -> Iterator[AsgiClient]:
    service = load_service(package, package.parent / "keys" / "signing.pub")
    app = ServerApp(Replica("7", "a"), impression_key=None)
    app.open(service)
    with AsgiClient(app) as client:
        yield client
    service.close()


@pytest.fixture(scope="module")
def document(client: AsgiClient) -> Any:
    answer = client.get("/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return answer.json


def test_it_is_valid_and_says_the_packages_names_and_limits(document: Any, package: Path) -> None:
    OpenAPIV31SpecValidator(document).validate()
    schemas = document["components"]["schemas"]
    assert schemas["InferInput"]["properties"]["name"]["enum"] == ["history"]
    assert schemas["RecommendRequest"]["properties"]["k"]["maximum"] == 20
    encoder = read_manifest(package).model_copy(update={"task": "encoder"})
    assert "/v1/recommend" not in orjson.loads(openapi.document(encoder, version="1"))["paths"]


def schema_errors(document: Any, content: Any, value: Any) -> list[str]:
    schema = content["application/json"]["schema"] | {"components": document["components"]}
    return [error.message for error in Draft202012Validator(schema).iter_errors(value)]


def test_every_get_answers_as_it_says(document: Any, client: AsgiClient) -> None:
    looked = 0
    for path, item in document["paths"].items():
        if "get" in item:
            answer = client.get(path)
            content = item["get"]["responses"]["200"]["content"]
            assert answer.status == 200, path
            if "application/json" in content:
                assert schema_errors(document, content, answer.json) == [], path
            looked += 1
    assert looked == 11


def test_every_post_takes_and_answers_what_it_says(document: Any, client: AsgiClient) -> None:
    posts = {
        path: item["post"] for path, item in document["paths"].items() if "post" in item and "repository" not in path
    }
    assert set(posts) == set(BODIES)
    for path, operation in posts.items():
        for body in BODIES[path]:
            assert schema_errors(document, operation["requestBody"]["content"], body) == [], path
            answer = client.post(path, body)
            assert answer.status == 200, answer.body
            assert schema_errors(document, operation["responses"]["200"]["content"], answer.json) == [], path


def test_the_repository_answers_as_it_says(document: Any, client: AsgiClient) -> None:
    for path, status in (("index", 200), ("models/recommender/load", 403), ("models/recommender/unload", 403)):
        answer = client.post(f"/v2/repository/{path}", b"")
        content = document["paths"][f"/v2/repository/{path}"]["post"]["responses"][str(status)]["content"]
        assert (answer.status, schema_errors(document, content, answer.json)) == (status, [])


def test_errors_are_of_the_form_it_says(document: Any, client: AsgiClient) -> None:
    for path, body in BAD.items():
        operation = document["paths"][path]["post"]
        assert schema_errors(document, operation["requestBody"]["content"], body) != [], path
        answer: Answer = client.post(path, body)
        assert answer.status == 400
        assert schema_errors(document, operation["responses"]["400"]["content"], answer.json) == [], path


def test_raw_tensors_come_back_as_bytes(client: AsgiClient) -> None:
    raw = np.array([[1, 2, 3]], "<i8").tobytes()
    described = {"name": "history", "datatype": "INT64", "shape": [1, 3], "parameters": {"binary_data_size": len(raw)}}
    text = orjson.dumps({"inputs": [described], "parameters": {"binary_data_output": True}})
    answer = client.post(
        "/v2/models/recommender/infer", text + raw,
        headers=[(b"inference-header-content-length", str(len(text)).encode())],
    )  # fmt: skip
    assert (answer.status, answer.headers["content-type"]) == (200, "application/octet-stream")
    size = int(answer.headers["inference-header-content-length"])
    items, scores = orjson.loads(answer.body[:size])["outputs"]
    assert (items["parameters"], scores["parameters"]) == ({"binary_data_size": 160}, {"binary_data_size": 80})
    assert np.frombuffer(answer.body[size : size + 160], "<i8")[0] == 4
    assert len(answer.body) == size + 240
