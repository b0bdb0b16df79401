"""The figures of a run and whether what had to happen did: ``summary.json``.

``ok`` is about outcomes alone. Times are reported beside their objectives and never decide it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from endcap.outcomes import exact_percentile
from endcap.recovery import Recovery
from endcap.report.run import Drill, Expected, ExpectedDrill, Requests, Rollout, Run

__all__ = [
    "DataSummary",
    "DrillSummary",
    "LoadSummary",
    "RolloutSummary",
    "Summary",
    "TrainingSummary",
    "failed_between",
    "summarise",
]


@dataclass(frozen=True, slots=True)
class DataSummary:
    name: str
    users: int
    items: int
    interactions: int
    synthetic: bool


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """``ndcg_at_10`` and ``hr_at_10`` are those of the model that the run exports, on the test split."""

    seconds: float
    epochs: int
    ndcg_at_10: float | None
    hr_at_10: float | None
    transformer_ndcg_at_10: float | None
    knn_ndcg_at_10: float | None
    popularity_ndcg_at_10: float | None


@dataclass(frozen=True, slots=True)
class RolloutSummary:
    """``canary_requests``: requests of which at least one attempt went to the canary while the rollout ran.
    ``failed_requests``: requests of all versions, meant to be sent while it ran, that shoppers saw fail.
    ``verdict`` and ``seconds`` are None where the rollout did not end.
    """

    from_: str
    to: str
    verdict: str | None
    reason: str
    seconds: float | None
    canary_requests: int | None
    failed_requests: int | None


@dataclass(frozen=True, slots=True)
class DrillSummary:
    """Seconds are from the fault; None where it did not come to that."""

    name: str
    requests: int | None
    failed_requests: int | None
    detected_s: float | None
    rto_s: float | None
    held: bool | None


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Recommendation requests. Latency is from the intended send, failed requests included."""

    requests: int
    failed: int
    offered_rps: float | None
    achieved_rps: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """``reasons``: why ``ok`` is False, one sentence each; kept in the report, not in ``summary.json``."""

    data: DataSummary | None
    training: TrainingSummary | None
    rollouts: tuple[RolloutSummary, ...]
    drills: tuple[DrillSummary, ...]
    load: LoadSummary | None
    ok: bool
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The keys of ``summary.json`` and no others; parts that are missing are null."""
        document = asdict(self)
        del document["reasons"]
        document["rollouts"] = [{"from": rollout.pop("from_"), **rollout} for rollout in document["rollouts"]]
        return document


def summarise(run: Run, measures: tuple[Recovery | None, ...]) -> Summary:
    """Summarise a run; ``measures`` holds one entry a drill (None where there is nothing to judge by)."""
    rollouts = tuple(_rollout(run, rollout) for rollout in run.rollouts)
    drills = tuple(_drill(drill, measured) for drill, measured in zip(run.drills, measures, strict=True))
    reasons = tuple(_reasons(run, rollouts, drills))
    return Summary(_data(run), _training(run), rollouts, drills, _load(run.requests), not reasons, reasons)


def _data(run: Run) -> DataSummary | None:
    if run.data is None:
        return None
    data = run.data
    return DataSummary(data.name, data.users, data.items, data.interactions, data.synthetic)


def _training(run: Run) -> TrainingSummary | None:
    if run.training is None:
        return None

    def metric(model: str | None, name: str) -> float | None:
        if run.evaluation is None or model is None or model not in run.evaluation.models:
            return None
        found = run.evaluation.models[model].metrics.get(name)
        return None if found is None else found.value

    chosen = run.evaluation.chosen if run.evaluation is not None else None
    return TrainingSummary(
        seconds=run.training.seconds,
        epochs=run.training.epochs,
        ndcg_at_10=metric(chosen, "ndcg_at_10"),
        hr_at_10=metric(chosen, "hr_at_10"),
        transformer_ndcg_at_10=metric("transformer", "ndcg_at_10"),
        knn_ndcg_at_10=metric("item-knn", "ndcg_at_10"),
        popularity_ndcg_at_10=metric("popularity", "ndcg_at_10"),
    )


def failed_between(requests: Requests, start_s: float, end_s: float) -> int:
    """Failed requests that were meant to be sent from ``start_s`` up to and with ``end_s`` (Unix seconds)."""
    meant = (requests.intended_s >= start_s) & (requests.intended_s <= end_s)
    return int((meant & requests.failed).sum())


def _rollout(run: Run, rollout: Rollout) -> RolloutSummary:
    end_s = rollout.ended_at_s
    last_s = end_s if end_s is not None else max((d.at_s for d in rollout.decisions), default=rollout.started_at_s)
    canary_requests = failed = None
    if run.attempts is not None:
        attempts = run.attempts
        meant = (attempts.at_s >= rollout.started_at_s) & (attempts.at_s <= last_s)
        canary_requests = len(set(attempts.request_id[meant & (attempts.version == rollout.canary)]))
    if run.requests is not None:
        failed = failed_between(run.requests, rollout.started_at_s, last_s)
        if canary_requests is None:
            sent = run.requests.intended_s
            meant = (sent >= rollout.started_at_s) & (sent <= last_s)
            canary_requests = int((meant & (run.requests.version == rollout.canary)).sum())
    seconds = None if end_s is None else round(end_s - rollout.started_at_s, 3)
    return RolloutSummary(
        rollout.stable, rollout.canary, rollout.verdict, rollout.reason, seconds, canary_requests, failed
    )


def _drill(drill: Drill, measured: Recovery | None) -> DrillSummary:
    if measured is None:
        return DrillSummary(drill.name, None, None, None, None, drill.held)
    return DrillSummary(drill.name, measured.requests, measured.failed_requests, _rounded(measured.detected_s),
                        _rounded(measured.rto_s), drill.held)  # fmt: skip


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _load(requests: Requests | None) -> LoadSummary | None:
    if requests is None:
        return None
    latency_ms = requests.latency_s * 1000
    failed = int(requests.failed.sum())

    def percentile(percent: float) -> float | None:
        found = exact_percentile(latency_ms, percent)
        return None if found is None else round(found, 3)

    offered = achieved = None
    if len(requests) > 1:
        start = float(requests.intended_s[0])
        sending_s, answering_s = float(requests.intended_s[-1]) - start, float(requests.done_s.max()) - start
        if sending_s > 0 and answering_s > 0:
            offered = round((len(requests) - 1) / sending_s, 2)
            achieved = round((len(requests) - failed) / answering_s, 2)
    return LoadSummary(len(requests), failed, offered, achieved, percentile(50), percentile(95), percentile(99))


_SAID = {
    "promoted": "promoted", "rolled_back": "rolled back", "refused": "refused", "held": "held", "aborted": "aborted",
    None: "unfinished",
}  # fmt: skip


def _reasons(run: Run, rollouts: tuple[RolloutSummary, ...], drills: tuple[DrillSummary, ...]) -> list[str]:
    found = [f"{name} is missing: the run did not get that far, or the file was moved" for name in run.missing]
    found += [f"The rollout of version {rollout.to} did not end" for rollout in rollouts if rollout.verdict is None]
    for drill, entry in zip(run.drills, drills, strict=True):
        want = run.card.expected.drill(drill.name) if run.card.expected else ExpectedDrill()
        if entry.held is None:
            found.append(f"The drill {drill.name} did not end")
        elif want is not None and want.held is not None and entry.held is not want.held:
            found.append(f"The drill {drill.name} was {'held' if entry.held else 'not held'}" + _because(drill.reason))
    if run.requests is not None and len(run.requests) == 0:
        found.append("The load sent no request")
    expected = run.card.expected
    if expected is None:
        return found
    return found + _unmet_rollouts(expected, rollouts) + _unmet_drills(expected, drills)


def _because(reason: str | None) -> str:
    return f": {reason}" if reason else ""


def _unmet_rollouts(expected: Expected, rollouts: tuple[RolloutSummary, ...]) -> list[str]:
    found = []
    last = {rollout.to: rollout for rollout in rollouts}
    for label, verdict in expected.rollouts.items():
        rollout = last.get(label)
        if rollout is None:
            found.append(f"Version {label} should have been {_SAID[verdict]}, and no rollout of it began")
        elif rollout.verdict is not None and rollout.verdict != verdict:
            found.append(f"Version {label} was {_SAID[rollout.verdict]} and should have been {_SAID[verdict]}")
        elif verdict == "promoted" and rollout.failed_requests:
            found.append(
                f"The promotion of version {label} was to lose no request, and {rollout.failed_requests} failed"
            )
        elif verdict == "refused" and rollout.canary_requests:
            found.append(f"Version {label} was refused and yet got {rollout.canary_requests} requests")
    return found


def _unmet_drills(expected: Expected, drills: tuple[DrillSummary, ...]) -> list[str]:
    found = []
    last = {drill.name: drill for drill in drills}
    for name in expected.drills:
        want, drill = expected.drill(name), last.get(name)
        if want is None:
            continue
        if drill is None:
            found.append(f"The drill {name} did not happen")
            continue
        if want.failed_requests is not None and (drill.failed_requests or 0) > want.failed_requests:
            found.append(
                f"The drill {name}: {drill.failed_requests} failed requests, at most {want.failed_requests} allowed"
            )
    return found
