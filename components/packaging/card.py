"""The model card: what the model is, on what it was trained, how well it did, what to beware of.

After Mitchell et al., "Model Cards for Model Reporting" (FAT* 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from components.evaluation.evaluation import Evaluation

__all__ = ["model_card"]

_KINDS = {
    "popularity": "the bestsellers, the same for everybody, newer purchases counting more",
    "item-knn": "sequential item-kNN: items bought soon after those in the history, newer ones counting more",
    "transformer": "a causal transformer over the purchase history (SASRec), scores by cosine",
    "transformer+item-knn": "a causal transformer (SASRec) blended with sequential item-kNN inside one graph",
}


def model_card(
    *,
    name: str,
    model: str,
    data: Mapping[str, object],
    evaluation: Evaluation,
    lineage: Mapping[str, str],
    caveats: Sequence[str],
    licence: str,
) -> str:
    """The card as Markdown.

    Args:
        data: the document ``data.json``.
        caveats: what a reader must know of the data; the general ones are added.
        licence: of the data.
    """
    quality = evaluation.models[model]
    rows = [
        f"| {other} | " + " | ".join(_interval(evaluation, other, metric) for metric in ("ndcg_at_10", "hr_at_10"))
        + f" | {evaluation.models[other].coverage_at_10.value:.3f} |"
        for other in evaluation.models
    ]  # fmt: skip
    synthetic = " **Synthetic data: these numbers say nothing about any real shop.**" if data["synthetic"] else ""
    share = evaluation.blend.get("knn_share")
    blended = f" Item-kNN's share is {share:g}, chosen on validation." if "+" in model and share is not None else ""
    parts = [
        f"# {name}: {model}",
        f"What it is: {_KINDS.get(model, model)}.{blended} Given the purchases of a shopper, oldest first, it lists"
        " the items most likely to be bought next, never one of the history. Task type: session-recommender.",
        "## Data",
        f"{data['name']}: {data['users']} shoppers, {data['items']} items, {data['interactions']} purchases,"
        f" SHA-256 `{data['sha256']}`.{synthetic} Licence of the data: {licence}.",
        "## Quality",
        "Leave-one-out test split, ranked among all items with the shopper's own history masked; 95 % bootstrap"
        " intervals over shoppers.",
        "| model | NDCG@10 | HR@10 | coverage@10 |\n|---|---|---|---|\n" + "\n".join(rows),
        "Popularity of what is shown, relative to the shoppers' own purchases:"
        f" {quality.popularity_bias_at_10.value:+.0%}.",
        "## Beware",
        "\n".join(
            f"- {caveat}"
            for caveat in (
                *caveats,
                "Offline quality on held-out purchases favours what earlier recommendations already showed;"
                " live click-through decides.",
                "These are means over all shoppers; evaluation.json has them by history length.",
                "Knows only the items of its table; new items need a new version.",
            )
        ),
        "## Lineage",
        "\n".join(f"- {key}: `{value}`" for key, value in lineage.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _interval(evaluation: Evaluation, model: str, metric: str) -> str:
    value = evaluation.models[model].metrics[metric]
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"
