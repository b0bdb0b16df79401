"""What a user relies on: the pipeline's steps really run, its gate really holds, and its faults are clear and clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components.data import Shop, synthetic_lines
from endcap.errors import BusyError, DataError, StepError
from endcap.files import FolderLock, read_json, read_json_lines
from endcap.package import read_items, verify_package
from endcap.registry import Registry, sqlite_uri
from pipelines.compile import compile_recommender
from pipelines.run import STEPS, RunConfig, StepEvent, run_recommender

# SQLAlchemy says this of MLflow's own mappings.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
SHOP = Shop(shoppers=300, items=80)


def config(folder: Path, **changes: object) -> RunConfig:
    data = folder / "shop.txt"
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_bytes(synthetic_lines(SHOP, 11))
    settings: dict[str, object] = {
        "out": folder, "registry_uri": sqlite_uri(folder / "mlflow"), "keys": folder / "keys", "file": data,
        "epochs": 1, "git_commit": "c0ffee", **changes,
    }  # fmt: skip
    return RunConfig(**settings)  # type: ignore[arg-type]


RUNNER = """
import sys
from pathlib import Path
from pipelines.run import RunConfig, run_recommender
out, registry = Path(sys.argv[1]), sys.argv[2]
run_recommender(RunConfig(out=out, registry_uri=registry, keys=out / "keys", file=out / "shop.txt", epochs=10_000,
                          checkpoint=out / "checkpoint.npz"),
                on_event=lambda event: print(event.step, event.event, flush=True))
"""


def ours(marker: str) -> list[int]:
    """Live processes with ``marker`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def test_killed_while_it_trains_no_process_stays(folder):
    settings = config(folder)
    marker = f"ENDCAP_TEST_MARKER={folder}"
    parent = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder), settings.registry_uri], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "ENDCAP_TEST_MARKER": str(folder)},
    )  # fmt: skip
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.strip() == "train epoch":
            break
    assert len(ours(marker)) >= 3  # this one, Kubeflow's runner, the step
    os.kill(parent.pid, signal.SIGKILL)
    parent.stdout.close()
    parent.wait()
    deadline = time.monotonic() + 20
    while (left := ours(marker)) and time.monotonic() < deadline:
        os.sched_yield()
    assert left == []


def test_the_run_after_that_resumes_and_goes_through_every_step_to_a_signed_registered_package(folder):
    events: list[StepEvent] = []
    # Its time is over: it has what the killed run learnt, and nothing more.
    settings = config(folder, epochs=10_000, training_seconds=0.001, checkpoint=folder / "checkpoint.npz", resume=True)
    result = run_recommender(settings, on_event=events.append)
    assert result.promoted_by_gate and result.version == "1" and result.package is not None
    assert [event.step for event in events if event.event == "finished"] == list(STEPS)
    assert [event for event in events if event.event == "epoch"] == [] and result.training.curve[0].epoch == 1
    assert not (folder / "checkpoint.npz").exists()
    assert set(result.evaluation.models) == {"popularity", "item-knn", "transformer", "transformer+item-knn"}
    assert result.evaluation.parity["shoppers"] > 0 and result.evaluation.int8["int8_bytes"] > 0
    assert read_json(folder / "evaluation.json") == result.evaluation.to_json()
    assert (result.data.users, result.data.synthetic, result.data.caveats) == (300, False, [])

    manifest = verify_package(result.package, folder / "keys" / "signing.pub")
    assert manifest.lineage["data_sha256"] == result.data.sha256 and manifest.lineage["git_commit"] == "c0ffee"
    registry = Registry(settings.registry_uri)
    assert registry.champion("recommender") is None  # nobody becomes champion by being registered
    resolved = registry.resolve("models:/recommender@candidate").package
    assert {path.name: path.read_bytes() for path in resolved.iterdir()} == {
        path.name: path.read_bytes() for path in result.package.iterdir()
    }
    run = next(iter(MlflowClient(tracking_uri=settings.registry_uri).search_runs(["1"])))
    assert {"knn_share", "seed", "item-knn.neighbours", "transformer.learning_rate"} <= set(run.data.params)
    assert run.data.metrics["ndcg_at_10"] == pytest.approx(result.evaluation.value(result.evaluation.candidate or ""))
    assert run.data.tags["data_sha256"] == result.data.sha256
    assert {path.name for path in (folder / "mlflow" / "artifacts").rglob("*.png")} == {"quality.png", "training.png"}
    shoppers = list(read_json_lines(result.shoppers))
    assert len(shoppers) == 300 and set(shoppers[0]["history"]) <= set(read_items(result.package))
    registry.set_champion("recommender", "1")


def test_a_champion_that_is_not_beaten_stays_and_nothing_after_the_gate_runs(folder):
    settings = config(folder, candidate="popularity")
    ran: list[str] = []
    result = run_recommender(settings, on_event=lambda event: ran.append(event.step))
    assert not result.promoted_by_gate and result.version is None and result.package is None
    assert "worse than the champion" in result.gate_reason
    assert set(ran) == {"ingest", "split", "train", "evaluate", "compare"}
    assert [version.version for version in Registry(settings.registry_uri).versions("recommender")] == ["1"]


def test_a_failing_step_shows_its_own_error(tmp_path):
    data = tmp_path / "broken.txt"
    data.write_text("1 2 3 4\n2 {} {} {}\n")
    with pytest.raises(StepError) as failed:
        run_recommender(config(tmp_path, file=data))
    assert isinstance(failed.value.__cause__, DataError)
    text = str(failed.value)
    assert "step ingest" in text and "broken.txt, line 2" in text and "malformed" in text
    assert "inner task" not in text and "Traceback" not in text
    assert not (tmp_path / "data.json").exists()


def test_a_missing_file_and_a_wrong_checksum_are_a_failing_steps_error(tmp_path):
    with pytest.raises(StepError, match=r"no such data file"):
        run_recommender(config(tmp_path, file=tmp_path / "gone.txt"))
    with pytest.raises(StepError, match=r"SHA-256"):
        run_recommender(config(tmp_path, sha256="0" * 64))


def test_two_runs_in_one_folder_are_one_too_many(tmp_path):
    with FolderLock(tmp_path, name=".pipeline.lock"), pytest.raises(BusyError):
        run_recommender(config(tmp_path))


def test_compiled_twice_it_is_the_same_pipeline(tmp_path):
    for name in ("one.yaml", "two.yaml"):
        compile_recommender(tmp_path / name)
    text = (tmp_path / "one.yaml").read_text()
    assert text == (tmp_path / "two.yaml").read_text()
    assert "exec-register-candidate" in text and "triggerPolicy" in text
    assert json.dumps(str(tmp_path)) not in text
