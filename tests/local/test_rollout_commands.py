"""A rollout as a person runs and steers it: the commands as processes, on real servers behind a real Envoy."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from endcap.cli.standing import read_standing
from endcap.files import read_json_lines
from loadtests.run import LoadConfig, start_load
from serving.rollout.notices import NOTICES_FILE
from serving.rollout.state import Phase
from serving.rollout.store import load_state
from serving.targets import LocalTarget, StableVersion, SupervisorConfig, start_local_target
from tests.packages import ITEMS, make_package
from tests.process import wait_until
from tests.webhook import SECRET, Hook

OBJECTIVES = """\
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: recommender}
spec:
  service: recommender
  objectives:
  - {name: availability, goal: 0.9, good: answered, margin: 0.2}
"""
ROLLOUT = """\
apiVersion: endcap.dev/v1alpha1
kind: Rollout
metadata: {name: recommender}
spec:
  service: recommender
  candidate: "models:/recommender/2"
  lookSeconds: 0.3
  steps:
  - {share: 0.3, minRequests: 20, minSeconds: 0.5, maxSeconds: 3600}
  - {share: 0.5, minRequests: 20, minSeconds: 0.5, maxSeconds: 3600, approval: true}
  - {share: 1, minRequests: 20, minSeconds: 0.5, maxSeconds: 3600}
"""


class Shop:
    """A target under load, and ``endcap rollout`` as its people run it."""

    def __init__(self, root: Path, target: LocalTarget, hook: Hook) -> None:
        self.root, self.target = root, target
        self._environment = {**os.environ, "ENDCAP_TARGET": str(target.folder), "ENDCAP_WEBHOOK_URL": hook.url}

    def folder(self, label: str) -> Path:
        return self.root / f"rollout-{label}"

    def endcap(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "endcap.cli", "rollout", *(str(argument) for argument in arguments)],
            capture_output=True, text=True, check=False, env=self._environment, timeout=60,
        )  # fmt: skip

    @contextmanager
    def engine(self, label: str) -> Iterator[subprocess.Popen[str]]:
        """``endcap rollout start``, without --objectives: the target has its own."""
        process = subprocess.Popen(
            [sys.executable, "-m", "endcap.cli", "rollout", "start", str(self.root / "rollout.yaml"), "--package",
             str(self.root / "candidate"), "--label", label, "--folder", str(self.folder(label)), "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shop, Hook]]:
    root = tmp_path_factory.mktemp("shop")
    config = SupervisorConfig(
        folder=root / "target", records=root / "records", public_key=root / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=make_package(root / "stable")), replicas_full=1,
    )  # fmt: skip
    make_package(root / "candidate")
    (root / "rollout.yaml").write_text(ROLLOUT)
    draw = random.Random(5)
    lines = [{"shopper": str(n), "history": draw.sample(ITEMS, 3), "next": draw.choice(ITEMS)} for n in range(200)]
    (root / "shoppers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hook = Hook()
    with start_local_target(config) as target:
        (target.folder / "objectives.yaml").write_text(OBJECTIVES)
        load = start_load(
            LoadConfig(shoppers=root / "shoppers.jsonl", out=root / "records", target=target.folder, rate_rps=40,
                       thresholds=False)
        )  # fmt: skip
        try:
            load.wait_until_answered()
            yield Shop(root, target, hook), hook
        finally:
            load.kill()
            hook.close()


def test_a_rollout_is_paused_stopped_gone_on_with_approved_and_promoted(shop: tuple[Shop, Hook]) -> None:
    here, hook = shop
    folder = here.folder("2")
    with here.engine("2") as engine:
        wait_until(lambda: load_state(folder) is not None, "the rollout begins")
        wait_until(lambda: read_standing(folder).approval == 2, "step 2 waits for approval")
        paused = here.endcap("pause", folder, "--by", "ann@shop")
        assert (paused.returncode, paused.stderr) == (0, "")
        assert "paused by ann@shop" in paused.stdout
        engine.send_signal(signal.SIGTERM)
        _, said = engine.communicate(timeout=30)
        assert engine.returncode == 143
        assert "The same command goes on with the rollout" in said
        assert "Traceback" not in said
    status = here.endcap("status", folder, "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["engine_runs"] is False
    assert json.loads(status.stdout)["paused"] is True
    assert here.target.observe().shares == pytest.approx({"2": 0.3, "1": 0.7})
    with here.engine("2") as engine:
        wait_until(lambda: read_standing(folder).engine, "an engine goes on with it")
        assert here.endcap("resume", folder).returncode == 0
        wait_until(lambda: read_standing(folder).approval == 2, "step 2 waits for approval again")
        assert here.endcap("approve", folder).returncode == 0
        said, for_people = engine.communicate(timeout=60)
        assert engine.returncode == 0
        assert json.loads(said)["verdict"] == "promoted"
        assert "version 2 was promoted: " in for_people
    assert here.target.observe().shares == {"2": 1.0}
    assert here.endcap("history", folder, "--verify").returncode == 0
    assert here.endcap("status", folder, "--watch").returncode == 0
    told = [line["kind"] for line in read_json_lines(folder / NOTICES_FILE) if line["result"] == "delivered"]
    assert told == ["start", "waiting", "promoted"]
    assert [body["text"].split(": ")[1].split()[2] for body in hook.bodies] == ["begins", "waits", "is"]
    assert not any(SECRET in path.read_text() for path in folder.glob("*.json*"))


def test_a_rollout_whose_engine_was_killed_is_aborted_by_one_command(shop: tuple[Shop, Hook]) -> None:
    here, _ = shop
    folder = here.folder("3")
    (stable,) = here.target.observe().shares
    with here.engine("3") as engine:
        wait_until(lambda: load_state(folder) is not None, "the rollout begins")
        wait_until(lambda: read_standing(folder).state.phase is Phase.OBSERVING, "it has traffic")
        engine.kill()
        engine.communicate()
    assert "3" in here.target.observe().shares
    aborted = here.endcap("abort", folder)
    assert aborted.returncode == 0, aborted.stderr
    assert here.target.observe().shares == {stable: 1.0}
    assert "3" not in here.target.healthy()
    again = here.endcap("abort", folder)
    assert again.returncode == 0
    assert "aborted" in again.stdout
    gone_on = here.endcap("start", here.root / "rollout.yaml", "--package", here.root / "candidate", "--label", "3",
                          "--folder", folder, "--json")  # fmt: skip
    assert gone_on.returncode == 4
    assert "aborted by" in gone_on.stderr
    assert json.loads(gone_on.stdout)["verdict"] == "aborted", "one document, although it is no promotion"
