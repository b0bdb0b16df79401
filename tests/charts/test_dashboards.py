"""Dashboards and alerts: every query parses in Prometheus' own tool and asks for series that somebody keeps."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from endcap.alerts import burn_rate_rules
from endcap.objectives import load_objectives
from serving.feedback.app import FeedbackMetrics
from serving.feedback.store import Evidence, VersionCounts
from serving.operator.metrics import Metrics
from serving.server.metrics import ServerMetrics
from tests.charts.conftest import CHART
from tests.prometheus_tool import promtool

DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
_VARIABLES = {"$__rate_interval": "5m", "$service": "recommender", "$rollout": "recommender", "$namespace": "shop"}
_NAME = re.compile(r"\b(endcap[a-z0-9_:]*)\b")
_LABELS = re.compile(r"\{[^{}]*\}|\b(?:by|ignoring|on|group_left|group_right|without)\s*\([^()]*\)")


def queries(path: Path) -> Iterator[tuple[str, str]]:
    """(panel, query) of a dashboard, Grafana's own variables filled in."""
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in _VARIABLES.items():
                text = text.replace(variable, value)
            assert "$" not in text, text
            yield panel["title"], text


def kept_series(tmp_path: Path) -> set[str]:
    """Every name that our programs' metrics pages have, and that our rules record."""
    pages = [ServerMetrics("7", thresholds_s=[0.1]).text(),
             FeedbackMetrics().text(Evidence(0, 0, {"7": VersionCounts(2, 1)}))]  # fmt: skip
    names = set(re.findall(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)", b"\n".join(pages), re.MULTILINE))
    found = {name.decode() for name in names}
    file = tmp_path / "objectives.yaml"
    file.write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Objectives\nmetadata: {name: a}\n"
        "spec: {service: a, objectives: [{name: availability, goal: 0.999, good: answered}]}\n"
    )
    for group in burn_rate_rules(load_objectives(file)).groups:
        found |= {rule["record"] for rule in group["rules"] if "record" in rule}
    return found | operator_series()


def operator_series() -> set[str]:
    metrics = Metrics()
    metrics.decisions.labels("grow"), metrics.endings.labels("promoted"), metrics.errors.labels("TargetError")
    metrics.requests.labels("GET", "ok"), metrics.rollouts.labels("growing")
    page = generate_latest(metrics.registry)
    return {name.decode() for name in re.findall(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)", page, re.MULTILINE)}


def asked(query: str) -> set[str]:
    return set(_NAME.findall(_LABELS.sub("", query)))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_parses_and_asks_for_series_that_are_kept(tmp_path: Path, path: Path) -> None:
    found = list(queries(path))
    assert found
    rules = [{"record": f"query:{number}", "expr": query} for number, (_, query) in enumerate(found)]
    check(tmp_path, {"groups": [{"name": path.stem, "rules": rules}]})
    kept = kept_series(tmp_path)
    for panel, query in found:
        names = asked(query)
        assert names or "ALERTS" in query, panel
        assert names <= kept, (panel, names - kept)


def test_alerts_parse_and_ask_for_series_that_are_kept(tmp_path: Path) -> None:
    document = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    check(tmp_path, document)
    kept = kept_series(tmp_path)
    for group in document["groups"]:
        for rule in group["rules"]:
            assert asked(rule["expr"]), rule["alert"]
            assert asked(rule["expr"]) <= kept, rule["alert"]
            assert {"summary", "description"} <= set(rule["annotations"]), rule["alert"]
            assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]


def test_the_check_of_names_finds_one_that_nobody_keeps(tmp_path: Path) -> None:
    assert asked('sum by (endcap_service) (rate(endcap_server_atempts_total{endcap_x="endcap_y"}[5m]))') == {
        "endcap_server_atempts_total"
    }
    assert "endcap_server_atempts_total" not in kept_series(tmp_path)


def check(tmp_path: Path, document: dict[str, Any]) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(document))
    ran = subprocess.run([promtool(), "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_their_own_places_and_ids(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    assert len({(one["gridPos"]["x"], one["gridPos"]["y"]) for one in panels}) == len(panels)
    assert all(one["datasource"]["uid"] == "${datasource}" for one in panels)
