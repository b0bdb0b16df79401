"""Open Inference Protocol v2: JSON to tensors and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from endcap.package import Manifest, Task, TensorSpec, Variant
from serving.server import oip


def manifest(datatype: Any = "INT64", shape: tuple[int, ...] = (-1, -1)) -> Manifest:
    return Manifest(
        name="recommender",
        task=Task.RANKER,
        model="any",
        inputs=(TensorSpec(name="x", datatype=datatype, shape=shape),),
        outputs=(
            TensorSpec(name="items", datatype="INT64", shape=(-1, 2)),
            TensorSpec(name="scores", datatype="FP32", shape=(-1, 2)),
        ),
        variants={"float32": Variant(file="model.onnx")},
        top_k=2,
        max_history=50,
        created_at="2026-11-22T00:00:00Z",
    )


def tensor(**change: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]]} | change


def parse(*tensors: Any, **more: Any) -> oip.InferRequest:
    return oip.parse_infer(orjson.dumps({"inputs": list(tensors)} | more), manifest())


@pytest.mark.parametrize("data", [[[1, 2], [3, 4]], [1, 2, 3, 4]])
def test_data_may_be_flat_or_nested(data: list[Any]) -> None:
    request = parse(tensor(data=data), id="7")
    assert request.id == "7"
    assert request.inputs["x"].tolist() == [[1, 2], [3, 4]]
    assert request.inputs["x"].dtype == np.int64


VALUES = {
    "BOOL": st.booleans(),
    "INT8": st.integers(-128, 127),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FP16": st.floats(width=16, allow_nan=False, allow_infinity=False),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
}


@given(st.data())
def test_every_datatype_is_read_exactly(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(sorted(VALUES)))
    values = data.draw(st.lists(VALUES[datatype], min_size=1, max_size=6))
    body = orjson.dumps({"inputs": [tensor(datatype=datatype, shape=[1, len(values)], data=values)]})
    assert oip.parse_infer(body, manifest(datatype)).inputs["x"].tolist() == [values]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"name": "y"}, "inputs.0.name"),
        ({"name": ["x"]}, "inputs.0.name"),
        ({"datatype": "FP32"}, "inputs.0.datatype"),
        ({"shape": [4]}, "inputs.0.shape"),
        ({"shape": [-1, 4]}, "inputs.0.shape"),
        ({"shape": [2.0, 2]}, "inputs.0.shape"),
        ({"shape": None}, "inputs.0.shape"),
        ({"shape": [2, 3]}, "inputs.0.data"),
        ({"shape": [2**30, 2**30]}, "inputs.0.data"),
        ({"data": None}, "inputs.0.data"),
        ({"data": [1, 2, 3, True]}, "inputs.0.data"),
        ({"data": [1, 2, 3, "4"]}, "inputs.0.data"),
        ({"data": [1, 2, 3, 4.0]}, "inputs.0.data"),
        ({"data": [1, 2, 3, 2**63]}, "inputs.0.data"),
        ({"data": [[1, 2], 3, 4]}, "inputs.0.data"),
        ({"data": [1, [2], 3, 4]}, "inputs.0.data"),
        ({"parameters": {"binary_data_size": 16}}, "inputs.0"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(tensor(**change))
    assert caught.value.where == where


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00\x01",
        b"[]",
        b"{}",
        b'{"inputs": {}}',
        b'{"inputs": []}',
        b'{"inputs": [1]}',
        b'{"inputs": [], "id": 7}',
    ],
)
def test_a_body_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        oip.parse_infer(body, manifest())


def test_the_same_input_twice_and_deep_nesting_are_refused() -> None:
    with pytest.raises(InputError, match="twice"):
        parse(tensor(), tensor())
    deep: Any = [1]
    for _ in range(50):
        deep = [deep]
    with pytest.raises(InputError, match="nested"):
        parse(tensor(data=deep))


@pytest.mark.parametrize("outputs", [[{"name": "nope"}], ["items"], {"name": "items"}, 7, [{"name": ["items"]}]])
def test_unknown_outputs_are_refused(outputs: Any) -> None:
    with pytest.raises(InputError, match="output"):
        parse(tensor(), outputs=outputs)


def test_the_answer_holds_what_was_asked_for() -> None:
    values = {"items": np.array([[1, 2]]), "scores": np.array([[0.5, 0.25]], np.float32)}
    everything = orjson.loads(oip.format_answer(parse(tensor(), id="a"), values, manifest(), version="3"))
    assert everything == {
        "model_name": "recommender",
        "model_version": "3",
        "id": "a",
        "outputs": [
            {"name": "items", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
            {"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.5, 0.25]},
        ],
    }
    some = orjson.loads(
        oip.format_answer(parse(tensor(), outputs=[{"name": "scores"}]), values, manifest(), version="3")
    )
    assert [output["name"] for output in some["outputs"]] == ["scores"]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["name", "datatype", "shape", "data", "parameters", "inputs", "x"]), inner),
    ),
    max_leaves=12,
)


@given(tensors=st.lists(st.fixed_dictionaries({"name": st.sampled_from(["x", "y"]), "datatype": st.just("INT64"),
                                               "shape": JSON, "data": JSON}), max_size=2),
       outputs=JSON, identity=JSON)  # fmt: skip
def test_any_json_is_parsed_or_refused(tensors: list[Any], outputs: Any, identity: Any) -> None:
    body = orjson.dumps({"inputs": tensors, "outputs": outputs, "id": identity})
    try:
        request = oip.parse_infer(body, manifest())
    except InputError:
        return
    assert request.inputs["x"].ndim == 2
