"""A pretrained text model as one graph: an encoder, or a ranker of candidates for a query; and their ONNX files."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from components.export.graph import OPSET
from endcap.errors import InputError, PackageError
from endcap.files import write_atomic

__all__ = ["TextEncoder", "TextRanker", "export_text", "load_encoder"]


class TextEncoder(nn.Module):
    """Texts to unit vectors: the mean of a transformer's last states over the text's tokens.

    As sentence-transformers pools (Reimers and Gurevych, "Sentence-BERT", EMNLP 2019); padding does not count.
    """

    def __init__(self, transformer: nn.Module, *, size: int, vocabulary: int, longest: int) -> None:
        """``size``: of a vector. ``vocabulary``: token ids are below it. ``longest``: tokens of a text at most."""
        super().__init__()
        self.transformer = transformer
        self.size, self.vocabulary, self.longest = size, vocabulary, longest

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """``int64 [b, l]``, ``int64 [b, l]`` (1: a token, 0: padding) -> ``float32 [b, size]``."""
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.to(states.dtype)[:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1.0)
        found: Tensor = nn.functional.normalize(mean, dim=-1)
        return found


class TextRanker(nn.Module):
    """Candidates for a query, scored by the cosine of their vectors, by one encoder."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, query_ids: Tensor, query_mask: Tensor, candidate_ids: Tensor, candidate_mask: Tensor) -> Tensor:
        """``int64 [b, q]`` twice, ``int64 [b, candidates, l]`` twice -> ``float32 [b, candidates]``."""
        query = self.encoder(query_ids, query_mask)
        texts = self.encoder(candidate_ids.flatten(0, 1), candidate_mask.flatten(0, 1))
        candidates = texts.view(candidate_ids.shape[0], candidate_ids.shape[1], -1)
        found: Tensor = (candidates @ query[:, :, None]).squeeze(-1)
        return found


def load_encoder(folder: Path) -> TextEncoder:
    """The encoder in a folder as Hugging Face's transformers keep it (``config.json``, ``model.safetensors``).

    Nothing is fetched, no pickle is read and no code of the folder's is run.

    Raises:
        InputError: no such model there, or none that gives states of tokens.
    """
    if not (folder / "model.safetensors").is_file():
        raise InputError("no text model there", where=folder, next_step="name the folder of its model.safetensors")
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Written out, because the exporter can follow it; other ways to attend are chosen by the runtime's kernels.
        transformer = AutoModel.from_pretrained(folder, config=config, local_files_only=True, use_safetensors=True,
                                                trust_remote_code=False, attn_implementation="eager")  # fmt: skip
        return TextEncoder(transformer.eval(), size=int(config.hidden_size), vocabulary=int(config.vocab_size),
                           longest=int(config.max_position_embeddings))  # fmt: skip
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"the text model cannot be used ({str(error).splitlines()[0]})", where=folder) from error


def export_text(graph: TextEncoder | TextRanker, path: Path) -> None:
    """Write ``graph`` as one ONNX file, with any number of rows, candidates and tokens.

    Raises:
        PackageError: it cannot be expressed in ONNX.
    """
    rows = {0: "rows"}
    axes: Mapping[str, Mapping[int, str]]
    example: Sequence[Tensor]
    if isinstance(graph, TextRanker):
        query, candidates = torch.ones((2, 5), dtype=torch.int64), torch.ones((2, 3, 7), dtype=torch.int64)
        example = (query, query, candidates, candidates)
        q_axes, c_axes = {**rows, 1: "query"}, {**rows, 1: "candidates", 2: "tokens"}
        axes = {"query_ids": q_axes, "query_mask": q_axes, "candidate_ids": c_axes, "candidate_mask": c_axes,
                "scores": {**rows, 1: "candidates"}}  # fmt: skip
    else:
        tokens = torch.ones((2, 5), dtype=torch.int64)
        example = (tokens, tokens)
        axes = {"input_ids": {**rows, 1: "tokens"}, "attention_mask": {**rows, 1: "tokens"}, "embedding": rows}
    *inputs, output = axes
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "graph.onnx"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(graph.eval(), tuple(example), made, dynamo=False, opset_version=OPSET,
                                  input_names=inputs, output_names=[output],
                                  dynamic_axes={name: dict(named) for name, named in axes.items()})  # fmt: skip
        except (RuntimeError, ValueError, TypeError) as error:
            raise PackageError(f"the model cannot be exported to ONNX ({str(error).splitlines()[0]})") from error
        write_atomic(path, _without_aliases(made.read_bytes()))


def _without_aliases(graph: bytes) -> bytes:
    """The graph with its weights read where they are used.

    The exporter names a weight that is used twice (a ranker's encoder) by ``Identity`` nodes, and the quantiser leaves
    alone what does not come straight from a weight.
    """
    import onnx

    model = onnx.load_from_string(graph)
    weights = {one.name for one in model.graph.initializer}
    alias = {node.output[0]: node.input[0] for node in model.graph.node
             if node.op_type == "Identity" and node.input[0] in weights}  # fmt: skip
    kept = [node for node in model.graph.node if node.output[0] not in alias]
    for node in kept:
        for place, name in enumerate(node.input):
            node.input[place] = alias.get(name, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    onnx.checker.check_model(model)
    found: bytes = model.SerializeToString()
    return found
