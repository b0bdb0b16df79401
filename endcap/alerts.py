"""Alert rules out of a service's objectives: burn rates over several windows, as PrometheusRules.

An objective allows ``1 - goal`` of its events to be bad. The burn rate is how many times faster than that the
allowance is used up. An alert fires when it is too fast in a long window *and* in a short one, so that it comes early
and goes soon after the trouble (Beyer et al., *The Site Reliability Workbook*, ch. 5, table 5-8, for 30 days). Where a
factor times the allowance would be 1 or more, as with the small goals of clicks, that pair of windows cannot fire and
is left out; what is left then says that the goal itself was missed. No data is an alert too, never a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from endcap.objectives import CountedBy, Good, Objective, Objectives, SeriesCounters
from endcap.selectors import Matcher, Operator, Selector

__all__ = ["SERVICE_LABEL", "AlertRules", "Windows", "burn_rate_rules", "recorded_name"]

SERVICE_LABEL = "endcap_service"
"""The label that scrapes of model servers and collectors carry; the chart's monitors set it."""

_SHOPPERS = Matcher("route", Operator.NOT_EQUAL, "shadow")
_ANSWERED = Matcher("outcome", Operator.MATCH, "answered|refused")


@dataclass(frozen=True, slots=True)
class Windows:
    """Fires when both windows burn ``factor`` times too fast. ``severity``: ``page`` or ``ticket``."""

    long: str
    short: str
    factor: float
    severity: str


WINDOWS = (
    Windows("1h", "5m", 14.4, "page"), Windows("6h", "30m", 6.0, "page"), Windows("1d", "2h", 3.0, "ticket"),
    Windows("3d", "6h", 1.0, "ticket"),
)  # fmt: skip
_HOLD = {"page": "2m", "ticket": "15m"}
_ALL_WINDOWS = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")


@dataclass(frozen=True, slots=True)
class AlertRules:
    """``groups``: Prometheus' rule groups. ``without``: objectives that have no rule, by name, and why."""

    groups: tuple[dict[str, Any], ...]
    without: dict[str, str]

    def rule_file(self) -> dict[str, Any]:
        """What ``promtool check rules`` and ``rule_files`` take."""
        return {"groups": list(self.groups)}

    def kubernetes(self, name: str, *, labels: dict[str, str] | None = None) -> dict[str, Any]:
        """A PrometheusRule of the Prometheus operator."""
        return {
            "apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "endcap", **(labels or {})}},
            "spec": self.rule_file(),
        }  # fmt: skip


def recorded_name(window: str) -> str:
    """The series that holds the share of bad events in ``window``, by service and objective."""
    return f"endcap:objective_bad:ratio_rate{window}"


def burn_rate_rules(declared: Objectives) -> AlertRules:
    """The rules of one service's objectives. Pure; the same for the same objectives."""
    recordings: list[dict[str, Any]] = []
    alerts: list[dict[str, Any]] = []
    without: dict[str, str] = {}
    for objective in declared.objectives:
        counters = _counters(objective, declared.service)
        if isinstance(counters, str):
            without[objective.name] = counters
            continue
        labels = {"service": declared.service, "objective": objective.name}
        good, total = counters
        recordings += [_recording(window, good, total, labels) for window in _ALL_WINDOWS]
        alerts += _alerts(objective, total, labels)
    # One group, whose rules run in their order: an alert never reads the shares of the round before.
    group = {"name": f"endcap-{declared.name}", "interval": "30s", "rules": [*recordings, *alerts]}
    return AlertRules((group,) if recordings else (), without)


def _counters(objective: Objective, service: str) -> tuple[Selector, Selector] | str:
    """Good and all events as counters in Prometheus; or why there are none."""
    of = Matcher(SERVICE_LABEL, Operator.EQUAL, service)
    if objective.good is Good.CLICKED:
        return (Selector("endcap_feedback_clicked_impressions_total", frozenset({of})),
                Selector("endcap_feedback_impressions_total", frozenset({of})))  # fmt: skip
    if objective.good is Good.ANSWERED and objective.within_ms is not None:
        edge = Matcher("le", Operator.EQUAL, _edge(objective.within_ms))
        return (Selector("endcap_server_latency_seconds_bucket", frozenset({of, _SHOPPERS, edge})),
                Selector("endcap_server_latency_seconds_count", frozenset({of, _SHOPPERS})))  # fmt: skip
    if objective.good is Good.ANSWERED:
        return (Selector("endcap_server_attempts_total", frozenset({of, _SHOPPERS, _ANSWERED})),
                Selector("endcap_server_attempts_total", frozenset({of, _SHOPPERS})))  # fmt: skip
    counted = objective.counted
    if not isinstance(counted, SeriesCounters):
        return "Envoy's own counters are read from its admin page, which Prometheus does not scrape"
    if counted.by is CountedBy.PROMETHEUS:
        return counted.good, counted.total
    return (Selector(counted.good.name, counted.good.matchers | {of}),
            Selector(counted.total.name, counted.total.matchers | {of}))  # fmt: skip


def _edge(within_ms: int) -> str:
    """A bucket's edge in seconds as prometheus_client writes it."""
    return repr(within_ms / 1000)


def _recording(window: str, good: Selector, total: Selector, labels: dict[str, str]) -> dict[str, Any]:
    everything = f"sum(rate({total}[{window}]))"
    # Good events that nobody counts (an edge that no bucket has) are none at all: that is to be noticed, not unseen.
    found = f"(sum(rate({good}[{window}])) or 0 * {everything})"
    return {"record": recorded_name(window), "expr": f"1 - {found} / {everything}", "labels": dict(labels)}


def _alerts(objective: Objective, total: Selector, labels: dict[str, str]) -> Sequence[dict[str, Any]]:
    allowed = 1 - objective.goal
    matchers = "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
    made = []
    for severity in ("page", "ticket"):
        pairs = [one for one in WINDOWS if one.severity == severity and one.factor * allowed < 1]
        if not pairs:
            continue
        parts = []
        for one in pairs:
            limit = f"{one.factor * allowed:.6g}"
            parts.append(f"({recorded_name(one.long)}{matchers} > {limit} and "
                         f"{recorded_name(one.short)}{matchers} > {limit})")  # fmt: skip
        made.append({
            "alert": "EndcapObjectiveBurns", "expr": " or ".join(parts), "for": _HOLD[severity],
            "labels": {**labels, "severity": severity},
            "annotations": {
                "summary": f"{labels['service']}: {objective.name} is missed too fast",
                "description": f"{{{{ $value | humanizePercentage }}}} of the events are not good; the goal "
                f"{objective.goal:.6g} allows {allowed:.3%}.",
            },
        })  # fmt: skip
    made.append({
        "alert": "EndcapObjectiveNoData", "expr": f"absent_over_time({total}[30m])", "for": "5m",
        "labels": {**labels, "severity": "ticket"},
        "annotations": {
            "summary": f"{labels['service']}: nothing is counted for {objective.name}",
            "description": f"No series {total.name} for half an hour. No data is never a pass: see whether the "
            f"service is scraped with the label {SERVICE_LABEL}.",
        },
    })  # fmt: skip
    return made
