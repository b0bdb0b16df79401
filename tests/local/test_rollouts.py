"""Rollouts on real model servers behind a real Envoy under real load: what a team relies on when it ships a model."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from endcap.files import read_json_lines
from endcap.objectives import Good, Objective, Objectives
from endcap.records import RequestRecord, read_requests
from loadtests.client import SHOPPER_HEADER
from loadtests.run import LoadConfig, LoadProcess, start_load
from serving.rollout.audit import LOOK, Decision
from serving.rollout.commands import ask
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.events import Command
from serving.rollout.looks import observation_from_json
from serving.rollout.spec import RolloutSpec, ShadowSpec, Step
from serving.rollout.state import Outcome, State
from serving.rollout.store import DECISIONS_FILE, LOOKS_FILE, load_state
from serving.targets import LocalTarget, ModelVersion, StableVersion, StickyKey, SupervisorConfig, start_local_target
from serving.targets.local import open_target
from tests.local.load import eventually
from tests.packages import ITEMS, make_package

Served = tuple[Path, LocalTarget, LoadProcess]

WINDOW_S = 1.5
"""How long a click may take: the target's and the objective's alike."""
OBJECTIVES = Objectives(
    "recommender", "recommender",
    (
        Objective("availability", 0.9, Good.ANSWERED, None, None, 0.05, None),
        Objective("click-through", 0.1, Good.CLICKED, None, WINDOW_S, None, 0.5),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "recommender", "recommender", "models:/recommender/2", "recommender",
    (Step(0.2, 30, 1, 90), Step(0.5, 50, 1, 120), Step(1.0, 30, 0.5, 60)), 0.05, 0.05, 0.5,
    sticky=StickyKey(header=SHOPPER_HEADER),
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
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("rollouts")
    stable = make_package(root / "stable")
    config = SupervisorConfig(
        folder=root / "target", records=root / "records", public_key=root / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=stable), window_s=WINDOW_S, replicas_full=1,
    )  # fmt: skip
    write_shoppers(root / "shoppers.jsonl")
    with start_local_target(config) as target:
        load = start_load(
            LoadConfig(shoppers=root / "shoppers.jsonl", out=root / "records", target=target.folder, rate_rps=100,
                       k=1, thresholds=False)
        )  # fmt: skip
        try:
            load.wait_until_answered()
            yield root, target, load
        finally:
            if load.running():
                load.kill()


def folder_of(root: Path, label: str) -> Path:
    return root / f"rollout-{label}"


def run(
    root: Path, target: LocalTarget, label: str, package: Path, *, spec: RolloutSpec = SPEC,
    on_decision: Callable[[Decision], None] | None = None,
) -> RolloutResult:  # fmt: skip
    asked = replace(spec, candidate=f"models:/recommender/{label}")
    return run_rollout(asked, OBJECTIVES, ModelVersion(label, package), target, folder_of(root, label),
                       packages=target.state().versions, on_decision=on_decision)  # fmt: skip


def state_of(root: Path, label: str) -> State:
    state = load_state(folder_of(root, label))
    assert state is not None
    return state


def requests_during(root: Path, label: str) -> list[RequestRecord]:
    """What the load's shoppers asked for while the rollout ran, and were answered; the load is at work beyond it."""
    state = state_of(root, label)
    ended_at_s = state.ended_at_s or float("inf")
    found: list[RequestRecord] = []

    def kept() -> bool:
        found[:] = [record for record in read_requests(root / "records") if record.kind == "recommend"]
        return bool(found) and found[-1].intended_s > ended_at_s + 0.5

    eventually(kept, what="the load goes on")
    return [record for record in found if state.started_at_s <= record.intended_s <= ended_at_s]


class Panel:
    """Shoppers who come again at every decision that changes something."""

    def __init__(self, client: httpx.Client, *, shoppers: int = 60) -> None:
        self._client = client
        self.answered_by: dict[str, list[str]] = {f"panel-{number}": [] for number in range(shoppers)}

    def ask_again(self, decided: Decision) -> None:
        if decided.action == LOOK:
            return
        for shopper, versions in self.answered_by.items():
            body = {"shopper": shopper, "history": [ITEMS[3]], "k": 1}
            answer = self._client.post("/v1/recommend", json=body, headers={SHOPPER_HEADER: shopper})
            assert answer.status_code == 200
            versions.append(answer.headers["x-endcap-version"])


def test_a_tampered_package_gets_no_traffic(served: Served) -> None:
    root, target, _ = served
    package = make_package(root / "tampered")
    graph = bytearray((package / "model.onnx").read_bytes())
    graph[-5] ^= 1
    (package / "model.onnx").write_bytes(graph)
    result = run(root, target, "tampered", package)
    assert result.outcome is Outcome.REFUSED
    assert "does not verify" in result.reason
    assert "version-tampered" not in {line["cluster"] for line in read_json_lines(root / "records" / "attempts.jsonl")}
    assert target.observe().shares == {result.stable: 1.0}


def test_a_fast_healthy_and_wrong_version_is_rolled_back_by_what_shoppers_click(served: Served) -> None:
    root, target, _ = served
    wrong = list(ITEMS)
    random.Random(1).shuffle(wrong)
    result = run(root, target, "wrong", make_package(root / "wrong", items=wrong))
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("click-through")
    assert target.observe().shares == {result.stable: 1.0}


def test_a_version_that_fails_for_some_is_rolled_back_though_retries_hide_it(served: Served) -> None:
    root, target, _ = served
    result = run(root, target, "failing", make_package(root / "failing", fails_on=ITEMS[20:26]))
    assert result.outcome is Outcome.ROLLED_BACK
    assert result.reason.startswith("availability")
    assert target.healthy() == {result.stable: 2}


def test_an_abort_in_the_middle_brings_all_traffic_back_and_no_request_fails(served: Served) -> None:
    root, target, _ = served

    def abort_at_half(decided: Decision) -> None:
        if decided.action == "observing" and decided.after.step == 1:
            ask(folder_of(root, "aborted"), Command.ABORT, by="ada")

    result = run(root, target, "aborted", make_package(root / "aborted"), on_decision=abort_at_half)
    assert (result.outcome, result.reason) == (Outcome.ABORTED, "aborted by ada")
    assert target.observe().shares == {result.stable: 1.0}
    assert target.healthy() == {result.stable: 2}
    during = requests_during(root, "aborted")
    assert {record.version for record in during} == {result.stable, "aborted"}
    assert [record for record in during if record.failed] == []
    ended_at_s = state_of(root, "aborted").ended_at_s or 0
    later = {record.version for record in read_requests(root / "records") if record.sent_s > ended_at_s}
    assert later - {None} == {result.stable}


def test_shadowed_first_a_good_version_is_promoted_and_shoppers_keep_their_version(served: Served) -> None:
    root, target, _ = served
    spec = replace(SPEC, shadow=ShadowSpec(0.5, 40, 60, 0.9))
    with httpx.Client(base_url=target.url) as client:
        panel = Panel(client)
        result = run(root, target, "good", make_package(root / "good"), spec=spec, on_decision=panel.ask_again)
    assert result.outcome is Outcome.PROMOTED
    assert target.observe().shares == {"good": 1.0}
    assert set(target.healthy()) == {"good"}
    during = requests_during(root, "good")
    assert {record.version for record in during} == {result.stable, "good"}

    # Its answers to copies were compared, the same package's are the same, and shoppers got none of them.
    lines = list(read_json_lines(folder_of(root, "good") / DECISIONS_FILE))
    grown = next(line for line in lines if line["phase"] == "growing")
    assert grown["shadow"]["pairs"] >= 40
    assert grown["shadow"]["overlap"] == 1.0
    looks = [observation_from_json(line) for line in read_json_lines(folder_of(root, "good") / LOOKS_FILE)]
    shadowed = [look.versions["good"] for look in looks if look.at_s <= grown["at_s"] and "good" in look.versions]
    assert shadowed
    assert {(v.attempts.total, v.impressions.total, v.impressions_open) for v in shadowed} == {(0, 0, 0)}
    assert "good" not in {record.version for record in during if record.done_s < grown["at_s"]}

    # Growing shares move shoppers to the candidate alone, and each step moves some of them.
    moved = [versions.index("good") for versions in panel.answered_by.values()]
    for versions, at in zip(panel.answered_by.values(), moved, strict=True):
        assert versions == [result.stable] * at + ["good"] * (len(versions) - at)
    assert len(set(moved)) == len(spec.steps)


def engine(root: Path, target: Path, label: str, package: Path) -> None:
    """A process of its own that runs the rollout."""
    run(root, open_target(target), label, package)


def test_an_engine_killed_in_the_middle_is_gone_on_with_to_promotion(served: Served) -> None:
    root, target, _ = served
    package = make_package(root / "resumed")
    process = multiprocessing.get_context("spawn").Process(
        target=engine, args=(root, target.folder, "resumed", package), daemon=True
    )
    process.start()

    def in_the_middle() -> bool:
        state = load_state(folder_of(root, "resumed"))
        return state is not None and state.step == 1

    eventually(in_the_middle, within_s=60)
    process.kill()
    process.join()
    left = state_of(root, "resumed")
    assert not left.ended
    token = target.state().token
    result = run(root, target, "resumed", package)
    assert (result.outcome, result.canary) == (Outcome.PROMOTED, "resumed")
    assert target.state().token > token
    assert target.observe().shares == {"resumed": 1.0}
    assert set(target.healthy()) == {"resumed"}
    ended = state_of(root, "resumed")
    assert ended.started_at_s == left.started_at_s
    during = requests_during(root, "resumed")
    assert {record.version for record in during} == {result.stable, "resumed"}
    assert [record for record in during if record.failed] == []


def test_no_shopper_s_request_failed_while_good_versions_came_and_went(served: Served) -> None:
    root, _, load = served
    load.stop()  # and what was in flight is waited for, so that none is missing
    records = [record for record in read_requests(root / "records") if record.kind == "recommend"]
    for label in ("aborted", "good", "resumed"):
        state = state_of(root, label)
        during = [r for r in records if state.started_at_s <= r.intended_s <= (state.ended_at_s or 0)]
        assert len(during) > 100
        assert [record for record in during if record.failed] == []
