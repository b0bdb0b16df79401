"""Tiny real packages of the other tasks: an encoder, a ranker, a classifier and one step of a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from endcap.files import write_atomic
from endcap.package import (
    MODEL_CARD_FILE,
    Manifest,
    Task,
    TensorSpec,
    Variant,
    ensure_signing_key,
    seal,
    sign_package,
)

__all__ = ["EMBEDDINGS", "make_task_package"]

EMBEDDINGS = np.arange(40, dtype=np.float32).reshape(10, 4)
"""Of the encoder's and the generator's ten tokens."""

_TYPES = {"INT64": TensorProto.INT64, "FP32": TensorProto.FLOAT}
_LENGTH = ("rows", "length")

Parts = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], Sequence[onnx.NodeProto], dict[str, np.ndarray]]


def make_task_package(folder: Path, task: Task, *, outputs: tuple[TensorSpec, ...] | None = None,
                      table: np.ndarray | None = None, ranges: bool = False) -> Path:  # fmt: skip
    """Make, seal and sign the package of ``task``, named as its task; ``outputs`` replaces those of its manifest, and
    ``table`` its embeddings [tokens, size]. ``ranges``: the encoder's manifest says what its tokens may be, so that
    others are refused and do not fail in the graph."""
    folder.mkdir(parents=True, exist_ok=True)
    takes, gives, nodes, constants = _PARTS[task]()
    if ranges and task is Task.ENCODER:
        most = {"input_ids": len(EMBEDDINGS) - 1, "attention_mask": 1}
        takes = tuple(spec.model_copy(update={"minimum": 0, "maximum": most[spec.name]}) for spec in takes)
    if table is not None:
        constants = {**constants, "table": table}
        gives = tuple(spec.model_copy(update={"shape": (*spec.shape[:-1], table.shape[1])}) for spec in gives)
    graph = helper.make_graph(
        nodes, task.value, [_info(spec) for spec in takes], [_info(spec) for spec in gives],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    write_atomic(folder / "model.onnx", model.SerializeToString())
    write_atomic(folder / MODEL_CARD_FILE, f"# {task}\nA package for tests.\n")
    seal(folder, Manifest(name=task.value, task=task, model="tiny", inputs=takes, outputs=outputs or gives,
                          variants={"float32": Variant(file="model.onnx")},
                          created_at="2026-11-22T00:00:00Z", lineage={"synthetic": "true"}))  # fmt: skip
    sign_package(folder, ensure_signing_key(folder.parent / "keys")[0])
    return folder


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    sizes = [f"{spec.name}_{axis}" if size == -1 else size for axis, size in enumerate(spec.shape)]
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.datatype], sizes)


def _encoder() -> Parts:
    """The sum of the embeddings of the tokens under the mask."""
    node = helper.make_node
    return (
        tuple(TensorSpec(name=name, datatype="INT64", shape=(-1, -1), axes=_LENGTH, padding="right")
              for name in ("input_ids", "attention_mask")),
        (TensorSpec(name="embedding", datatype="FP32", shape=(-1, 4)),),
        [
            node("Gather", ["table", "input_ids"], ["each"]),
            node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["mask", "last"], ["mask_wide"]),
            node("Mul", ["each", "mask_wide"], ["masked"]),
            node("ReduceSum", ["masked", "length"], ["embedding"], keepdims=0),
        ],
        {"table": EMBEDDINGS, "last": np.array([-1]), "length": np.array([1])},
    )  # fmt: skip


def _ranker() -> Parts:
    """The product of the query with each candidate."""
    node = helper.make_node
    axes = ("rows", "candidates", "size")
    return (
        (TensorSpec(name="query", datatype="FP32", shape=(-1, 2)),
         TensorSpec(name="candidates", datatype="FP32", shape=(-1, -1, 2), axes=axes, padding="right")),
        (TensorSpec(name="scores", datatype="FP32", shape=(-1, -1), axes=axes[:2]),),
        [
            node("Unsqueeze", ["query", "last"], ["column"]),
            node("MatMul", ["candidates", "column"], ["wide"]),
            node("Squeeze", ["wide", "last"], ["scores"]),
        ],
        {"last": np.array([-1])},
    )  # fmt: skip


def _classifier() -> Parts:
    return (
        (TensorSpec(name="features", datatype="FP32", shape=(-1, 3)),),
        (TensorSpec(name="probabilities", datatype="FP32", shape=(-1, 3)),),
        [helper.make_node("Softmax", ["features"], ["probabilities"], axis=-1)],
        {},
    )


def _generator() -> Parts:
    """The next token's logits at every place."""
    return (
        (TensorSpec(name="input_ids", datatype="INT64", shape=(-1, -1), axes=_LENGTH, padding="right", minimum=0,
                    maximum=9, longest=8),),
        (TensorSpec(name="logits", datatype="FP32", shape=(-1, -1, 4), axes=(*_LENGTH, "vocabulary")),),
        [helper.make_node("Gather", ["table", "input_ids"], ["logits"])],
        {"table": EMBEDDINGS},
    )  # fmt: skip


_PARTS: dict[Task, Callable[[], Parts]] = {
    Task.ENCODER: _encoder, Task.RANKER: _ranker, Task.CLASSIFIER: _classifier, Task.GENERATOR: _generator,
}  # fmt: skip
