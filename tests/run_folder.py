"""A run folder as a demo leaves it, from a seed: raw records only, for tests of what is computed from them.

Six rollouts (1 -> 2 promoted; 2 -> 3, 4 and 5 rolled back by click-through, availability and latency; a tampered
package refused; 2 -> 6 aborted) and two drills (a replica killed, a zone lost), under one load. Nothing here is a
measurement.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

START_S = 1_794_700_800.0
CLICK_SHARE = {"1": 0.079, "2": 0.094, "3": 0.004, "4": 0.094, "5": 0.094, "6": 0.094}

OBJECTIVES = """\
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: recommender}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.999, good: answered}
  - {name: latency, goal: 0.99, good: answered, withinMs: 100}
  - {name: click-through, goal: 0.05, good: clicked, windowSeconds: 5, marginRelative: 0.1}
"""


@dataclass(frozen=True)
class PlannedRollout:
    stable: str
    candidate: str
    steps: tuple[tuple[float, float], ...]
    """``(seconds after the load's start, share)``; the last is when it ended."""
    verdict: str
    reason: str
    shadow_s: float | None = None
    """When copies of requests began to go to it, before its first step."""
    standstills: tuple[tuple[str, float, float], ...] = ()
    """Pauses and holds: ``(kind, from, until)``."""


ROLLOUTS = (
    PlannedRollout(
        "1",
        "2",
        ((12, 0.05), (30, 0.25), (46, 0.5), (60, 1.0), (66, 1.0)),
        "promoted",
        "every gate passed at 5, 25, 50 and 100 %",
        shadow_s=6,
        standstills=(("pause", 35, 40), ("wait", 43, 46)),
    ),
    PlannedRollout(
        "2",
        "3",
        ((78, 0.05), (96, 0.25), (111, 0.0)),
        "rolled_back",
        "click-through: shown to be worse than control by more than the margin",
    ),
    PlannedRollout(
        "2",
        "4",
        ((118, 0.05), (131, 0.0)),
        "rolled_back",
        "availability: shown to be worse than control by more than the margin",
        standstills=(("hold", 125, 131),),
    ),
    PlannedRollout(
        "2",
        "5",
        ((136, 0.05), (148, 0.0)),
        "rolled_back",
        "latency: shown to be worse than control by more than the margin",
    ),
    PlannedRollout(
        "2",
        "tampered",
        ((151, 0.0), (151.6, 0.0)),
        "refused",
        "the package does not verify: model.onnx differs from its signed digest",
    ),
    PlannedRollout("2", "6", ((152, 0.05), (155.5, 0.0)), "aborted", "aborted by ann@shop"),
)
KILL_AT_S, KILL_SPAN = 162.0, (156.0, 178.0)
ZONE_AT_S, ZONE_BACK_S, ZONE_SPAN = 196.0, 214.0, (190.0, 228.0)
LENGTH_S = 240.0

NAMES = {
    "1": "item-knn",
    "2": "transformer + item-knn",
    "3": "2 with its item table permuted",
    "4": "2, failing part of the requests",
    "5": "2, stalling for part of the requests",
    "tampered": "2, one byte changed after signing",
    "6": "2, trained again",
}
EXPECTED = {
    "rollouts": {"2": "promoted", "3": "rolled_back", "4": "rolled_back", "5": "rolled_back", "tampered": "refused"},
    "drills": {
        "replica-kill": {"held": True, "failed_requests": 0},
        "zone-loss": {"held": True, "rto_s": 5.0},
    },
}


def shares_at(t_s: float) -> dict[str, float]:
    """Shares by version label, ``t_s`` seconds after the load's start."""
    shares = {"1": 1.0}
    for rollout in ROLLOUTS:
        for at_s, share in rollout.steps:
            if t_s >= at_s:
                stable = "2" if rollout.verdict == "promoted" and share == 1.0 else rollout.stable
                shares = {stable: 1.0} if share in (0.0, 1.0) else {stable: 1 - share, rollout.candidate: share}
    return shares


def _lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def _interval(value: float, half: float) -> dict[str, float]:
    return {"value": round(value, 5), "low": round(max(0.0, value - half), 5), "high": round(value + half, 5)}


def _model(ndcg: float, hr: float, coverage: float, bias: float, slope: float) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for k, factor in ((5, 0.78), (10, 1.0), (20, 1.24)):
        metrics[f"ndcg_at_{k}"] = _interval(ndcg * factor, 0.0018)
        metrics[f"hr_at_{k}"] = _interval(hr * factor**1.8, 0.0031)
        metrics[f"mrr_at_{k}"] = _interval(ndcg * 0.83 * factor**0.6, 0.0016)
    groups = []
    for index, (low, high, users) in enumerate(((1, 4, 10120), (5, 9, 7702), (10, 19, 3471), (20, 10_000, 1070))):
        part = ndcg * (1 + slope * (index - 1.2))
        half = 0.19 / math.sqrt(users)
        groups.append(
            {
                "from": low,
                "to": high,
                "users": users,
                "ndcg_at_10": _interval(part, half),
                "hr_at_10": _interval(part * 1.6, half * 1.5),
            }
        )
    return {"metrics": metrics, "coverage_at_10": _interval(coverage, 0.0041),
            "popularity_bias_at_10": _interval(bias, 0.02), "by_history_length": groups}  # fmt: skip


def write_offline(folder: Path, *, synthetic: bool = False) -> None:
    """data.json, training.json, evaluation.json and objectives.yaml."""
    data = {
        "name": "beauty" if not synthetic else "synthetic-shop",
        "users": 22363,
        "items": 12101,
        "interactions": 198502,
        "synthetic": synthetic,
        "sha256": "9f6c1d0e" * 8,
        "dropped": {"malformed_lines": 0, "duplicates": 3, "short_users": 0},
        "caveats": ["Purchases of the same day stand in the order of their item ids."],
    }
    _json(folder / "data.json", data)
    curve = [
        {
            "epoch": n,
            "seconds": 8.1 * n,
            "loss": 6.9 * math.exp(-n / 6) + 3.2,
            "valid_ndcg_at_10": 0.058 * (1 - math.exp(-n / 3.1)),
        }
        for n in range(1, 15)
    ]
    _json(folder / "training.json", {"seconds": 118.4, "epochs": 14, "curve": curve, "stopped_early": False})
    models = {
        "popularity": _model(0.0068, 0.0152, 0.0021, 0.91, 0.05),
        "item-knn": _model(0.0496, 0.0776, 0.77, 0.11, -0.14),
        "transformer": _model(0.0489, 0.0838, 0.58, 0.16, 0.02),
        "transformer+item-knn": _model(0.0561, 0.0917, 0.66, 0.13, -0.06),
    }
    evaluation = {
        "split": "test",
        "models": models,
        "candidate": "transformer+item-knn",
        "paired": [
            {
                "a": "transformer+item-knn",
                "b": "item-knn",
                "metric": "ndcg_at_10",
                "difference": 0.0065,
                "low": 0.0051,
                "high": 0.0079,
            },
            {
                "a": "transformer",
                "b": "item-knn",
                "metric": "ndcg_at_10",
                "difference": -0.0007,
                "low": -0.0024,
                "high": 0.0011,
            },
        ],
        "int8": {
            "shoppers": 22363,
            "float32_bytes": 3_402_112,
            "int8_bytes": 1_104_880,
            "float32_ndcg_at_10": 0.0561,
            "int8_ndcg_at_10": 0.0558,
            "difference": {"value": -0.0003, "low": -0.0006, "high": 0.0001},
        },
        "parity": {
            "shoppers": 2048,
            "identical_share": 0.9985,
            "tied_share": 0.0015,
            "largest_score_difference": 2.4e-06,
            "tolerance": 1e-05,
        },
    }
    _json(folder / "evaluation.json", evaluation)
    (folder / "objectives.yaml").write_text(OBJECTIVES)


def _requests(rng: np.random.Generator, rate: float) -> dict[str, np.ndarray[Any, Any]]:
    n = int(rng.poisson(rate * LENGTH_S))
    intended = np.sort(rng.uniform(0, LENGTH_S, n))
    version = np.empty(n, dtype=object)
    bounds = sorted({0.0, LENGTH_S} | {at for r in ROLLOUTS for at, _ in r.steps})
    for low, high in itertools.pairwise(bounds):
        where = (intended >= low) & (intended < high)
        shares = shares_at(low)
        version[where] = rng.choice(list(shares), size=int(where.sum()), p=list(shares.values()))
    latency = rng.lognormal(math.log(0.0058), 0.33, n) + rng.exponential(0.0012, n)
    latency[(version == "5") & (rng.random(n) < 0.3)] += 0.25
    status = np.full(n, 200)
    attempts = np.ones(n, dtype=int)
    first_failed = (version == "4") & (rng.random(n) < 0.3)
    killed = (intended > KILL_AT_S) & (intended < KILL_AT_S + 0.35) & (rng.random(n) < 0.25)
    lost = (intended > ZONE_AT_S) & (intended < ZONE_AT_S + 1.6) & (rng.random(n) < 0.5)
    for where, cost in ((first_failed, 0.004), (killed, 0.003), (lost, 0.5)):
        attempts[where] += 1
        latency[where] += cost
    failed = lost & (rng.random(n) < 0.08)
    latency[failed] = 2.5
    status[failed] = 504
    answered = version.copy()
    answered[first_failed] = "2"
    answered[failed] = None
    chance = np.array([CLICK_SHARE.get(v, 0.0) for v in answered])
    clicked = rng.random(n) < chance
    return {
        "t": intended,
        "asked": version,
        "version": answered,
        "latency": latency,
        "status": status,
        "attempts": attempts,
        "clicked": clicked,
        "hung": lost,
    }


class _Seen:
    """Evidence that grows look by look, as a rollout's does."""

    def __init__(self, rng: np.random.Generator, canary: str, control: str) -> None:
        self.rng = rng
        clicks = (CLICK_SHARE[canary], CLICK_SHARE[control], 0.1 * CLICK_SHARE[control])
        self.truth = {
            "availability": (0.7 if canary == "4" else 0.9997, 0.9997, 0.01),
            "latency": (0.7 if canary == "5" else 0.996, 0.997, 0.01),
            "click-through": clicks,
        }
        self.counts = {name: [0, 0, 0, 0] for name in self.truth}

    def look(self, canary: float, control: float) -> dict[str, Any]:
        found = {}
        for name, (good, good_beside, margin) in self.truth.items():
            counts = self.counts[name]
            for place, (mean, share) in enumerate(((canary, good), (control, good_beside))):
                new = int(self.rng.poisson(mean))
                counts[2 * place] += int(self.rng.binomial(new, share))
                counts[2 * place + 1] += new
            a, n, b, m = counts
            if n == 0 or m == 0:
                continue
            difference = a / n - b / m
            half = 2.4 * math.sqrt(good * (1 - good) / n + good_beside * (1 - good_beside) / m) + 3.0 / n
            low, high = max(-1.0, difference - half), min(1.0, difference + half)
            verdict = "fail" if high < -margin else "pass" if low > -margin else "inconclusive"
            found[name] = {
                "canary": {"good": a, "total": n},
                "control": {"good": b, "total": m},
                "difference": difference,
                "low": low,
                "high": high,
                "margin": margin,
                "verdict": verdict,
            }
        return found


def _rollout(folder: Path, number: int, plan: PlannedRollout, rng: np.random.Generator, rate: float) -> None:
    home = folder / "rollouts" / f"{number:02d}-{plan.candidate}"
    begin, end = plan.steps[0][0], plan.steps[-1][0]
    name = f"{plan.stable}-to-{plan.candidate}"
    records = []

    def record(
        at: float,
        step: int,
        share: float | None,
        action: str,
        verdict: str,
        reason: str,
        evidence: Any,
        outcome: str | None = None,
        **more: Any,
    ) -> None:
        records.append(
            {
                "seq": len(records) + 1,
                "at_s": START_S + at,
                "rollout": name,
                "from": plan.stable,
                "to": plan.candidate,
                "step": step,
                "share": share,
                "phase": action,
                "action": action,
                "verdict": verdict,
                "outcome": outcome,
                "reason": reason,
                "waiting": None,
                "event": None,
                "evidence": evidence,
                **more,
            }
        )

    record(begin if plan.shadow_s is None else plan.shadow_s, 1, None, "start", "inconclusive", "started", {},
           phase="gating")  # fmt: skip
    if plan.shadow_s is not None:
        record(plan.shadow_s + 0.2, 1, None, "shadowing", "inconclusive", "10% of the requests are copied to it", {})
    seen = _Seen(rng, plan.candidate, plan.stable) if plan.verdict != "refused" else None
    evidence: Any = {}
    received = [0, 0]
    for step, ((at, share), (until, _)) in enumerate(itertools.pairwise(plan.steps), 1):
        if seen is None:
            break
        record(at, step, share, "observing", "inconclusive", f"step {step} of 4: {share:.0%}", evidence)
        look, kind = at + 0.5, None
        while look < until - 0.25:
            evidence = seen.look(rate * share / 2, rate * (1 - share) / 2)
            received[0] += int(rng.binomial(int(rate / 2), share))
            received[1] += int(rate / 2)
            event: dict[str, Any] = {
                "kind": "looked", "received": {"canary_attempts": received[0], "canary_requests": received[0],
                                               "requests": received[1]},
            }  # fmt: skip
            now = next((k for k, since, to in plan.standstills if since <= look < to), None)
            if now != kind and "pause" in (now, kind):
                asked = "pause" if now == "pause" else "resume"
                event = {"kind": "commanded", "command": asked, "by": "ann@shop", "number": 1, "step": None}
            kind = now
            waiting = {"pause": "paused by ann@shop", "wait": "step 3 (50%) waits for approval"}.get(now or "")
            phase = "holding" if now == "hold" else "observing"
            record(look, step, share, "look", "inconclusive", "more evidence is needed", evidence, phase=phase,
                   waiting=waiting, event=event)  # fmt: skip
            look += 0.5
    verdict = {"promoted": "pass", "rolled_back": "fail"}.get(plan.verdict, "inconclusive")
    decided = "retiring" if plan.verdict == "promoted" else "returning"
    last = 1.0 if plan.verdict == "promoted" else 0.0
    record(end - 0.2, len(plan.steps) - 1, last, decided, verdict, plan.reason, evidence, plan.verdict)
    record(end, len(plan.steps) - 1, last, "end", verdict, plan.reason, evidence, plan.verdict, phase="done")
    _lines(home / "decisions.jsonl", records)
    state = {
        "phase": "done",
        "step": len(plan.steps) - 2,
        "stable": plan.stable,
        "canary": plan.candidate,
        "started_at_s": START_S + (begin if plan.shadow_s is None else plan.shadow_s),
        "step_at_s": START_S + begin,
        "intent": [],
        "verdict": plan.verdict,
        "reason": plan.reason,
        "ended_at_s": START_S + end,
    }
    _json(home / "state.json", state)
    (home / "rollout.yaml").write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Rollout\n"
        f"metadata: {{name: {name}}}\n"
        f'spec: {{service: recommender, candidate: "models:/recommender/{plan.candidate}", objectives: recommender}}\n'
    )


def make_run_folder(folder: Path, *, seed: int = 7, rate: float = 130.0, synthetic: bool = False) -> Path:
    """Write a whole run folder; ``rate`` is requests per second over four minutes."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_offline(folder, synthetic=synthetic)
    data = json.loads((folder / "data.json").read_text())
    _json(
        folder / "run.json",
        {
            "name": "demo",
            "started_at_s": START_S - 150,
            "seed": seed,
            "data": data,
            "git_commit": "6bce694c0ffee00",
            "expected": EXPECTED,
            "version_names": NAMES,
            "environment": {"endcap": "0.1.0", "Python": "3.11.2", "processors": 2},
        },
    )
    for number, plan in enumerate(ROLLOUTS, 1):
        _rollout(folder, number, plan, rng, rate)
    for name, fault, at, (begin, end) in (
        ("replica-kill", "kill a replica (SIGKILL)", KILL_AT_S, KILL_SPAN),
        ("zone-loss", "lose a zone (SIGSTOP)", ZONE_AT_S, ZONE_SPAN),
    ):
        drill = {
            "name": name,
            "fault": fault,
            "started_at_s": START_S + begin,
            "fault_at_s": START_S + at,
            "ended_at_s": START_S + end,
            "held": True,
            "reason": None,
            "promises": {"failed_requests": 0 if name == "replica-kill" else None, "rto_s": 5.0},
        }
        _json(folder / "drills" / name / "drill.json", drill)
        _json(folder / "drills" / name / "journal.json", {"status": "completed", "deviated": False})
    records = folder / "records"
    faults = [
        {
            "at_s": START_S + KILL_AT_S,
            "drill": "replica-kill",
            "fault": "sigkill",
            "phase": "injected",
            "subject": "2/a/0",
        },
        {
            "at_s": START_S + ZONE_AT_S,
            "drill": "zone-loss",
            "fault": "sigstop",
            "phase": "injected",
            "subject": "zone a",
        },
        {
            "at_s": START_S + ZONE_BACK_S,
            "drill": "zone-loss",
            "fault": "sigcont",
            "phase": "reverted",
            "subject": "zone a",
        },
    ]
    _lines(records / "faults.jsonl", faults)
    moments = [0.0, *sorted({at for r in ROLLOUTS for at, _ in r.steps if r.verdict != "refused"})]
    target: list[dict[str, Any]] = [
        {
            "at_s": START_S + t,
            "event": "shares_set",
            "version": None,
            "zone": None,
            "replica": None,
            "detail": " ".join(f"{label}={100 * share:g}%" for label, share in shares_at(t).items()),
        }
        for t in moments
    ]
    for at, event, zone in (
        (KILL_AT_S + 0.04, "replica_died", "a"),
        (KILL_AT_S + 0.05, "replica_started", "a"),
        (KILL_AT_S + 2.1, "replica_ready", "a"),
        (ZONE_AT_S + 0.9, "replica_unhealthy", "a"),
        (ZONE_AT_S + 1.0, "replica_unhealthy", "a"),
        (ZONE_BACK_S + 0.5, "replica_healthy", "a"),
    ):
        target.append(
            {"at_s": START_S + at, "event": event, "version": "2", "zone": zone, "replica": "0", "detail": ""}
        )
    _lines(records / "target.jsonl", sorted(target, key=lambda record: float(record["at_s"])))

    r = _requests(rng, rate)
    n = len(r["t"])
    ids = [f"{seed:02x}{i:06x}" for i in range(n)]
    done = START_S + r["t"] + r["latency"]
    columns = {
        "request_id": pa.array(ids),
        "kind": pa.array(["recommend"] * n),
        "shopper": pa.array([str(i % 997) for i in range(n)]),
        "intended_s": pa.array(START_S + r["t"]),
        "sent_s": pa.array(START_S + r["t"] + 0.0004),
        "done_s": pa.array(done),
        "status": pa.array(r["status"].astype(np.int16)),
        "error": pa.array([None if s == 200 else "HTTP 504" for s in r["status"]], pa.string()),
        "version": pa.array(list(r["version"]), pa.string()),
        "impression": pa.array(
            [f"i{x}" if s == 200 else None for x, s in zip(ids, r["status"], strict=True)], pa.string()
        ),
        "clicked": pa.array(r["clicked"] & (r["status"] == 200)),
        "fallback": pa.array([None] * n, pa.string()),
    }
    pq.write_table(pa.table(columns), records / "requests.parquet")
    access, attempts = [], []
    for i in range(n):
        at, asked, tries = START_S + float(r["t"][i]), str(r["asked"][i]), int(r["attempts"][i])
        code, took = int(r["status"][i]), round(float(r["latency"][i]) * 1000)
        base = {
            "at_s": f"{at:.6f}",
            "request_id": ids[i],
            "route": "recommend",
            "cluster": f"version-{asked}",
            "details": "-",
        }
        access.append(
            {
                **base,
                "host": "unix",
                "code": code,
                "flags": "-" if code == 200 else "UT",
                "duration_ms": took,
                "attempts": tries,
            }
        )
        for attempt in range(tries):
            bad = attempt < tries - 1 or code >= 500
            failed = {"code": 0 if r["hung"][i] else 503, "flags": "UT" if r["hung"][i] else "UF"}
            attempts.append(
                {**base, "host": "unix", **(failed if bad else {"code": 200, "flags": "-"}), "duration_ms": took}
            )
    _lines(records / "access.jsonl", access)
    _lines(records / "attempts.jsonl", attempts)
    return folder
