"""What an ONNX graph of the package contract recommends, by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from components.evaluation.evaluation import Ranked
from components.models.histories import batches_by_length
from endcap.errors import PackageError

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]

__all__ = ["open_graph", "open_graph_bytes", "rank_by_graph", "run_graph"]


def open_graph(path: Path, *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """Load a graph of ours (verify a package before you open its graph).

    Raises:
        PackageError: ONNX Runtime cannot load it.
    """
    return open_graph_bytes(path.read_bytes(), where=path, threads=threads)


def open_graph_bytes(graph: bytes, *, where: Path, threads: int | None = None) -> onnxruntime.InferenceSession:
    """:func:`open_graph` of a graph in memory; ``where`` is named in errors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or min(4, len(os.sched_getaffinity(0)))
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base but this
        raise PackageError(f"ONNX Runtime cannot load the graph ({str(error).splitlines()[0]})", where=where) from error


def run_graph(session: onnxruntime.InferenceSession, history: NDArray[np.int64]
              ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:  # fmt: skip
    """``history int64 [b, l]`` (left-padded with 0) -> ``items int64 [b, k]``, ``scores float32 [b, k]``."""
    items, scores = session.run(["items", "scores"], {"history": history})
    return items, scores


def rank_by_graph(model: str, path: Path, histories: Sequence[NDArray[np.integer]], targets: NDArray[np.integer], *,
                  max_history: int, rows: int = 256) -> Ranked:  # fmt: skip
    """What the graph shows every shopper, and the target's place in it (a large number where it is not in the list).

    As the server does, the newest ``max_history`` items are shown to the graph; with none the list is empty.
    """
    session = open_graph(path)
    ranks = np.full(len(histories), 1_000_000, np.int64)
    top: NDArray[np.int64] | None = None
    for index, batch in batches_by_length(histories, rows, longest=max_history):
        items, _ = run_graph(session, batch)
        if top is None:
            top = np.zeros((len(histories), items.shape[1]), np.int64)
        known = np.asarray((batch > 0).any(axis=1))
        items = np.where(known[:, None], items, 0)
        top[index] = items
        hit_row, hit_place = np.nonzero(items == targets[index][:, None])
        ranks[index[hit_row]] = hit_place + 1
    return Ranked(model, ranks, top if top is not None else np.zeros((0, 1), np.int64))
