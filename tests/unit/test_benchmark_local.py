"""The local rollout benchmark's pure parts: whose failures are whose, what was set and what came, how old is old."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rollout.local_figures import (
    Failures,
    Span,
    failing_objectives,
    is_right,
    samples,
    share_spans,
    shares_seen,
    whose_failures,
)
from benchmarks.rollout.local_packages import (
    KINDS,
    WORSE_AT_LEAST,
    WORSE_AT_MOST,
    Kind,
    find_old_part,
    oldest,
    plan,
)
from endcap.errors import OutcomeError
from endcap.records import RequestRecord, TargetEvent, TargetEventKind
from serving.rollout.state import Outcome


def failed(request_id: str, sent_s: float, done_s: float) -> RequestRecord:
    return RequestRecord(request_id, "recommend", "7", sent_s, sent_s, done_s, 503)


def event(at_s: float, detail: str | None, kind: TargetEventKind = "shares_set") -> TargetEvent:
    return TargetEvent(at_s, kind, detail=detail)


def test_every_failure_is_the_engine_s_unless_the_candidate_is_one_that_fails() -> None:
    records = [failed("tried", 10, 11), failed("beside", 12, 13), failed("before", 1, 2), failed("after", 30, 31)]
    for name in ("again", "old-data", "permuted", "tampered"):
        assert whose_failures(KINDS[name], records, {"tried"}, [Span(5, 20)]) == Failures(engine=4)
    for name in ("failing", "stalling"):
        assert whose_failures(KINDS[name], records, {"tried"}, [Span(5, 20)]) == Failures(2, 1, 1)
        assert whose_failures(KINDS[name], records, set(), []) == Failures(engine=4)


def test_a_request_that_was_asked_of_the_candidate_is_its_own_whenever_that_was() -> None:
    assert whose_failures(KINDS["failing"], [failed("a", 30, 31)], {"a"}, [Span(5, 20)]) == Failures(tried=1)


@pytest.mark.parametrize(
    ("sent_s", "done_s", "engine"), [(4, 4.9, 1), (4, 5, 0), (19, 22, 0), (20, 22, 0), (21, 22, 1)]
)
def test_a_share_at_any_moment_of_the_request_is_enough(sent_s: float, done_s: float, engine: int) -> None:
    assert whose_failures(KINDS["stalling"], [failed("a", sent_s, done_s)], set(), [Span(5, 20)]).engine == engine


def test_when_a_version_had_a_share_is_read_from_the_target_s_events() -> None:
    events = [
        event(1, "1=100%"), event(2, "r1=5% 1=95%"), event(3, None, "replica_ready"), event(4, "r1=50% 1=50%"),
        event(5, "1=100%"), event(6, "r12=5% 1=95%"), event(7, "r1=5% 1=95%"), event(8, "r1=0% 1=100%"),
    ]  # fmt: skip
    assert share_spans(events, "r1", until_s=9) == [Span(2, 5), Span(7, 8)]
    assert share_spans(events, "r12", until_s=9) == [Span(6, 7)]
    assert share_spans(events[:4], "r1", until_s=9) == [Span(2, 9)]
    assert share_spans(events, "r2", until_s=9) == []


def test_a_rollback_is_right_only_for_what_is_wrong_with_the_candidate() -> None:
    assert is_right(KINDS["again"], "promoted", [])
    assert not is_right(KINDS["again"], "held", [])
    assert is_right(KINDS["old-data"], "rolled_back", ["click-through"])
    assert not is_right(KINDS["old-data"], "rolled_back", ["latency"])
    assert not is_right(KINDS["old-data"], "rolled_back", [])
    assert is_right(KINDS["stalling"], "rolled_back", ["availability"])
    assert is_right(KINDS["tampered"], "refused", [])


def test_all_outcomes_are_expected_of_some_candidate_in_any_ten_in_a_row() -> None:
    kinds = plan(20)
    assert len(kinds) == 20
    assert kinds[:10] == kinds[10:]
    assert {kind.expected for kind in kinds[:3]} == {Outcome.PROMOTED, Outcome.ROLLED_BACK, Outcome.REFUSED}
    assert {kind.name for kind in kinds} == set(KINDS)
    assert all(kind.by for kind in kinds if kind.expected is Outcome.ROLLED_BACK)
    assert all(isinstance(kind, Kind) and kind.own_failures for kind in kinds if kind.name in ("failing", "stalling"))


def received(canary: int, requests: int) -> dict[str, dict[str, int]]:
    return {"received": {"canary_attempts": canary, "canary_requests": canary, "requests": requests}}


def test_shares_set_and_seen_are_told_for_each_step() -> None:
    lines = [
        {"phase": "gating", "step": 1, "share": None, "event": None},
        {"phase": "growing", "step": 1, "share": 0.05, "event": {"kind": "gated"}},
        {"phase": "observing", "step": 1, "share": 0.05, "event": received(0, 100)},
        {"phase": "observing", "step": 1, "share": 0.05, "event": received(5, 200)},
        {"phase": "observing", "step": 1, "share": 0.05, "event": {"kind": "commanded"}},
        {"phase": "growing", "step": 2, "share": 0.5, "event": received(10, 300)},
        {"phase": "observing", "step": 2, "share": 0.5, "event": received(30, 400)},
        {"phase": "holding", "step": 2, "share": 0.5, "event": received(80, 500)},
        {"phase": "returning", "step": 2, "share": 0.0, "event": received(130, 600)},
        {"phase": "done", "step": 2, "share": 0.0, "event": received(130, 700)},
    ]
    assert shares_seen(lines) == [
        {"step": 1, "set": 0.05, "seen": 0.05, "requests": 200},
        {"step": 2, "set": 0.5, "seen": 0.5, "requests": 200},
    ]
    assert shares_seen(lines[:2]) == []


def test_samples_of_a_decision_without_data_have_no_share() -> None:
    line = {"evidence": {
        "clicks": {"canary": {"good": 1, "total": 4}, "control": {"good": 0, "total": 0}, "verdict": "fail"},
        "latency": {"canary": {"good": 1, "total": 1}, "control": {"good": 3, "total": 4}, "verdict": "pass"},
    }}  # fmt: skip
    assert failing_objectives(line) == ["clicks"]
    assert samples(line)["clicks"] == {
        "canary": 4, "control": 0, "canary_share": 0.25, "control_share": None, "verdict": "fail"
    }  # fmt: skip


def test_old_data_keeps_the_oldest_and_at_least_one_purchase() -> None:
    train = [np.arange(1, 11, dtype=np.int32), np.array([3], np.int32)]
    assert [row.tolist() for row in oldest(train, 0.5)] == [[1, 2, 3, 4, 5], [3]]
    assert [row.tolist() for row in oldest(train, 0.01)] == [[1], [3]]


@given(st.floats(0.3, 3.0))
def test_the_last_model_made_is_the_one_that_is_a_quarter_worse(power: float) -> None:
    made: list[float] = []

    def worse_by(part: float) -> float:
        made.append(part)
        return float(1 - part**power)

    part = find_old_part(worse_by)
    assert made[-1] == part
    assert WORSE_AT_LEAST <= 1 - part**power <= WORSE_AT_MOST


def test_data_that_makes_no_difference_is_said() -> None:
    with pytest.raises(OutcomeError, match="a quarter worse"):
        find_old_part(lambda _: 0.0)
