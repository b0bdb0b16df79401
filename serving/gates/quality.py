"""Offline quality against stable: pure judgements on what both packages did for the same recorded shoppers.

The rule, for all shoppers and for each segment alike. A candidate may lose a part ``margin`` of stable's NDCG@10. Each
shopper's ``candidate - (1 - margin) * stable`` is resampled (paired: a shopper is drawn with what both packages did
for them), and

- **fail**: the whole interval of its mean lies below zero. The candidate is shown to be worse by more than the margin.
- **pass**: the whole interval lies above zero. It is shown not to be.
- **inconclusive**: neither. The rollout goes on: the few shoppers of a file are no reason to refuse a version that
  the evidence of its steps can still stop, and a gate that refused whatever is not shown to be good would refuse good
  candidates for the shortness of a file.

Inconclusive too is what few shoppers decide: a percentile interval is too sure of itself where hardly anything
differs, so a fail needs :data:`LEAST_DIFFERING` shoppers for whom the two packages did unlike well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from endcap.evidence import Verdict
from endcap.evidence.bootstrap import Estimate, estimate, resampled_means
from endcap.shoppers import Shopper
from serving.gates.report import GateResult
from serving.gates.scoring import Scored
from serving.gates.settings import GateSettings

__all__ = ["LEAST_DIFFERING", "LEVEL", "Comparison", "Segment", "compare", "judge_offline", "judge_segments", "segment"]

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Of the two-sided interval: a candidate exactly at the margin fails one time in forty."""
LEAST_DIFFERING = 20
_RESAMPLES = 4000
_LENGTHS = ((1, 4), (5, 9), (10, 19), (20, None))
"""Segments by how many items a history holds, both ends included: those of the evaluation."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """``ndcg`` and ``hr``: candidate less stable. ``allowed``: the contrast that is judged, see the module.

    ``differing``: shoppers for whom the packages did unlike well.
    """

    shoppers: int
    candidate: float
    stable: float
    ndcg: Estimate
    hr: Estimate
    allowed: Estimate
    differing: int
    margin: float

    @property
    def verdict(self) -> Verdict:
        if self.allowed.high < 0 and self.differing >= LEAST_DIFFERING:
            return Verdict.FAIL
        return Verdict.PASS if self.allowed.low > 0 else Verdict.INCONCLUSIVE

    def __str__(self) -> str:
        change = f" ({self.candidate / self.stable - 1:+.1%})" if self.stable > 0 else ""
        return f"NDCG@10 {self.candidate:.4f} against stable's {self.stable:.4f}{change} of {self.shoppers} shoppers"

    def to_json(self) -> dict[str, JsonValue]:
        return {
            "verdict": self.verdict.value,
            "shoppers": self.shoppers,
            "differing": self.differing,
            "margin_relative": self.margin,
            "ndcg_at_10": {"candidate": self.candidate, "stable": self.stable, **_interval(self.ndcg)},
            "hr_at_10": _interval(self.hr),
            "against_margin": _interval(self.allowed),
        }


def _interval(found: Estimate) -> dict[str, JsonValue]:
    return {"difference": found.value, "low": found.low, "high": found.high}


def compare(candidate: Scored, stable: Scored, *, margin: float, seed: int, level: float = LEVEL) -> Comparison:
    """Both on the same shoppers, at least one, in the same order. ``margin``: as a part of stable's own NDCG@10."""
    a, b = candidate.ndcg, stable.ndcg
    columns: Floats = np.stack([a - b, candidate.hits - stable.hits, a - (1.0 - margin) * b], axis=1)
    draws = resampled_means(columns, resamples=_RESAMPLES, seed=seed)
    ndcg, hr, allowed = (
        estimate(float(columns[:, at].mean()), draws[:, at], level=level) for at in range(columns.shape[1])
    )
    return Comparison(
        len(a), float(a.mean()), float(b.mean()), ndcg, hr, allowed, int(np.count_nonzero(a != b)), margin
    )


def judge_offline(candidate: Scored, stable: Scored, settings: GateSettings) -> GateResult:
    """The gate ``offline``: all shoppers together."""
    found = compare(candidate, stable, margin=settings.offline_margin_relative, seed=settings.seed)
    words = {
        Verdict.FAIL: f"worse than stable by more than {found.margin:.0%}: {found}",
        Verdict.PASS: f"no worse than stable by more than {found.margin:.0%}: {found}",
        Verdict.INCONCLUSIVE: f"not enough recorded shoppers to tell: {found}",
    }
    failed = f"; for {candidate.failed} of them the candidate's graph failed" if candidate.failed else ""
    figures: dict[str, JsonValue] = {
        **found.to_json(),
        "candidate_failed": candidate.failed, "stable_failed": stable.failed,
        "candidate_fallbacks": candidate.fallbacks, "stable_fallbacks": stable.fallbacks,
    }  # fmt: skip
    return GateResult("offline", found.verdict, words[found.verdict] + failed, figures)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    name: str
    members: NDArray[np.bool_]


def segment(shoppers: Sequence[Shopper], *, items: Sequence[str], popular: Sequence[str]) -> tuple[Segment, ...]:
    """By length of history, and the shoppers whose next item is new or rare.

    ``new or rare items``: what stable's package (``items``, ``popular``) can tell of an item is whether it was there
    when stable was trained (its item table) and, by the list of popular items, which are the best sold. Rare is what
    is not among the first half of the catalogue by that order; a list shorter than that half (the pipeline keeps the
    first 200) leaves all that it does not name. When an item was first sold no package says. Items unknown to stable
    alone would be no segment: stable never shows them, so nothing can be worse there.
    """
    lengths = np.array([len(shopper.history) for shopper in shoppers], np.int64)
    found = [
        Segment(
            f"history of {first} or more" if last is None else f"history of {first}-{last}",
            (lengths >= first) & (lengths <= (last or lengths.max(initial=0))),
        )
        for first, last in _LENGTHS
    ]
    known = set(items)
    head = set([item for item in dict.fromkeys(popular) if item in known][: (len(items) + 1) // 2])
    rare = np.array([shopper.next_item not in head for shopper in shoppers], np.bool_)
    return (*found, Segment("new or rare items", rare))


def judge_segments(candidate: Scored, stable: Scored, segments: Sequence[Segment],
                   settings: GateSettings) -> GateResult:  # fmt: skip
    """The gate ``segments``: each against its margin, the level shared over all that are judged (Bonferroni)."""
    judged = [one for one in segments if np.count_nonzero(one.members) >= settings.segment_min_shoppers]
    figures: dict[str, JsonValue] = {
        one.name: {"verdict": None, "shoppers": int(np.count_nonzero(one.members))}
        for one in segments if one not in judged
    }  # fmt: skip
    if not judged:
        return GateResult("segments", Verdict.INCONCLUSIVE,
                          f"no segment has {settings.segment_min_shoppers} recorded shoppers", figures)  # fmt: skip
    level = 1.0 - (1.0 - LEVEL) / len(judged)
    by_verdict: dict[Verdict, list[tuple[str, Comparison]]] = {verdict: [] for verdict in Verdict}
    for one in judged:
        comparison = compare(
            _only(candidate, one.members), _only(stable, one.members),
            margin=settings.segment_margin_relative, seed=settings.seed, level=level,
        )  # fmt: skip
        figures[one.name] = comparison.to_json()
        by_verdict[comparison.verdict].append((one.name, comparison))
    if failed := by_verdict[Verdict.FAIL]:
        words = "; ".join(f"{name}: {comparison}" for name, comparison in failed)
        return GateResult("segments", Verdict.FAIL,
                          f"worse than stable by more than {settings.segment_margin_relative:.0%} in {words}",
                          figures)  # fmt: skip
    shown = f"no segment is shown worse ({len(judged)} of {len(segments)} judged)"
    if unclear := by_verdict[Verdict.INCONCLUSIVE]:
        names = ", ".join(name for name, _ in unclear)
        return GateResult("segments", Verdict.INCONCLUSIVE, f"{shown}; too few shoppers to tell: {names}", figures)
    return GateResult("segments", Verdict.PASS, shown, figures)


def _only(scored: Scored, members: NDArray[np.bool_]) -> Scored:
    return Scored(scored.ndcg[members], scored.hits[members])
