"""The steps after the gate that need no PyTorch: compress, package, register."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from components.data import Dataset, LeaveOneOut
from components.data.storage import read_arrays
from components.evaluation import Evaluation, with_measured
from components.export.compress import Compression, compress_graph, measure_compression
from components.export.session import rank_by_graph
from components.packaging import PackageParts, build_package, model_card
from endcap.package import Manifest, ensure_signing_key
from endcap.registry import ModelVersion, Registry

__all__ = ["compress_model", "draw_plots", "package_model", "register_model"]

_POPULAR_KEPT = 200


def compress_model(graph: Path, destination: Path, *, split: LeaveOneOut, max_history: int, seed: int,
                   shoppers: int = 5000) -> Compression:  # fmt: skip
    """Quantise ``graph`` and measure both on a sample of the test split's shoppers (drawn by ``seed``)."""
    compress_graph(graph, destination)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(split.train))[:shoppers])
    everybody = split.histories("test")
    histories = [everybody[int(row)] for row in drawn]
    targets = split.test_target[drawn]
    ranked = [
        rank_by_graph(variant, path, histories, targets, max_history=max_history)
        for variant, path in (("float32", graph), ("int8", destination))
    ]
    return measure_compression(ranked[0], ranked[1], float32_file=graph, int8_file=destination, seed=seed)


def package_model(
    folder: Path,
    *,
    name: str,
    graph: Path,
    int8: Path,
    models: Path,
    dataset: Dataset,
    evaluation: Evaluation,
    parity: Mapping[str, Any],
    compression: Mapping[str, Any],
    max_history: int,
    lineage: Mapping[str, str],
    caveats: Sequence[str],
    licence: str,
    keys: Path,
) -> tuple[Manifest, Evaluation]:
    """Build, seal and sign the candidate's package; returns also the evaluation with parity and int8 filled in.

    Args:
        models: the training step's models, for the bestsellers to fall back to.
        keys: folder of the signing key, made on first use.
    """
    model = evaluation.candidate or ""
    whole = with_measured(evaluation, parity=dict(parity), int8=dict(compression))
    arrays, _ = read_arrays(models)
    order = np.argsort(-arrays["popularity"][1:], kind="stable")[:_POPULAR_KEPT]
    quality = {metric: value.value for metric, value in whole.models[model].metrics.items()}
    private, _ = ensure_signing_key(keys)
    manifest = build_package(
        folder,
        PackageParts(
            name=name,
            model=model,
            float32=graph,
            int8=int8,
            items=dataset.item_ids,
            popular=[dataset.item_ids[int(index)] for index in order],
            card=model_card(name=name, model=model, data=dataset.describe(), evaluation=whole, lineage=lineage,
                            caveats=caveats, licence=licence),
            top_k=min(20, dataset.n_items),
            max_history=max_history,
            created_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            quality={"float32": quality, "int8": {"ndcg_at_10": float(compression["int8_ndcg_at_10"])}},
            lineage=lineage,
        ),
        private,
    )  # fmt: skip
    return manifest, whole


def register_model(package: Path, *, registry: Registry, name: str, evaluation: Evaluation,
                   training: Mapping[str, Any], manifest: Manifest, scratch: Path) -> ModelVersion:  # fmt: skip
    """Register the package with its metrics, plots, parameters and lineage."""
    model = evaluation.candidate or ""
    metrics = {metric: value.value for metric, value in evaluation.models[model].metrics.items()}
    metrics |= {
        f"{other}_ndcg_at_10".replace("+", "_"): quality.metrics["ndcg_at_10"].value
        for other, quality in evaluation.models.items()
    }
    metrics |= {
        "coverage_at_10": evaluation.models[model].coverage_at_10.value,
        "popularity_bias_at_10": evaluation.models[model].popularity_bias_at_10.value,
        "training_seconds": float(training["seconds"]),
    }
    params = {
        "model": model,
        "epochs": training["epochs"],
        "top_k": manifest.top_k,
        "max_history": manifest.max_history,
        "seed": manifest.lineage.get("seed", ""),
        **{key: value for key, value in evaluation.blend.items() if key == "knn_share"},
        **training["parameters"],
    }
    return registry.register(
        package, name=name, metrics=metrics, params=params, tags=manifest.lineage,
        plots=draw_plots(scratch, evaluation, training, synthetic=manifest.lineage.get("synthetic") == "true"),
        run_name=manifest.lineage.get("pipeline_run"),
    )  # fmt: skip


def draw_plots(folder: Path, evaluation: Evaluation, training: Mapping[str, Any], *, synthetic: bool) -> list[Path]:
    """Quality of all models, and the training curve where there is one, as PNG files in ``folder``."""
    title = "Synthetic data" if synthetic else ""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    names = list(evaluation.models)
    values = [evaluation.models[name].metrics["ndcg_at_10"] for name in names]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    errors = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
    axes.barh(names, [v.value for v in values], xerr=errors, color="#4c78a8")
    axes.invert_yaxis()
    axes.set_xlabel("NDCG@10 on the test split, 95 % interval")
    made = [folder / "quality.png"]
    figure.savefig(made[0], dpi=120)
    if training["curve"]:
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        axes.plot([e["seconds"] for e in training["curve"]], [e["valid_ndcg_at_10"] for e in training["curve"]], "o-")
        axes.set_xlabel("seconds of training")
        axes.set_ylabel("NDCG@10 on validation")
        made.append(folder / "training.png")
        figure.savefig(made[1], dpi=120)
    return made


def compression_to_json(compression: Compression) -> dict[str, Any]:
    """The part ``int8`` of ``evaluation.json``."""
    return asdict(compression)
