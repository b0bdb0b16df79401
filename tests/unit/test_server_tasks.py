"""Packages of tasks other than the recommender, through the HTTP face, over real graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from endcap.errors import PackageError
from endcap.package import Task, TensorSpec
from serving.server.app import Replica, ServerApp
from serving.server.service import Service, load_service
from tests.asgi_client import Answer, AsgiClient, call
from tests.task_packages import EMBEDDINGS, make_task_package

TASKS = (Task.ENCODER, Task.RANKER, Task.CLASSIFIER, Task.GENERATOR)


def load(folder: Path, task: Task) -> Service:
    package = make_task_package(folder / task.value, task)
    return load_service(package, folder / "keys" / "signing.pub")


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Task, AsgiClient]]:
    folder = tmp_path_factory.mktemp("tasks")
    clients: dict[Task, AsgiClient] = {}
    for task in TASKS:
        app = ServerApp(Replica("3", "a"), impression_key=None)
        app.open(load(folder, task))
        clients[task] = AsgiClient(app).__enter__()
    yield clients
    for client in clients.values():
        client.app.service.close()
        client.__exit__(None, None, None)


def tensor(name: str, values: Any, datatype: str) -> dict[str, Any]:
    array = np.array(values)
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.ravel().tolist()}


def ids(*rows: list[int]) -> list[dict[str, Any]]:
    return [tensor("input_ids", rows, "INT64"), tensor("attention_mask", np.ones_like(np.array(rows)), "INT64")]


def output(answer: Answer) -> Any:
    assert answer.status == 200, answer.body
    found = answer.json["outputs"][0]
    return np.array(found["data"]).reshape(found["shape"])


def ask_together(client: AsgiClient, path: str, bodies: list[list[dict[str, Any]]]) -> list[Answer]:
    async def ask() -> list[Answer]:
        return await asyncio.gather(*(call(client.app, "POST", path, {"inputs": inputs}) for inputs in bodies))

    return client.run(ask())


def test_an_encoder_gives_every_text_of_a_batch_its_own_embedding(clients: dict[Task, AsgiClient]) -> None:
    texts = [[1, 2, 3], [4], [5, 6]]
    answers = ask_together(clients[Task.ENCODER], "/v2/models/encoder/infer", [ids(text) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        assert np.array_equal(output(answer), EMBEDDINGS[text].sum(axis=0)[None])


def test_one_text_that_the_graph_cannot_take_fails_alone(clients: dict[Task, AsgiClient]) -> None:
    answers = ask_together(clients[Task.ENCODER], "/v2/models/encoder/infer", [ids([1]), ids([10_000]), ids([3])])
    assert [answer.status for answer in answers] == [200, 500, 200]


def test_a_ranker_scores_as_many_candidates_as_were_sent(clients: dict[Task, AsgiClient]) -> None:
    def inputs(count: int) -> list[dict[str, Any]]:
        candidates = [[[number, 1.0] for number in range(count)]]
        return [tensor("query", [[2.0, 1.0]], "FP32"), tensor("candidates", candidates, "FP32")]

    answers = ask_together(clients[Task.RANKER], "/v2/models/ranker/infer", [inputs(count) for count in (3, 1, 2)])
    assert [output(answer).tolist() for answer in answers] == [[[1, 3, 5]], [[1]], [[1, 3]]]


def test_a_classifier_and_a_step_of_a_generator(clients: dict[Task, AsgiClient]) -> None:
    features = [tensor("features", [[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]], "FP32")]
    found = output(ask_together(clients[Task.CLASSIFIER], "/v2/models/classifier/infer", [features])[0])
    assert found.sum(axis=1) == pytest.approx([1, 1])
    assert found[1, 0] > 0.99
    bodies = [[tensor("input_ids", [[1, 2, 3]], "INT64")], [tensor("input_ids", [[4]], "INT64")]]
    long, short = ask_together(clients[Task.GENERATOR], "/v2/models/generator/infer", bodies)
    assert np.array_equal(output(long), EMBEDDINGS[[[1, 2, 3]]])
    assert np.array_equal(output(short), EMBEDDINGS[[[4]]])


@pytest.mark.parametrize("task", TASKS)
def test_only_a_recommender_recommends(clients: dict[Task, AsgiClient], task: Task) -> None:
    answer = clients[task].post("/v1/recommend", {"shopper": "1", "history": []})
    assert answer.status == 404
    assert answer.json["error"]["what"] == f"{task} is a {task}, not a recommender"
    assert answer.json["error"]["next"] == f"send tensors to /v2/models/{task}/infer"


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([tensor("input_ids", [[1, 2]], "INT64"), tensor("attention_mask", [[1]], "INT64")], "attention_mask"),
        ([tensor("input_ids", [[1], [2]], "INT64"), tensor("attention_mask", [[1]], "INT64")], "attention_mask"),
        ([tensor("input_ids", np.ones((0, 2)), "INT64"), tensor("attention_mask", np.ones((0, 2)), "INT64")], "empty"),
        ([tensor("input_ids", np.ones((300, 1), int), "INT64"),
          tensor("attention_mask", np.ones((300, 1), int), "INT64")], "at most 256 rows"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    clients: dict[Task, AsgiClient], inputs: list[dict[str, Any]], says: str
) -> None:
    answer = clients[Task.ENCODER].post("/v2/models/encoder/infer", {"inputs": inputs})
    assert answer.status == 400
    assert says in answer.json["error"]
    assert clients[Task.ENCODER].post("/v2/models/encoder/infer", {"inputs": ids([1])}).status == 200


@pytest.mark.parametrize(
    ("row", "says"), [([10], "outside 0 to 9"), ([-1], "outside 0 to 9"), ([1] * 9, "at most 8 a row")]
)
def test_values_and_lengths_beyond_the_manifests_are_refused(
    clients: dict[Task, AsgiClient], row: list[int], says: str
) -> None:
    answer = clients[Task.GENERATOR].post(
        "/v2/models/generator/infer", {"inputs": [tensor("input_ids", [row], "INT64")]}
    )
    assert answer.status == 400
    assert says in answer.json["error"]
    assert "inputs.input_ids" in answer.json["error"]


@pytest.mark.parametrize("task", [Task.ENCODER, Task.RANKER, Task.CLASSIFIER])
def test_a_package_without_its_tasks_tensors_is_refused(tmp_path: Path, task: Task) -> None:
    wrong = (TensorSpec(name="else", datatype="FP32", shape=(-1, 4)),)
    package = make_task_package(tmp_path / "package", task, outputs=wrong)
    with pytest.raises(PackageError, match=f"not the tensors of an? {task}"):
        load_service(package, tmp_path / "keys" / "signing.pub")
