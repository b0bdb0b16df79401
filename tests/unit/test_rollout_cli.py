"""What people ask of a rollout and are told of it: kept, taken up once, safe to repeat, with an engine or without."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from endcap.cli.main import app
from endcap.cli.standing import read_standing
from endcap.errors import BusyError, EndcapError, InputError, OutcomeError, StateError, TargetError
from endcap.files import FolderLock, read_json_lines
from endcap.objectives import load_objectives
from serving.rollout.commands import ask, engine_runs, step_waiting
from serving.rollout.declared import DECLARED_FILE, read_declared
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.events import Command
from serving.rollout.spec import RolloutSpec, Step, load_rollout
from serving.rollout.state import Outcome, Phase, State
from serving.rollout.store import COMMANDS_FILE, DECISIONS_FILE, STATE_FILE, RolloutStore, load_state
from tests.simulated import CANARY, OBJECTIVES, SPEC, Behaviour, Killed, SimulatedClock, SimulatedTarget

PACKAGES = {"1": Path("one"), "2": Path("two")}
LONG = replace(SPEC, steps=(Step(0.05, 100, 5, 1e9), Step(0.5, 100, 5, 1e9, approval=True), Step(1.0, 100, 5, 1e9)))
"""Its second step waits for a person however long it takes."""


class Ticking(SimulatedClock):
    """A second of rollout in a millisecond of ours, so that an engine in a thread leaves others the processor."""

    def wait(self, seconds: float) -> None:
        super().wait(seconds)
        time.sleep(0.001)


def roll(folder: Path, target: SimulatedTarget, spec: RolloutSpec = LONG) -> RolloutResult:
    return run_rollout(spec, OBJECTIVES, CANARY, target, folder, packages=PACKAGES, clock=target.clock)  # type: ignore[arg-type]


def simulated(canary: Behaviour | None = None) -> SimulatedTarget:
    clock = Ticking()
    return SimulatedTarget({"1": Behaviour(), "2": canary or Behaviour(clicked=0.1)}, clock, 200.0)


@pytest.fixture
def cut_off(tmp_path: Path) -> tuple[Path, SimulatedTarget]:
    """A rollout whose engine was killed while its canary was observed."""
    target = simulated()
    target.die_at = (14, "after")
    folder = tmp_path / "rollout"
    with pytest.raises(Killed):
        roll(folder, target)
    target.die_at = None
    assert load_state(folder) is not None and state_of(folder).phase is Phase.OBSERVING
    return folder, target


def state_of(folder: Path) -> State:
    state = load_state(folder)
    assert state is not None
    return state


@contextmanager
def running(folder: Path, target: SimulatedTarget, spec: RolloutSpec = LONG) -> Iterator[Callable[[], RolloutResult]]:
    """The engine in a thread; what it yields waits for its end and tells how it ended."""
    ended: list[RolloutResult] = []
    thread = threading.Thread(target=lambda: ended.append(roll(folder, target, spec)))
    thread.start()

    def result() -> RolloutResult:
        thread.join(60)
        return ended[0]

    try:
        wait_until(lambda: load_state(folder) is not None)
        yield result
    finally:
        if thread.is_alive() and not state_of(folder).ended:
            ask(folder, Command.ABORT, by="the test")
        thread.join(60)


def wait_until(done: Callable[[], bool], *, within_s: float = 30.0) -> None:
    ends_s = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < ends_s
        time.sleep(0.002)


def endcap(*arguments: object) -> None:
    """A command as ``endcap`` runs it; errors are raised instead of printed."""
    app([str(argument) for argument in arguments], standalone_mode=False)


# ---- asking ----


def test_commands_are_numbered_and_the_same_is_not_asked_twice(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    asked = [Command.PAUSE, Command.PAUSE, Command.RESUME, Command.RESUME, Command.PAUSE]
    assert [ask(folder, command, by="ann@shop", at_s=5.0) for command in asked] == [1, 1, 2, 2, 3]
    assert next(read_json_lines(folder / COMMANDS_FILE)) == {"command": "pause", "by": "ann@shop", "at_s": 5.0}


def test_an_approval_names_its_step_so_that_asking_twice_approves_no_later_one(
    cut_off: tuple[Path, SimulatedTarget],
) -> None:
    folder, _ = cut_off
    assert ask(folder, Command.APPROVE, by="ann", step=2) == 1
    assert ask(folder, Command.APPROVE, by="bob", step=2) == 1
    assert ask(folder, Command.APPROVE, by="bob", step=3) == 2


def test_a_torn_line_of_a_writer_that_was_killed_is_no_command(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    ask(folder, Command.PAUSE, by="ann")
    with (folder / COMMANDS_FILE).open("a") as file:
        file.write('{"command": "abo')
    assert ask(folder, Command.RESUME, by="ann") == 2


def test_people_who_ask_at_once_are_all_heard(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda step=step: numbers.append(ask(folder, Command.APPROVE, by="x", step=step)))  # type: ignore[misc]
        for step in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(numbers) == list(range(1, 9))
    assert len(list(read_json_lines(folder / COMMANDS_FILE))) == 8


def test_commands_that_are_gone_are_no_fresh_start(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    state = json.loads((folder / STATE_FILE).read_text())
    (folder / STATE_FILE).write_text(json.dumps(state | {"commands": 2}))
    with pytest.raises(StateError, match="2 commands were taken up, and 0 are left"):
        ask(folder, Command.PAUSE, by="ann")


def test_a_writer_that_hangs_is_named_and_waited_for_no_longer(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    with FolderLock(folder, name=".commands.lock"), pytest.raises(BusyError, match="in use by process"):
        ask(folder, Command.PAUSE, by="ann", wait_s=0.05)


@pytest.mark.parametrize("by", ["", "  ", "a\nb", "x" * 201])
def test_somebody_asks(by: str, cut_off: tuple[Path, SimulatedTarget]) -> None:
    with pytest.raises(InputError, match="who asks"):
        ask(cut_off[0], Command.PAUSE, by=by)


def test_there_has_to_be_a_rollout_that_goes_on(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no rollout here"):
        ask(tmp_path, Command.PAUSE, by="ann")
    (tmp_path / DECISIONS_FILE).write_text("{}\n")
    with pytest.raises(InputError, match="cut off as it began"):
        ask(tmp_path, Command.PAUSE, by="ann")


def test_whether_an_engine_runs_is_seen_without_a_trace(tmp_path: Path) -> None:
    assert not engine_runs(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path):
        assert engine_runs(tmp_path)
    assert not engine_runs(tmp_path)


def test_only_a_step_that_is_due_waits_for_approval() -> None:
    observing = State(Phase.OBSERVING, 0, "1", "2", 0.0, 0.0, ())
    due = observing.with_(waiting="step 2 (50%) waits for approval")
    assert step_waiting(LONG, due) == 2
    assert step_waiting(LONG, observing) is None
    assert step_waiting(LONG, due.with_(approved=2)) is None
    assert step_waiting(LONG, due.with_(paused_at_s=1.0)) is None
    assert step_waiting(LONG, due.with_(step=2)) is None
    assert step_waiting(LONG, due.with_(outcome=Outcome.ABORTED)) is None
    first = replace(LONG, steps=(replace(LONG.steps[0], approval=True), *LONG.steps[1:]))
    assert step_waiting(first, due.with_(phase=Phase.PENDING)) == 1


# ---- what it was begun with ----

DOCUMENTS = """\
apiVersion: endcap.dev/v1alpha1
kind: Objectives
metadata: {name: shop}
spec:
  service: shop
  objectives:
  - {name: availability, goal: 0.99, good: answered}
  - {name: click-through, goal: 0.03, good: clicked, windowSeconds: 4, marginRelative: 0.2}
  - name: basket
    goal: 0.1
    good: counted
    prometheus: {good: 'orders{kind="paid"}', total: orders}
"""
ROLLOUT = """\
apiVersion: endcap.dev/v1alpha1
kind: Rollout
metadata: {name: shop}
spec:
  service: shop
  candidate: "models:/shop/2"
  margins: {availability: {absolute: 0.02}}
  shadow: {share: 0.2}
  gates: {requests: recorded.jsonl}
  sticky: {cookie: shopper}
  freeze:
  - {days: [friday], from: "18:00", until: "08:00", timezone: Europe/Paris}
  - {from: 2026-12-01T00:00:00Z, until: 2026-12-02T00:00:00Z}
  prometheus: {url: "http://localhost:9090"}
"""


def test_what_a_rollout_was_begun_with_is_read_back_whole(tmp_path: Path) -> None:
    (tmp_path / "objectives.yaml").write_text(DOCUMENTS)
    (tmp_path / "rollout.yaml").write_text(ROLLOUT)
    spec = load_rollout(tmp_path / "rollout.yaml")
    objectives = spec.judged(load_objectives(tmp_path / "objectives.yaml"))
    with RolloutStore(tmp_path) as store:
        store.declare(spec, objectives)
        found = read_declared(tmp_path)
        store.check_declared(found.spec, found.objectives)
    assert (found.spec, found.objectives) == (spec, objectives)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"name": "x", "objectives": {}}'])
def test_a_damaged_declaration_is_named(damage: str, tmp_path: Path) -> None:
    (tmp_path / DECLARED_FILE).write_text(damage)
    with pytest.raises(StateError, match=r"declared\.json"):
        read_declared(tmp_path)


# ---- with an engine ----


def test_a_rollout_is_steered_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path, simulated()) as result:
        wait_until(lambda: read_standing(tmp_path).approval == 2)
        endcap("rollout", "pause", tmp_path, "--by", "ann@shop")
        assert "paused" in capsys.readouterr().out
        endcap("rollout", "pause", tmp_path)
        assert "paused already: paused by ann@shop" in capsys.readouterr().out
        with pytest.raises(InputError, match="nothing waits for approval") as refused:
            endcap("rollout", "approve", tmp_path)
        assert "resume" in str(refused.value)
        endcap("rollout", "resume", tmp_path)
        endcap("rollout", "resume", tmp_path)
        assert "it is not paused" in capsys.readouterr().out
        wait_until(lambda: read_standing(tmp_path).approval == 2)
        endcap("rollout", "approve", tmp_path, "--by", "bob@shop")
        endcap("rollout", "approve", tmp_path, "--json")
        assert "step 2 is approved already" in (said := capsys.readouterr()).err
        assert json.loads(said.out[said.out.index("{") :])["to"] == "2"
        assert result().outcome is Outcome.PROMOTED
    assert [line["command"] for line in read_json_lines(tmp_path / COMMANDS_FILE)] == ["pause", "resume", "approve"]
    endcap("rollout", "promote", tmp_path)
    assert "promoted already" in capsys.readouterr().out
    endcap("rollout", "approve", tmp_path)
    assert "approved already" in capsys.readouterr().out
    for command in ("pause", "resume"):
        with pytest.raises(InputError, match="has ended: promoted"):
            endcap("rollout", command, tmp_path)
    with pytest.raises(InputError, match="was promoted and serves"):
        endcap("rollout", "abort", tmp_path)
    endcap("rollout", "history", tmp_path, "--verify")
    endcap("rollout", "history", tmp_path)
    told = capsys.readouterr().out
    assert "pause by ann@shop" in told and "approve by bob@shop" in told


def test_an_abort_returns_the_traffic_and_may_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = simulated()
    with running(tmp_path, target) as result:
        wait_until(lambda: state_of(tmp_path).phase is Phase.OBSERVING)
        endcap("rollout", "abort", tmp_path, "--by", "ann@shop")
        assert result().outcome is Outcome.ABORTED
    assert target.shares == {"1": 1.0}
    capsys.readouterr()
    endcap("rollout", "abort", tmp_path)
    assert "was aborted; all traffic is on version 1" in capsys.readouterr().out


def test_a_promotion_by_hand_says_by_whom(tmp_path: Path) -> None:
    with running(tmp_path, simulated()) as result:
        wait_until(lambda: state_of(tmp_path).phase is Phase.OBSERVING)
        endcap("rollout", "promote", tmp_path, "--by", "ann@shop")
        assert result().outcome is Outcome.PROMOTED
    assert "promoted by ann@shop" in state_of(tmp_path).reason


def test_an_engine_that_is_busy_is_said_and_what_was_asked_stays(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, target = cut_off
    with FolderLock(folder), pytest.raises(OutcomeError, match="it stays asked"):
        endcap("rollout", "pause", folder, "--timeout", "0.1")
    with running(folder, target):
        wait_until(lambda: state_of(folder).paused_at_s is not None)


def test_status_follows_a_rollout_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        running(tmp_path, simulated(Behaviour(clicked=0.001))),
        pytest.raises(OutcomeError, match="not promoted: rolled back, click-through"),
    ):
        endcap("rollout", "status", tmp_path, "--watch", "--json")
    said = capsys.readouterr()
    assert json.loads(said.out)["outcome"] == "rolled_back"
    assert "shop: version 2" in said.err


# ---- without an engine ----


def test_what_is_asked_while_no_engine_runs_is_taken_up_by_the_next(
    cut_off: tuple[Path, SimulatedTarget], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = cut_off
    endcap("rollout", "pause", folder)
    assert "taken up when endcap rollout start goes on" in capsys.readouterr().out.replace("\n", " ")
    endcap("rollout", "status", folder)
    assert "no engine runs" in capsys.readouterr().out
    with running(folder, target):
        wait_until(lambda: state_of(folder).paused_at_s is not None)


class Local(SimulatedTarget):
    """As much of a local target as the commands need."""

    folder: Path
    found = SimpleNamespace(public_key=Path("key"), envoy_admin_url="http://localhost")
    known: Sequence[str] = ("1", "2")

    def state(self) -> Any:
        return SimpleNamespace(versions={label: Path(label) for label in self.known})


@pytest.fixture
def local(cut_off: tuple[Path, SimulatedTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Local:
    cut_off[1].__class__ = Local
    target = cut_off[1]
    assert isinstance(target, Local)
    target.folder = tmp_path / "target"
    monkeypatch.setattr("serving.targets.open_target", lambda _folder: target)
    monkeypatch.delenv("ENDCAP_WEBHOOK_URL", raising=False)
    return target


def test_an_abort_without_an_engine_returns_the_traffic_itself(
    cut_off: tuple[Path, SimulatedTarget], local: Local, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = cut_off
    endcap("rollout", "abort", folder, "--by", "ann@shop", "--json")
    assert json.loads(capsys.readouterr().out)["outcome"] == "aborted"
    assert local.shares == {"1": 1.0}
    assert local.capacity == {"1"}
    assert state_of(folder).reason == "aborted by ann@shop"
    endcap("rollout", "history", folder, "--verify")


def test_an_abort_at_another_target_touches_nothing(cut_off: tuple[Path, SimulatedTarget], local: Local) -> None:
    local.known = ("7",)
    before = dict(local.shares)
    with pytest.raises(InputError, match=r"the abort is kept.*version 1"):
        endcap("rollout", "abort", cut_off[0])
    assert local.shares == before


def test_an_abort_whose_target_is_gone_is_kept(
    cut_off: tuple[Path, SimulatedTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, target = cut_off

    def gone(_folder: Path | None) -> Any:
        raise TargetError("no target runs here")

    monkeypatch.setattr("serving.targets.open_target", gone)
    with pytest.raises(TargetError, match="the abort is kept"):
        endcap("rollout", "abort", folder)
    assert roll(folder, target).outcome is Outcome.ABORTED


# ---- what it is started with ----


@pytest.fixture
def files(tmp_path: Path, local: Local) -> Path:
    """A rollout document and objectives; the target was started with none."""
    local.folder.mkdir()
    documents = DOCUMENTS.split("  - name: basket")[0]
    (tmp_path / "objectives.yaml").write_text(documents)
    (tmp_path / "rollout.yaml").write_text(ROLLOUT)
    return tmp_path


def begin_with(files: Path, *arguments: object) -> None:
    endcap("rollout", "start", files / "rollout.yaml", "--package", files, "--label", "2", *arguments)


def test_a_start_without_objectives_takes_the_target_s_or_says_that_it_has_none(files: Path, local: Local) -> None:
    with pytest.raises(InputError, match="no objectives were given, and the target was started with none"):
        begin_with(files)
    (local.folder / "objectives.yaml").write_text(DOCUMENTS.replace("name: shop", "name: stall", 1))
    with pytest.raises(InputError, match=r"asks for objectives 'shop'; these are 'stall'") as caught:
        begin_with(files)
    assert caught.value.where == str(files / "rollout.yaml")


def test_one_rollout_a_service_at_a_time(files: Path, local: Local) -> None:
    with (
        FolderLock(local.folder, name=".rollout-shop.lock"),
        pytest.raises(BusyError, match="a rollout of shop runs here already"),
    ):
        begin_with(files, "--objectives", files / "objectives.yaml", "--folder", files / "other")
    assert not (files / "other").exists()


def test_an_address_for_notices_that_is_none_is_said_before_anything_begins(
    files: Path, local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENDCAP_WEBHOOK_URL", "hooks.example/s3cr3t")
    with pytest.raises(InputError, match="ENDCAP_WEBHOOK_URL") as caught:
        begin_with(files, "--objectives", files / "objectives.yaml", "--folder", files / "other")
    assert "s3cr3t" not in str(caught.value)
    assert not (files / "other").exists()


def test_objectives_that_are_counted_elsewhere_need_an_address(files: Path, local: Local) -> None:
    (files / "objectives.yaml").write_text(DOCUMENTS)
    (files / "rollout.yaml").write_text("\n".join(ROLLOUT.splitlines()[:-1]) + "\n")
    with pytest.raises(InputError, match="'basket' is counted by Prometheus"):
        begin_with(files, "--objectives", files / "objectives.yaml", "--folder", files / "other")


# ---- reading ----


def test_status_is_read_at_any_moment_of_the_engine_s_work(
    cut_off: tuple[Path, SimulatedTarget], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = cut_off
    with (folder / DECISIONS_FILE).open("a") as file:
        file.write('{"seq": 99, "eviden')
    endcap("rollout", "status", folder, "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["from"], document["to"], document["share"]) == ("1", "2", 0.05)
    assert document["objectives"]["availability"]["canary"]["total"] > 0
    assert document["engine_runs"] is False
    (folder / DECISIONS_FILE).unlink()
    endcap("rollout", "status", folder)
    assert "step 1 of 3" in capsys.readouterr().out


def test_a_long_last_line_is_read_whole(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    line = list(read_json_lines(folder / DECISIONS_FILE))[-1]
    with (folder / DECISIONS_FILE).open("a") as file:
        file.write(json.dumps(line | {"at_s": 7.0, "more": "x" * 200_000}) + "\n")
    assert read_standing(folder).looked_at_s == 7.0


@pytest.mark.parametrize(
    ("file", "damage"),
    [(STATE_FILE, "{"), (STATE_FILE, "{}"), (DECLARED_FILE, "{"), (DECISIONS_FILE, "{]\n"), (DECISIONS_FILE, "7\n")],
)
def test_a_damaged_file_is_named(file: str, damage: str, cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    (folder / file).write_text(damage)
    with pytest.raises(StateError, match=file):
        endcap("rollout", "status", folder)


def test_a_log_that_was_tampered_with_does_not_verify(cut_off: tuple[Path, SimulatedTarget]) -> None:
    folder, _ = cut_off
    endcap("rollout", "history", folder, "--verify")
    path = folder / DECISIONS_FILE
    whole = path.read_text()
    path.write_text(whole.replace('"passed":true', '"passed":false'))
    with pytest.raises(StateError, match=DECISIONS_FILE):
        endcap("rollout", "history", folder, "--verify")
    path.write_text(whole)
    state = json.loads((folder / STATE_FILE).read_text())
    (folder / STATE_FILE).write_text(json.dumps(state | {"step": 2}))
    with pytest.raises(StateError, match="does not lead to the state"):
        endcap("rollout", "history", folder, "--verify")


def test_a_state_behind_its_log_is_what_a_crash_leaves(
    cut_off: tuple[Path, SimulatedTarget], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, target = cut_off
    before = (folder / STATE_FILE).read_text()
    ask(folder, Command.ABORT, by="ann")
    roll(folder, target)
    (folder / STATE_FILE).write_text(before)
    endcap("rollout", "history", folder, "--verify", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] is True
    assert told["decisions"] > told["kept"]


def test_errors_are_of_the_kinds_that_commands_exit_by(tmp_path: Path) -> None:
    with pytest.raises(EndcapError) as none:
        endcap("rollout", "status", tmp_path)
    assert none.value.exit_code == 2
