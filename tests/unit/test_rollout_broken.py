"""What a rollout's folder looks like after an accident: files cut off, exchanged or lost. Nobody is promoted by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from endcap.cli.standing import read_standing
from endcap.errors import StateError
from endcap.files import read_json_lines
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.store import DECISIONS_FILE, LOOKS_FILE, STATE_FILE
from tests.simulated import CANARY, OBJECTIVES, SPEC, Behaviour, Killed, SimulatedClock, SimulatedTarget

PACKAGES = {"1": Path("one"), "2": Path("two")}


def simulated() -> SimulatedTarget:
    return SimulatedTarget({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, SimulatedClock(), 200.0)


def roll(folder: Path, target: SimulatedTarget) -> RolloutResult:
    return run_rollout(SPEC, OBJECTIVES, CANARY, target, folder, packages=PACKAGES, clock=target.clock)


@pytest.fixture
def cut_off(tmp_path: Path) -> tuple[Path, SimulatedTarget]:
    """A rollout whose engine was killed while its canary was observed."""
    target, folder = simulated(), tmp_path / "rollout"
    target.die_at = (14, "after")
    with pytest.raises(Killed):
        roll(folder, target)
    target.die_at = None
    return folder, target


def assert_refused(folder: Path, target: SimulatedTarget, file: str) -> None:
    shares, written = dict(target.shares), len(target.log)
    with pytest.raises(StateError, match=file):
        roll(folder, target)
    assert (target.shares, len(target.log)) == (shares, written), "nothing was done"


def test_a_state_of_another_rollout_promotes_nobody(cut_off: tuple[Path, SimulatedTarget], tmp_path: Path) -> None:
    folder, target = cut_off
    assert roll(tmp_path / "other", simulated()).outcome == "promoted"
    shutil.copy(tmp_path / "other" / STATE_FILE, folder / STATE_FILE)
    assert_refused(folder, target, DECISIONS_FILE)
    with pytest.raises(StateError, match=STATE_FILE):
        read_standing(folder)
    (folder / STATE_FILE).unlink()  # the log alone suffices
    assert roll(folder, target).outcome == "promoted"


@pytest.mark.parametrize("change", [{"seq": 99}, {"phase": "done", "verdict": "promoted"}, {"step": 1}])
def test_a_state_that_the_log_does_not_tell_of_is_refused(
    change: dict[str, object], cut_off: tuple[Path, SimulatedTarget]
) -> None:
    folder, target = cut_off
    state = json.loads((folder / STATE_FILE).read_text())
    (folder / STATE_FILE).write_text(json.dumps(state | change))
    assert_refused(folder, target, DECISIONS_FILE)


def test_looks_of_another_rollout_are_no_evidence(cut_off: tuple[Path, SimulatedTarget], tmp_path: Path) -> None:
    folder, target = cut_off
    other = simulated()
    other.clock.wait(7)
    assert roll(tmp_path / "other", other).outcome == "promoted"
    shutil.copy(tmp_path / "other" / LOOKS_FILE, folder / LOOKS_FILE)
    assert_refused(folder, target, LOOKS_FILE)


def test_a_log_that_lost_its_end_is_refused(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, target = cut_off
    path = folder / DECISIONS_FILE
    first, *_ = read_json_lines(path)
    path.write_text(json.dumps(first) + "\n")
    assert_refused(folder, target, DECISIONS_FILE)
    with pytest.raises(StateError, match=STATE_FILE):
        read_standing(folder)
    path.write_text("")
    assert_refused(folder, target, DECISIONS_FILE)


def test_a_damaged_state_is_made_again_from_the_log_as_its_error_says(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, target = cut_off
    (folder / STATE_FILE).write_bytes(b"\x00" * 200)
    with pytest.raises(StateError, match=STATE_FILE) as caught:
        roll(folder, target)
    assert caught.value.next_step is not None and "move it away" in caught.value.next_step
    (folder / STATE_FILE).rename(folder / "damaged")
    assert roll(folder, target).outcome == "promoted"
