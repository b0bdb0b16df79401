"""Packages with a known defect, made of a good one: signed, valid, and bad in a way that only serving shows.

For demonstrations and drills of a rollout. Nothing but the package is bad; the server does not cooperate.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from endcap.errors import PackageError, from_os_error
from endcap.files import replaced_folder, write_atomic, write_json
from endcap.package import (
    ITEMS_FILE,
    MODEL_CARD_FILE,
    SIGNATURE_FILE,
    Manifest,
    read_items,
    seal,
    sign_package,
    verify_package,
)

__all__ = ["Defect", "make_defective"]


class Defect(StrEnum):
    """What is wrong with the package."""

    PERMUTED = "permuted"
    """The item table is shuffled: fast, healthy, every answer well-formed, and wrong."""
    FAILING = "failing"
    """The graph fails at run time for a quarter of the catalogue as newest item."""
    STALLING = "stalling"
    """The graph keeps a core busy for about 0.6 s for a tenth of the catalogue as newest item."""
    TAMPERED = "tampered"
    """One byte of the graph was changed after signing."""


_EVERY = {Defect.FAILING: (4, 3), Defect.STALLING: (10, 7)}
"""Items ``i`` with ``i % divisor == remainder`` set it off; the first item, which servers warm up with, does not."""

_CARDS = {
    Defect.PERMUTED: "its item table is permuted: it answers fast and well-formed, and recommends the wrong items.",
    Defect.FAILING: "its graph fails at run time for histories whose newest item is one of a quarter of the catalogue.",
    Defect.STALLING: "its graph keeps a core busy for about {stall_s:g} s for histories whose newest item is one of a"
    " tenth of the catalogue.",
    Defect.TAMPERED: "one byte of its graph was changed after it was signed; it must never be loaded.",
}


def make_defective(good: Path, folder: Path, defect: Defect, *, private_key: Path, public_key: Path, seed: int = 7,
                   stall_s: float = 0.6) -> Manifest:  # fmt: skip
    """Write to ``folder`` (replaced) a copy of the package ``good`` with ``defect``, sealed and signed.

    Args:
        public_key: ``good`` is verified with it first.
        seed: of the permutation.
        stall_s: how long a stalling graph computes, on this machine's speed, at least.

    Raises:
        VerificationError: ``good`` does not verify.
        PackageError: its graph is not of the contract's form.
        StorageError: no space, or not allowed.
    """
    manifest = verify_package(good, public_key)
    try:
        with replaced_folder(folder) as scratch:
            shutil.copytree(good, scratch)
            (scratch / SIGNATURE_FILE).unlink()
            card = (scratch / MODEL_CARD_FILE).read_text()
            warning = f"**Defective on purpose ({defect})**: {_CARDS[defect].format(stall_s=stall_s)}"
            write_atomic(scratch / MODEL_CARD_FILE, f"{warning}\n\n{card}")
            if defect is Defect.PERMUTED:
                items = read_items(scratch)
                order = np.random.default_rng(seed).permutation(len(items))
                write_json(scratch / ITEMS_FILE, [items[int(index)] for index in order])
            elif defect is not Defect.TAMPERED:
                guard = _fail if defect is Defect.FAILING else _stall(good / manifest.variants["float32"].file, stall_s)
                for variant in manifest.variants.values():
                    path = scratch / variant.file
                    write_atomic(path, _with_guard(path, guard, _EVERY[defect]).SerializeToString())
            sealed = seal(scratch, manifest.model_copy(update={
                "model": f"{manifest.model} ({defect})", "lineage": {**manifest.lineage, "defect": str(defect)},
            }))  # fmt: skip
            sign_package(scratch, private_key)
            if defect is Defect.TAMPERED:
                _change_a_byte(scratch / manifest.variants["float32"].file)
    except OSError as error:
        raise from_os_error(error, doing=f"writing the package {folder}") from error
    return sealed


def _change_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x01
    write_atomic(path, bytes(raw))


_Guard = Callable[[], tuple[list[NodeProto], dict[str, np.ndarray]]]
"""Nodes that compute ``guard`` (a float zero) from ``guard_found`` (bool), and their constants."""


def _with_guard(path: Path, guard: _Guard, every: tuple[int, int]) -> onnx.ModelProto:
    """The graph with ``guard`` computed from the newest items and added to the scores, which it does not change."""
    model = onnx.load(path)
    graph = model.graph
    if [tensor.name for tensor in graph.input] != ["history"] or "scores" not in {t.name for t in graph.output}:
        raise PackageError("the graph does not take `history` and give `scores`", where=path)
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == "scores":
                node.output[place] = "guard_scores"
        for place, name in enumerate(node.input):
            if name == "scores":
                node.input[place] = "guard_scores"
    nodes, constants = guard()
    divisor, remainder = every
    constants |= {
        "guard_last": np.array(-1, np.int64),
        "guard_divisor": np.array(divisor, np.int64),
        "guard_remainder": np.array(remainder, np.int64),
        "guard_zero": np.array(0, np.int64),
    }
    make = helper.make_node
    graph.node.extend(
        [
            make("Gather", ["history", "guard_last"], ["guard_newest"], axis=1),
            make("Mod", ["guard_newest", "guard_divisor"], ["guard_rest"]),
            make("Equal", ["guard_rest", "guard_remainder"], ["guard_each"]),
            make("Cast", ["guard_each"], ["guard_numbers"], to=TensorProto.INT64),
            make("ReduceMax", ["guard_numbers"], ["guard_any"], keepdims=0),
            make("Cast", ["guard_any"], ["guard_found"], to=TensorProto.BOOL),
            *nodes,
            make("Add", ["guard_scores", "guard"], ["scores"]),
        ]
    )
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    onnx.checker.check_model(model)
    return model


def _fail() -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    """An index that no tensor has, which ONNX Runtime finds out as it gathers."""
    nodes = [
        helper.make_node("Where", ["guard_found", "guard_far", "guard_zero"], ["guard_index"]),
        helper.make_node("Gather", ["guard_zeros", "guard_index"], ["guard"], axis=0),
    ]
    return nodes, {"guard_far": np.array(1 << 40, np.int64), "guard_zeros": np.zeros(1, np.float32)}


def _stall(path: Path, stall_s: float) -> _Guard:
    """A loop of as many turns as take ``stall_s`` on this machine."""
    turns = 20_000
    for _ in range(8):
        took_s = _time_stall(path, turns)
        if took_s >= 0.1:
            break
        turns *= 4
    turns = max(turns, int(turns * stall_s / took_s * 1.1))
    return lambda: _loop(turns)


def _time_stall(path: Path, turns: int) -> float:
    """Seconds of one run with ``turns`` turns of the loop, the plain run's taken off, the fastest of three."""
    from components.export.session import open_graph_bytes

    session = open_graph_bytes(
        _with_guard(path, lambda: _loop(turns), _EVERY[Defect.STALLING]).SerializeToString(), where=path
    )
    _, remainder = _EVERY[Defect.STALLING]
    best = float("inf")
    for _ in range(3):
        marks = []
        for item in (1, remainder):
            begun = time.perf_counter()
            session.run(None, {"history": np.array([[item]], np.int64)})
            marks.append(time.perf_counter() - begun)
        best = min(best, max(1e-6, marks[1] - marks[0]))
    return best


def _loop(turns: int) -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    make, info = helper.make_node, helper.make_tensor_value_info
    body = helper.make_graph(
        [make("Identity", ["go"], ["go_on"]), make("Sin", ["busy_in"], ["busy_out"])],
        "guard_body",
        [
            info("turn", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("busy_in", TensorProto.FLOAT, []),
        ],
        [info("go_on", TensorProto.BOOL, []), info("busy_out", TensorProto.FLOAT, [])],
    )
    nodes = [
        make("Where", ["guard_found", "guard_loops", "guard_zero"], ["guard_turns"]),
        make("Loop", ["guard_turns", "guard_yes", "guard_start"], ["guard"], body=body),
    ]
    return nodes, {
        "guard_loops": np.array(turns, np.int64),
        "guard_yes": np.array(True),
        "guard_start": np.array(0.0, np.float32),
    }
