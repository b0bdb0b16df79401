"""What the API server itself refuses of the files that people write, and what it shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from endcap.objectives import ObjectivesDocument
from serving.operator.crds import crds
from serving.rollout.spec import RolloutDocument
from tests.cluster.access import Access

SPEC: dict[str, Any] = {"service": "shop", "candidate": "models:/shop/2"}
UP = {"name": "up", "goal": 0.9, "good": "answered"}
OBJECTIVES: dict[str, Any] = {"service": "shop", "objectives": [UP]}
CHART = Path(__file__).parents[2] / "charts" / "endcap" / "crds"


@pytest.fixture(scope="module", autouse=True)
def installed(control_plane: Access) -> None:
    control_plane.kubectl("apply", "--server-side", "-f", str(CHART))
    for name in crds():
        crd = f"crd/{crds()[name]['metadata']['name']}"
        control_plane.kubectl("wait", "--for=condition=Established", crd, "--timeout=60s")


def document(kind: str, spec: dict[str, Any], name: str = "shop") -> dict[str, Any]:
    return {"apiVersion": "endcap.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}


def applied(access: Access, namespace: str, kind: str, spec: dict[str, Any], *, name: str = "shop") -> str:
    """What is said against it; empty where it is taken."""
    ended = access.try_kubectl("apply", "--namespace", namespace, "-f", "-",
                               stdin=yaml.safe_dump(document(kind, spec, name)))  # fmt: skip
    return "" if ended.returncode == 0 else ended.stderr


def steps(*shares: float, **more: Any) -> list[dict[str, Any]]:
    return [{"share": share, **more} for share in shares]


BAD_ROLLOUTS = {
    "shares that do not grow": ({"steps": steps(0.5, 0.2, 1)}, "each share must be greater"),
    "the same share twice": ({"steps": steps(0.5, 0.5, 1)}, "each share must be greater"),
    "a last share below 1": ({"steps": steps(0.1, 0.5)}, "the last share must be 1"),
    "nothing to compare with": ({"steps": steps(1)}, "a share below 1 is needed first"),
    "a share of nothing": ({"steps": steps(0, 1)}, "at least 0.0001"),
    "more time than is allowed": ({"steps": steps(0.1, 1, minSeconds=90, maxSeconds=60)}, "maxSeconds is below"),
    "more time than the default": ({"steps": steps(0.1, 1, minSeconds=4000)}, "maxSeconds is below"),
    "looks without a pause": ({"lookSeconds": 0}, "at least 0.1"),
    "no margin": ({"margins": {"up": {"relative": 0}}}, "greater than 0"),
    "two margins": ({"margins": {"up": {"relative": 0.1, "absolute": 0.1}}}, "absolute or relative"),
    "an empty margin": ({"margins": {"up": {}}}, "absolute or relative"),
    "an objective's name": ({"margins": {"Up!": {"relative": 0.1}}}, "an objective's name is the key"),
    "a primary without ab": ({"primary": "up"}, "primary goes with mode: ab"),
    "ab without a primary": ({"mode": "ab"}, "mode: ab needs primary"),
    "ab in three steps": ({"mode": "ab", "primary": "up", "steps": steps(0.1, 0.5, 1)}, "two steps"),
    "ab with a baseline": ({"mode": "ab", "primary": "up", "baseline": True}, "baseline goes with mode: canary"),
    "ab without stickiness": ({"mode": "ab", "primary": "up", "sticky": {}}, "mode: ab needs sticky"),
    "two sticky keys": ({"sticky": {"header": "a", "cookie": "b"}}, "give header or cookie"),
    "a freeze without a zone": ({"freeze": [{"from": "2026-12-24T00:00:00", "until": "2026-12-27T00:00:00Z"}]},
                                "dates with their zone"),
    "a weekly freeze by dates": ({"freeze": [{"days": ["friday"], "from": "2026-12-24T00:00:00Z", "until": "08:00"}]},
                                 "times such as"),
    "an unknown day": ({"freeze": [{"days": ["someday"], "from": "18:00", "until": "08:00"}]}, "Unsupported value"),
    "an unknown mode": ({"mode": "blue"}, "Unsupported value"),
    "a number that is a text": ({"alpha": "much"}, "must be of type number"),
    "a name that is none": ({"service": "Shop"}, "should match"),
    "an alpha of a coin": ({"alpha": 0.5}, "less than 0.5"),
    "an address that is none": ({"prometheus": {"url": "ftp://x"}}, "should match"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_ROLLOUTS))
def test_a_rollout_that_the_models_refuse_is_refused(name: str, control_plane: Access, namespace: str) -> None:
    change, because = BAD_ROLLOUTS[name]
    assert because in applied(control_plane, namespace, "Rollout", {**SPEC, **change})
    with pytest.raises(ValidationError):
        RolloutDocument.model_validate(document("Rollout", {**SPEC, **change}))


def test_an_unknown_field_is_refused(control_plane: Access, namespace: str) -> None:
    assert 'unknown field "spec.canditate"' in applied(control_plane, namespace, "Rollout", {**SPEC, "canditate": "x"})


GOOD_ROLLOUTS = [
    {}, {"steps": steps(0.05, 0.5, 1, minRequests=500)}, {"sticky": {}}, {"sticky": {"cookie": "shopper"}},
    {"mode": "ab", "primary": "up", "steps": steps(0.5, 1)}, {"margins": {"click-through": {"relative": 0.2}}},
    {"freeze": [{"from": "2026-12-24T00:00:00Z", "until": "2026-12-27T00:00:00+01:00", "reason": "holidays"},
                {"days": ["friday"], "from": "18:00", "until": "8:00", "timezone": "Europe/Berlin"}]},
    {"shadow": {"share": 0.2, "minOverlap": 0.5}, "gates": {"requests": "/data/recorded.jsonl"}, "baseline": True},
    {"inconclusive": {"holdSeconds": 0}, "notify": {"webhookFrom": "URL"}, "prometheus": {"url": "http://prom:9090"}},
]  # fmt: skip


@pytest.mark.parametrize("change", GOOD_ROLLOUTS, ids=[", ".join(change) or "least" for change in GOOD_ROLLOUTS])
def test_what_is_taken_is_what_the_models_take(change: dict[str, Any], control_plane: Access, namespace: str) -> None:
    assert applied(control_plane, namespace, "Rollout", {**SPEC, **change}) == ""
    kept = control_plane.get("rollout", "shop", "--namespace", namespace)["spec"]
    asked = RolloutDocument.model_validate(document("Rollout", {**SPEC, **change}))
    assert RolloutDocument.model_validate(document("Rollout", kept)) == asked, "nothing was added or dropped"


def test_a_rollout_keeps_its_service_and_may_get_another_candidate(control_plane: Access, namespace: str) -> None:
    assert applied(control_plane, namespace, "Rollout", SPEC) == ""
    assert "keeps its service" in applied(control_plane, namespace, "Rollout", {**SPEC, "service": "other"})
    assert applied(control_plane, namespace, "Rollout", {**SPEC, "candidate": "models:/shop/3"}) == ""
    assert "63 characters" in applied(control_plane, namespace, "Rollout", SPEC, name="a" * 64)


BAD_OBJECTIVES = {
    "a click without a window": ([{**UP, "good": "clicked"}], "needs windowSeconds"),
    "a window without a click": ([{**UP, "windowSeconds": 5}], "windowSeconds goes with good: clicked"),
    "a click in time": ([{**UP, "good": "clicked", "windowSeconds": 5, "withinMs": 9}], "withinMs goes with"),
    "two margins": ([{**UP, "margin": 0.1, "marginRelative": 0.1}], "not both"),
    "nothing that counts": ([{**UP, "good": "counted"}], "needs one of prometheus"),
    "two that count": ([{**UP, "good": "counted", "envoy": {}, "metrics": {"good": "a", "total": "b"}}],
                       "needs one of prometheus"),
    "counted twice": ([{**UP, "envoy": {}}], "they go with nothing else"),
    "two of a name": ([UP, UP], "Duplicate value"),
    "a goal of all": ([{**UP, "goal": 1}], "less than 1"),
    "none": ([], "at least 1"),
    "two windows": ([{"name": "a", "goal": 0.1, "good": "clicked", "windowSeconds": 5},
                     {"name": "b", "goal": 0.1, "good": "clicked", "windowSeconds": 6}], "one window"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_OBJECTIVES))
def test_objectives_that_the_models_refuse_are_refused(name: str, control_plane: Access, namespace: str) -> None:
    found, because = BAD_OBJECTIVES[name]
    spec = {**OBJECTIVES, "objectives": found}
    assert because in applied(control_plane, namespace, "Objectives", spec)
    with pytest.raises(ValidationError):
        ObjectivesDocument.model_validate(document("Objectives", spec))


def test_objectives_are_taken_and_rollouts_are_listed(control_plane: Access, namespace: str) -> None:
    click = {"name": "click", "goal": 0.05, "good": "clicked", "windowSeconds": 10, "marginRelative": 0.1}
    baskets = {"name": "baskets", "goal": 0.3, "good": "counted", "prometheus": {"good": "a_total", "total": "b_total"}}
    spec = {**OBJECTIVES, "objectives": [UP, click, baskets]}
    assert applied(control_plane, namespace, "Objectives", spec) == ""
    assert applied(control_plane, namespace, "Rollout", SPEC) == ""
    status = '{"status": {"phase": "observing", "step": "2/4", "share": "25%", "verdict": "pass"}}'
    where = ("--namespace", namespace, "--subresource=status", "--type=merge")
    control_plane.kubectl("patch", "ro", "shop", *where, "-p", status)
    listed = control_plane.kubectl("get", "ro", "--namespace", namespace)
    assert listed.split()[:6] == ["NAME", "PHASE", "STEP", "SHARE", "VERDICT", "AGE"]
    assert listed.split()[6:11] == ["shop", "observing", "2/4", "25%", "pass"]
    explained = control_plane.kubectl("explain", "rollout.spec.candidate")
    assert "models:/NAME/VERSION" in explained
