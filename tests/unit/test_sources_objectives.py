"""What an objectives file may say about counters beside the target."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import EndcapError, InputError
from endcap.objectives import CountedBy, EnvoyCounters, Good, Objectives, SeriesCounters, load_objectives
from endcap.outcomes import judge_requests
from endcap.selectors import Matcher, Operator, Selector, parse_selector


def load(folder: Path, *objectives: str) -> Objectives:
    lines = "".join(f"  - {objective}\n" for objective in objectives)
    path = folder / "objectives.yaml"
    path.write_text(
        "apiVersion: endcap.dev/v1alpha1\nkind: Objectives\nmetadata: {name: shop}\n"
        f"spec:\n  service: shop\n  objectives:\n{lines}"
    )
    return load_objectives(path)


def counted(where: str, *, good: str = "counted", more: str = "") -> str:
    return f"{{name: errors, goal: 0.99, good: {good}, {more}{where}}}"


def test_an_objective_counted_by_prometheus(tmp_path: Path) -> None:
    text = (
        """{good: 'rq_bucket{service="$service",le="0.1"}', total: 'rq_count{service="$service"}', versionLabel: v}"""
    )
    (objective,) = load(tmp_path, counted(f"prometheus: {text}")).objectives
    assert objective.good is Good.COUNTED
    assert objective.counted == SeriesCounters(
        CountedBy.PROMETHEUS,
        parse_selector('rq_bucket{le="0.1",service="shop"}'),
        Selector("rq_count", frozenset({Matcher("service", Operator.EQUAL, "shop")})),
        "v", "", ("prometheus_replica", "replica"),
    )  # fmt: skip
    assert objective.margin == pytest.approx(0.01)


def test_objectives_counted_by_metrics_and_by_envoy(tmp_path: Path) -> None:
    metrics = counted("""metrics: {good: 'a{code!~"5.."}', total: a, versionPrefix: version-}""")
    declared = load(tmp_path, metrics, "{name: attempts, goal: 0.99, good: counted, envoy: {}}")
    first, second = declared.objectives
    assert isinstance(first.counted, SeriesCounters)
    assert (first.counted.by, first.counted.version_prefix) == (CountedBy.METRICS, "version-")
    assert second.counted == EnvoyCounters("version-")


def test_what_only_a_source_can_tell_is_not_judged_on_a_client_s_records(tmp_path: Path) -> None:
    assert judge_requests(load(tmp_path, counted("envoy: {}")), []) == ()


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        (counted(""), "needs one of prometheus, metrics and envoy"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a}, envoy: {}"), "needs one of prometheus"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a}", good="answered"), "go with good: counted"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a}", more="withinMs: 5, "), "goes with good: answered"),
        (counted("envoy: {}", more="windowSeconds: 5, "), "goes with good: clicked"),
        (counted("prometheus: {good: 'rate(a[5m])', total: a}"), "an expression, not a selector"),
        (counted("prometheus: {good: 'a[5m]', total: a}"), "an expression, not a selector"),
        (counted("prometheus: {good: 'a{b=\"c\"} offset 5m', total: a}"), "an expression, not a selector"),
        (counted("prometheus: {good: a, total: 'a / b'}"), "an expression, not a selector"),
        (counted("prometheus: {good: a, total: 'sum(a)'}"), "an expression, not a selector"),
        (counted("prometheus: {good: '{job=\"x\"}', total: a}"), "not a selector of a counter"),
        (counted("prometheus: {good: '', total: a}"), "not a selector of a counter"),
        (counted("prometheus: {good: a, total: a}"), "every event would be good"),
        (counted("prometheus: {good: 'a{b=~\"(\"}', total: a}"), "not a regular expression"),
        (counted("prometheus: {good: 'a{b=c}', total: a}"), "not labels of a selector"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a, versionLabel: replica}"), "among replicaLabels"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a, versionLabel: a-b}"), "versionLabel"),
        (counted("prometheus: {good: 'a{b=\"c\"}', total: a, query: x}"), "query"),
        (counted("prometheus: {good: 'a{b=\"c\"}'}"), "total"),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_file_is_read(tmp_path: Path, objective: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("{", r"\{")) as caught:
        load(tmp_path, objective)
    assert "objectives.yaml" in str(caught.value)


def test_a_selector_matches_as_prometheus_does() -> None:
    selector = parse_selector(""" a_total { code !~ "5..|429", path='/x"', } """)
    assert selector.matches("a_total", {"code": "200", "path": '/x"'})
    assert selector.matches("a_total", {"path": '/x"'})  # a label that is not there is empty
    assert not selector.matches("a_total", {"code": "503", "path": '/x"'})
    assert selector.matches("a_total", {"code": "5033", "path": '/x"'})  # anchored at both ends
    assert not selector.matches("b_total", {"code": "200", "path": '/x"'})
    assert str(selector) == r'a_total{code!~"5..|429",path="/x\""}'


def test_a_selector_that_only_asks_for_more_narrows_another() -> None:
    total, good = parse_selector('a{s="x"}'), parse_selector('a{c="1",s="x"}')
    assert good.narrows(total) == {Matcher("c", Operator.EQUAL, "1")}
    assert total.narrows(good) is None
    assert parse_selector('b{s="x"}').narrows(total) is None


labels = st.from_regex(r"[a-z]\w{0,5}", fullmatch=True).filter(lambda label: label.isascii())
matchers = st.builds(
    Matcher, labels, st.sampled_from([Operator.EQUAL, Operator.NOT_EQUAL]), st.text(max_size=8).filter(str.isprintable)
)


@given(st.builds(Selector, st.just("a_total"), st.frozensets(matchers, max_size=4)))
def test_a_selector_survives_being_written_and_read(selector: Selector) -> None:
    assert parse_selector(str(selector)) == selector


@given(st.text(max_size=60) | st.text(alphabet='ab{}=~!",\\[5m]()', max_size=40).map("a".__add__))
def test_any_text_is_a_selector_or_a_clear_error(text: str) -> None:
    try:
        parse_selector(text)
    except EndcapError as error:
        assert error.next_step
