"""A tiny real model package for tests: a signed session recommender that answers in microseconds.

The answer is easy to foresee: the items that follow the newest known item in the item table, in order and
round the end, without those of the history. With no known item it is the table from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from endcap.files import write_atomic, write_json
from endcap.package import (
    ATTRIBUTES_FILE,
    ITEMS_FILE,
    MODEL_CARD_FILE,
    POPULAR_FILE,
    Attributes,
    Manifest,
    Task,
    TensorSpec,
    Variant,
    ensure_signing_key,
    seal,
    sign_package,
)

ITEMS = tuple(str(100 + number) for number in range(50))
"""The default item table; external ids on purpose unlike the graph's 1..n."""


def make_package(
    folder: Path,
    *,
    items: Sequence[str] = ITEMS,
    popular: Sequence[str] | None = None,
    key: Path | None = None,
    sign: bool = True,
    name: str = "recommender",
    model: str = "next-in-table",
    top_k: int = 20,
    max_history: int = 50,
    int8: bool = False,
    fails_on: Sequence[str] = (),
    stalls_on: Sequence[str] = (),
    stall_loops: int = 3_000_000,
    attributes: Attributes | None = None,
) -> Path:
    """Make, seal and sign a package in ``folder`` (created); returns ``folder``.

    Args:
        items: the item table; a permuted copy of it makes the valid and wrong package.
        popular: what to fall back to; default: the table from its end.
        key: the private signing key; default: one in ``folder.parent / "keys"``, made on first use
            (its public half is ``signing.pub`` beside it).
        sign: False leaves the package sealed and unsigned.
        int8: add a variant ``int8`` (the same graph in a second file).
        fails_on: items; a history holding one makes the graph fail at run time (not at load).
        stalls_on: items; a history holding one keeps the graph busy for ``stall_loops`` turns of an empty
            loop (some seconds, on one core).
        attributes: written as ``attributes.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    top_k = min(top_k, len(items))
    indices = {item: number for number, item in enumerate(items, 1)}
    graph = _graph(len(items), top_k, [indices[item] for item in fails_on],
                   [indices[item] for item in stalls_on], stall_loops).SerializeToString()  # fmt: skip
    files = {"float32": "model.onnx"} | ({"int8": "model.int8.onnx"} if int8 else {})
    for file in files.values():
        write_atomic(folder / file, graph)
    write_json(folder / ITEMS_FILE, list(items))
    write_json(folder / POPULAR_FILE, list(reversed(items)) if popular is None else list(popular))
    if attributes is not None:
        write_json(folder / ATTRIBUTES_FILE, attributes.model_dump(mode="json", exclude_none=True))
    write_atomic(folder / MODEL_CARD_FILE, f"# {name}\nA package for tests.\n")
    seal(
        folder,
        Manifest(
            name=name,
            task=Task.SESSION_RECOMMENDER,
            model=model,
            inputs=(TensorSpec(name="history", datatype="INT64", shape=(-1, -1)),),
            outputs=(
                TensorSpec(name="items", datatype="INT64", shape=(-1, top_k)),
                TensorSpec(name="scores", datatype="FP32", shape=(-1, top_k)),
            ),
            variants={variant: Variant(file=file) for variant, file in files.items()},
            top_k=top_k,
            max_history=max_history,
            created_at="2026-11-22T00:00:00Z",
            lineage={"synthetic": "true"},
        ),
    )
    if sign:
        sign_package(folder, key or ensure_signing_key(folder.parent / "keys")[0])
    return folder


def _graph(items: int, top_k: int, fails_on: Sequence[int], stalls_on: Sequence[int],
           stall_loops: int) -> onnx.ModelProto:  # fmt: skip
    """history int64 [batch, length] -> items int64 [batch, top_k], scores float32 [batch, top_k]."""
    start = np.arange(items + 1)[:, None]
    forward = (np.arange(items + 1)[None, :] - start - 1) % items
    table = (1.0 / (1.0 + forward)).astype(np.float32)
    table[0, 1:] = 1.0 / np.arange(1, items + 1, dtype=np.float32)
    table[:, 0] = -1e9

    node = helper.make_node
    constants: dict[str, np.ndarray] = {
        "table": table,
        "last": np.array(-1, np.int64),
        "depth": np.array(items + 1, np.int64),
        "off_on": np.array([0.0, -1e9], np.float32),
        "length_axis": np.array([1], np.int64),
        "k": np.array([top_k], np.int64),
        "fail_items": np.array([-1, *fails_on], np.int64),
        "stall_items": np.array([-1, *stalls_on], np.int64),
        "fail_far": np.array(1 << 40, np.int64),
        "stall_loops": np.array(stall_loops, np.int64),
        "zero": np.array(0, np.int64),
        "two": np.array([2], np.int64),
        "yes": np.array(True),
        "zeros": np.zeros(1, np.float32),
    }
    body = helper.make_graph(
        [node("Identity", ["go"], ["go_on"]), node("Add", ["busy_in", "one"], ["busy_out"])],
        "loop",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("busy_in", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("busy_out", TensorProto.INT64, []),
        ],
        [numpy_helper.from_array(np.array(0, np.int64), "one")],
    )

    def holds(which: str) -> list[onnx.NodeProto]:
        return [
            node("Unsqueeze", ["history", "two"], [f"{which}_wide"]),
            node("Equal", [f"{which}_wide", f"{which}_items"], [f"{which}_equal"]),
            node("Cast", [f"{which}_equal"], [f"{which}_numbers"], to=TensorProto.INT64),
            node("ReduceMax", [f"{which}_numbers"], [f"{which}_any"], keepdims=0),
            node("Cast", [f"{which}_any"], [f"{which}_found"], to=TensorProto.BOOL),
        ]

    nodes = [
        node("Gather", ["history", "last"], ["newest"], axis=1),
        node("Gather", ["table", "newest"], ["forward"], axis=0),
        node("OneHot", ["history", "depth", "off_on"], ["seen_each"], axis=-1),
        node("ReduceSum", ["seen_each", "length_axis"], ["seen"], keepdims=0),
        node("Add", ["forward", "seen"], ["masked"]),
        # A history with a bad item makes an index that no tensor has.
        *holds("fail"),
        node("Where", ["fail_found", "fail_far", "zero"], ["fail_index"]),
        node("Gather", ["zeros", "fail_index"], ["nothing"], axis=0),
        *holds("stall"),
        node("Where", ["stall_found", "stall_loops", "zero"], ["turns"]),
        node("Loop", ["turns", "yes", "zero"], ["busy"], body=body),
        node("Min", ["busy", "zero"], ["busy_zero"]),
        node("Cast", ["busy_zero"], ["busy_nothing"], to=TensorProto.FLOAT),
        node("Add", ["masked", "nothing"], ["checked"]),
        node("Add", ["checked", "busy_nothing"], ["all_scores"]),
        node("TopK", ["all_scores", "k"], ["scores", "items"], axis=-1, largest=1, sorted=1),
    ]
    graph = helper.make_graph(
        nodes,
        "next-in-table",
        [helper.make_tensor_value_info("history", TensorProto.INT64, ["batch", "length"])],
        [
            helper.make_tensor_value_info("items", TensorProto.INT64, ["batch", top_k]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", top_k]),
        ],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model
