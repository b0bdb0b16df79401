"""A package of an encoder or a ranker of a pretrained text model: exported, compared, quantised, measured, signed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from components.export.compress import compress_graph
from components.export.session import open_graph
from components.packaging.build import FLOAT32_FILE, INT8_FILE
from components.text.judged import JudgedQuery, Ranking, Scorer, by_bm25, by_chance, measure_ranking
from components.text.tokens import TOKENIZER_FILE, Tokens, encoder_inputs, ranker_inputs
from endcap.errors import InputError, PackageError, from_os_error
from endcap.files import replaced_folder, sha256_file, write_atomic
from endcap.package import MODEL_CARD_FILE, Manifest, Task, TensorSpec, Variant, seal, sign_package

__all__ = ["TextPackage", "TextParts", "build_text_package"]

LONGEST = 256
"""Tokens of a text, beyond which it is cut: what all-MiniLM-L6-v2 was trained for."""
_TOLERANCE = 1e-4
_AT_ONCE = 8
_SAMPLES = (
    "wireless noise cancelling headphones", "Xerox 006R90321 toner cartridge Original Black 6 pc(s)", "laptop", "usb c",
    "HP Pavilion dv7-1211ea Notebook Silver 43.2 cm (17\") 1440 x 900 pixels Intel Core 2 Duo 4 GB DDR2-SDRAM",
)  # fmt: skip
"""What parity is looked at with."""


@dataclass(frozen=True)
class TextParts:
    """What a package of text is made of.

    Attributes:
        weights: folder of the pretrained model (``config.json``, ``model.safetensors``, ``tokenizer.json``).
        model: what it is, for people; ``licence``: of the weights.
        judged: what to measure on; empty: quality is not measured, and the card says so.
        created_at: UTC, ISO 8601.
    """

    name: str
    task: Task
    weights: Path
    model: str
    licence: str
    created_at: str
    judged: Sequence[JudgedQuery] = ()
    seed: int = 7
    longest: int = LONGEST


@dataclass(frozen=True)
class TextPackage:
    """``parity``: the largest difference between PyTorch's outputs and the float32 graph's. ``quality``: by who ranked:
    ``float32``, ``int8``, ``bm25`` and ``chance``; empty where nothing was judged."""

    manifest: Manifest
    parity: float
    quality: Mapping[str, Ranking]


def build_text_package(folder: Path, parts: TextParts, private_key: Path) -> TextPackage:
    """Write the package to ``folder`` (replaced), sealed and signed; it is there whole or not at all.

    Raises:
        InputError: no such weights, or a task that is not made of text here.
        PackageError: the graph cannot be exported or quantised, or does not answer as PyTorch does.
    """
    if parts.task not in (Task.ENCODER, Task.RANKER):
        raise InputError(f"a {parts.task} is not made of a pretrained text model", next_step="encoder or ranker")
    from components.text.models import TextRanker, export_text, load_encoder

    encoder = load_encoder(parts.weights)
    longest = min(parts.longest, encoder.longest)
    tokens = Tokens(parts.weights / TOKENIZER_FILE, longest=longest)
    try:
        with replaced_folder(folder) as scratch:
            scratch.mkdir()
            graph = TextRanker(encoder) if parts.task is Task.RANKER else encoder
            export_text(graph, scratch / FLOAT32_FILE)
            parity = _parity(graph, scratch / FLOAT32_FILE, _sample(parts.task, tokens))
            compress_graph(scratch / FLOAT32_FILE, scratch / INT8_FILE)
            shutil.copyfile(parts.weights / TOKENIZER_FILE, scratch / TOKENIZER_FILE)
            files = {"float32": FLOAT32_FILE, "int8": INT8_FILE}
            quality = _measured(parts, {variant: scratch / file for variant, file in files.items()}, tokens)
            lineage = {"weights_sha256": sha256_file(parts.weights / "model.safetensors"), "synthetic": "false"}
            write_atomic(scratch / MODEL_CARD_FILE, _card(parts, parity, quality, lineage))
            takes, gives = _tensors(parts.task, encoder.vocabulary, encoder.size, longest)
            manifest = seal(scratch, Manifest(
                name=parts.name, task=parts.task, model=parts.model, inputs=takes, outputs=gives,
                variants={variant: Variant(file=file, quality=_of(quality.get(variant)))
                          for variant, file in files.items()},
                created_at=parts.created_at, lineage=lineage,
            ))  # fmt: skip
            sign_package(scratch, private_key)
    except OSError as error:
        raise from_os_error(error, doing=f"writing the package {folder}") from error
    return TextPackage(manifest, parity, quality)


def _of(ranking: Ranking | None) -> dict[str, float]:
    return {} if ranking is None else {"ndcg_at_10": ranking.ndcg_at_10.value}


def _sample(task: Task, tokens: Tokens) -> Sequence[NDArray[np.int64]]:
    inputs = ranker_inputs(tokens, _SAMPLES[0], _SAMPLES) if task is Task.RANKER else encoder_inputs(tokens, _SAMPLES)
    return list(inputs.values())


def _parity(graph: object, path: Path, sample: Sequence[NDArray[np.int64]]) -> float:
    """The largest difference; PackageError where it is more than rounding explains."""
    import torch

    session = open_graph(path)
    names = [one.name for one in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, sample, strict=True)))
    with torch.inference_mode():
        expected = graph(*(torch.from_numpy(one) for one in sample)).numpy()  # type: ignore[operator]
    largest = float(np.abs(found - expected).max())
    if not largest <= _TOLERANCE:
        raise PackageError(f"the exported graph differs from PyTorch's by {largest:.2g}", where=path)
    return largest


def _measured(parts: TextParts, graphs: Mapping[str, Path], tokens: Tokens) -> dict[str, Ranking]:
    """NDCG@10 of both graphs on the judged queries, beside BM25's and chance's."""
    if not parts.judged:
        return {}
    scorers: dict[str, Scorer] = {variant: _scorer(path, parts.task, tokens) for variant, path in graphs.items()} | {
        "bm25": by_bm25(parts.judged),
        "chance": by_chance(parts.seed),
    }
    return {name: measure_ranking(parts.judged, scorer, seed=parts.seed) for name, scorer in scorers.items()}


def _scorer(path: Path, task: Task, tokens: Tokens) -> Scorer:
    session = open_graph(path)

    def ranked(query: str, texts: Sequence[str]) -> NDArray[np.floating]:
        (scores,) = session.run(["scores"], ranker_inputs(tokens, query, texts))
        found: NDArray[np.floating] = scores[0]
        return found

    def encoded(query: str, texts: Sequence[str]) -> NDArray[np.floating]:
        (vectors,) = session.run(["embedding"], encoder_inputs(tokens, [query, *texts]))
        found: NDArray[np.floating] = vectors[1:] @ vectors[0]
        return found

    score = ranked if task is Task.RANKER else encoded

    def all_of(query: JudgedQuery) -> NDArray[np.floating]:
        """A few at once, of like length: else most of a run is padding."""
        order = sorted(range(len(query.texts)), key=lambda place: len(query.texts[place]))
        found = np.zeros(len(query.texts))
        for begin in range(0, len(order), _AT_ONCE):
            places = order[begin : begin + _AT_ONCE]
            found[places] = score(query.query, [query.texts[place] for place in places])
        return found

    return all_of


def _tensors(task: Task, vocabulary: int, size: int, longest: int
             ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:  # fmt: skip
    def taken(name: str, axes: tuple[str, ...], *, maximum: int) -> TensorSpec:
        return TensorSpec(name=name, datatype="INT64", shape=(-1,) * len(axes), axes=axes, padding="right", minimum=0,
                          maximum=maximum, longest=longest)  # fmt: skip

    def pair(ids: str, mask: str, axes: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        return taken(ids, axes, maximum=vocabulary - 1), taken(mask, axes, maximum=1)

    if task is Task.ENCODER:
        vectors = TensorSpec(name="embedding", datatype="FP32", shape=(-1, size), axes=("rows", "size"))
        return pair("input_ids", "attention_mask", ("rows", "tokens")), (vectors,)
    scores = TensorSpec(name="scores", datatype="FP32", shape=(-1, -1), axes=("rows", "candidates"))
    takes = pair("query_ids", "query_mask", ("rows", "query")) + pair(
        "candidate_ids", "candidate_mask", ("rows", "candidates", "tokens")
    )
    return takes, (scores,)


def _card(parts: TextParts, parity: float, quality: Mapping[str, Ranking], lineage: Mapping[str, str]) -> str:
    what = {
        Task.ENCODER: "Texts to unit vectors: their cosine says how near they are in meaning.",
        Task.RANKER: "A query and its candidates to scores: the cosine of their vectors, by one encoder.",
    }[parts.task]
    if quality:
        of = next(iter(quality.values()))
        rows = "\n".join(
            f"| {name} | {one.ndcg_at_10.value:.4f} [{one.ndcg_at_10.low:.4f}, {one.ndcg_at_10.high:.4f}] |"
            for name, one in quality.items()
        )
        measured = (
            f"Ranking judged candidates only, {of.queries} queries, {of.relevant} with a relevant one; gain"
            f" 2^grade - 1; 95 % bootstrap intervals over queries.\n\n| by | NDCG@10 |\n|---|---|\n{rows}"
        )
    else:
        measured = "Not measured: no judgements were given."
    return (
        "\n\n".join(
            (
                f"# {parts.name}: {parts.model}",
                f"What it is: {what} Texts become tokens by `{TOKENIZER_FILE}`, cut at {parts.longest}. Task type:"
                f" {parts.task}. Licence of the weights: {parts.licence}. Nothing was trained here.",
                "## Quality",
                measured,
                f"The exported graph differs from PyTorch's by {parity:.1e} at most.",
                "## Beware",
                "- Candidates nobody judged count for nothing here: this says nothing about retrieval.\n"
                "- A pretrained model knows nothing of this shop's own words, names and numbers.",
                "## Lineage",
                "\n".join(f"- {key}: `{value}`" for key, value in lineage.items()),
            )
        )
        + "\n"
    )
