"""The two models of the benchmark, with weights drawn from a seed: how long a graph takes does not depend on them."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from components.export.graph import export_graph
from components.models.graph import RecommenderGraph, TransformerScorer
from components.models.transformer import Transformer, TransformerConfig
from components.packaging import PackageParts, build_package
from endcap.files import replaced_folder, write_atomic
from endcap.package import MODEL_CARD_FILE, Manifest, Task, TensorSpec, Variant, ensure_signing_key, seal, sign_package

__all__ = ["HEAVY", "SASREC", "Made", "encoder_package", "inputs_of", "sasrec_package"]

SASREC, HEAVY = "recommender", "encoder"
ITEMS = 12_101
"""Amazon Beauty's, 5-core."""
_VOCABULARY, _WIDTH, _BLOCKS, _HEADS, _EXPANDED = 30_522, 384, 6, 12, 1536
"""all-MiniLM-L6-v2's shape."""
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


class _Encoder(nn.Module):
    """BERT as all-MiniLM-L6-v2 has it, with the mean over the mask's tokens as a unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(_VOCABULARY, _WIDTH), nn.Embedding(512, _WIDTH)
        self.first = nn.LayerNorm(_WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(_BLOCKS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = self.first(self.words(input_ids) + self.places(places)[None])
        mask = attention_mask.to(states.dtype)
        unseen = (1.0 - mask)[:, None, None, :] * -1e9
        for block in self.blocks:
            states = block(states, unseen)
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1.0)
        return nn.functional.normalize(mean, dim=-1)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mix = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.expand, self.contract = nn.Linear(_WIDTH, _EXPANDED), nn.Linear(_EXPANDED, _WIDTH)
        self.attended, self.fed = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

    def forward(self, states: Tensor, unseen: Tensor) -> Tensor:
        rows, length, _ = states.shape

        def split(found: Tensor) -> Tensor:
            return found.reshape(rows, length, _HEADS, _WIDTH // _HEADS).transpose(1, 2)

        query, key, value = split(self.query(states)), split(self.key(states)), split(self.value(states))
        weights = torch.softmax(query @ key.transpose(2, 3) / (_WIDTH // _HEADS) ** 0.5 + unseen, dim=-1)
        mixed = self.mix((weights @ value).transpose(1, 2).reshape(rows, length, _WIDTH))
        states = self.attended(states + mixed)
        fed: Tensor = self.fed(states + self.contract(nn.functional.gelu(self.expand(states))))
        return fed


def encoder_package(folder: Path, *, seed: int) -> Made:
    """An encoder of all-MiniLM-L6-v2's architecture (22.6 million weights, 90 MB)."""
    torch.manual_seed(seed)
    private_key, public_key = ensure_signing_key(folder / "keys")
    with replaced_folder(folder / HEAVY) as made:
        made.mkdir(parents=True, exist_ok=True)
        example = torch.ones((2, 5), dtype=torch.int64)
        free = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"},
                "embedding": {0: "batch"}}  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Encoder().eval(), (example, example), str(made / "model.onnx"), dynamo=False, opset_version=17,
                input_names=["input_ids", "attention_mask"], output_names=["embedding"], dynamic_axes=free,
            )  # fmt: skip
        write_atomic(made / MODEL_CARD_FILE, "# Of the serving benchmark\nWeights drawn, not learnt.\n")
        tokens = {"datatype": "INT64", "shape": (-1, -1), "axes": ("batch", "length"), "padding": "right",
                  "minimum": 0, "longest": 512}  # fmt: skip
        seal(
            made,
            Manifest(
                name=HEAVY, task=Task.ENCODER, model="all-MiniLM-L6-v2's shape",
                inputs=(TensorSpec.model_validate({**tokens, "name": "input_ids", "maximum": _VOCABULARY - 1}),
                        TensorSpec.model_validate({**tokens, "name": "attention_mask", "maximum": 1})),
                outputs=(TensorSpec(name="embedding", datatype="FP32", shape=(-1, _WIDTH), axes=("batch", "size")),),
                variants={"float32": Variant(file="model.onnx")}, created_at=_MADE_AT, lineage={"synthetic": "true"},
            ),
        )  # fmt: skip
        sign_package(made, private_key)
    return Made(HEAVY, folder / HEAVY, folder / HEAVY / "model.onnx", public_key)


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
