"""Drills without processes: what is chosen, what is looked at, and why a drill is not held."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import drills, faults, probes
from endcap.errors import InputError, TargetError
from endcap.objectives import Good, Objective, Objectives
from endcap.records import GatewayRecord, read_access_since
from endcap.recovery import Recovery
from serving.targets import Replica

OBJECTIVES = Objectives(
    "recommender",
    "recommender",
    (
        Objective("availability", 0.9, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.9, Good.ANSWERED, 100, None, 0.01, None),
        Objective("click-through", 0.05, Good.CLICKED, None, 5.0, None, 0.1),
    ),
)
REPLICAS = st.builds(
    Replica,
    version=st.sampled_from("12"),
    zone=st.sampled_from("ab"),
    index=st.integers(0, 3),
    pid=st.none() | st.integers(2, 99),
    port=st.just(1),
    ready=st.booleans(),
)


# ---- choosing ----------------------------------------------------------------------------------------


@given(st.lists(REPLICAS, unique_by=faults.subject_of), st.integers(), st.none() | st.sampled_from("12"))
def test_a_kill_always_leaves_a_ready_replica_of_the_version(
    replicas: list[Replica], seed: int, version: str | None
) -> None:
    try:
        chosen = faults.choose_replica(replicas, seed=seed, version=version, zone=None)
    except TargetError:
        return
    assert chosen.ready
    assert chosen.pid is not None
    assert version in (None, chosen.version)
    assert any(one.ready and one.version == chosen.version and one != chosen for one in replicas)
    # The order in which a target lists its replicas does not change what a seed means.
    assert faults.choose_replica(replicas[::-1], seed=seed, version=version, zone=None) == chosen


@given(st.lists(REPLICAS, unique_by=faults.subject_of), st.integers())
def test_a_lost_zone_is_lost_wholly_and_another_is_left(replicas: list[Replica], seed: int) -> None:
    try:
        chosen = faults.choose_zone(replicas, seed=seed, zone=None)
    except TargetError:
        return
    (zone,) = {one.zone for one in chosen}
    live = [one for one in replicas if one.pid is not None]
    assert sorted(chosen, key=faults.subject_of) == sorted(
        (one for one in live if one.zone == zone), key=faults.subject_of
    )
    assert any(one.zone != zone for one in live)


def test_a_zone_that_is_not_there_is_named() -> None:
    replicas = [Replica("1", zone, 0, 10, 1, True) for zone in "ab"]
    with pytest.raises(TargetError, match="no zone 'c'"):
        faults.choose_zone(replicas, seed=1, zone="c")
    with pytest.raises(TargetError, match="only the zone 'a'"):
        faults.choose_zone(replicas[:1], seed=1, zone=None)


# ---- looking -----------------------------------------------------------------------------------------


def outcome(at_s: float, *, code: int = 200, duration_ms: float = 5.0, route: str = "recommend", flags: str = "-"
            ) -> GatewayRecord:  # fmt: skip
    return GatewayRecord(at_s, "r", route, "version-1", "h:1", code, flags, duration_ms, 1, None)


def test_steady_state_is_the_objectives_over_shoppers_requests_only() -> None:
    records = [
        *(outcome(10.0 + number / 10) for number in range(18)),
        outcome(11.0, code=503),
        outcome(11.0, duration_ms=500.0),
        outcome(11.0, code=0, flags="DC"),  # the shopper went away
        outcome(11.0, code=503, route="feedback"),
        outcome(5.0, code=503),
    ]
    found = probes.judge_outcomes(OBJECTIVES, records, from_s=10.0, to_s=12.0)
    assert set(found) == {"availability", "latency"}
    assert (found["availability"]["good"], found["availability"]["total"]) == (19, 20)
    assert (found["latency"]["good"], found["latency"]["total"]) == (18, 19)
    assert probes.objectives_hold(found)
    assert not probes.objectives_hold(probes.judge_outcomes(OBJECTIVES, records, from_s=10.9, to_s=11.1))


def test_no_data_is_no_steady_state() -> None:
    assert not probes.objectives_hold(probes.judge_outcomes(OBJECTIVES, [], from_s=0.0, to_s=1.0))
    assert not probes.objectives_hold({})
    assert not probes.objectives_hold(None)


def test_objectives_are_found_beside_the_records_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    monkeypatch.delenv("ENDCAP_OBJECTIVES", raising=False)
    with pytest.raises(InputError, match="ENDCAP_OBJECTIVES"):
        probes.find_objectives(records)
    (tmp_path / "objectives.yaml").write_text("")
    assert probes.find_objectives(records) == tmp_path / "objectives.yaml"
    other = tmp_path / "other.yaml"
    other.write_text("")
    monkeypatch.setenv("ENDCAP_OBJECTIVES", str(other))
    assert probes.find_objectives(records) == other
    assert probes.find_objectives(records, str(tmp_path / "objectives.yaml")) == tmp_path / "objectives.yaml"


@given(starts=st.lists(st.floats(0, 1000), max_size=60), since_s=st.floats(0, 1000), padding=st.integers(0, 60_000))
def test_the_end_of_a_long_access_log_is_read_as_if_it_were_whole(
    tmp_path_factory: pytest.TempPathFactory, starts: list[float], since_s: float, padding: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "access.jsonl"
    lines = [json.dumps({"at_s": at_s, "code": 200, "details": "x" * padding}) for at_s in sorted(starts)]
    path.write_text("".join(f"{line}\n" for line in lines) + '{"torn')
    found = [record.at_s for record in read_access_since(path, since_s)]
    assert found == [at_s for at_s in sorted(starts) if at_s >= since_s]
    assert read_access_since(path.with_name("missing"), 0.0) == []


# ---- judging -----------------------------------------------------------------------------------------

STEADY = {"steady_state_met": True, "probes": []}
COMPLETED = {"status": "completed", "deviated": False, "steady_states": {"before": STEADY, "after": STEADY}, "run": []}
UNHURT = Recovery(100, 0, None, None, None, 0.0, None, 0, 0)
HURT = Recovery(100, 3, 0.1, 0.5, 1.1, 2.0, None, 2, 0)
LOST = Recovery(100, 50, 0.1, None, None, None, None, 9, 0)


@pytest.mark.parametrize(
    ("journal", "recovery", "promised", "reason"),
    [
        (COMPLETED, UNHURT, 0, None),
        (COMPLETED, HURT, None, None),
        (COMPLETED, HURT, 0, "3 requests failed, 0 are promised"),
        (COMPLETED, LOST, None, "not steady again"),
        (COMPLETED, Recovery(0, 0, None, None, None, None, None, 0, 0), 0, "no request"),
        ({**COMPLETED, "deviated": True}, UNHURT, 0, "did not come back"),
        ({**COMPLETED, "status": "interrupted"}, UNHURT, 0, "interrupted"),
        (
            {**COMPLETED, "status": "failed", "steady_states": {
                "before": {"steady_state_met": False, "probes": [
                    {"activity": {"name": "replicas-not-ready"}, "output": {"count": 2}, "tolerance_met": False}]}}},
            UNHURT, 0, "no steady state before it .*replicas-not-ready.*2",
        ),
        (
            {**COMPLETED, "run": [{"activity": {"name": "kill-a-replica"}, "status": "failed",
                                   "exception": ["ActivityFailed: TargetError: no ready replica\n"]}]},
            UNHURT, 0, "kill-a-replica failed .*no ready replica",
        ),
        ({"status": "aborted", "steady_states": None}, UNHURT, 0, "no steady state before"),
    ],
)  # fmt: skip
def test_a_drill_says_why_it_is_not_held(
    journal: dict[str, object], recovery: Recovery, promised: int | None, reason: str | None
) -> None:
    found = drills._reason(journal, recovery, drills.Promises(promised))
    if reason is None:
        assert found is None
    else:
        import re

        assert found is not None
        assert re.search(reason, found)


def test_the_drills_that_come_with_endcap_state_their_promises() -> None:
    assert drills.drill_names() == ["replica-kill", "zone-loss"]
    assert drills._promises(drills._experiment("replica-kill")) == drills.Promises(0, 5)
    assert drills._promises(drills._experiment("zone-loss")) == drills.Promises(None, 5)
    with pytest.raises(InputError, match="replica-kill, zone-loss"):
        drills._experiment("earthquake")
