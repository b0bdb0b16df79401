"""KServe v1: instances and inputs to tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from endcap.package import Manifest, Task, TensorSpec, Variant
from serving.server import v1


def manifest(*more: TensorSpec, outputs: int = 2) -> Manifest:
    return Manifest(
        name="ranker", task=Task.RANKER, model="any",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 2)), *more),
        outputs=(
            TensorSpec(name="items", datatype="INT64", shape=(-1, 2)),
            TensorSpec(name="scores", datatype="FP32", shape=(-1,)),
        )[:outputs],
        variants={"float32": Variant(file="model.onnx")}, top_k=2, max_history=50, created_at="2026-11-22T00:00:00Z",
    )  # fmt: skip


WORDS = TensorSpec(name="words", datatype="BYTES", shape=(-1,))


def parse(document: Any, package: Manifest | None = None) -> v1.PredictRequest:
    return v1.parse_predict(orjson.dumps(document), package or manifest())


@pytest.mark.parametrize(
    "document",
    [
        {"instances": [[1, 2], [3, 4.5]]},
        {"instances": [{"x": [1, 2]}, {"x": [3, 4.5]}]},
        {"inputs": {"x": [[1, 2], [3, 4.5]]}},
        {"inputs": [[1, 2], [3, 4.5]]},
    ],
)
def test_rows_are_read_in_every_form(document: Any) -> None:
    request = parse(document)
    assert request.inputs["x"].tolist() == [[1, 2], [3, 4.5]]
    assert request.inputs["x"].dtype == np.float32
    assert request.by_row == ("instances" in document)


def test_a_model_with_two_inputs_takes_them_by_name() -> None:
    two = manifest(WORDS)
    for document in (
        {"instances": [{"x": [1, 2], "words": "a"}, {"words": "b", "x": [3, 4]}]},
        {"inputs": {"x": [[1, 2], [3, 4]], "words": ["a", "b"]}},
    ):
        inputs = parse(document, two).inputs
        assert (inputs["x"].tolist(), inputs["words"].tolist()) == ([[1, 2], [3, 4]], ["a", "b"])
    with pytest.raises(InputError, match="object of x, words"):
        parse({"instances": [[1, 2]]}, two)


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ([], "body"),
        ({}, "instances"),
        ({"instances": [[1, 2]], "inputs": [[1, 2]]}, "instances"),
        ({"instances": []}, "instances"),
        ({"instances": {}}, "instances"),
        ({"instances": [1]}, "instances"),
        ({"instances": [[1, 2], [3]]}, "instances.1"),
        ({"instances": [[1, 2], 3]}, "instances.1"),
        ({"instances": [[1, 2, 3]]}, "instances.shape"),
        ({"instances": [[1, "2"]]}, "instances"),
        ({"instances": [[[1], [2]]]}, "instances"),
        ({"instances": [{"y": [1, 2]}]}, "instances.0"),
        ({"instances": [{"x": [1, 2]}, [1, 2]]}, "instances.1"),
        ({"instances": [{"x": [1, 2], "y": 1}]}, "instances.0"),
        ({"instances": [[1, 2], {"x": [1, 2]}]}, "instances.1"),
        ({"inputs": {"x": 1}}, "inputs.x"),
        ({"inputs": {"x": [[1, 2]], "y": 1}}, "inputs"),
        ({"inputs": 7}, "inputs"),
        ({"inputs": {"x": [[1, True]]}}, "inputs.x"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(document: Any, where: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(document)
    assert caught.value.where == where


OUTPUTS = {"items": np.array([[1, 2], [3, 4]]), "scores": np.array([0.5, 0.25], np.float32)}


def test_the_answer_has_the_form_of_the_request() -> None:
    def answer(by_row: bool, package: Manifest) -> Any:
        return orjson.loads(v1.format_predictions(v1.PredictRequest({}, by_row), OUTPUTS, package))

    both, one = manifest(), manifest(outputs=1)
    assert answer(True, both) == {"predictions": [{"items": [1, 2], "scores": 0.5}, {"items": [3, 4], "scores": 0.25}]}
    assert answer(False, both) == {"outputs": {"items": [[1, 2], [3, 4]], "scores": [0.5, 0.25]}}
    assert answer(True, one) == {"predictions": [[1, 2], [3, 4]]}
    assert answer(False, one) == {"outputs": [[1, 2], [3, 4]]}
    words = both.model_copy(update={"outputs": (WORDS,)})
    values = {"words": np.array(["a", "b"], object)}
    assert orjson.loads(v1.format_predictions(v1.PredictRequest({}, True), values, words)) == {
        "predictions": ["a", "b"]
    }


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["x", "y"]), inner)),
    max_leaves=8,
)


@given(document=st.dictionaries(st.sampled_from(["instances", "inputs", "x"]), JSON, max_size=2))
def test_any_json_is_parsed_or_refused(document: Any) -> None:
    try:
        request = parse(document)
    except InputError as error:
        assert error.where
        return
    assert request.inputs["x"].shape[1] == 2


@given(st.binary(max_size=40))
def test_any_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        v1.parse_predict(body, manifest())
