"""Open Inference Protocol v2 (JSON over HTTP), purely: bodies to tensors and back.

Specification: https://github.com/kserve/open-inference-protocol (rest/inference_rest.yaml). Errors there are
``{"error": "<text>"}``. The binary tensor extension is not spoken; a request that uses it is refused and told so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError
from endcap.package import Manifest, TensorSpec
from serving.server.engine import DTYPES

__all__ = ["InferRequest", "error_text", "format_answer", "metadata", "parse_infer", "server_metadata"]

_MAX_DEPTH = 8
_FLOAT_LIMITS = {"FP16": 65504.0, "FP32": 3.4028235e38}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """``outputs``: names asked for, or None for all."""

    id: str | None
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] | None


def parse_infer(body: bytes, manifest: Manifest) -> InferRequest:
    """A body of ``/infer`` against the manifest's schema.

    Raises:
        InputError: not JSON, or not what the schema takes.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error.msg})", where="body",
                         next_step="send tensors as JSON; binary tensor data is not supported") from error  # fmt: skip
    if type(document) is not dict:
        raise InputError("the body is not a JSON object", where="body")
    identity = document.get("id")
    if identity is not None and (type(identity) is not str or len(identity) > 256):
        raise InputError("id must be a string of at most 256 characters", where="id")
    specs = {spec.name: spec for spec in manifest.inputs}
    tensors = document.get("inputs")
    if type(tensors) is not list:
        raise InputError("inputs must be a list of tensors", where="inputs",
                         next_step=f"send: {', '.join(specs)}")  # fmt: skip
    inputs: dict[str, NDArray[Any]] = {}
    for place, tensor in enumerate(tensors):
        where = f"inputs.{place}"
        if type(tensor) is not dict:
            raise InputError("a tensor must be a JSON object", where=where)
        name = tensor.get("name")
        spec = specs.get(name) if type(name) is str else None
        if spec is None:
            raise InputError("no such input", where=f"{where}.name", next_step=f"send: {', '.join(specs)}")
        if spec.name in inputs:
            raise InputError(f"{spec.name} is given twice", where=where)
        inputs[spec.name] = _tensor(tensor, spec, where)
    for name in specs:
        if name not in inputs:
            raise InputError(f"input {name} is missing", where="inputs", next_step=f"send: {', '.join(specs)}")
    return InferRequest(identity, inputs, _wanted(document.get("outputs"), manifest))


def _wanted(outputs: object, manifest: Manifest) -> tuple[str, ...] | None:
    if outputs is None or outputs == []:
        return None
    if not isinstance(outputs, list):
        raise InputError("outputs must be a list", where="outputs")
    known = [spec.name for spec in manifest.outputs]
    names: list[str] = []
    for place, output in enumerate(outputs):
        name = output.get("name") if isinstance(output, dict) else None
        if name not in known:
            raise InputError("no such output", where=f"outputs.{place}", next_step=f"ask for: {', '.join(known)}")
        if name not in names:
            names.append(name)
    return tuple(names)


def _tensor(tensor: Mapping[str, Any], spec: TensorSpec, where: str) -> NDArray[Any]:
    if tensor.get("datatype") != spec.datatype or spec.datatype not in DTYPES:
        raise InputError(f"{spec.name} must have datatype {spec.datatype}", where=f"{where}.datatype")
    shape = tensor.get("shape")
    if type(shape) is not list or not all(type(size) is int and 0 <= size < 1 << 31 for size in shape):
        raise InputError("shape must be a list of sizes", where=f"{where}.shape")
    if len(shape) != len(spec.shape) or any(
        wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
    ):
        raise InputError(f"{spec.name} must have shape {list(spec.shape)} (-1: any size)", where=f"{where}.shape")
    parameters = tensor.get("parameters")
    if isinstance(parameters, dict) and "binary_data_size" in parameters:
        raise InputError("binary tensor data is not supported", where=where, next_step="send data as JSON")
    values: list[Any] = []
    _flatten(tensor.get("data"), values, f"{where}.data", _MAX_DEPTH)
    count = math.prod(shape)
    if len(values) != count:
        raise InputError(f"shape says {count} values, data has {len(values)}", where=f"{where}.data")
    _check_values(values, spec, f"{where}.data")
    return np.array(values, DTYPES[spec.datatype]).reshape(shape)


def _flatten(data: object, into: list[Any], where: str, depth: int) -> None:
    """Row-major, flat or nested, as the protocol allows."""
    if type(data) is not list or depth == 0:
        raise InputError("data must be a list of values, flat or nested by shape", where=where)
    if data and type(data[0]) is list:
        for part in data:
            _flatten(part, into, where, depth - 1)
    else:
        into.extend(data)


def _check_values(values: Sequence[Any], spec: TensorSpec, where: str) -> None:
    if spec.datatype == "BOOL":
        good = all(type(value) is bool for value in values)
    elif spec.datatype.startswith("INT"):
        bits = int(spec.datatype[3:])
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        good = all(type(value) is int and low <= value <= high for value in values)
    else:
        limit = _FLOAT_LIMITS.get(spec.datatype, math.inf)
        good = all(type(value) in (int, float) and abs(value) <= limit for value in values)
    if not good:
        raise InputError(f"a value is not {spec.datatype}", where=where)


def format_answer(request: InferRequest, outputs: Mapping[str, NDArray[Any]], manifest: Manifest, *,
                  version: str) -> bytes:  # fmt: skip
    """The answer to ``request``."""
    document: dict[str, Any] = {"model_name": manifest.name, "model_version": version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = [
        {
            "name": spec.name,
            "datatype": spec.datatype,
            "shape": list(outputs[spec.name].shape),
            "data": outputs[spec.name].ravel().tolist(),
        }
        for spec in manifest.outputs
        if request.outputs is None or spec.name in request.outputs
    ]
    return orjson.dumps(document)


def server_metadata(version: str) -> bytes:
    """Answer to ``GET /v2``."""
    return orjson.dumps({"name": "endcap", "version": version, "extensions": []})


def metadata(manifest: Manifest, *, version: str) -> bytes:
    """Answer to ``GET /v2/models/{name}``."""

    def tensors(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]

    return orjson.dumps({
        "name": manifest.name, "versions": [version], "platform": "onnx_onnxruntime",
        "inputs": tensors(manifest.inputs), "outputs": tensors(manifest.outputs),
    })  # fmt: skip


def error_text(error: EndcapError) -> bytes:
    """``{"error": "where: what; next: ..."}``."""
    text = str(error).replace("\n  next:", "; next:")
    return orjson.dumps({"error": text})
