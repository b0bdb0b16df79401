"""Open Inference Protocol v2 over HTTP, purely: bodies to tensors and back.

Specification: https://github.com/kserve/open-inference-protocol (specification/protocol/inference_rest.md). Errors
there are ``{"error": "<text>"}``. The binary tensor extension
(https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md) is spoken too: a
body is then JSON, of as many bytes as the header ``Inference-Header-Content-Length`` says, and after it the raw bytes
of each input that has the parameter ``binary_data_size``, in order. Outputs come raw when the request's parameter
``binary_data_output`` or the output's ``binary_data`` is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError
from endcap.package import Manifest, TensorSpec
from serving.server import tensors

__all__ = [
    "BINARY_HEADER", "InferRequest", "UnknownModelError", "check_model", "error_text", "format_answer",
    "header_length", "metadata", "parse_infer",
    "send_names", "server_metadata", "split_answer",
]  # fmt: skip

BINARY_HEADER = b"inference-header-content-length"
EXTENSIONS = ["binary_tensor_data"]
MAX_ID_CHARS = 256
_SEND_TENSORS = 'send {"inputs": [{"name": ..., "shape": [...], "datatype": ..., "data": [...]}]}'
_NO_PARAMETERS: Mapping[str, Any] = {}


class UnknownModelError(InputError):
    """A model, or a version of it, that this server does not hold: 404."""


@dataclass(frozen=True, slots=True)
class InferRequest:
    """``outputs``: names asked for, or None for all. ``binary``: names of those that are answered as raw bytes."""

    id: str | None
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] | None
    binary: frozenset[str] = frozenset()


def check_model(name: str, version: str, manifest: Manifest, ours: str) -> None:
    """Refuse another model than the manifest's, or another version than ``ours``. An empty version is any.

    Raises:
        UnknownModelError: it is one.
    """
    if name != manifest.name or version not in ("", ours):
        raise UnknownModelError("no such model or version", where="model" if name != manifest.name else "version",
                                next_step=f"ask for {manifest.name}, version {ours} or none")  # fmt: skip


def header_length(headers: Sequence[tuple[bytes, bytes]]) -> int | None:
    """How many bytes of the body are JSON, as the request's headers say; None: all.

    Raises:
        InputError: the header is no size.
    """
    for name, value in headers:
        if name == BINARY_HEADER:
            if not value.isdigit() or len(value) > 12:
                raise InputError("must be a number of bytes", where="Inference-Header-Content-Length",
                                 next_step="send the length of the JSON part of the body")  # fmt: skip
            return int(value)
    return None


def parse_infer(body: bytes, manifest: Manifest, json_bytes: int | None = None) -> InferRequest:
    """A body of ``/infer`` against the manifest's schema. ``json_bytes``: of :func:`header_length`.

    Raises:
        InputError: not JSON, or not what the schema takes.
    """
    raw = memoryview(b"")
    if json_bytes is not None:
        if json_bytes > len(body):
            raise InputError(f"says {json_bytes}, the body has {len(body)} bytes",
                             where="Inference-Header-Content-Length",
                             next_step="send the length of the JSON part of the body")  # fmt: skip
        whole = memoryview(body)
        text, raw = whole[:json_bytes], whole[json_bytes:]
    else:
        text = body  # type: ignore[assignment]
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error})", where="body", next_step=_SEND_TENSORS) from error
    if type(document) is not dict:
        raise InputError("the body is not a JSON object", where="body", next_step=_SEND_TENSORS)
    identity = document.get("id")
    if identity is not None and (type(identity) is not str or len(identity) > MAX_ID_CHARS):
        raise InputError(f"id must be a string of at most {MAX_ID_CHARS} characters", where="id")
    inputs = _inputs(document.get("inputs"), manifest, raw)
    outputs, binary = _wanted(document.get("outputs"), _parameters(document, "parameters"), manifest)
    return InferRequest(identity, inputs, outputs, binary)


def _inputs(found: object, manifest: Manifest, raw: memoryview) -> dict[str, NDArray[Any]]:
    specs = manifest.inputs
    if type(found) is not list:
        raise InputError("inputs must be a list of tensors", where="inputs", next_step=send_names(specs))
    inputs: dict[str, NDArray[Any]] = {}
    place_in_raw = 0
    for place, tensor in enumerate(found):
        where = f"inputs.{place}"
        if type(tensor) is not dict:
            raise InputError("a tensor must be a JSON object", where=where)
        name = tensor.get("name")
        spec = next((spec for spec in specs if spec.name == name), None)
        if spec is None:
            raise InputError("no such input", where=f"{where}.name", next_step=send_names(specs))
        if spec.name in inputs:
            raise InputError(f"{spec.name} is given twice", where=where)
        if tensor.get("datatype") != spec.datatype:
            raise InputError(f"{spec.name} must have datatype {spec.datatype}", where=f"{where}.datatype")
        shape = tensor.get("shape")
        count = tensors.checked_count(shape, spec, where)
        assert type(shape) is list  # noqa: S101 - checked_count's, for the type checker
        size = _parameters(tensor, f"{where}.parameters").get("binary_data_size")
        if size is None:
            inputs[spec.name] = tensors.from_values(tensor.get("data"), shape, count, spec, f"{where}.data")
            continue
        here = f"{where}.parameters.binary_data_size"
        if type(size) is not int or size < 0 or "data" in tensor:
            raise InputError("must be a number of bytes, and then the tensor has no data", where=here)
        if size > len(raw) - place_in_raw:
            raise InputError(f"says {size} bytes, {len(raw) - place_in_raw} are left after the JSON", where=here,
                             next_step="send Inference-Header-Content-Length and the bytes after the JSON")  # fmt: skip
        part = raw[place_in_raw : place_in_raw + size]
        inputs[spec.name] = tensors.from_raw(part, shape, count, spec, here)
        place_in_raw += size
    if len(inputs) != len(specs):
        missing = next(spec.name for spec in specs if spec.name not in inputs)
        raise InputError(f"input {missing} is missing", where="inputs", next_step=send_names(specs))
    if place_in_raw != len(raw):
        raise InputError(f"{len(raw) - place_in_raw} bytes after the JSON belong to no input", where="body",
                         next_step="name their number in the input's parameter binary_data_size")  # fmt: skip
    return inputs


def send_names(specs: Sequence[TensorSpec]) -> str:
    """What to do about inputs of other names."""
    return f"send: {', '.join(spec.name for spec in specs)}"


def _parameters(document: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    parameters = document.get("parameters")
    if parameters is None:
        return _NO_PARAMETERS
    if type(parameters) is not dict:
        raise InputError("parameters must be a JSON object", where=where)
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, where: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise InputError(f"{name} must be true or false", where=f"{where}.{name}")
    return value


def _wanted(
    outputs: object, parameters: Mapping[str, Any], manifest: Manifest
) -> tuple[tuple[str, ...] | None, frozenset[str]]:
    """Names of the outputs that are wanted, and of those the ones that are wanted raw."""
    all_raw = _flag(parameters, "binary_data_output", "parameters", default=False)
    known = [spec.name for spec in manifest.outputs]
    if outputs is None or outputs == []:
        return None, frozenset(known) if all_raw else frozenset()
    if type(outputs) is not list:
        raise InputError("outputs must be a list", where="outputs")
    names: dict[str, bool] = {}
    for place, output in enumerate(outputs):
        where = f"outputs.{place}"
        name = output.get("name") if type(output) is dict else None
        if name not in known:
            raise InputError("no such output", where=where, next_step=f"ask for: {', '.join(known)}")
        names[name] = _flag(_parameters(output, f"{where}.parameters"), "binary_data", f"{where}.parameters",
                            default=all_raw)  # fmt: skip
    return tuple(names), frozenset(name for name, raw in names.items() if raw)


def format_answer(request: InferRequest, outputs: Mapping[str, NDArray[Any]], manifest: Manifest, *,
                  version: str) -> bytes:  # fmt: skip
    """The answer to ``request``, when none of it is wanted raw."""
    return split_answer(request, outputs, manifest, version=version)[0]


def split_answer(request: InferRequest, outputs: Mapping[str, NDArray[Any]], manifest: Manifest, *,
                 version: str) -> tuple[bytes, int | None]:  # fmt: skip
    """The answer's body, and how many bytes of it are JSON when raw ones follow.

    With those its content type is ``application/octet-stream``, and the length goes into
    ``Inference-Header-Content-Length``.
    """
    described: list[dict[str, Any]] = []
    raws: list[bytes] = []
    for spec in manifest.outputs:
        if request.outputs is not None and spec.name not in request.outputs:
            continue
        array = outputs[spec.name]
        output: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": array.shape}
        if spec.name in request.binary:
            raws.append(tensors.to_raw(array, spec))
            output["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            output["data"] = tensors.to_values(array, spec)
        described.append(output)
    document: dict[str, Any] = {"model_name": manifest.name, "model_version": version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = described
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *raws)), len(text)) if request.binary else (text, None)


def server_metadata(version: str) -> bytes:
    """Answer to ``GET /v2``."""
    return orjson.dumps({"name": "endcap", "version": version, "extensions": EXTENSIONS})


def metadata(manifest: Manifest, *, version: str) -> bytes:
    """Answer to ``GET /v2/models/{name}``."""

    def described(specs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
        return [{"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)} for spec in specs]

    return orjson.dumps({
        "name": manifest.name, "versions": [version], "platform": "onnx_onnxruntime",
        "inputs": described(manifest.inputs), "outputs": described(manifest.outputs),
    })  # fmt: skip


def error_text(error: EndcapError) -> bytes:
    """``{"error": "where: what; next: ..."}``."""
    text = str(error).replace("\n  next:", "; next:")
    return orjson.dumps({"error": text})
