"""From a run and its summary to ``report.html``: one file that asks nothing of any other, with no script."""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from endcap.objectives import Good, Objective
from endcap.outcomes import exact_percentile
from endcap.recovery import Recovery
from endcap.report import plots
from endcap.report.charts import linear_ticks, plain
from endcap.report.run import Drill, Measured, Requests, Rollout, Run
from endcap.report.series import fold
from endcap.report.summary import DrillSummary, RolloutSummary, Summary

__all__ = ["SECTIONS", "render"]

SECTIONS = (
    ("verdict", "Verdict"), ("rollouts", "Rollouts"), ("drills", "Drills"), ("timeline", "Timeline"),
    ("evidence", "Evidence"), ("models", "Models"), ("training", "Training"), ("load", "Load"),
    ("objectives", "Objectives"), ("data", "Data"), ("environment", "Environment"), ("definitions", "Definitions"),
    ("rerun", "Rerun"),
)  # fmt: skip
SAID = {
    "promoted": "promoted", "rolled_back": "rolled back", "refused": "refused", "held": "held", "aborted": "aborted",
    None: "unfinished",
}  # fmt: skip
TALLIED = (
    ("promoted", "Promoted"), ("rolled_back", "Rolled back"), ("held", "Held, inconclusive"), ("refused", "Refused"),
    ("aborted", "Aborted"),
)  # fmt: skip
PERCENTILES = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


def render(run: Run, summary: Summary, measures: tuple[Recovery | None, ...]) -> str:
    """The whole page; the same run gives the same bytes."""
    css = resources.files("endcap.report").joinpath("page.css").read_text()
    template = _template()
    return template.render(
        css=Markup(css),  # noqa: S704 - our own file
        sections=SECTIONS,
        **_context(run, summary, measures),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("endcap.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        count=count, share=share, ms=ms, seconds=seconds, said=lambda v: SAID.get(v, v), metric=metric,
        instant=instant, signed=signed, rate=rate, plain=plain,
    )  # fmt: skip
    return environment.get_template("page.html.j2")


# ---- how numbers are written -------------------------------------------------------------------------


def count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    """A share as a percentage, with as many places as tell it from 0 and from 100 %."""
    if value is None:
        return "–"
    away = min(abs(value), abs(1 - value))
    places = 1 if away >= 0.1 else 2 if away >= 0.01 or away == 0 else 3
    text = f"{100 * value:.{places}f}"
    return ("100" if value == 1 else "0" if value == 0 else text) + " %"


def ms(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1000:.2f} s" if value >= 1000 else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    if value == 0:
        return "0 s"
    if value >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest} s"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} /s"


def metric(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}".replace("0.", ".", 1)


def bias(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "−")


def instant(unix_s: float | None) -> str:
    if unix_s is None:
        return "not recorded"
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---- what the page shows -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolloutCard:
    badge: str
    summary: RolloutSummary
    from_tone: str
    to_tone: str
    from_name: str | None
    to_name: str | None
    expected: str | None
    met: bool | None
    course: plots.Course | None
    plots: tuple[plots.EvidencePlot, ...]


@dataclass(frozen=True, slots=True)
class DrillCard:
    badge: str
    drill: Drill
    summary: DrillSummary
    measures: Recovery | None
    rto_objective_s: float | None
    met: bool | None
    expected: str
    chart: Markup | None

    @property
    def in_time(self) -> bool | None:
        if self.rto_objective_s is None or self.summary.rto_s is None:
            return None
        return self.summary.rto_s <= self.rto_objective_s


@dataclass(frozen=True, slots=True)
class ObjectiveRow:
    """``good`` of ``total`` over the whole run, and the share while no drill was on."""

    name: str
    promise: str
    goal: float
    good: int
    total: int
    outside: float | None

    @property
    def measured(self) -> float | None:
        return self.good / self.total if self.total else None

    @property
    def met(self) -> bool | None:
        return None if self.measured is None else self.measured >= self.goal


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value as places on an axis, in percent of its width."""

    name: str
    tone: str
    chosen: bool
    value: float
    low: float | None
    high: float | None
    at: float
    from_: float
    to: float


def _context(run: Run, summary: Summary, measures: tuple[Recovery | None, ...]) -> dict[str, Any]:
    requests = run.requests if run.requests is not None and len(run.requests) else None
    outside = _outside_drills(run, requests) if requests is not None else None
    tones = {name: f"m{index % 6}" for index, name in enumerate(_model_order(run))}
    rollouts = tuple(
        _rollout_card(run, n, pair) for n, pair in enumerate(zip(run.rollouts, summary.rollouts, strict=True), 1)
    )
    drills = tuple(
        _drill_card(run, n, *both) for n, both in enumerate(zip(run.drills, summary.drills, measures, strict=True), 1)
    )
    slices = fold(requests, run.attempts, run.versions) if requests is not None else None
    return {
        "run": run,
        "summary": summary,
        "title": f"{'Synthetic data: ' if run.synthetic else ''}{run.card.name}, endcap report",
        "headline": _headline(summary, rollouts, drills),
        "rollouts": rollouts,
        "tally": _tally(summary),
        "drills": drills,
        "tones": tones,
        "version_tones": {label: plots.colour(run.versions, label) for label in run.versions},
        "timeline": plots.timeline(run, slices, requests) if slices is not None and requests is not None else None,
        "training_charts": plots.training_charts(run.training) if run.training else (),
        "history_chart": plots.history_chart(run.evaluation, tones) if run.evaluation else None,
        "intervals": {name: _intervals(run, name, tones) for name in ("ndcg_at_10", "hr_at_10")},
        "lift": _lift(run),
        "percentile_chart": plots.percentile_chart(run, requests, outside)
        if requests is not None and outside is not None
        else None,
        "latency_rows": _latency_rows(run, requests, outside),
        "percentiles": [plain(p) for p in PERCENTILES],
        "objective_rows": _objective_rows(run, requests, outside),
        "fallbacks": int(requests.fallback.sum()) if requests is not None else 0,
        "facts": _facts,
        "write": {"metric": metric, "share": share, "bias": bias},
    }


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Another part's figures, named and written for people: ``int8_bytes`` becomes ``int8 size: 1.1 MB``."""
    found = []
    for key, value in document.items():
        name = key.removesuffix("_bytes") + " size" if key.endswith("_bytes") else key
        name = name.replace("ndcg_at_", "NDCG@").replace("hr_at_", "HR@").removesuffix("_share").replace("_", " ")
        found.append((name, _figure(key, value)))
    return found


def _figure(key: str, value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int() | float() if key.endswith("_bytes"):
            return f"{value / 1e6:.2f} MB"
        case int() | float() if key.endswith("_share"):
            return share(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.1e}".replace("-", "−") if 0 < abs(value) < 1e-4 else plain(round(value, 4))
        case {"value": float(middle), "low": float(low), "high": float(high)}:
            return f"{signed(middle)}, interval {signed(low)} to {signed(high)}"
        case _:
            return str(value)


def _outside_drills(run: Run, requests: Requests) -> NDArray[np.bool_]:
    outside = np.ones(len(requests), dtype=np.bool_)
    for drill in run.drills:
        end = drill.ended_at_s if drill.ended_at_s is not None else math.inf
        outside &= (requests.intended_s < drill.started_at_s) | (requests.intended_s > end)
    return outside


def _rollout_card(run: Run, number: int, pair: tuple[Rollout, RolloutSummary]) -> RolloutCard:
    rollout, summary = pair
    want = run.card.expected.rollouts.get(rollout.canary) if run.card.expected else None
    met = None if want is None else summary.verdict == want
    if want == "promoted" and summary.failed_requests:
        met = False
    names = run.card.version_names
    return RolloutCard(
        f"R{number}", summary, plots.colour(run.versions, rollout.stable), plots.colour(run.versions, rollout.canary),
        names.get(rollout.stable), names.get(rollout.canary), None if want is None else SAID[want], met,
        plots.course(run, rollout), plots.evidence_charts(run, rollout),
    )  # fmt: skip


def _tally(summary: Summary) -> list[tuple[str, int]]:
    """How many rollouts ended in which way; what the evidence did not decide is counted apart."""
    ended = [rollout.verdict for rollout in summary.rollouts]
    found = [(name, ended.count(verdict)) for verdict, name in TALLIED]
    return found + ([("Unfinished", ended.count(None))] if None in ended else [])


def _drill_card(run: Run, number: int, drill: Drill, summary: DrillSummary, measured: Recovery | None) -> DrillCard:
    want = run.card.expected.drill(drill.name) if run.card.expected else None
    objective = want.rto_s if want is not None and want.rto_s is not None else drill.promises.rto_s
    met, expected = None, ""
    if want is not None:
        allowed = want.failed_requests
        met = (want.held is None or drill.held is want.held) and (
            allowed is None or (summary.failed_requests or 0) <= allowed
        )
        said = [] if want.held is None else ["steady state held" if want.held else "steady state broken"]
        if allowed is not None:
            said.append("no failed request" if allowed == 0 else f"at most {allowed} failed requests")
        expected = " and ".join(said)
    return DrillCard(f"D{number}", drill, summary, measured, objective, met, expected,
                     plots.drill_chart(run, drill, measured))  # fmt: skip


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _headline(summary: Summary, rollouts: Sequence[RolloutCard], drills: Sequence[DrillCard]) -> str:
    if not summary.ok:
        if len(summary.reasons) == 1:
            return f"{summary.reasons[0]}."
        return f"{len(summary.reasons)} things did not happen as expected."
    parts = []
    for verdict in ("promoted", "rolled_back", "refused", "held", "aborted"):
        labels = [card.summary.to for card in rollouts if card.summary.verdict == verdict]
        if labels:
            noun = "version" if all(label.isdigit() for label in labels) else "candidate"
            many = len(labels) > 1
            parts.append(f"{noun}{'s' if many else ''} {_listed(labels)} {'were' if many else 'was'} {SAID[verdict]}")
    if drills and all(card.drill.held for card in drills):
        kept = {1: "the drill", 2: "both drills"}.get(len(drills), f"all {len(drills)} drills")
        parts.append(f"the service withstood {kept}")
    if not parts:
        return "The run came to its end, and nothing in it failed."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _model_order(run: Run) -> list[str]:
    """Known models first, in the order from simple to exported; the exported one takes the strongest colour."""
    if run.evaluation is None:
        return []
    usual = ["popularity", "item-knn", "transformer", "transformer+item-knn"]
    return usual + [name for name in run.evaluation.models if name not in usual]


def _intervals(run: Run, name: str, tones: dict[str, str]) -> tuple[list[Interval], list[tuple[float, str]]]:
    """Every model's value of one metric on a common axis that starts at 0, and the axis's ticks."""
    if run.evaluation is None:
        return [], []
    found: list[tuple[str, Measured]] = [
        (model, quality.metrics[name]) for model, quality in run.evaluation.models.items() if name in quality.metrics
    ]
    if not found:
        return [], []
    top = max(m.high if m.high is not None else m.value for _, m in found) * 1.05 or 1.0
    rows = []
    for model, m in found:
        low, high = m.value if m.low is None else m.low, m.value if m.high is None else m.high
        rows.append(Interval(model, tones[model], model == run.evaluation.chosen, m.value, m.low, m.high,
                             100 * m.value / top, 100 * low / top, 100 * high / top))  # fmt: skip
    return rows, [(100 * t / top, plain(t).removeprefix("0") or "0") for t in linear_ticks(0, top, 3)]


def _lift(run: Run) -> tuple[float, float | None, float | None] | None:
    """How much better the exported model is than item-kNN: the relative gain, and the paired interval in NDCG@10."""
    if run.evaluation is None or run.evaluation.chosen is None or "item-knn" not in run.evaluation.models:
        return None
    ours = run.evaluation.models[run.evaluation.chosen].metrics.get("ndcg_at_10")
    theirs = run.evaluation.models["item-knn"].metrics.get("ndcg_at_10")
    if ours is None or theirs is None or theirs.value == 0:
        return None
    for pair in run.evaluation.paired:
        if (pair.a, pair.b, pair.metric) == (run.evaluation.chosen, "item-knn", "ndcg_at_10"):
            return ours.value / theirs.value - 1, pair.low, pair.high
    return ours.value / theirs.value - 1, None, None


def _latency_rows(
    run: Run, requests: Requests | None, outside: NDArray[np.bool_] | None
) -> list[tuple[str, str | None, int, list[float | None]]]:
    """Name, colour, number of requests, then each percentile and the slowest, in milliseconds."""
    if requests is None or outside is None:
        return []
    groups: list[tuple[str, str | None, NDArray[np.bool_]]] = [("Whole run", None, np.ones_like(outside))]
    if not outside.all():
        groups.append(("Outside of drills", None, outside))
    groups += [
        (f"Version {label}", plots.colour(run.versions, label), requests.version == label) for label in run.versions
    ]
    rows = []
    for name, tone, mine in groups:
        latency = requests.latency_s[mine] * 1000
        if len(latency):
            values = [exact_percentile(latency, p) for p in PERCENTILES] + [float(latency.max())]
            rows.append((name, tone, len(latency), values))
    return rows


def _objective_rows(run: Run, requests: Requests | None, outside: NDArray[np.bool_] | None) -> list[ObjectiveRow]:
    """Each objective on what shoppers saw. Same reading as :func:`endcap.outcomes.judge_requests`."""
    if run.objectives is None:
        return []
    rows = []
    for objective in run.objectives.objectives:
        if objective.good is Good.COUNTED:
            continue
        good, events = _events(objective, requests)
        quiet = events & outside if outside is not None else events
        part = float((good & quiet).sum() / quiet.sum()) if quiet.any() else None
        rows.append(ObjectiveRow(objective.name, promise(objective), objective.goal, int((good & events).sum()),
                                 int(events.sum()), part))  # fmt: skip
    return rows


def _events(objective: Objective, requests: Requests | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which requests are good events, and which are events at all."""
    if requests is None:
        return np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.bool_)
    if objective.good is Good.CLICKED:
        return requests.clicked, requests.shown
    if objective.within_ms is None:
        return ~requests.failed, np.ones(len(requests), dtype=np.bool_)
    return requests.latency_s * 1000 <= objective.within_ms, ~requests.failed


def promise(objective: Objective) -> str:
    """An objective in words."""
    goal = plots.percent(objective.goal)
    if objective.good is Good.COUNTED:
        return f"{goal} of the events that {objective.name} counts"
    if objective.good is Good.CLICKED:
        return f"{goal} of impressions clicked within {plain(objective.window_s or 0)} s"
    if objective.within_ms is not None:
        return f"{goal} of answers within {objective.within_ms} ms"
    return f"{goal} of requests answered"
