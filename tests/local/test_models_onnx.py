"""Every model's graph gives in ONNX Runtime what it gives in PyTorch, for any batch and any length of history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch

from components.models.graph import RecommenderGraph
from tests.unit.test_models_graph import TOP_K, histories, scorers

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("name", ["popularity", "item-knn", "transformer", "blend"])
def test_a_graph_is_the_same_in_onnx(name: str, tmp_path: Path) -> None:
    graph = RecommenderGraph(scorers()[name], TOP_K).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.onnx.export(
        graph,
        (torch.from_numpy(histories()[1]),),
        dynamo=True,
        input_names=["history"],
        output_names=["items", "scores"],
        dynamic_shapes={"history": {0: batch, 1: length}},
        verbose=False,
    )
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for history in histories():
        with torch.inference_mode():
            items, scores = (output.numpy() for output in graph(torch.from_numpy(history)))
        onnx_items, onnx_scores = session.run(["items", "scores"], {"history": history})
        np.testing.assert_allclose(onnx_scores, scores, rtol=1e-4, atol=1e-5)
        # Where two items score the same, either may come first.
        apart = np.abs(np.diff(scores, axis=1, append=-1e9)) > 1e-4
        apart &= np.abs(np.diff(scores, axis=1, prepend=1e9)) > 1e-4
        np.testing.assert_array_equal(onnx_items[apart], items[apart])
