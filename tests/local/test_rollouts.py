"""Rollouts on real model servers behind a real Envoy under real load: what a team relies on when it ships a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from endcap.files import read_json_lines
from endcap.objectives import Good, Objective, Objectives
from endcap.records import read_requests
from loadtests.run import LoadConfig, LoadProcess, start_load
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome
from serving.targets import LocalTarget, ModelVersion, StableVersion, SupervisorConfig, start_local_target
from tests.packages import ITEMS, make_package

OBJECTIVES = Objectives(
    "recommender", "recommender",
    (
        Objective("availability", 0.9, Good.ANSWERED, None, None, 0.05, None),
        Objective("click-through", 0.1, Good.CLICKED, None, 2.0, None, 0.3),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "recommender", "recommender", "models:/recommender/2", "recommender",
    (Step(0.1, 30, 2, 90), Step(0.5, 100, 3, 120), Step(1.0, 50, 1, 60)), 0.05, 0.05, 0.5,
)  # fmt: skip


def write_shoppers(path: Path) -> None:
    """Shoppers of whom four in ten next buy what follows their newest item in the table: what the package answers."""
    draw = random.Random(3)
    lines = []
    for shopper in range(400):
        bought = draw.sample(range(len(ITEMS)), 4)
        following = (bought[-1] + 1) % len(ITEMS)
        if draw.random() > 0.4 or following in bought:
            following = draw.choice([item for item in range(len(ITEMS)) if item not in bought])
        record = {"shopper": str(shopper), "history": [ITEMS[i] for i in bought], "next": ITEMS[following]}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LocalTarget, LoadProcess]]:
    root = tmp_path_factory.mktemp("rollouts")
    stable = make_package(root / "stable")
    config = SupervisorConfig(
        folder=root / "target", records=root / "records", public_key=root / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=stable), window_s=2.0, replicas_full=1,
    )  # fmt: skip
    write_shoppers(root / "shoppers.jsonl")
    with start_local_target(config) as target:
        load = start_load(
            LoadConfig(shoppers=root / "shoppers.jsonl", out=root / "records", target=target.folder, rate_rps=80,
                       k=1, thresholds=False)
        )  # fmt: skip
        try:
            load.wait_until_answered()
            yield root, target, load
        finally:
            if load.running():
                load.kill()


def roll(served: tuple[Path, LocalTarget, LoadProcess], label: str, package: Path) -> RolloutResult:
    root, target, _ = served
    spec = replace(SPEC, candidate=f"models:/recommender/{label}")
    packages = target.state().versions
    return run_rollout(
        spec, OBJECTIVES, ModelVersion(label, package), target, root / f"rollout-{label}", packages=packages
    )


def test_a_tampered_package_gets_no_traffic(served: tuple[Path, LocalTarget, LoadProcess]) -> None:
    root, target, _ = served
    package = make_package(root / "tampered")
    graph = bytearray((package / "model.onnx").read_bytes())
    graph[-5] ^= 1
    (package / "model.onnx").write_bytes(graph)
    result = roll(served, "tampered", package)
    assert result.outcome is Outcome.REFUSED
    assert "does not verify" in result.reason
    assert "tampered" not in {line["cluster"] for line in read_json_lines(root / "records" / "attempts.jsonl")}
    assert target.observe().shares == {result.stable: 1.0}


def test_a_fast_healthy_and_wrong_version_is_rolled_back_by_what_shoppers_click(
    served: tuple[Path, LocalTarget, LoadProcess],
) -> None:
    root, target, _ = served
    wrong = list(ITEMS)
    random.Random(1).shuffle(wrong)
    result = roll(served, "wrong", make_package(root / "wrong", items=wrong))
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("click-through")
    assert target.observe().shares == {result.stable: 1.0}


def test_a_version_that_fails_for_some_is_rolled_back_though_retries_hide_it(
    served: tuple[Path, LocalTarget, LoadProcess],
) -> None:
    root, target, _ = served
    result = roll(served, "failing", make_package(root / "failing", fails_on=ITEMS[20:26]))
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("availability")
    assert target.healthy() == {result.stable: 2}


def test_a_good_version_is_promoted_and_no_request_fails(served: tuple[Path, LocalTarget, LoadProcess]) -> None:
    root, target, load = served
    result = roll(served, "good", make_package(root / "good"))
    assert result.outcome is Outcome.PROMOTED
    assert target.observe().shares == {"good": 1.0}
    assert set(target.healthy()) == {"good"}
    summary = load.stop()
    assert summary.requests > 500
    state = json.loads((root / "rollout-good" / "state.json").read_text())
    during = [
        record
        for record in read_requests(root / "records")
        if record.kind == "recommend" and state["started_at_s"] <= record.intended_s <= state["ended_at_s"]
    ]
    assert {record.version for record in during} == {"1", "good"}
    assert [record for record in during if record.failed] == []
