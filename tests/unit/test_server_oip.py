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
from serving.server import oip, tensors


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
        ({"shape": [2, 3]}, "inputs.0.data.0"),
        ({"shape": [2**30, 2**30], "data": [1, 2, 3, 4]}, "inputs.0.data"),
        ({"shape": [2] * 100}, "inputs.0.shape"),
        ({"data": None}, "inputs.0.data"),
        ({"data": [1, 2, 3, True]}, "inputs.0.data"),
        ({"data": [1, 2, 3, "4"]}, "inputs.0.data"),
        ({"data": [1, 2, 3, 4.0]}, "inputs.0.data"),
        ({"data": [1, 2, 3, 2**63]}, "inputs.0.data"),
        ({"data": [[1, 2], 3, 4]}, "inputs.0.data"),
        ({"data": [1, [2], 3, 4]}, "inputs.0.data"),
        ({"data": [[1], [2, 3, 4]]}, "inputs.0.data.0"),
        ({"data": [[1, 2], [3]]}, "inputs.0.data.1"),
        ({"data": [[1, 2], [3, 4], [5, 6]]}, "inputs.0.data"),
        ({"data": [[[1], [2]], [[3], [4]]]}, "inputs.0.data"),
        ({"parameters": 7}, "inputs.0.parameters"),
        ({"parameters": {"binary_data_size": 16}}, "inputs.0.parameters.binary_data_size"),
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
    with pytest.raises(InputError, match="shape says"):
        parse(tensor(data=deep))
    with pytest.raises(InputError, match="nested"):
        parse(tensor(shape=[1, 1], data=[[deep]]))
    with pytest.raises(InputError, match="depth limit") as caught:
        oip.parse_infer(b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}", manifest())
    assert caught.value.where == "body"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e39"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    tensor = f'{{"inputs": [{{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, {number}]}}]}}'
    with pytest.raises(InputError) as caught:
        oip.parse_infer(tensor.encode(), manifest("FP32"))
    assert caught.value.where in ("body", "inputs.0.data")


BINARY = st.sampled_from(sorted(set(tensors.NUMPY) - {"BYTES"}))


def binary(raw: bytes, datatype: str, shape: list[int], **more: Any) -> tuple[bytes, int]:
    described = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    text = orjson.dumps({"inputs": [described | more]})
    return text + raw, len(text)


def typed(datatype: str) -> Manifest:
    """Also of datatypes that no package has yet."""
    spec = TensorSpec.model_construct(name="x", datatype=datatype, shape=(-1, -1))
    return manifest().model_copy(update={"inputs": (spec,), "outputs": (spec,)})


@given(datatype=BINARY, rows=st.integers(0, 3), length=st.integers(0, 3), data=st.data())
def test_raw_tensors_come_and_go_exactly(datatype: str, rows: int, length: int, data: st.DataObject) -> None:
    dtype = tensors.NUMPY[datatype]
    raw = data.draw(st.binary(min_size=rows * length * dtype.itemsize, max_size=rows * length * dtype.itemsize))
    body, size = binary(raw, datatype, [rows, length])
    try:
        array = oip.parse_infer(body, typed(datatype), size).inputs["x"]
    except InputError as error:
        assert datatype[0] in "FB", "of whole numbers all bytes are values"
        assert error.where == "inputs.0.parameters.binary_data_size"
        return
    assert (array.shape, array.dtype, array.flags.aligned) == ((rows, length), dtype, True)
    assert np.isfinite(array.astype(float)).all()
    asked = oip.InferRequest("q", {}, None, frozenset({"x"}))
    answer, json_bytes = oip.split_answer(asked, {"x": array}, typed(datatype), version="1")
    assert answer[json_bytes:] == raw
    assert orjson.loads(answer[:json_bytes])["outputs"] == [
        {"name": "x", "datatype": datatype, "shape": [rows, length], "parameters": {"binary_data_size": len(raw)}}
    ]


@given(st.lists(st.text(max_size=4), min_size=1, max_size=4))
def test_strings_come_and_go_raw_and_as_json(values: list[str]) -> None:
    shape = [1, len(values)]
    spec = typed("BYTES").inputs[0]
    raw = tensors.to_raw(np.array(values, object), spec)
    body, size = binary(raw, "BYTES", shape)
    as_json = orjson.dumps({"inputs": [tensor(datatype="BYTES", shape=shape, data=values)]})
    for array in (
        oip.parse_infer(body, typed("BYTES"), size).inputs["x"],
        oip.parse_infer(as_json, typed("BYTES")).inputs["x"],
    ):
        assert array.tolist() == [values]
        plain = oip.InferRequest(None, {}, None)
        assert orjson.loads(oip.format_answer(plain, {"x": array}, typed("BYTES"), version="1"))["outputs"][0][
            "data"
        ] == list(values)


@pytest.mark.parametrize(
    ("raw", "datatype", "shape"),
    [
        (b"\0" * 15, "INT64", [1, 2]),
        (b"\0" * 17, "INT64", [1, 2]),
        (b"", "INT64", [2**30, 2**30]),
        (b"\0", "BYTES", [2**30, 2**30]),
        (b"\2", "BOOL", [1, 1]),
        (np.array([np.nan], "<f4").tobytes(), "FP32", [1, 1]),
        (np.array([-np.inf], "<f2").tobytes(), "FP16", [1, 1]),
        (b"\1\0\0\0\xff", "BYTES", [1, 1]),
        (b"\xff\xff\xff\xffab", "BYTES", [1, 1]),
        (b"\1\0\0\0ab", "BYTES", [1, 1]),
        (b"\5\0\0\0abcde\1", "BYTES", [1, 2]),
    ],
)
def test_raw_bytes_that_are_no_such_tensor_are_refused(raw: bytes, datatype: str, shape: list[int]) -> None:
    body, size = binary(raw, datatype, shape)
    with pytest.raises(InputError) as caught:
        oip.parse_infer(body, typed(datatype), size)
    assert caught.value.where == "inputs.0.parameters.binary_data_size"


@pytest.mark.parametrize(
    ("body", "size", "where"),
    [
        (b"{}", 3, "Inference-Header-Content-Length"),
        (binary(b"\0" * 8, "INT64", [1, 1])[0], 5, "body"),
        (binary(b"\0" * 8, "INT64", [1, 1])[0] + b"x", binary(b"\0" * 8, "INT64", [1, 1])[1], "body"),
        (*binary(b"\0" * 8, "INT64", [1, 1], data=[1]), "inputs.0.parameters.binary_data_size"),
        (*binary(b"", "INT64", [1, 1], parameters={"binary_data_size": 2**60}), "inputs.0.parameters.binary_data_size"),
        (*binary(b"", "INT64", [1, 1], parameters={"binary_data_size": -1}), "inputs.0.parameters.binary_data_size"),
        (*binary(b"", "INT64", [1, 1], parameters={"binary_data_size": True}), "inputs.0.parameters.binary_data_size"),
    ],
)
def test_lengths_that_do_not_agree_are_refused(body: bytes, size: int, where: str) -> None:
    with pytest.raises(InputError) as caught:
        oip.parse_infer(body, manifest(), size)
    assert caught.value.where == where


def test_the_length_of_the_json_is_read_from_its_header() -> None:
    assert oip.header_length([(b"a", b"1")]) is None
    assert oip.header_length([(b"inference-header-content-length", b"12")]) == 12
    for value in (b"", b"-1", b"1.0", b"9" * 50):
        with pytest.raises(InputError, match="Inference-Header-Content-Length"):
            oip.header_length([(b"inference-header-content-length", value)])


def test_each_output_may_be_raw_or_json() -> None:
    values = {"items": np.array([[1, 2]]), "scores": np.array([[0.5, -np.inf]], np.float32)}

    def answer(**more: Any) -> tuple[list[Any], bytes, int | None]:
        body, size = oip.split_answer(parse(tensor(), **more), values, manifest(), version="3")
        return orjson.loads(body[:size])["outputs"], body[size:] if size else b"", size

    described, raw, _ = answer(parameters={"binary_data_output": True})
    assert [output["parameters"]["binary_data_size"] for output in described] == [16, 8]
    assert raw == values["items"].tobytes() + values["scores"].tobytes()
    described, raw, _ = answer(outputs=[{"name": "scores", "parameters": {"binary_data": True}}, {"name": "items"}])
    assert (described[0]["data"], raw) == ([1, 2], values["scores"].tobytes())
    described, raw, size = answer(
        parameters={"binary_data_output": True}, outputs=[{"name": "items", "parameters": {"binary_data": False}}]
    )
    assert (described[0]["data"], raw, size) == ([1, 2], b"", None)
    described, _, size = answer()
    assert (described[1]["data"], size) == ([0.5, None], None)
    with pytest.raises(InputError, match="true or false"):
        answer(parameters={"binary_data_output": 1})


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
