"""From what a target counts to what the evidence needs: one stratum an objective a look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from endcap.evidence import Counts, Stratum
from endcap.objectives import Good, Objective, Objectives
from serving.targets.base import Observation, VersionObservation

__all__ = ["observation_from_json", "observation_to_json", "strata"]

_NOTHING = VersionObservation()


def strata(objectives: Objectives, before: Observation, now: Observation, *, canary: str) -> Mapping[str, Stratum]:
    """What each objective saw between two observations; control is everything served beside canary."""
    found = {}
    for objective in objectives.objectives:
        canary_counts, control_counts = Counts(), Counts()
        for label, seen in now.versions.items():
            new = _counts(objective, seen).since(_counts(objective, before.versions.get(label, _NOTHING)))
            if label == canary:
                canary_counts += new
            else:
                control_counts += new
        found[objective.name] = Stratum(canary_counts, control_counts)
    return found


def _counts(objective: Objective, seen: VersionObservation) -> Counts:
    if objective.good is Good.CLICKED:
        return seen.impressions
    if objective.within_ms is not None:
        return seen.within_ms.get(objective.within_ms, Counts())
    return seen.attempts


def observation_to_json(seen: Observation) -> dict[str, Any]:
    """A raw look as it is kept in looks.jsonl: cumulative counts as [good, total]."""
    return {
        "at_s": seen.at_s,
        "shares": dict(seen.shares),
        "outcomes": [seen.outcomes.good, seen.outcomes.total],
        "versions": {
            label: {
                "attempts": [v.attempts.good, v.attempts.total],
                "within_ms": {str(ms): [c.good, c.total] for ms, c in v.within_ms.items()},
                "impressions": [v.impressions.good, v.impressions.total],
                "impressions_open": v.impressions_open,
                "ready_replicas": v.ready_replicas,
                "replicas": v.replicas,
            }
            for label, v in seen.versions.items()
        },
    }


def observation_from_json(document: Mapping[str, Any]) -> Observation:
    """The inverse of :func:`observation_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    return Observation(
        at_s=float(document["at_s"]),
        shares={str(k): float(v) for k, v in document["shares"].items()},
        outcomes=Counts(*document["outcomes"]),
        versions={
            str(label): VersionObservation(
                attempts=Counts(*v["attempts"]),
                within_ms={int(ms): Counts(*c) for ms, c in v["within_ms"].items()},
                impressions=Counts(*v["impressions"]),
                impressions_open=int(v["impressions_open"]),
                ready_replicas=int(v["ready_replicas"]),
                replicas=int(v["replicas"]),
            )
            for label, v in document["versions"].items()
        },
    )
