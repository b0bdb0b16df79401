"""Offline quality: metrics, intervals, the comparison with the champion and the gate."""

from components.evaluation.evaluation import (
    Evaluation,
    Lengths,
    ModelQuality,
    Paired,
    Ranked,
    estimate_difference,
    evaluate,
    read_evaluation,
    with_measured,
    write_evaluation,
)
from components.evaluation.gate import GateDecision, decide_gate
from components.evaluation.metrics import (
    CUTOFFS,
    METRICS,
    catalogue_coverage,
    mean_popularity,
    per_shopper,
    popularity_lift,
)
from endcap.evidence.bootstrap import Estimate, estimate, resampled_means, standard_interval

__all__ = [
    "CUTOFFS", "METRICS", "Estimate", "Evaluation", "GateDecision", "Lengths", "ModelQuality", "Paired", "Ranked",
    "catalogue_coverage", "decide_gate", "estimate", "estimate_difference", "evaluate", "mean_popularity",
    "per_shopper", "popularity_lift", "read_evaluation", "resampled_means", "standard_interval", "with_measured",
    "write_evaluation",
]  # fmt: skip
