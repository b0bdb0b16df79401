"""Alert rules made of objectives, judged by Prometheus' own tool: they parse, fire when they must, and not else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from endcap.alerts import SERVICE_LABEL, burn_rate_rules, recorded_name
from endcap.objectives import Objectives, load_objectives
from serving.feedback.app import FeedbackMetrics
from serving.feedback.store import Evidence, VersionCounts
from serving.server.metrics import ServerMetrics
from tests.prometheus_tool import promtool

DOCUMENT = """
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: shop}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.999, good: answered}
  - {name: latency, goal: 0.99, good: answered, withinMs: 100}
  - {name: click-through, goal: 0.05, good: clicked, windowSeconds: 10, marginRelative: 0.1}
  - name: orders
    goal: 0.95
    good: counted
    prometheus: {good: 'orders_total{service="$service",state="paid"}', total: 'orders_total{service="$service"}'}
  - {name: attempts, goal: 0.99, good: counted, envoy: {}}
"""
OF = f'{SERVICE_LABEL}="recommender",version="7",route="recommend"'


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "objectives.yaml"
    file.write_text(DOCUMENT)
    return file


@pytest.fixture
def declared(document: Path) -> Objectives:
    return load_objectives(document)


def minutely(*rates: tuple[int, int]) -> str:
    """Samples a minute of a counter: (events a minute, minutes) after each other, in promtool's words."""
    values, total = ["0"], 0
    for rate, minutes in rates:
        for _ in range(minutes):
            total += rate
            values.append(str(total))
    return " ".join(values)


def availability(*good_and_bad: tuple[int, int, int]) -> list[dict[str, str]]:
    good = [(one[0], one[2]) for one in good_and_bad]
    bad = [(one[1], one[2]) for one in good_and_bad]
    return [
        {"series": f'endcap_server_attempts_total{{{OF},outcome="answered"}}', "values": minutely(*good)},
        {"series": f'endcap_server_attempts_total{{{OF},outcome="failed"}}', "values": minutely(*bad)},
    ]


def fires(tmp_path: Path, declared: Objectives, series: list[dict[str, str]], at: str, name: str,
          *expected: tuple[str, str]) -> None:  # fmt: skip
    """At ``at`` exactly the (objective, severity) pairs ``expected`` fire of the objectives in ``series``."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(burn_rate_rules(declared).rule_file()))
    query = f'count by (objective, severity) (ALERTS{{alertname="{name}",alertstate="firing"}})'
    test = {
        "rule_files": ["rules.yaml"], "evaluation_interval": "10m" if at.endswith("h") else "1m",
        "tests": [{
            "interval": "1m", "input_series": series,
            "promql_expr_test": [{
                "expr": query, "eval_time": at,
                "exp_samples": [{"labels": f'{{objective="{objective}",severity="{severity}"}}', "value": 1}
                                for objective, severity in expected],
            }],
        }],
    }  # fmt: skip
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    ran = subprocess.run([promtool(), "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


BURNS = "EndcapObjectiveBurns"


def test_the_rules_are_such_as_prometheus_takes(tmp_path, declared):
    made = burn_rate_rules(declared)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(made.rule_file()))
    ran = subprocess.run([promtool(), "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"], cwd=tmp_path,
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert list(made.without) == ["attempts"]


def test_an_outage_pages_within_minutes_and_stops_soon_after_it(tmp_path, declared):
    # All is well for two hours, then 5 % fail: 50 times the allowance of 0.1 %.
    begun = ((1000, 0, 120), (950, 50, 30), (1000, 0, 60))
    fires(tmp_path, declared, availability(*begun), "119m", BURNS)
    fires(tmp_path, declared, availability(*begun), "145m", BURNS, ("availability", "page"), ("availability", "ticket"))
    # The short windows have forgotten it long before the long ones.
    fires(tmp_path, declared, availability(*begun), "200m", BURNS, ("availability", "ticket"))


def test_a_slow_burn_is_a_ticket_and_no_page(tmp_path, declared):
    slow = availability((9960, 40, 60 * 30))  # 4 times the allowance, for 30 hours
    fires(tmp_path, declared, slow, "29h", BURNS, ("availability", "ticket"))


def test_within_the_goal_nothing_fires(tmp_path, declared):
    fires(tmp_path, declared, availability((9993, 7, 60 * 30)), "29h", BURNS)


def test_what_shadows_get_counts_for_nothing_and_what_is_refused_is_no_fault(tmp_path, declared):
    series = [
        *availability((1000, 0, 300)),
        {"series": f'endcap_server_attempts_total{{{SERVICE_LABEL}="recommender",route="shadow",outcome="failed"}}',
         "values": minutely((500, 300))},
        {"series": f'endcap_server_attempts_total{{{OF},outcome="refused"}}', "values": minutely((500, 300))},
        {"series": f'endcap_server_attempts_total{{{SERVICE_LABEL}="other",route="recommend",outcome="failed"}}',
         "values": minutely((500, 300))},
    ]  # fmt: skip
    fires(tmp_path, declared, series, "290m", BURNS)


def test_answers_that_come_late_page_and_an_edge_that_no_bucket_has_is_not_silent(tmp_path, declared):
    count = {"series": f"endcap_server_latency_seconds_count{{{OF}}}", "values": minutely((1000, 300))}
    in_time = {"series": f'endcap_server_latency_seconds_bucket{{{OF},le="0.1"}}', "values": minutely((500, 300))}
    elsewhere = {"series": f'endcap_server_latency_seconds_bucket{{{OF},le="0.2"}}', "values": minutely((1000, 300))}
    both = (("latency", "page"), ("latency", "ticket"))
    fires(tmp_path, declared, [count, in_time], "290m", BURNS, *both)
    fires(tmp_path, declared, [count, elsewhere], "290m", BURNS, *both)
    fires(tmp_path, declared, [count, {**in_time, "values": count["values"]}], "290m", BURNS)


@pytest.mark.parametrize(("clicked", "expected"), [(60, ()), (30, (("click-through", "ticket"),))])
def test_a_goal_of_clicks_that_is_missed_for_days_is_a_ticket(tmp_path, declared, clicked, expected):
    labels = f'{{{SERVICE_LABEL}="recommender",version="7"}}'
    series = [
        {"series": f"endcap_feedback_impressions_total{labels}", "values": minutely((1000, 60 * 74))},
        {"series": f"endcap_feedback_clicked_impressions_total{labels}", "values": minutely((clicked, 60 * 74))},
    ]
    fires(tmp_path, declared, series, "73h", BURNS, *expected)


def test_no_data_is_an_alert(tmp_path, declared):
    stops = availability((1000, 0, 100))
    fires(tmp_path, declared, stops, "60m", "EndcapObjectiveNoData", ("click-through", "ticket"), ("latency", "ticket"),
          ("orders", "ticket"))  # fmt: skip
    stopped = [{**one, "values": one["values"] + " stale"} for one in stops]
    fires(tmp_path, declared, stopped, "150m", "EndcapObjectiveNoData", ("availability", "ticket"),
          ("click-through", "ticket"), ("latency", "ticket"), ("orders", "ticket"))  # fmt: skip


def test_the_counters_are_those_that_servers_and_collector_keep(declared):
    server = ServerMetrics("7", thresholds_s=[0.1])
    feedback = FeedbackMetrics().text(Evidence(0, 0, {"7": VersionCounts(2, 1)})).decode()
    kept = server.text().decode() + feedback
    text = str([rule["expr"] for group in burn_rate_rules(declared).groups for rule in group["rules"]])
    for name in ("endcap_server_attempts_total", "endcap_server_latency_seconds_bucket", "le=\"0.1\"",
                 "endcap_server_latency_seconds_count", "endcap_feedback_impressions_total",
                 "endcap_feedback_clicked_impressions_total"):  # fmt: skip
        assert name in kept, name
        assert name in text, name


@pytest.mark.parametrize("form", ["file", "kubernetes", "values"])
def test_the_command_prints_them(document, declared, form):
    ran = subprocess.run([sys.executable, "-m", "endcap.cli", "objectives", "rules", str(document), "--as", form],
                         capture_output=True, text=True, check=True)  # fmt: skip
    found: dict[str, Any] = yaml.safe_load(ran.stdout)
    groups = {"file": lambda: found["groups"], "kubernetes": lambda: found["spec"]["groups"],
              "values": lambda: found["prometheusRules"]["groups"]}[form]()  # fmt: skip
    assert groups == list(burn_rate_rules(declared).groups)
    assert "no rule for attempts" in ran.stderr and "&id" not in ran.stdout
    assert recorded_name("1h") in ran.stdout
