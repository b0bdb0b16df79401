"""What the parts of endcap write is what a report reads: their own writers, no copies of their formats."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from components.evaluation import Ranked, evaluate, with_measured
from components.export.compress import measure_compression
from endcap.evidence import Counts, Evidence, Stratum
from endcap.files import write_json
from endcap.objectives import load_objectives
from endcap.report import build
from endcap.report.run import read_run
from serving.rollout.audit import Decision, decision_record
from serving.rollout.decide import begin
from serving.rollout.events import Command, Commanded, Looked, Received
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome, Phase
from tests.run_folder import OBJECTIVES

SPEC = RolloutSpec(
    name="r", service="recommender", candidate="models:/recommender/2", objectives="recommender",
    steps=(Step(0.05, 10, 1, 60), Step(1.0, 10, 1, 60)), alpha=0.05, beta=0.05, look_s=1.0,
)  # fmt: skip


def test_a_rollout_as_the_engine_records_it(tmp_path: Path) -> None:
    (tmp_path / "objectives.yaml").write_text(OBJECTIVES)
    evidence = Evidence.start(load_objectives(tmp_path / "objectives.yaml"))
    growing = begin(SPEC, stable="1", canary="2", now_s=100.0)
    observing = growing.with_(phase=Phase.OBSERVING, intent=())
    done = observing.with_(
        phase=Phase.DONE, outcome=Outcome.ROLLED_BACK, reason="availability", ended_at_s=104.5, intent=()
    )
    home = tmp_path / "rollouts" / "01-2"
    home.mkdir(parents=True)
    lines = [decision_record(SPEC, Decision(None, None, growing, 100.0, evidence))]
    for second in range(1, 4):
        bad = Stratum(Counts(10, 40), Counts(399, 400))
        evidence = evidence.update({"availability": bad})
        looked = Looked(evidence.verdict, "", Received(40 * second, 40 * second, 440 * second))
        lines.append(decision_record(SPEC, Decision(observing, looked, observing, 100.0 + second, evidence)))
    paused = observing.with_(paused_at_s=103.5, waiting="paused by ann", seq=3)
    asked = Commanded(Command.PAUSE, "ann", 1)
    lines.append(decision_record(SPEC, Decision(observing, asked, paused, 103.5, evidence)))
    lines.append(decision_record(SPEC, Decision(observing, looked, done, 104.5, evidence)))
    (home / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(home / "state.json", done.to_json())

    (rollout,) = read_run(tmp_path).rollouts
    assert (rollout.stable, rollout.canary, rollout.verdict) == ("1", "2", "rolled_back")
    assert [decision.share for decision in rollout.decisions] == [None, 0.05, 0.05, 0.05, 0.05, 0.0]
    last = rollout.decisions[-1].evidence["availability"]
    assert (last.canary.good, last.canary.total, last.verdict) == (30, 120, "fail")
    (summary,) = build(tmp_path).rollouts
    assert (summary.seconds, summary.reason) == (4.5, "availability")
    page = (tmp_path / "report.html").read_text()
    assert "availability: <span" in page
    # The engine's intervals reach 25 points to either side; what lies beyond is said to be beyond.
    assert "points, interval below −" in page


def test_an_evaluation_as_the_pipeline_writes_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    shoppers = 60
    ranked = [
        Ranked(name, rng.integers(1, reach, shoppers), rng.integers(1, 40, (shoppers, 20)))
        for name, reach in (("popularity", 200), ("item-knn", 40), ("transformer", 20))
    ]
    histories = [rng.integers(1, 40, length) for length in rng.integers(1, 30, shoppers)]
    found = evaluate(
        ranked, split="test", histories=histories, purchases=np.ones(41), pairs=[("transformer", "item-knn")],
        resamples=50,
    )  # fmt: skip
    file = tmp_path / "graph"
    file.write_bytes(b"0" * 1000)
    small = measure_compression(ranked[2], ranked[1], float32_file=file, int8_file=file, seed=7)
    found = with_measured(found, int8=asdict(small), parity={"shoppers": 60, "identical_share": 1.0})
    write_json(tmp_path / "evaluation.json", found.to_json())
    write_json(tmp_path / "training.json", {"seconds": 2.0, "epochs": 1, "curve": [], "stopped_early": False})

    summary = build(tmp_path).training
    assert summary is not None
    assert summary.transformer_ndcg_at_10 == summary.ndcg_at_10 == found.value("transformer")
    assert summary.knn_ndcg_at_10 == found.value("item-knn")
    page = (tmp_path / "report.html").read_text()
    assert "better than item-knn" in page
    assert "int8 size" in page
