"""Export a recommender's graph to ONNX, and prove that it still answers as PyTorch does."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from components.export.session import open_graph, run_graph
from components.models.graph import RecommenderGraph
from components.models.histories import batches_by_length
from endcap.errors import PackageError
from endcap.files import write_atomic

__all__ = ["OPSET", "Parity", "check_parity", "export_graph"]

OPSET = 17


@dataclass(frozen=True)
class Parity:
    """How the exported graph's answers compare with PyTorch's for the same shoppers."""

    shoppers: int
    identical_share: float
    """Share of lists that are the same item by item."""
    tied_share: float
    """Share that differs only among items whose scores are equal within the tolerance."""
    largest_score_difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Every list is the same but for ties."""
        return self.identical_share + self.tied_share >= 1.0 and self.largest_score_difference <= self.tolerance


def export_graph(graph: RecommenderGraph, path: Path) -> None:
    """Write ``graph`` as one ONNX file with any batch and any length.

    The TorchScript exporter is used knowingly: 0.3 s, where the newer one takes 7 s and 4 s of imports for the same
    graph; the parity check guards the result.

    Raises:
        PackageError: the graph cannot be expressed in ONNX.
    """
    graph.eval()
    example = torch.ones((2, 5), dtype=torch.int64)
    example[0, :2] = 0
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "graph.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    graph, (example,), made, dynamo=False, opset_version=OPSET,
                    input_names=["history"], output_names=["items", "scores"],
                    dynamic_axes={"history": {0: "batch", 1: "length"}, "items": {0: "batch"}, "scores": {0: "batch"}},
                )  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            raise PackageError(f"the model cannot be exported to ONNX ({str(error).splitlines()[0]})") from error
        write_atomic(path, made.read_bytes())


def check_parity(graph: RecommenderGraph, path: Path, histories: Sequence[NDArray[np.integer]], *,
                 tolerance: float = 1e-4) -> Parity:  # fmt: skip
    """Compare the lists of ``graph`` and of the file ``path`` for ``histories``.

    Scores are compared relative to the largest score of the list.
    """
    session = open_graph(path)
    identical = tied = 0
    largest = 0.0
    graph.eval()
    with torch.inference_mode():
        for _, batch in batches_by_length(histories, 256):
            expected = tuple(part.numpy() for part in graph(torch.from_numpy(batch)))
            found = run_graph(session, batch)
            for row in range(len(batch)):
                same, difference = _compare(expected[0][row], expected[1][row], found[0][row], found[1][row], tolerance)
                largest = max(largest, difference)
                if np.array_equal(expected[0][row], found[0][row]):
                    identical += 1
                elif same:
                    tied += 1
    count = max(len(histories), 1)
    return Parity(len(histories), identical / count, tied / count, largest, tolerance)


def _compare(items: NDArray[np.int64], scores: NDArray[np.float32], found_items: NDArray[np.int64],
             found_scores: NDArray[np.float32], tolerance: float) -> tuple[bool, float]:  # fmt: skip
    """Whether two lists differ in nothing but ties, and their largest relative difference of scores."""
    scale = max(float(np.abs(scores).max()), 1e-9)
    largest = float(np.abs(scores - found_scores).max()) / scale
    known = dict(zip(items.tolist(), scores.tolist(), strict=True))
    last = float(scores[-1])
    for item, score in zip(found_items.tolist(), found_scores.tolist(), strict=True):
        if abs(known.get(item, last) - score) > tolerance * scale:
            return False, largest
    return True, largest
