"""The gates as a rollout runs them: a real child, real graphs, real model servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from endcap.errors import InputError
from endcap.evidence import Verdict
from endcap.objectives import Good, Objective, Objectives
from endcap.package import ensure_signing_key
from serving.gates import GateReport, GateSettings, run_gates
from tests.packages import ITEMS, make_package
from tests.process import wait_until

SETTINGS = GateSettings(segment_min_shoppers=50, max_shoppers=200, replayed_requests=60)
OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.999, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.9, Good.ANSWERED, 1000, None, 0.01, None),
    ),
)  # fmt: skip
FOREVER = 2_000_000_000


STALLING = 9
"""An item that is in one history of the small sample, and not the first, which servers warm up with."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gates")
    make_package(root / "stable")
    lines = []
    for shopper in range(200):
        # Every second one buys what follows their newest item in the table: what the package answers.
        bought = [ITEMS[(shopper + step) % len(ITEMS)] for step in (0, 7, 20)]
        following = ITEMS[(shopper + (21 if shopper % 2 else 18)) % len(ITEMS)]
        lines.append(json.dumps({"shopper": str(shopper), "history": bought, "next": following}))
    (root / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return root


def gates(root: Path, candidate: Path, folder: Path, *, settings: GateSettings = SETTINGS,
          deadline_s: float = 120.0) -> GateReport:  # fmt: skip
    return run_gates(
        settings, candidate, root / "stable", root / "keys" / "signing.pub", OBJECTIVES,
        requests=root / "requests.jsonl", folder=folder, deadline_s=deadline_s,
    )  # fmt: skip


def verdicts(report: GateReport) -> dict[str, Verdict]:
    return {gate.name: gate.verdict for gate in report.gates}


def test_the_same_package_passes_and_is_not_run_twice(root: Path, tmp_path: Path) -> None:
    candidate = make_package(root / "same")
    report = gates(root, candidate, tmp_path)
    assert report.passed, report.reason
    assert set(verdicts(report)) == {"verify", "offline", "segments", "replay"}
    assert verdicts(report)["offline"] is Verdict.PASS
    assert report.gates[1].figures["shoppers"] == 200
    assert report.gates[3].figures["mean_overlap_with_stable"] == 1.0
    log = (tmp_path / "gates.log").read_text()
    assert gates(root, candidate, tmp_path) == report
    assert (tmp_path / "gates.log").read_text() == log, "the kept report was used"
    assert gates(root, candidate, tmp_path / "anew").gates[:3] == report.gates[:3], "the same seed, the same figures"


def test_wrong_items_fail_offline_and_pass_the_replay(root: Path, tmp_path: Path) -> None:
    report = gates(root, make_package(root / "permuted", items=[*ITEMS[::3], *ITEMS[1::3], *ITEMS[2::3]]), tmp_path)
    found = verdicts(report)
    assert (found["verify"], found["offline"], found["segments"]) == (Verdict.PASS, Verdict.FAIL, Verdict.FAIL)
    assert report.gates[3].passed
    assert report.reason.startswith("offline: worse than stable by more than 5%: NDCG@10 ")
    assert not report.passed


def test_a_graph_that_fails_for_some_items_fails_the_replay(root: Path, tmp_path: Path) -> None:
    report = gates(root, make_package(root / "failing", fails_on=[ITEMS[5]]), tmp_path)
    assert "answered 500" in report.gates[3].reason
    assert report.gates[3].verdict is Verdict.FAIL
    assert report.gates[1].figures["candidate_failed"] > 0


def test_a_package_that_does_not_verify_is_never_loaded(root: Path, tmp_path: Path) -> None:
    candidate = make_package(root / "tampered")
    graph = candidate / "model.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0")
    report = gates(root, candidate, tmp_path)
    assert report.reason == "verify: the signature does not verify: model.onnx changed after signing"
    assert [gate.reason for gate in report.gates[1:]] == ["not run: the package is refused"] * 3
    other = gates(root, make_package(root / "short", top_k=5), tmp_path)
    assert other.reason == "verify: its top_k is 5, stable's is 20"


def test_without_recorded_requests_only_the_package_is_verified(root: Path, tmp_path: Path) -> None:
    report = run_gates(
        SETTINGS, make_package(root / "alone"), root / "stable", root / "keys" / "signing.pub", OBJECTIVES,
        requests=None, folder=tmp_path,
    )  # fmt: skip
    assert report.passed
    assert verdicts(report)["verify"] is Verdict.PASS
    assert [gate.reason for gate in report.gates[1:]] == ["not run: no recorded requests"] * 3


def test_a_slow_graph_fails_beside_stable(root: Path, tmp_path: Path) -> None:
    # A run that would never end is ended after the server's two seconds: an error, by the server's own clock.
    candidate = make_package(root / "stalling", stalls_on=ITEMS[STALLING:][:1], stall_loops=FOREVER)
    report = gates(root, candidate, tmp_path, settings=replace(SETTINGS, max_shoppers=20, replayed_requests=20))
    replay = report.gates[3]
    assert replay.verdict is Verdict.FAIL
    assert "answered 504" in replay.reason
    assert replay.figures["stable"]["answered"] == 20


def test_gates_that_hang_fail_at_the_deadline_and_leave_no_process(root: Path, tmp_path: Path) -> None:
    candidate = make_package(root / "hanging", stalls_on=ITEMS, stall_loops=FOREVER)
    report = gates(root, candidate, tmp_path, deadline_s=10.0)
    assert not report.passed
    assert "not done within 10 s" in report.reason
    assert sum("not run" in gate.reason for gate in report.gates) >= 1
    wait_until(lambda: processes_of(root / "hanging") + processes_of(tmp_path / "gates") == [], "all have ended")


def processes_of(package: Path) -> list[int]:
    """Processes that name the package among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(package) in arguments:
                found.append(int(entry.name))
    return found


def test_a_child_that_is_killed_is_a_failed_gate(root: Path, tmp_path: Path) -> None:
    candidate = make_package(root / "deadly", stalls_on=ITEMS, stall_loops=FOREVER)
    program = (
        "import sys; from pathlib import Path; from tests.local.test_gates_process import gates;"
        "report = gates(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]));"
        "sys.stdout.write(report.reason)"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", program, str(root), str(candidate), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: running(tmp_path) == "offline", "the candidate is being scored")
        (child,) = processes_of(tmp_path / "gates" / "job.json")
        os.kill(child, signal.SIGKILL)
        reason, _ = engine.communicate(timeout=60)
    finally:
        engine.kill()
        engine.wait()
    assert reason.startswith("offline: the process ended (killed by SIGKILL); its last words: ")


def test_an_engine_that_is_killed_leaves_nothing_and_the_next_one_starts_over(root: Path, tmp_path: Path) -> None:
    candidate = make_package(root / "cut", stalls_on=ITEMS, stall_loops=FOREVER)
    program = (
        "import sys; from pathlib import Path; from tests.local.test_gates_process import gates;"
        "gates(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))"
    )
    engine = subprocess.Popen([sys.executable, "-c", program, str(root), str(candidate), str(tmp_path)])
    try:
        wait_until(lambda: running(tmp_path) == "offline", "the candidate is being scored")
    finally:
        engine.kill()
        engine.wait()
    wait_until(lambda: processes_of(tmp_path / "gates") == [], "the gates ended with the engine")
    assert not (tmp_path / "gates.json").exists()
    assert gates(root, make_package(root / "cut-good"), tmp_path).passed


def running(folder: Path) -> str | None:
    try:
        return json.loads((folder / "gates" / "result.json").read_text())["running"]
    except (FileNotFoundError, ValueError):
        return None


def test_what_the_person_gave_is_an_error_and_no_verdict(root: Path, tmp_path: Path) -> None:
    key = root / "keys" / "signing.pub"
    candidate = make_package(root / "fine")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"shopper": "1", "history": ["100"], "next": "101"}\nnonsense\n')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2"):
        run_gates(SETTINGS, candidate, root / "stable", key, OBJECTIVES, requests=bad, folder=tmp_path)
    _, other = ensure_signing_key(tmp_path / "other")
    with pytest.raises(InputError, match="stable's package cannot be compared with"):
        run_gates(SETTINGS, candidate, root / "stable", other, OBJECTIVES, requests=None, folder=tmp_path)
    assert not (tmp_path / "gates.json").exists()
