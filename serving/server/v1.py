"""KServe's v1 protocol, purely: ``POST /v1/models/{name}:predict`` to tensors and back.

Two forms, as TensorFlow Serving has them (https://www.tensorflow.org/tfx/serving/api_rest#predict_api):

* ``{"instances": [...]}``: one entry a row. Of a model with one input an entry is that row's values; otherwise (and
  there too, if one likes) an object, ``{"<input>": values, ...}``. The answer is ``{"predictions": [...]}``, one entry
  a row: values where the model has one output, else ``{"<output>": values, ...}``.
* ``{"inputs": {"<input>": rows, ...}}``: a whole tensor each; of a model with one input also its rows as such. The
  answer is ``{"outputs": ...}`` in the same form.

Shapes are read from the nesting of the lists, so rows of unlike lengths are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.package import Manifest, TensorSpec
from serving.server import tensors

__all__ = ["PredictRequest", "format_predictions", "models", "parse_predict", "ready"]

_SEND = 'send {"instances": [...]} or {"inputs": {...}}'


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """``by_row``: asked as instances, so that it is answered as predictions."""

    inputs: dict[str, NDArray[Any]]
    by_row: bool


def parse_predict(body: bytes, manifest: Manifest) -> PredictRequest:
    """A body of ``:predict`` against the manifest's schema.

    Raises:
        InputError: not JSON, or not what the schema takes.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the body is not JSON ({error})", where="body", next_step=_SEND) from error
    if type(document) is not dict:
        raise InputError("the body is not a JSON object", where="body", next_step=_SEND)
    if ("instances" in document) == ("inputs" in document):
        raise InputError("one of instances and inputs must be there", where="instances", next_step=_SEND)
    if "instances" in document:
        return PredictRequest(_by_row(document["instances"], manifest), by_row=True)
    return PredictRequest(_whole(document["inputs"], manifest, "inputs"), by_row=False)


def _by_row(instances: object, manifest: Manifest) -> dict[str, NDArray[Any]]:
    if type(instances) is not list or not instances:
        raise InputError("instances must be a list with a row at least", where="instances", next_step=_SEND)
    specs = manifest.inputs
    if type(instances[0]) is not dict:
        if len(specs) != 1:
            names = ", ".join(spec.name for spec in specs)
            raise InputError(f"an instance must be an object of {names}", where="instances.0")
        return {specs[0].name: _tensor(instances, specs[0], "instances")}
    columns: dict[str, list[Any]] = {spec.name: [] for spec in specs}
    for place, instance in enumerate(instances):
        if type(instance) is not dict or instance.keys() != columns.keys():
            raise InputError(f"an instance must be an object of {', '.join(columns)}", where=f"instances.{place}")
        for name, column in columns.items():
            column.append(instance[name])
    return {spec.name: _tensor(columns[spec.name], spec, f"instances.*.{spec.name}") for spec in specs}


def _whole(inputs: object, manifest: Manifest, where: str) -> dict[str, NDArray[Any]]:
    specs = manifest.inputs
    if type(inputs) is list and len(specs) == 1:
        return {specs[0].name: _tensor(inputs, specs[0], where)}
    names = [spec.name for spec in specs]
    if type(inputs) is not dict or sorted(inputs) != sorted(names):
        raise InputError(f"inputs must be an object of {', '.join(names)}", where=where)
    return {spec.name: _tensor(inputs[spec.name], spec, f"{where}.{spec.name}") for spec in specs}


def _tensor(data: object, spec: TensorSpec, where: str) -> NDArray[Any]:
    """Nested lists, whose shape is that of their first entries."""
    shape: list[int] = []
    level = data
    while type(level) is list and len(shape) <= len(spec.shape):
        shape.append(len(level))
        level = level[0] if level else None
    if len(shape) != len(spec.shape):
        raise InputError(
            f"{spec.name} must have shape {list(spec.shape)} (-1: any size), nested lists of depth {len(spec.shape)}",
            where=where,
        )
    count = tensors.checked_count(shape, spec, where)
    return tensors.from_values(data, shape, count, spec, where)


def format_predictions(request: PredictRequest, outputs: Mapping[str, NDArray[Any]], manifest: Manifest) -> bytes:
    """The answer to ``request``."""
    document: dict[str, Any]
    specs = manifest.outputs
    values = {spec.name: _nested(outputs[spec.name], spec) for spec in specs}
    if not request.by_row:
        document = {"outputs": values if len(specs) > 1 else values[specs[0].name]}
    elif len(specs) == 1:
        document = {"predictions": values[specs[0].name]}
    else:
        rows = len(outputs[specs[0].name])
        document = {"predictions": [{name: value[row] for name, value in values.items()} for row in range(rows)]}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _nested(array: NDArray[Any], spec: TensorSpec) -> Any:
    """What orjson writes as nested lists. Rows of it are taken only where there are rows."""
    if spec.datatype == "BYTES":
        return np.array(tensors.to_values(array, spec), object).reshape(array.shape).tolist()
    contiguous = np.ascontiguousarray(array)
    return contiguous if array.ndim > 1 else contiguous.tolist()


def models(manifest: Manifest) -> bytes:
    """Answer to ``GET /v1/models``."""
    return orjson.dumps({"models": [manifest.name]})


def ready(manifest: Manifest, *, ready: bool) -> bytes:
    """Answer to ``GET /v1/models/{name}``; its status is 503 when not ready."""
    return orjson.dumps({"name": manifest.name, "ready": ready})
