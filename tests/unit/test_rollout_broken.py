"""What a rollout's folder looks like after an accident: files cut off, exchanged or lost. Nobody is promoted by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from endcap.cli.main import app
from endcap.cli.rollout import _label_of, _not_promoted
from endcap.cli.standing import read_standing
from endcap.errors import BusyError, CapacityError, InputError, OutcomeError, StateError, StorageError
from endcap.files import FolderLock, read_json_lines
from serving.rollout.commands import ask
from serving.rollout.decide import begin, decide
from serving.rollout.declared import DECLARED_FILE
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.events import Command, Commanded
from serving.rollout.freeze import DateFreeze
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome, Phase
from serving.rollout.store import DECISIONS_FILE, LOOKS_FILE, STATE_FILE
from tests.simulated import CANARY, OBJECTIVES, SPEC, Behaviour, Killed, SimulatedClock, SimulatedTarget

PACKAGES = {"1": Path("one"), "2": Path("two")}


def simulated() -> SimulatedTarget:
    return SimulatedTarget({"1": Behaviour(), "2": Behaviour(clicked=0.1)}, SimulatedClock(), 200.0)


def roll(folder: Path, target: SimulatedTarget, spec: RolloutSpec = SPEC) -> RolloutResult:
    return run_rollout(spec, OBJECTIVES, CANARY, target, folder, packages=PACKAGES, clock=target.clock)


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


def test_a_freeze_declared_while_it_runs_is_in_the_log_and_the_log_verifies(
    cut_off: tuple[Path, SimulatedTarget],
) -> None:
    folder, target = cut_off
    now_s = target.clock.now_s()
    freeze = DateFreeze(now_s, now_s + 300, "holidays")
    result = roll(folder, target, replace(SPEC, freeze=(freeze,)))
    assert (result.outcome, result.seconds > 300) == ("promoted", True)
    endcap("rollout", "history", folder, "--verify")
    (folder / STATE_FILE).unlink()
    assert roll(folder, target) == result, "the log alone leads there, with or without the freeze"


@pytest.mark.parametrize("damage", [b"", b"null", b"{", b"\xff\x00", None])
def test_a_declaration_that_is_lost_names_the_way_back(
    damage: bytes | None, cut_off: tuple[Path, SimulatedTarget]
) -> None:
    folder, target = cut_off
    path = folder / DECLARED_FILE
    path.unlink() if damage is None else path.write_bytes(damage)
    assert_refused(folder, target, DECLARED_FILE)
    with pytest.raises(StateError, match=DECLARED_FILE) as caught:
        read_standing(folder)
    assert caught.value.next_step is not None and "endcap serve restore" in caught.value.next_step


# ---- a rollout's folder is gone, and its canary still has traffic ----


class Serving(SimulatedTarget):
    """As much of a local target as ``endcap serve restore`` needs."""

    folder = Path()
    found = SimpleNamespace(public_key=Path("key"), envoy_admin_url="http://localhost")

    def state(self) -> SimpleNamespace:
        return SimpleNamespace(versions=PACKAGES)


@pytest.fixture
def abandoned(cut_off: tuple[Path, SimulatedTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    folder, target = cut_off
    shutil.rmtree(folder)
    target.__class__ = Serving
    assert isinstance(target, Serving)
    target.folder = tmp_path / "target"
    target.folder.mkdir()
    monkeypatch.setattr("serving.targets.open_target", lambda _folder: target)
    assert target.shares["2"] > 0
    return target


def endcap(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_all_traffic_is_returned_by_hand_where_a_rollout_is_lost(abandoned: Serving) -> None:
    endcap("serve", "restore", "1")
    assert (abandoned.shares, abandoned.capacity) == ({"1": 1.0}, {"1"})
    endcap("serve", "restore", "1")
    assert abandoned.shares == {"1": 1.0}


def test_traffic_returns_by_hand_although_its_replicas_do_not(
    abandoned: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_shares: Mapping[object, float], *, token: int) -> None:
        raise CapacityError(f"no room {token}")

    monkeypatch.setattr(abandoned, "ensure_capacity", refuse)
    with pytest.raises(CapacityError):
        endcap("serve", "restore", "1")
    assert abandoned.shares == {"1": 1.0}


def test_nothing_is_restored_under_a_rollout_that_runs_or_to_a_version_that_does_not(abandoned: Serving) -> None:
    before = dict(abandoned.shares)
    with pytest.raises(InputError, match="version 7 does not run here"):
        endcap("serve", "restore", "7")
    with FolderLock(abandoned.folder, name=".rollout-shop.lock"), pytest.raises(BusyError, match="a rollout runs here"):
        endcap("serve", "restore", "1")
    assert abandoned.shares == before


def test_an_abort_whose_engine_died_on_the_way_back_is_gone_on_with_by_the_next(
    cut_off: tuple[Path, SimulatedTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = cut_off
    ask(folder, Command.ABORT, by="ann")
    target.die_at = (target.calls + 2, "before")
    with pytest.raises(Killed):
        roll(folder, target)
    target.die_at = None
    assert target.shares["2"] > 0 and read_standing(folder).state.outcome == "aborted"
    target.__class__ = Serving
    assert isinstance(target, Serving)
    target.folder = tmp_path / "target"
    target.folder.mkdir()
    monkeypatch.setattr("serving.targets.open_target", lambda _folder: target)
    monkeypatch.delenv("ENDCAP_WEBHOOK_URL", raising=False)
    endcap("rollout", "abort", folder)
    assert (target.shares, read_standing(folder).state.ended) == ({"1": 1.0}, True)


# ---- what people are told ----


def test_what_was_approved_waits_for_approval_no_longer() -> None:
    spec = replace(SPEC, steps=(Step(0.1, 10, 0, 60), Step(0.5, 10, 0, 60, approval=True), Step(1, 10, 0, 60)))
    waiting = begin(spec, stable="1", canary="2", now_s=0.0).with_(
        phase=Phase.OBSERVING, intent=(), waiting="step 2 (50%) waits for approval"
    )
    assert decide(spec, waiting, Commanded(Command.APPROVE, "ann", 1, 2), 1.0).waiting is None
    assert decide(spec, waiting, Commanded(Command.APPROVE, "ann", 1, 1), 1.0).waiting == waiting.waiting
    frozen = waiting.with_(waiting="frozen until tomorrow")
    assert decide(spec, frozen, Commanded(Command.APPROVE, "ann", 1, 2), 1.0).waiting == frozen.waiting


def test_an_engine_that_sees_nothing_any_more_is_said_to(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    with FolderLock(folder):
        standing = read_standing(folder)
        assert standing.looked_at_s is not None
        said = {age_s: str(standing.page(standing.looked_at_s + age_s).lines) for age_s in (1, 60)}
    assert "does not answer" in said[60]
    assert "does not answer" not in said[1]


def test_an_engine_that_does_not_hear_is_named(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    with FolderLock(folder) as held, pytest.raises(OutcomeError) as caught:
        endcap("rollout", "abort", folder, "--timeout", 0)
    assert f"process {held.holder}" in str(caught.value)
    assert ask(folder, Command.ABORT, by="the same") == 1, "it stays asked"


def test_an_abort_that_cannot_be_written_down_says_how_the_traffic_returns_without_it(
    cut_off: tuple[Path, SimulatedTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise StorageError("no space left", next_step="free some space, then run the same command again")

    monkeypatch.setattr("serving.rollout.commands.ask", full)
    with pytest.raises(StorageError) as caught:
        endcap("rollout", "abort", cut_off[0])
    assert caught.value.next_step is not None and "endcap serve restore 1" in caught.value.next_step
    with pytest.raises(StorageError) as caught:
        endcap("rollout", "pause", cut_off[0])
    assert caught.value.next_step is not None and "restore" not in caught.value.next_step


def test_a_folder_that_a_refused_start_left_holds_no_rollout(tmp_path: Path) -> None:
    (tmp_path / DECISIONS_FILE).touch()
    with pytest.raises(InputError, match="no rollout here"):
        endcap("rollout", "status", tmp_path)


@pytest.mark.parametrize(
    ("candidate", "label"),
    [("models:/shop/7", "7"), ("models:/shop@champion", "candidate"), ("shop", "candidate")],
)
def test_a_package_without_a_label_is_the_version_that_the_document_names(candidate: str, label: str) -> None:
    assert _label_of(candidate) == label


def test_a_mistyped_package_does_not_use_the_rollout_s_folder_up(abandoned: Serving, tmp_path: Path) -> None:
    head = "apiVersion: endcap.dev/v1alpha1\nkind: {}\nmetadata: {{name: shop}}\nspec: "
    rollout, objectives = tmp_path / "rollout.yaml", tmp_path / "objectives.yaml"
    rollout.write_text(head.format("Rollout") + '{service: shop, candidate: "models:/shop/2"}')
    objectives.write_text(
        head.format("Objectives") + "{service: shop, objectives: [{name: up, goal: 0.9, good: answered}]}"
    )
    with pytest.raises(InputError, match="no such package folder"):
        endcap("rollout", "start", rollout, "--objectives", objectives, "--package", tmp_path / "none", "--folder",
               tmp_path / "new")  # fmt: skip
    with pytest.raises(InputError, match="is no label"):
        endcap("rollout", "start", rollout, "--objectives", objectives, "--package", tmp_path, "--label", "../x",
               "--folder", tmp_path / "new")  # fmt: skip
    rollout.write_text(rollout.read_text().replace("}", ", baseline: true}", 2).replace(", baseline: true", "", 1))
    with pytest.raises(InputError, match="fresh copy"):
        endcap("rollout", "start", rollout, "--objectives", objectives, "--package", tmp_path, "--label", "1-baseline",
               "--folder", tmp_path / "new")  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_an_outcome_is_not_said_twice() -> None:
    assert _not_promoted("2", Outcome.ABORTED, "aborted by ann") == "version 2 was not promoted: aborted by ann"
    assert _not_promoted("2", Outcome.ROLLED_BACK, "latency") == "version 2 was not promoted: rolled back, latency"
