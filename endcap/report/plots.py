"""The plots of a report: from measured series to charts, each with its main figure in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from endcap.objectives import Good, Objective, Objectives
from endcap.outcomes import exact_percentile
from endcap.recovery import Recovery
from endcap.report.charts import Axis, Chart, linear_ticks, log_ticks, plain, stack, time_ticks
from endcap.report.run import Decision, Drill, Evaluation, Judged, Requests, Rollout, Run, Training, shares_set
from endcap.report.series import Slices, rolling_share

__all__ = [
    "Course",
    "Span",
    "Timeline",
    "course",
    "drill_chart",
    "evidence_charts",
    "history_chart",
    "percentile_chart",
    "timeline",
    "training_charts",
]

Floats = NDArray[np.float64]
CLICK_ROLLING_S = 15.0
CLICK_AT_LEAST = 60
MAX_DOTS = 2500
_NOTE_WIDTH = 0.16
"""The part of the width that a share's note takes on the narrowest page."""
_LANE_WIDTH = 0.09
"""The least part of the width that a span's badge takes on the narrowest page."""


def clock(seconds: float) -> str:
    """``m:ss`` after the load's start, or ``h:mm:ss``."""
    minutes, rest = divmod(round(abs(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float) -> str:
    return f"{plain(round(100 * share, 4))} %"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return ("+" if share > 0 else "") + plain(round(100 * share, 4))


def milliseconds(value: float) -> str:
    return f"{plain(value)} ms" if value < 1000 else f"{plain(value / 1000)} s"


def colour(versions: Sequence[str], label: str) -> str:
    """A version's colour class: the same in every plot of a report."""
    return f"c{versions.index(label) % 8}" if label in versions else "c-soft"


@dataclass(frozen=True, slots=True)
class Span:
    """Something that lasted, placed in the timeline by thousandths of its width."""

    badge: str
    text: str
    kind: str
    start: float
    width: float
    lane: int


@dataclass(frozen=True, slots=True)
class Timeline:
    rollout_spans: tuple[Span, ...]
    drill_spans: tuple[Span, ...]
    charts: tuple[Markup, ...]
    click_window_s: float


def _spans(x: Axis, found: Sequence[tuple[str, str, float, float]], kind: str) -> tuple[Span, ...]:
    """Put spans in as few lanes as keep their badges apart even on the narrowest page."""
    lanes: list[float] = []
    spans = []
    for badge, text, start_s, end_s in found:
        start, end = max(0.0, x.one(start_s)), min(1.0, x.one(end_s))
        start = min(start, 1 - _LANE_WIDTH)
        needs = max(end, start + _LANE_WIDTH)
        lane = next((i for i, taken in enumerate(lanes) if taken <= start + 1e-9), len(lanes))
        lanes[lane:] = [needs, *lanes[lane + 1 :]]
        spans.append(Span(badge, text, kind, round(100 * start, 2), round(100 * max(0.0, end - start), 2), lane))
    return tuple(spans)


def timeline(run: Run, slices: Slices, requests: Requests) -> Timeline:
    """Panels over the whole run on one axis of time."""
    start, length = slices.start_s, slices.end_s - slices.start_s
    x = Axis(0, length, tuple(time_ticks(0, length, 10)), format=clock)
    last_s = slices.end_s
    rollouts = [
        (f"R{number}", f"{r.stable} → {r.canary}", r.started_at_s - start, (r.ended_at_s or last_s) - start)
        for number, r in enumerate(run.rollouts, 1)
    ]
    drills = [
        (f"D{number}", d.name, d.started_at_s - start, (d.ended_at_s or last_s) - start)
        for number, d in enumerate(run.drills, 1)
    ]
    charts = [
        _share_chart(run, slices, x),
        _attempts_chart(run, slices, x),
        _failed_chart(slices, x),
        _latency_chart(run.objectives, slices, x, requests),
        _click_chart(run, slices, x),
    ]
    for index, chart in enumerate(charts):
        _marks(chart, run, start, rollouts if index else (), drills if index else ())
    return Timeline(
        _spans(x, rollouts, "rollout"), _spans(x, drills, "drill"), tuple(chart.html() for chart in charts),
        CLICK_ROLLING_S,
    )  # fmt: skip


def _marks(
    chart: Chart, run: Run, start_s: float,
    rollouts: Sequence[tuple[str, str, float, float]], drills: Sequence[tuple[str, str, float, float]],
) -> None:  # fmt: skip
    for _, _, begin, end in rollouts:
        chart.vband(begin, end, "span")
    for _, _, begin, end in drills:
        chart.vband(begin, end, "span drill")
    for rollout in run.rollouts:
        decided = next((d.at_s for d in rollout.decisions if d.outcome is not None), None)
        if decided is not None:
            chart.vline(decided - start_s, "moment thin")
    for fault in run.faults:
        chart.vline(fault.at_s - start_s, "fault thin" + ("" if fault.phase == "injected" else " dashed"))


def _share_chart(run: Run, slices: Slices, x: Axis) -> Chart:
    versions = [label for label in run.versions if label in slices.answered and slices.answered[label].any()]
    total = sum((slices.answered[label] for label in versions), np.zeros(len(slices)))
    said = ", ".join(f"version {v}: {percent(_part(slices.answered[v], total))}" for v in versions)
    y = Axis(0, 1, (0, 0.5, 1), format=lambda share: f"{share:.0%}")
    chart = Chart(f"Share of answers by version over time. Of the whole run, {said}.", x, y, 104,
                  "Who answered: share per version", show_x=False)  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore"):
        layers = [np.where(total > 0, slices.answered[label] / total, 0.0) for label in versions]
    edges, ends = slices.edges_s, slices.edges_s + slices.width_s
    for label, (low, high) in zip(versions, stack(layers), strict=True):
        chart.band(_corners(edges, ends), np.repeat(low, 2), np.repeat(high, 2), colour(run.versions, label))
    moments = [at for at, _ in shares_set(run.events)]
    _share_lines(chart, run, slices, versions, moments)
    return chart


def _share_lines(chart: Chart, run: Run, slices: Slices, versions: Sequence[str], moments: Sequence[float]) -> None:
    """Thin lines where the shares were set to lie, over the areas of what was counted."""
    found = shares_set(run.events)
    if not found:
        return
    xs = [min(max(at - slices.start_s, 0.0), slices.end_s - slices.start_s) for at in moments]
    xs.append(slices.end_s - slices.start_s)
    base = np.zeros(len(found))
    for label in versions[:-1]:
        base = base + np.array([shares.get(label, 0.0) for _, shares in found])
        chart.line(xs, np.append(base, base[-1]), "set thin", step=True)


def _corners(starts: Floats, ends: Floats) -> Floats:
    return np.column_stack([starts, ends]).ravel()


def _part(values: Floats, total: Floats) -> float:
    whole = float(total.sum())
    return round(float(values.sum()) / whole, 3) if whole else 0.0


def _count_axis(highest: float) -> Axis:
    top = max(1.0, highest)
    ticks = [t for t in linear_ticks(0, top, 2) if t == round(t)]
    return Axis(0, top * 1.12, tuple(ticks))


def _attempts_chart(run: Run, slices: Slices, x: Axis) -> Chart:
    layers = [slices.attempts_failed.get(label, np.zeros(len(slices))) for label in run.versions]
    total = sum(layers, np.zeros(len(slices)))
    said = ", ".join(
        f"version {v}: {layer.sum():.0f}" for v, layer in zip(run.versions, layers, strict=True) if layer.any()
    )
    unit = "per second" if slices.width_s == 1 else f"per {slices.width_s:.0f} s"
    chart = Chart(f"Failed attempts by version over time: {said or 'none'}.", x, _count_axis(float(total.max())), 76,
                  f"Failed attempts {unit}, before the gateway's retries", show_x=False)  # fmt: skip
    for label, (low, high) in zip(run.versions, stack(layers), strict=True):
        chart.bars(slices.edges_s, slices.edges_s + slices.width_s, low, high, colour(run.versions, label))
    return chart


def _failed_chart(slices: Slices, x: Axis) -> Chart:
    unit = "per second" if slices.width_s == 1 else f"per {slices.width_s:.0f} s"
    chart = Chart(
        f"Failed requests over time, as shoppers saw them: {slices.failed.sum():.0f} of {slices.asked.sum():.0f}.",
        x, _count_axis(float(slices.failed.max())), 56, f"Failed requests {unit}, as shoppers saw them", show_x=False,
    )  # fmt: skip
    chart.bars(slices.edges_s, slices.edges_s + slices.width_s, slices.failed * 0, slices.failed, "bad")
    if not slices.failed.any():
        chart.text(x.high / 2, chart.y.high / 2, "none")
    return chart


def _latency_objective(objectives: Objectives | None) -> Objective | None:
    found = [o for o in objectives.objectives if o.within_ms is not None] if objectives else []
    return found[0] if found else None


def _latency_chart(objectives: Objectives | None, slices: Slices, x: Axis, requests: Requests) -> Chart:
    goal = _latency_objective(objectives)
    values = np.concatenate([slices.p50_ms, slices.p99_ms])
    seen = values[np.isfinite(values)]
    top = max(float(seen.max()) if len(seen) else 1.0, (goal.within_ms or 1) * 1.3 if goal else 1.0)
    low = max(0.1, (float(seen.min()) if len(seen) else 1.0) * 0.8)
    whole = requests.latency_s * 1000
    p50, p99 = exact_percentile(whole, 50) or 0.0, exact_percentile(whole, 99) or 0.0
    y = Axis(low, top * 1.25, tuple(log_ticks(low, top * 1.25)), log=True, format=milliseconds)
    chart = Chart(
        "Latency over time, median and 99th percentile of each slice. "
        f"Whole run: median {milliseconds(round(p50, 1))}, 99th percentile {milliseconds(round(p99, 1))}.",
        x, y, 118, "Latency: median and 99th percentile", show_x=False,
    )  # fmt: skip
    if goal is not None and goal.within_ms is not None:
        chart.hline(goal.within_ms, "limit", f"objective: {percent(goal.goal)} within {goal.within_ms} ms")
    chart.line(slices.middles_s, slices.p99_ms, "c-ink")
    chart.line(slices.middles_s, slices.p50_ms, "c-soft dashed")
    return chart


def _click_chart(run: Run, slices: Slices, x: Axis) -> Chart:
    count = max(1, round(CLICK_ROLLING_S / slices.width_s))
    lines = {
        label: rolling_share(
            slices.clicked[label],
            slices.shown[label],
            slices=count,
            at_least=CLICK_AT_LEAST,
            quiet=max(1, round(CLICK_ROLLING_S / 5 / slices.width_s)),
        )
        for label in run.versions
        if label in slices.shown
    }
    finite = [line[np.isfinite(line)] for line in lines.values()]
    top = max([float(line.max()) for line in finite if len(line)] + [0.01])
    goal = next((o for o in run.objectives.objectives if o.good is Good.CLICKED), None) if run.objectives else None
    if goal is not None:
        top = max(top, goal.goal * 1.2)
    top *= 1.1
    said = ", ".join(
        f"version {v}: {percent(float(slices.clicked[v].sum() / slices.shown[v].sum()))}"
        for v in lines
        if slices.shown[v].sum() >= CLICK_AT_LEAST
    )
    # A little room below 0, so that a line at 0 is seen.
    y = Axis(-0.04 * top, top, tuple(linear_ticks(0, top, 3)), format=percent)
    chart = Chart(f"Click-through by version over time. Whole run: {said or 'no impressions'}.", x, y, 118,
                  f"Click-through per version, over the last {CLICK_ROLLING_S:.0f} s")  # fmt: skip
    if goal is not None:
        chart.hline(goal.goal, "limit", f"objective: {percent(goal.goal)}")
    for label, line in lines.items():
        chart.line(slices.middles_s, line, f"strong {colour(run.versions, label)}")
    return chart


# ---- one rollout's course and evidence ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """A rollout's share over time. ``marks``: what the legend has to explain, each a css class and its words."""

    chart: Markup
    marks: tuple[tuple[str, str], ...]


_MARKS = {
    "shadow": "copies of requests only, before any traffic",
    "hold": "held: inconclusive, for more evidence or a person",
    "pause": "paused by a person",
    "wait": "waits: for approval, or for the end of a freeze",
}


def course(run: Run, rollout: Rollout) -> Course | None:
    """The share that was set and the share that came, and when the rollout did not go on and why."""
    steps = _steps(rollout)
    spans = _standstills(rollout)
    if not steps and not spans:
        return None
    end = _length(rollout)
    decided = next((d.at_s - rollout.started_at_s for d in rollout.decisions if d.outcome is not None), None)
    times, shares = [0.0, *(at for at, _ in steps)], [0.0, *(share for _, share in steps)]
    if decided is not None and rollout.verdict != "promoted":
        times.append(decided)
        shares.append(0.0)
    x = _time_axis(end)
    highest = max([0.05, *shares])
    # What comes scatters about a small share more than about a great one.
    ticks, top = ((0, 0.5, 1), 1.12) if highest > 0.5 else ((0, highest), 1.8 * highest)
    y = Axis(0, top, ticks, format=lambda share: f"{plain(round(100 * share, 1))}%")
    said = ", ".join(f"{percent(share)} after {_after(at)}" for at, share in steps) or "no share"
    stood = "; ".join(f"{_MARKS[kind].split(':')[0]} for {_after(until - at)}" for kind, at, until in spans)
    chart = Chart(f"Share of version {rollout.canary} over time: {said}{'; ' + stood if stood else ''}.", x, y, 84,
                  "Share of the requests")  # fmt: skip
    for kind, at, until in spans:
        chart.vband(at, until, f"span {kind}")
    tone = colour(run.versions, rollout.canary)
    came = _came(rollout, end)
    if came is not None:
        chart.dots(*came, f"came {tone}")
    chart.line([*times, end], [*shares, shares[-1]], f"strong {tone}", step=True)
    if decided is not None:
        chart.vline(decided, "moment")
    kinds = dict.fromkeys(kind for kind, _, _ in spans)
    return Course(chart.html(), tuple((kind, _MARKS[kind]) for kind in kinds))


def _standstills(rollout: Rollout) -> tuple[tuple[str, float, float], ...]:
    """``(kind, from, until)``, in seconds after the start, in which the share was not to grow."""
    found: list[tuple[str, float, float]] = []
    kind, since_s, paused = None, 0.0, False
    for decision in rollout.decisions:
        at_s = decision.at_s - rollout.started_at_s
        asked = decision.event.command if decision.event is not None else None
        paused = (paused or asked == "pause") and asked != "resume" and decision.phase != "growing"
        now = _standstill(decision, paused=paused)
        if now != kind:
            if kind is not None:
                found.append((kind, since_s, at_s))
            kind, since_s = now, at_s
    if kind is not None:
        found.append((kind, since_s, _length(rollout)))
    return tuple(found)


def _standstill(decision: Decision, *, paused: bool) -> str | None:
    if decision.outcome is not None:
        return None
    if paused:
        return "pause"
    if decision.phase == "shadowing":
        return "shadow"
    if decision.phase == "holding":
        return "hold"
    return "wait" if decision.waiting is not None else None


def _came(rollout: Rollout, end_s: float) -> tuple[Floats, Floats] | None:
    """The part of the requests that canary got, each over about a fortieth of the rollout's time."""
    every_s = max(end_s / 40, 1.0)
    times, shares = [], []
    before: tuple[float, int, int] | None = None
    for decision in rollout.decisions:
        received = decision.event.received if decision.event is not None else None
        if received is None:
            continue
        at_s = decision.at_s - rollout.started_at_s
        if before is None:
            before = (at_s, received.canary_requests, received.requests)
            continue
        since_s, canary, requests = before
        if at_s - since_s < every_s:
            continue
        if received.requests > requests:
            times.append((since_s + at_s) / 2)
            shares.append((received.canary_requests - canary) / (received.requests - requests))
        before = (at_s, received.canary_requests, received.requests)
    return (np.array(times), np.array(shares)) if times else None


def _length(rollout: Rollout) -> float:
    """Seconds from its start to its end, or to the last that is known of it."""
    ends = rollout.ended_at_s or max((d.at_s for d in rollout.decisions), default=rollout.started_at_s)
    return max(ends - rollout.started_at_s, 1.0)


def _time_axis(end_s: float) -> Axis:
    words = _after if end_s < 300 else clock
    return Axis(0, end_s, tuple(time_ticks(0, end_s, 6)), format=words)


def _after(seconds: float) -> str:
    return f"{plain(round(seconds, 1))} s" if seconds < 300 else f"{plain(round(seconds / 60))} min"


@dataclass(frozen=True, slots=True)
class EvidencePlot:
    objective: str
    verdict: str | None
    finding: str
    events: str
    chart: Markup


def evidence_charts(run: Run, rollout: Rollout) -> tuple[EvidencePlot, ...]:
    """One chart an objective: canary minus control, its interval and the margin, until the decision."""
    declared = [objective.name for objective in run.objectives.objectives] if run.objectives else []
    found = dict.fromkeys(name for decision in rollout.decisions for name in decision.evidence)
    names = [*(name for name in declared if name in found), *(name for name in found if name not in declared)]
    return tuple(plot for name in names if (plot := _evidence(run, rollout, name)) is not None)


def _evidence(run: Run, rollout: Rollout, name: str) -> EvidencePlot | None:
    start = rollout.started_at_s
    looks: list[tuple[float, Judged]] = [
        (decision.at_s - start, decision.evidence[name])
        for decision in rollout.decisions
        if name in decision.evidence and decision.evidence[name].canary.total > 0
    ]
    if not looks:
        return None
    floor, roof = _reach(rollout, name)
    times = [at for at, _ in looks]
    difference, low, high, margin = (
        np.array([math.nan if v is None else v for v in column], dtype=np.float64)
        for column in (
            [j.difference for _, j in looks], [j.low for _, j in looks],
            [j.high for _, j in looks], [j.margin for _, j in looks],
        )
    )  # fmt: skip
    # An end that evidence has not moved yet is open: nothing beyond it was ruled out.
    low, high = np.where(low <= floor, -1.0, low), np.where(high >= roof, 1.0, high)
    final = looks[-1][1]
    widest = float(np.nanmax(margin)) if np.isfinite(margin).any() else 0.01
    settled = [v for v in (final.low, final.high, final.difference) if v is not None and floor < v < roof]
    settled += [] if final.difference is None else [final.difference]
    bottom = max(-1.0, min([-2.2 * widest] + [1.15 * v for v in settled]))
    top = min(1.0, max([1.2 * widest] + [1.15 * v for v in settled]))
    x = _time_axis(_length(rollout))
    y = Axis(bottom, top, tuple(linear_ticks(bottom, top, 4)), format=points)
    finding = _finding(final, floor, roof)
    chart = Chart(f"{name}, canary minus control over time: {finding}.", x, y, 132)
    chart.hline(0, "zero")
    chart.line(np.append(times, x.high), np.append(-margin, -margin[-1]), "limit", step=True)
    tone = colour(run.versions, rollout.canary)
    if len(looks) == 1:
        chart.whiskers(times, low, high, f"strong {tone}")
    chart.band(times, low, high, f"pale {tone}")
    chart.line(times, low, f"thin {tone}")
    chart.line(times, high, f"thin {tone}")
    chart.line(times, difference, f"strong {tone}")
    chart.dots(times[-1:], difference[-1:], tone)
    steps = _steps(rollout)
    for (at, share), (until, _) in itertools.pairwise([*steps, (x.high, 0.0)]):
        chart.vline(at, "soft")
        if x.one(until) - x.one(at) > _NOTE_WIDTH:
            chart.text(at, y.high, percent(share), "start top")
    decided = next((d for d in rollout.decisions if d.outcome is not None), None)
    if decided is not None:
        chart.vline(decided.at_s - start, "moment")
    events = f"{final.canary.total:,} canary events, {final.control.total:,} control{_lift_words(final)}"
    return EvidencePlot(name, final.verdict, finding, events, chart.html())


def _steps(rollout: Rollout) -> list[tuple[float, float]]:
    """When each share was first in force (seconds after the rollout's start)."""
    found: list[tuple[float, float]] = []
    for decision in rollout.decisions:
        settled = "growing" not in (decision.action, decision.phase) and decision.action != "start"
        settled = settled and decision.outcome is None
        if settled and decision.share is not None and (not found or found[-1][1] != decision.share):
            found.append((decision.at_s - rollout.started_at_s, decision.share))
    return found


def _reach(rollout: Rollout, name: str) -> tuple[float, float]:
    """The widest interval that the evidence can state: the one before any event. Unbounded where none is recorded."""
    empty = [d.evidence[name] for d in rollout.decisions if name in d.evidence and d.evidence[name].canary.total == 0]
    lows = [judged.low for judged in empty if judged.low is not None]
    highs = [judged.high for judged in empty if judged.high is not None]
    return min(lows, default=-math.inf), max(highs, default=math.inf)


def _finding(judged: Judged, floor: float, roof: float) -> str:
    """Such as ``−7.7 points, interval −10.5 to −4.9, margin −0.94``; as many places as the interval is worth."""
    if judged.difference is None:
        return "no data"
    if judged.low is None or judged.high is None:
        return f"{points(round(judged.difference, 5))} points"
    width = max(judged.high - judged.low, 1e-3) * 100
    places = max(0, min(4, 1 - math.floor(math.log10(width))))

    def said(share: float) -> str:
        text = f"{100 * share:+.{places}f}".replace("-", "−")
        return text if text.strip("+−0.") else "0"

    if judged.low <= floor and judged.high >= roof:
        interval = "no interval yet"
    elif judged.low <= floor:
        interval = f"interval below {said(judged.high)}"
    elif judged.high >= roof:
        interval = f"interval above {said(judged.low)}"
    else:
        interval = f"interval {said(judged.low)} to {said(judged.high)}"
    words = f"{said(judged.difference)} points, {interval}"
    return words if judged.margin is None else f"{words}, margin {points(-float(f'{judged.margin:.2g}'))}"


def _lift_words(judged: Judged) -> str:
    lift = judged.lift
    if lift is None or lift.value is None:
        return ""
    interval = ""
    if lift.low is not None and lift.high is not None:
        interval = f", interval {lift.low:+.1%} to {lift.high:+.1%}"
    return f"; lift {lift.value:+.1%}{interval}".replace("-", "−").replace("%", " %")


# ---- one drill ---------------------------------------------------------------------------------------


def drill_chart(run: Run, drill: Drill, measured: Recovery | None) -> Markup | None:
    """Each request around the fault as a dot, failed ones marked; None where nothing was recorded."""
    requests = run.requests
    if requests is None or drill.fault_at_s is None:
        return None
    fault = drill.fault_at_s
    settled = (measured.rto_s if measured else None) or 0.0
    before, after = 3.0, min(60.0, max(9.0, 2 * settled + 3))
    if drill.ended_at_s is not None:
        after = max(3.0, min(after, drill.ended_at_s - fault))
    at = requests.intended_s - fault
    inside = np.flatnonzero((at >= -before) & (at <= after))
    if not len(inside):
        return None
    latency = np.maximum(requests.latency_s[inside] * 1000, 0.1)
    low, high = float(latency.min()) * 0.7, float(latency.max()) * 1.6
    goal = _latency_objective(run.objectives)
    if goal is not None and goal.within_ms is not None:
        high = max(high, goal.within_ms * 1.4)
    ticks = tuple(t for t in linear_ticks(-before, after, 8) if t == round(t))
    x = Axis(-before, after, ticks, format=lambda t: f"{'+' if t > 0 else ''}{plain(t)} s")
    y = Axis(low, high, tuple(log_ticks(low, high)), log=True, format=milliseconds)
    failed = requests.failed[inside]
    worst = milliseconds(round(float(latency.max())))
    chart = Chart(
        f"Each request around the fault of {drill.name}: {int(failed.sum())} of {len(inside)} failed, slowest {worst}.",
        x, y, 150,
    )  # fmt: skip
    if goal is not None and goal.within_ms is not None:
        chart.hline(goal.within_ms, "limit")
    chart.vline(0, "fault")
    chart.text(0, y.low, "fault", "start bottom")
    if measured is not None and measured.detected_s is not None and measured.detected_s < after:
        chart.vline(measured.detected_s, "soft")
    if measured is not None and measured.rto_s and measured.rto_s < after:
        chart.vline(measured.rto_s, "moment")
    good = inside[~failed]
    if len(good) > MAX_DOTS:
        slow = requests.latency_s[good] > np.quantile(requests.latency_s[good], 0.9)
        good = np.sort(np.concatenate([good[slow], good[~slow][:: math.ceil(len(good) / MAX_DOTS)]]))
    for label in run.versions:
        mine = good[requests.version[good] == label]
        chart.dots(at[mine], np.maximum(requests.latency_s[mine] * 1000, 0.1), f"tiny {colour(run.versions, label)}")
    bad = inside[failed]
    chart.dots(at[bad], np.maximum(requests.latency_s[bad] * 1000, 0.1), "bad")
    return chart.html()


# ---- models and load ---------------------------------------------------------------------------------


def training_charts(training: Training) -> tuple[Markup, ...]:
    """Quality on the validation split and the loss, over the seconds of training."""
    curve = training.curve
    if not curve:
        return ()
    seconds = [epoch.seconds for epoch in curve]
    end = max(seconds) * 1.02 or 1.0
    x = Axis(0, end, tuple(linear_ticks(0, end, 5)), format=lambda t: f"{plain(t)} s")
    found = []
    for title, values in (
        ("Validation NDCG@10", [epoch.valid_ndcg_at_10 for epoch in curve]),
        ("Training loss", [epoch.loss for epoch in curve]),
    ):
        known = [v for v in values if v is not None]
        if not known:
            continue
        low = 0.0 if title.startswith("Validation") else min(known) * 0.97
        high = max(known) * 1.06 if max(known) > low else low + 1
        y = Axis(low, high, tuple(linear_ticks(low, high, 4)))
        says = f"{title} over training time: {plain(round(known[0], 4))} after {plain(round(seconds[0], 1))} s, "
        says += f"{plain(round(known[-1], 4))} after {plain(round(seconds[-1], 1))} s."
        chart = Chart(says, x, y, 140, title)
        numbers = [math.nan if v is None else v for v in values]
        chart.line(seconds, numbers, "c-ink")
        chart.dots(seconds, numbers, "c-ink")
        found.append(chart.html())
    return tuple(found)


def history_chart(evaluation: Evaluation, tones: Mapping[str, str]) -> Markup | None:
    """NDCG@10 of each model by how long a shopper's history is, with intervals."""
    models = {name: model.by_history_length for name, model in evaluation.models.items() if model.by_history_length}
    if not models:
        return None
    groups = max(models.values(), key=len)
    top = max(g.ndcg_at_10.high or g.ndcg_at_10.value for model in models.values() for g in model) * 1.08 or 1.0
    names = [group.words for group in groups]
    middles = tuple(index + 0.5 for index in range(len(groups)))
    x = Axis(0, len(groups), middles, format=lambda at: names[int(at)])
    y = Axis(0, top, tuple(linear_ticks(0, top, 4)))
    best = "; ".join(
        f"{name}: " + ", ".join(f"{plain(round(g.ndcg_at_10.value, 4))}" for g in model)
        for name, model in models.items()
    )
    chart = Chart(f"NDCG at 10 by length of history ({', '.join(names)} items). {best}.", x, y, 150, kind="all-labels")
    for index, (name, model) in enumerate(models.items()):
        places = [i + 0.5 + 0.16 * (index - (len(models) - 1) / 2) for i in range(len(model))]
        values = [g.ndcg_at_10.value for g in model]
        lows = [v if g.ndcg_at_10.low is None else g.ndcg_at_10.low for v, g in zip(values, model, strict=True)]
        highs = [v if g.ndcg_at_10.high is None else g.ndcg_at_10.high for v, g in zip(values, model, strict=True)]
        chart.whiskers(places, lows, highs, f"strong {tones[name]}")
        chart.dots(places, values, f"big {tones[name]}")
    return chart.html()


def percentile_chart(run: Run, requests: Requests, outside: NDArray[np.bool_]) -> Markup | None:
    """Latency by percentile, stretched towards the slowest, for the whole run and outside of drills."""
    if len(requests) < 2:
        return None
    latency = np.sort(np.maximum(requests.latency_s * 1000, 0.1))
    quiet = np.sort(np.maximum(requests.latency_s[outside] * 1000, 0.1))
    nines = math.log10(max(10, len(latency)))
    marks = [(0.0, "0"), (0.301, "50"), (1.0, "90"), (2.0, "99"), (3.0, "99.9"), (4.0, "99.99"), (5.0, "99.999")]
    ticks = tuple(at for at, _ in marks if at <= nines + 1e-9)
    named = dict(marks)
    x = Axis(0, nines, ticks, format=lambda at: named[at])
    low, high = float(latency[0]) * 0.8, float(latency[-1]) * 1.3
    goal = _latency_objective(run.objectives)
    if goal is not None and goal.within_ms is not None:
        high = max(high, goal.within_ms * 1.3)
    y = Axis(low, high, tuple(log_ticks(low, high)), log=True, format=milliseconds)
    p50, p99 = exact_percentile(latency, 50) or 0.0, exact_percentile(latency, 99) or 0.0
    chart = Chart(
        f"Latency by percentile: half within {milliseconds(round(p50, 1))}, 99 % within {milliseconds(round(p99, 1))}, "
        f"all within {milliseconds(round(float(latency[-1])))}.",
        x, y, 190, kind="all-labels",
    )  # fmt: skip
    if goal is not None and goal.within_ms is not None:
        chart.hline(goal.within_ms, "limit", f"{goal.within_ms} ms")
    at = np.linspace(0, nines, 240)
    for values, css in ((latency, "strong c-ink"), (quiet, "strong c1")):
        if len(values):
            ranks = np.ceil(np.round(len(values) * (1 - 10.0**-at), 9)).astype(np.int64) - 1
            chart.line(at, values[np.clip(ranks, 0, len(values) - 1)], css)
    return chart.html()
