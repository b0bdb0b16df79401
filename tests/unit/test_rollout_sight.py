"""What looks come to, kept as JSON and gone on from; and an engine that is driven a turn at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from endcap.errors import StateError
from endcap.evidence import Evidence
from endcap.files import read_json_lines
from serving.rollout import store as stores
from serving.rollout.engine import Engine, RolloutResult, run_rollout
from serving.rollout.events import Received
from serving.rollout.looks import observation_from_json
from serving.rollout.sight import Sight
from serving.rollout.spec import ShadowSpec
from serving.rollout.state import Outcome
from serving.rollout.store import LOOKS_FILE, SIGHT_FILE, RolloutStore
from serving.targets.base import Observation
from tests.simulated import CANARY, OBJECTIVES, SPEC, Behaviour, Killed, SimulatedClock, SimulatedTarget

SHADOWED = replace(SPEC, shadow=ShadowSpec(0.1, 50, 60, 0.5), baseline=True)


def start(clicked: float = 0.1, rate: float = 200.0) -> SimulatedTarget:
    return SimulatedTarget({"1": Behaviour(), "2": Behaviour(clicked=clicked)}, SimulatedClock(), rate)


def roll(folder: Path, target: SimulatedTarget) -> RolloutResult:
    return run_rollout(
        SHADOWED, OBJECTIVES, CANARY, target, folder, packages={"1": Path("one")}, clock=target.clock
    )  # fmt: skip


def fresh() -> Sight:
    return Sight(SHADOWED, OBJECTIVES, "2", "1-baseline")


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> list[Observation]:
    folder = tmp_path_factory.mktemp("rollout")
    assert roll(folder, start()).outcome is Outcome.PROMOTED
    return [observation_from_json(record) for record in read_json_lines(folder / LOOKS_FILE)]


def arrays(evidence: Evidence) -> Iterator[np.ndarray]:
    state, intervals = evidence.state, evidence.intervals
    yield from (state.bets.log_e, state.bets.x, state.peak, state.usual_share, evidence.seen)
    if intervals is not None:
        yield from (intervals.bets.log_e, intervals.bets.x, intervals.recent, intervals.ruled_out)


@pytest.mark.parametrize("cut", [0, 1, 7, 20])
def test_what_is_read_back_goes_on_to_the_bit(cut: int, looks: list[Observation]) -> None:
    whole, first, second = fresh(), fresh(), fresh()
    for seen in looks[:cut]:
        first.take(seen)
    second.restore(json.loads(json.dumps(first.to_json())))
    for seen in looks:
        whole.take(seen)
    for seen in looks[cut:]:
        second.take(seen)
    assert second.to_json() == whole.to_json()
    assert all((one == other).all() for one, other in zip(arrays(second.evidence), arrays(whole.evidence), strict=True))
    assert second.evidence.judgement == whole.evidence.judgement
    assert second.received == whole.received != Received()


def test_its_size_does_not_grow_with_the_number_of_looks(looks: list[Observation]) -> None:
    sight, sizes = fresh(), []
    for _ in range(3):
        for seen in looks:
            sight.take(seen)
        sizes.append(len(json.dumps(sight.to_json())))
    assert max(sizes) < 1.01 * min(sizes)
    small = Sight(SHADOWED, OBJECTIVES, "2", "1-baseline", intervals=False)
    for seen in looks:
        small.take(seen)
    assert len(json.dumps(small.to_json())) < 10_000, "a look of a rollout on a cluster is one write of this"


def test_intervals_that_were_not_kept_begin_anew_and_the_verdict_is_the_same(looks: list[Observation]) -> None:
    small, whole = Sight(SHADOWED, OBJECTIVES, "2", "1-baseline", intervals=False), fresh()
    for seen in looks:
        small.take(seen)
    whole.restore(small.to_json())
    assert whole.evidence.judgement == small.evidence.judgement
    assert whole.evidence.intervals is not None
    assert not whole.evidence.intervals.ruled_out.any()


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 99}, {"canary": "3"}, {"evidence": {}}, {"lately": {}}, {"fold": None}, {"split": {"log_e": [1]}},
    ],
)  # fmt: skip
def test_anything_else_is_no_sight(damage: dict[str, object], looks: list[Observation]) -> None:
    sight = fresh()
    for seen in looks[:9]:
        sight.take(seen)
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        fresh().restore({**sight.to_json(), **damage})


@pytest.mark.parametrize(
    ("name", "value"), [("peak", "AAAA"), ("peak", 7), ("seen", "@@@"), ("looks", -1), ("alpha", 0.4)]
)
def test_damaged_evidence_is_no_evidence(name: str, value: object, looks: list[Observation]) -> None:
    sight = fresh()
    sight.take(looks[0])
    document = sight.to_json()
    document["evidence"][name] = value
    with pytest.raises((TypeError, ValueError)):
        fresh().restore(document)


# ---- in a folder ----


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "SIGHT_EVERY", 5)


def cut_off(folder: Path, call: int = 40) -> SimulatedTarget:
    target = start()
    target.die_at = (call, "after")
    with pytest.raises(Killed):
        roll(folder, target)
    target.die_at = None
    return target


@pytest.mark.usefixtures("often")
def test_an_engine_that_goes_on_folds_only_the_looks_that_were_not_folded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = cut_off(tmp_path)
    all_looks = [observation_from_json(record) for record in read_json_lines(tmp_path / LOOKS_FILE)]
    again: list[float] = []

    def counted(document: dict[str, object]) -> Observation:
        seen = observation_from_json(document)
        again.append(seen.at_s)
        return seen

    monkeypatch.setattr(stores, "observation_from_json", counted)
    kept, folded = fresh(), fresh()
    with RolloutStore(tmp_path) as store:
        assert store.resume(SHADOWED) is not None
        assert store.recall(kept)
    for seen in all_looks:
        folded.take(seen)
    assert kept.to_json() == folded.to_json()
    assert len(again) < 10 < len(all_looks)
    assert roll(tmp_path, target).outcome is Outcome.PROMOTED


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("damage", ["{", "[]", '{"looks_bytes": 10}', '{"looks_bytes": 99999999}'])
def test_a_damaged_fold_is_an_error_and_moving_it_away_mends_it(damage: str, tmp_path: Path) -> None:
    target = cut_off(tmp_path)
    (tmp_path / SIGHT_FILE).write_text(damage)
    shares = dict(target.shares)
    with pytest.raises(StateError, match=SIGHT_FILE):
        roll(tmp_path, target)
    assert target.shares == shares
    (tmp_path / SIGHT_FILE).unlink()
    assert roll(tmp_path, target).outcome is Outcome.PROMOTED


@pytest.mark.usefixtures("often")
def test_the_fold_of_other_looks_is_refused(tmp_path: Path) -> None:
    target = cut_off(tmp_path / "one")
    other = start()
    other.clock.wait(11)
    assert roll(tmp_path / "other", other).outcome is Outcome.PROMOTED
    (tmp_path / "one" / SIGHT_FILE).write_bytes((tmp_path / "other" / SIGHT_FILE).read_bytes())
    with pytest.raises(StateError, match=SIGHT_FILE):
        roll(tmp_path / "one", target)


@pytest.mark.usefixtures("often")
def test_looks_that_lost_their_end_are_refused_where_more_was_folded(tmp_path: Path) -> None:
    target = cut_off(tmp_path)
    path = tmp_path / LOOKS_FILE
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with pytest.raises(StateError, match="does not reach to byte"):
        roll(tmp_path, target)


# ---- a turn at a time ----


class Impatient(SimulatedClock):
    """Nobody may wait by it."""

    def wait(self, seconds: float) -> None:
        raise AssertionError("a turn waited")

    def passes(self, seconds: float) -> None:
        super().wait(seconds)


def test_turns_of_many_rollouts_are_taken_by_one_thread_in_the_order_in_which_they_are_due(tmp_path: Path) -> None:
    with ExitStack() as held:
        take_turns(tmp_path, held)


def take_turns(tmp_path: Path, held: ExitStack) -> None:
    clock = Impatient()
    clicked = {"better": 0.1, "worse": 0.001, "the same": 0.08}
    engines = {}
    for name, canary in clicked.items():
        target = SimulatedTarget({"1": Behaviour(), "2": Behaviour(clicked=canary)}, clock, 200.0)
        engines[name] = Engine(
            SPEC, OBJECTIVES, CANARY, target, held.enter_context(RolloutStore(tmp_path / name)), {"1": Path("one")},
            clock=clock,
        )  # fmt: skip
        engines[name].open()
    due = dict.fromkeys(engines, clock.now_s())
    while due:
        name = min(due, key=due.__getitem__)
        clock.passes(max(0.0, due[name] - clock.now_s()))
        after_s = engines[name].step()
        if after_s is None:
            del due[name]
        else:
            assert after_s <= clock.now_s() + SPEC.look_s
            due[name] = after_s
    outcomes = {name: engine.result.outcome for name, engine in engines.items()}
    assert outcomes["better"] is Outcome.PROMOTED
    assert outcomes["worse"] is Outcome.ROLLED_BACK
    for name, canary in clicked.items():
        target = start(canary)
        alone = run_rollout(SPEC, OBJECTIVES, CANARY, target, tmp_path / f"{name} alone",
                            packages={"1": Path("one")}, clock=target.clock)  # fmt: skip
        assert (engines[name].result.outcome, engines[name].result.reason) == (alone.outcome, alone.reason)


def test_a_turn_that_is_not_due_does_nothing_and_says_when_it_is(tmp_path: Path) -> None:
    target = start()
    with RolloutStore(tmp_path) as store:
        engine = Engine(SPEC, OBJECTIVES, CANARY, target, store, {"1": Path("one")}, clock=target.clock)
        engine.open()
        due_s = engine.step()
        while due_s is not None and due_s <= target.clock.now_s():
            due_s = engine.step()
        calls = target.calls
        assert due_s is not None
        assert (engine.step(), target.calls) == (due_s, calls)
        assert due_s == target.clock.now_s() + SPEC.look_s
