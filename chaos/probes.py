"""What drills look at, as Chaos Toolkit probes: the same objectives as everywhere, over the last seconds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from chaos.faults import subject_of
from endcap.errors import InputError
from endcap.objectives import Good, Objective, Objectives, load_objectives
from endcap.records import ACCESS_FILE, GatewayRecord, read_access_since
from serving.targets import open_target

__all__ = ["find_objectives", "judge_outcomes", "objectives_hold", "outcomes", "replicas_not_ready"]

OBJECTIVES_VARIABLE = "ENDCAP_OBJECTIVES"
_SHOPPERS_ROUTES = frozenset({"recommend", "infer"})
_LOG_DELAY_S = 0.5
"""The gateway writes its log a little later than it answers."""
_POLL_S = 0.25


def find_objectives(records: Path, named: str | None = None) -> Path:
    """The objectives file: the one named, else ENDCAP_OBJECTIVES, else ``objectives.yaml`` beside the records.

    Raises:
        InputError: there is none.
    """
    for candidate in (named, os.environ.get(OBJECTIVES_VARIABLE), records.parent / "objectives.yaml"):
        if candidate and Path(candidate).exists():
            return Path(candidate)
    raise InputError("no objectives file, so no steady state to judge", where=records.parent / "objectives.yaml",
                     next_step=f"name one (--objectives), or set {OBJECTIVES_VARIABLE}")  # fmt: skip


def outcomes(look_back_s: float = 5.0, within_s: float = 0.0, objectives: str | None = None) -> dict[str, Any]:
    """What shoppers got in the last ``look_back_s``, by objective: ``{"availability": {"good", "total", "share",
    "goal", "held"}, ...}``; looks again for up to ``within_s`` until all are held.

    Clicks are left out: a few seconds hold too few of them.
    """
    target = open_target()
    try:
        records = target.records
    finally:
        target.close()
    declared = load_objectives(find_objectives(records, objectives))
    return _look(
        lambda now_s: judge_outcomes(
            declared,
            read_access_since(records / ACCESS_FILE, now_s - look_back_s - _LOG_DELAY_S),
            from_s=now_s - look_back_s - _LOG_DELAY_S,
            to_s=now_s - _LOG_DELAY_S,
        ),
        within_s,
    )


def _look(judge: Callable[[float], dict[str, Any]], within_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + within_s
    while True:
        found = judge(time.time())
        if objectives_hold(found) or time.monotonic() >= deadline:
            return found
        time.sleep(_POLL_S)


def judge_outcomes(
    objectives: Objectives, records: Iterable[GatewayRecord], *, from_s: float, to_s: float
) -> dict[str, Any]:
    """The answered objectives over shoppers' requests that began between two times. Pure."""
    mine = [
        one for one in records
        if from_s <= one.at_s < to_s and one.route in _SHOPPERS_ROUTES and not one.cut_by_client
    ]  # fmt: skip
    found: dict[str, Any] = {}
    for objective in objectives.objectives:
        if objective.good is Good.ANSWERED:
            events = [good for one in mine if (good := _good(objective, one)) is not None]
            share = sum(events) / len(events) if events else None
            found[objective.name] = {
                "good": sum(events), "total": len(events), "share": share, "goal": objective.goal,
                "held": share is not None and share >= objective.goal,
            }  # fmt: skip
    return found


def _good(objective: Objective, record: GatewayRecord) -> bool | None:
    if objective.within_ms is None:
        return not record.failed
    return None if record.failed else record.duration_ms <= objective.within_ms


def objectives_hold(value: Mapping[str, Any] | None = None) -> bool:
    """The tolerance of :func:`outcomes`: each objective at its goal. No objective and no data are not steady."""
    return bool(value) and all(one["held"] for one in (value or {}).values())


def replicas_not_ready() -> dict[str, Any]:
    """Replicas that the gateway sends no requests to: ``{"count", "names"}``."""
    target = open_target()
    try:
        names = [subject_of(one) for one in target.replicas() if not one.ready]
        return {"count": len(names), "names": names}
    finally:
        target.close()
