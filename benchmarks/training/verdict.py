"""From both contestants' records to the figures: who got where, and when. Pure, and a curve for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Comparison", "Final", "Point", "compare", "draw", "table"]


@dataclass(frozen=True)
class Point:
    """One validation of one contestant."""

    epoch: int
    wall_s: float
    """Since the start of its training."""
    cpu_s: float
    valid_ndcg_at_10: float


@dataclass(frozen=True)
class Final:
    """One contestant's end: the weights that validation chose, on the test targets."""

    test_ndcg_at_10: float
    test_hr_at_10: float
    epochs: int
    best_epoch: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """When ours was as good as RecBole's best."""

    best_valid_ndcg_at_10: float
    """RecBole's best."""
    recbole_wall_s: float
    """When RecBole got there."""
    recbole_cpu_s: float
    ours_wall_s: float
    """When ours was first at least as good."""
    ours_cpu_s: float
    ratio_wall: float
    ratio_cpu: float


def compare(ours: Sequence[Point], recbole: Sequence[Point]) -> Comparison | None:
    """None when RecBole has no validation, or ours never got as far."""
    if not recbole:
        return None
    best = max(recbole, key=lambda point: point.valid_ndcg_at_10)
    reached = next((point for point in ours if point.valid_ndcg_at_10 >= best.valid_ndcg_at_10), None)
    if reached is None:
        return None
    return Comparison(
        best_valid_ndcg_at_10=best.valid_ndcg_at_10,
        recbole_wall_s=best.wall_s,
        recbole_cpu_s=best.cpu_s,
        ours_wall_s=reached.wall_s,
        ours_cpu_s=reached.cpu_s,
        ratio_wall=best.wall_s / max(reached.wall_s, 1e-9),
        ratio_cpu=best.cpu_s / max(reached.cpu_s, 1e-9),
    )


def table(ours: Final | None, recbole: Final | None, comparison: Comparison | None) -> str:
    """Markdown."""
    lines = ["| | test NDCG@10 | test HR@10 | epochs | best epoch | seconds |", "|---|---|---|---|---|---|"]
    for label, final in (("endcap's transformer", ours), ("RecBole's SASRec", recbole)):
        if final is None:
            lines.append(f"| {label} | not run | | | | |")
            continue
        lines.append(
            f"| {label} | {final.test_ndcg_at_10:.4f} | {final.test_hr_at_10:.4f} | {final.epochs} "
            f"| {final.best_epoch} | {final.seconds:.0f} |"
        )
    if comparison is not None:
        lines += [
            "",
            "| RecBole's best validation NDCG@10 | RecBole there after | ours there after | ratio |",
            "|---|---|---|---|",
            f"| {comparison.best_valid_ndcg_at_10:.4f} "
            f"| {comparison.recbole_wall_s:.0f} s (CPU {comparison.recbole_cpu_s:.0f} s) "
            f"| {comparison.ours_wall_s:.0f} s (CPU {comparison.ours_cpu_s:.0f} s) "
            f"| {comparison.ratio_wall:.1f} (CPU {comparison.ratio_cpu:.1f}) |",
        ]
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: dict[str, Sequence[Point]]) -> None:
    """Validation quality over wall time, as SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, points in curves.items():
        axes.plot([p.wall_s / 60 for p in points], [p.valid_ndcg_at_10 for p in points], marker=".", label=label)
    axes.set_xlabel("minutes of training, one core each")
    axes.set_ylabel("validation NDCG@10")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
