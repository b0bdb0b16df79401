"""Drills with real processes: a real target under real load, and a drill that is itself killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.drills import EXPERIMENTS, drill_names, run_drill
from endcap.records import read_faults
from loadtests.run import LoadConfig, start_load
from serving.targets import LocalTarget, StableVersion, SupervisorConfig, start_local_target
from tests.packages import ITEMS, make_package

DEADLINE_S = 60.0
CHAOS = [sys.executable, "-m", "chaostoolkit", "--no-version-check", "--no-log-file", "--settings", "none.yaml"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about in time"
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """The kernel's letter for a process: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---- the last net: no target needed ------------------------------------------------------------------

STOPS_TWO = """
import sys
from pathlib import Path
from chaos import faults
from serving.targets import Replica

replicas = [Replica("1", "a", index, int(pid), 1, True) for index, pid in enumerate(sys.argv[2:])]
faults.stop(replicas, drill="zone-loss", records=Path(sys.argv[1]))
print("stopped", flush=True)
sys.stdin.readline()
faults.revert_all()
print("reverted", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def drill(sleepers: list[int], tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [str(tmp_path), *map(str, sleepers)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPS_TWO, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "stopped\n"
    wait_until(lambda: all(state_of(pid) == "T" for pid in sleepers))
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_killed_drill_leaves_nothing_stopped(
    drill: subprocess.Popen[str], sleepers: list[int], tmp_path: Path
) -> None:
    drill.kill()
    wait_until(lambda: all(state_of(pid) != "T" for pid in sleepers))
    wait_until(lambda: len(read_faults(tmp_path)) == 4)
    assert [fault.phase for fault in read_faults(tmp_path)] == ["injected", "injected", "reverted", "reverted"]
    assert {fault.subject for fault in read_faults(tmp_path)} == {"1-a-0", "1-a-1"}


def test_a_reverted_fault_is_recorded_once(drill: subprocess.Popen[str], sleepers: list[int], tmp_path: Path) -> None:
    assert drill.stdin is not None
    assert drill.stdout is not None
    drill.stdin.write("\n")
    drill.stdin.flush()
    assert drill.stdout.readline() == "reverted\n"
    assert all(state_of(pid) != "T" for pid in sleepers)
    drill.kill()
    drill.wait()
    assert len(read_faults(tmp_path)) == 4


# ---- Chaos Toolkit itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", drill_names())
def test_plain_chaos_toolkit_accepts_the_experiments(name: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ENDCAP_TARGET"}
    done = subprocess.run(
        [*CHAOS, "validate", str(EXPERIMENTS / f"{name}.yaml")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- a real target under load ------------------------------------------------------------------------

# Wide enough for a busy machine: what is tested is that drills work, not how fast this machine is.
OBJECTIVES = """
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: recommender}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.99, good: answered}
  - {name: latency, goal: 0.5, good: answered, withinMs: 1000}
"""
QUICK = {"look_back_s": 2.0, "lost_s": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "objectives.yaml").write_text(OBJECTIVES)
    shoppers = [{"shopper": str(number), "history": [item], "next": None} for number, item in enumerate(ITEMS)]
    (folder / "shoppers.jsonl").write_text("".join(json.dumps(shopper) + "\n" for shopper in shoppers))
    return folder


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[LocalTarget]:
    package = make_package(folder / "packages" / "1")
    config = SupervisorConfig(
        folder=folder / "target", records=folder / "records", public_key=package.parent / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=package), thresholds_ms=(1000,), feedback_module=None,
    )  # fmt: skip
    with start_local_target(config) as target:
        load = start_load(
            LoadConfig(
                shoppers=folder / "shoppers.jsonl", out=folder / "records", target=target.folder, rate_rps=40,
                feedback=False,
            )
        )  # fmt: skip
        try:
            load.wait_until_answered()
            yield target
        finally:
            load.kill()


def all_run_and_serve(target: LocalTarget) -> bool:
    replicas = target.replicas()
    return all(one.ready and one.pid is not None and state_of(one.pid) != "T" for one in replicas)


def test_a_killed_replica_is_noticed_by_the_target_and_by_no_shopper(target: LocalTarget, folder: Path) -> None:
    out = folder / "drills" / "replica-kill"
    before = {one.pid for one in target.replicas()}
    result = run_drill("replica-kill", target=target.folder, out=out, variables=QUICK)
    assert result.held, result.describe()
    assert result.recovery.failed_requests == 0
    assert result.recovery.requests > 0
    assert result.recovery.detected_s is not None
    assert len(before - {one.pid for one in target.replicas()}) == 1
    journal = json.loads((out / "journal.json").read_text())
    (_, probe) = journal["steady_states"]["after"]["probes"]
    assert probe["activity"]["tolerance"]["name"] == "every-objective-is-at-its-goal"
    assert probe["output"]["availability"]["goal"] == 0.99
    written = json.loads((out / "drill.json").read_text())
    assert (written["name"], written["held"]) == ("replica-kill", True)
    assert written["started_at_s"] < written["fault_at_s"] < written["ended_at_s"]


def test_a_hung_zone_is_survived_and_taken_back(target: LocalTarget, folder: Path) -> None:
    wait_until(lambda: all_run_and_serve(target))
    out = folder / "drills" / "zone-loss"
    result = run_drill("zone-loss", target=target.folder, out=out, variables=QUICK, zone="b")
    assert result.held, result.describe()
    assert result.span.reverted_at_s is not None
    assert result.recovery.rto_s is not None
    assert result.recovery.detected_s is not None
    faults = [fault for fault in read_faults(folder / "records") if fault.drill == "zone-loss"]
    assert {fault.subject for fault in faults} == {"1-b-0", "1-b-1"}
    assert all_run_and_serve(target)


def test_plain_chaos_run_finds_the_target_and_an_interrupted_one_reverts(target: LocalTarget, folder: Path) -> None:
    wait_until(lambda: all_run_and_serve(target))
    records, journal = folder / "records", folder / "journal.json"
    before = len(read_faults(records))
    process = subprocess.Popen(
        [*CHAOS, "run", "--journal-path", str(journal), "--var", "lost_s:float=600", "--var", "look_back_s:float=2",
         str(EXPERIMENTS / "zone-loss.yaml")],
        cwd=folder, env={**os.environ, "ENDCAP_TARGET": str(target.folder)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: len(read_faults(records)) == before + 2)
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
    finally:
        process.kill()
        process.wait()
    assert json.loads(journal.read_text())["status"] == "interrupted"
    wait_until(lambda: all_run_and_serve(target))
    assert [fault.phase for fault in read_faults(records)[before:]] == ["injected"] * 2 + ["reverted"] * 2


def test_where_there_is_no_steady_state_nothing_is_injected(target: LocalTarget, folder: Path) -> None:
    strict = folder / "strict.yaml"
    strict.write_text(OBJECTIVES.replace("withinMs: 1000", "withinMs: 1").replace("goal: 0.5", "goal: 0.999999"))
    wait_until(lambda: all_run_and_serve(target))
    before = len(read_faults(folder / "records"))
    result = run_drill(
        "replica-kill", target=target.folder, out=folder / "drills" / "unsteady", objectives=strict,
        variables={**QUICK, "steady_within_s": 0.0},
    )  # fmt: skip
    assert not result.held
    assert result.reason is not None
    assert "no steady state before" in result.reason
    assert len(read_faults(folder / "records")) == before


def test_a_fault_that_cannot_be_injected_ends_the_drill_and_is_named(target: LocalTarget, folder: Path) -> None:
    wait_until(lambda: all_run_and_serve(target))
    result = run_drill(
        "zone-loss", target=target.folder, out=folder / "drills" / "nowhere", zone="c",
        variables={"look_back_s": 2.0, "lost_s": 600.0},
    )  # fmt: skip
    assert not result.held
    assert result.reason is not None
    assert "stop-a-zone failed" in result.reason
    assert "no zone 'c'" in result.reason
    assert result.span.fault_at_s is None
