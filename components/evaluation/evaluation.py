"""All models side by side on one split: the document ``evaluation.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from components.evaluation.metrics import METRICS, catalogue_coverage, mean_popularity, per_shopper, popularity_lift
from endcap.errors import StateError
from endcap.evidence.bootstrap import Estimate, estimate, resampled_means, standard_interval
from endcap.files import read_json, write_json

__all__ = [
    "Evaluation", "Lengths", "ModelQuality", "Paired", "Ranked", "estimate_difference", "evaluate", "read_evaluation",
    "with_measured", "write_evaluation",
]  # fmt: skip

LENGTHS = ((1, 4), (5, 9), (10, 19), (20, 10_000))
"""Groups of shoppers by how many purchases their history holds, both ends included."""
_BY_LENGTH = ("ndcg_at_10", "hr_at_10")


@dataclass(frozen=True)
class Ranked:
    """What one model did for every shopper.

    Attributes:
        ranks: ``[shoppers]``, place of the target among all items but the shopper's own, 1 is best.
        top: ``[shoppers, k]`` with k at least 10: the items it would show, best first, 0 where it has none.
    """

    model: str
    ranks: NDArray[np.integer]
    top: NDArray[np.integer]


@dataclass(frozen=True)
class Lengths:
    """Quality for the shoppers whose history has ``first`` to ``last`` purchases."""

    first: int
    last: int
    users: int
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class ModelQuality:
    """One model's quality; ``metrics`` has a value for each of :data:`~components.evaluation.metrics.METRICS`."""

    metrics: Mapping[str, Estimate]
    coverage_at_10: Estimate
    popularity_bias_at_10: Estimate
    by_history_length: tuple[Lengths, ...]


@dataclass(frozen=True)
class Paired:
    """Mean over shoppers of model ``a`` less model ``b``, with the interval of the paired bootstrap."""

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """The result; ``parity``, ``int8`` and ``blend`` are added by the steps that measure them."""

    split: Literal["valid", "test"]
    models: Mapping[str, ModelQuality]
    paired: tuple[Paired, ...]
    candidate: str | None = None
    """The model that validation chose."""
    blend: Mapping[str, float] = field(default_factory=dict)
    """Share of item-kNN in the blend (``knn_share``), and validation's NDCG@10 at every share tried."""
    int8: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def value(self, model: str, metric: str = "ndcg_at_10") -> float:
        """The mean of ``metric`` for ``model``; KeyError where it was not evaluated."""
        return self.models[model].metrics[metric].value

    def to_json(self) -> dict[str, Any]:
        """The document ``evaluation.json``."""
        return {
            "split": self.split,
            "models": {name: _quality_to_json(quality) for name, quality in self.models.items()},
            "paired": [asdict(paired) for paired in self.paired],
            "candidate": self.candidate,
            "blend": dict(self.blend),
            "int8": dict(self.int8),
            "parity": dict(self.parity),
        }


def evaluate(
    ranked: Sequence[Ranked],
    *,
    split: Literal["valid", "test"],
    histories: Sequence[NDArray[np.integer]],
    purchases: NDArray[np.number],
    pairs: Sequence[tuple[str, str]] = (),
    paired_metrics: Sequence[str] = ("ndcg_at_10", "hr_at_10"),
    resamples: int = 1000,
    seed: int = 7,
) -> Evaluation:
    """Judge all models on the same shoppers.

    Args:
        ranked: one entry a model, rows in the order of ``histories``.
        histories: what each shopper had bought before the target.
        purchases: ``[n_items + 1]``, how often each item was bought in training.
        pairs: models to compare, (better hoped for, worse hoped for).
    """
    lengths = np.array([len(history) for history in histories], np.int64)
    masks = [((lengths >= first) & (lengths <= last)).astype(np.float64) for first, last in LENGTHS]
    by_model = {entry.model: per_shopper(entry.ranks) for entry in ranked}
    popularity = [mean_popularity(np.asarray(entry.top)[:, :10], histories, purchases) for entry in ranked]
    overall = np.concatenate([*by_model.values(), *popularity], axis=1)
    draws = resampled_means(overall, resamples=resamples, seed=seed)
    chosen = [METRICS.index(metric) for metric in _BY_LENGTH]
    narrow = np.concatenate([values[:, chosen] for values in by_model.values() for _ in LENGTHS], axis=1)
    weights = np.stack([mask for _ in by_model for mask in masks for _ in chosen], axis=1)
    group_draws = resampled_means(narrow, weights, resamples=resamples, seed=seed)

    models: dict[str, ModelQuality] = {}
    columns: dict[str, int] = {}
    for place, entry in enumerate(ranked):
        values = by_model[entry.model]
        first_column = place * len(METRICS)
        columns[entry.model] = first_column
        top = np.asarray(entry.top)[:, :10]
        models[entry.model] = ModelQuality(
            metrics={
                metric: estimate(float(values[:, at].mean()), draws[:, first_column + at])
                for at, metric in enumerate(METRICS)
            },
            coverage_at_10=_coverage(top, len(purchases) - 1, resamples=min(resamples, 200), seed=seed),
            popularity_bias_at_10=_popularity_bias(
                popularity[place], draws[:, len(by_model) * len(METRICS) + 2 * place :][:, :2]
            ),
            by_history_length=tuple(
                Lengths(
                    first, last, int(mask.sum()),
                    {
                        metric: estimate(
                            float(values[mask > 0, chosen[at]].mean()),
                            group_draws[:, (place * len(LENGTHS) + group) * len(chosen) + at],
                        )
                        for at, metric in enumerate(_BY_LENGTH)
                    },
                )
                for group, ((first, last), mask) in enumerate(zip(LENGTHS, masks, strict=True))
                if mask.any()
            ),
        )  # fmt: skip
    paired = []
    for a, b in pairs:
        for metric in paired_metrics:
            at = METRICS.index(metric)
            difference = estimate(
                float((by_model[a][:, at] - by_model[b][:, at]).mean()),
                draws[:, columns[a] + at] - draws[:, columns[b] + at],
            )
            paired.append(Paired(a, b, metric, difference.value, difference.low, difference.high))
    return Evaluation(split=split, models=models, paired=tuple(paired))


def _coverage(top: NDArray[np.integer], n_items: int, *, resamples: int, seed: int) -> Estimate:
    random = np.random.default_rng(seed)
    draws = [catalogue_coverage(top[random.integers(len(top), size=len(top))], n_items) for _ in range(resamples)]
    found = standard_interval(catalogue_coverage(top, n_items), np.array(draws))
    return Estimate(found.value, max(0.0, found.low), min(1.0, found.high))


def _popularity_bias(popularity: NDArray[np.float64], draws: NDArray[np.float64]) -> Estimate:
    """Of ``popularity [shoppers, 2]``, shown and owned, and resampled means of both, ``draws [resamples, 2]``."""
    shown, owned = popularity.mean(axis=0).tolist()
    return estimate(popularity_lift(shown, owned), np.array([popularity_lift(*pair) for pair in draws.tolist()]))


def estimate_difference(a: Ranked, b: Ranked, *, metric: str = "ndcg_at_10", resamples: int = 1000,
                        seed: int = 7) -> tuple[float, float, Estimate]:  # fmt: skip
    """``metric`` of ``a``, of ``b``, and of ``a`` less ``b`` with the interval of the paired bootstrap."""
    at = METRICS.index(metric)
    gains_a, gains_b = per_shopper(a.ranks)[:, at], per_shopper(b.ranks)[:, at]
    difference = gains_a - gains_b
    draws = resampled_means(difference[:, None], resamples=resamples, seed=seed)[:, 0]
    return float(gains_a.mean()), float(gains_b.mean()), estimate(float(difference.mean()), draws)


def _quality_to_json(quality: ModelQuality) -> dict[str, Any]:
    return {
        "metrics": {metric: asdict(value) for metric, value in quality.metrics.items()},
        "coverage_at_10": asdict(quality.coverage_at_10),
        "popularity_bias_at_10": asdict(quality.popularity_bias_at_10),
        "by_history_length": [
            {
                "from": group.first,
                "to": group.last,
                "users": group.users,
                **{metric: asdict(value) for metric, value in group.metrics.items()},
            }
            for group in quality.by_history_length
        ],
    }


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``, whole or not at all."""
    write_json(path, evaluation.to_json())


def read_evaluation(path: Path) -> Evaluation:
    """The inverse of :func:`write_evaluation`.

    Raises:
        StateError: missing, or not of this form.
    """
    document = read_json(path)
    try:
        return Evaluation(
            split=document["split"],
            models={name: _quality_from_json(quality) for name, quality in document["models"].items()},
            paired=tuple(Paired(**paired) for paired in document["paired"]),
            candidate=document["candidate"],
            blend=document["blend"],
            int8=document["int8"],
            parity=document["parity"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StateError(f"not an evaluation ({error!r})", where=path, next_step="run the pipeline again") from error


def _quality_from_json(document: dict[str, Any]) -> ModelQuality:
    return ModelQuality(
        metrics={metric: Estimate(**value) for metric, value in document["metrics"].items()},
        coverage_at_10=Estimate(**document["coverage_at_10"]),
        popularity_bias_at_10=Estimate(**document["popularity_bias_at_10"]),
        by_history_length=tuple(
            Lengths(
                group["from"], group["to"], group["users"], {metric: Estimate(**group[metric]) for metric in _BY_LENGTH}
            )
            for group in document["by_history_length"]
        ),
    )


def with_measured(evaluation: Evaluation, **parts: Any) -> Evaluation:
    """``evaluation`` with ``parity``, ``int8``, ``blend`` or ``candidate`` filled in."""
    return replace(evaluation, **parts)
