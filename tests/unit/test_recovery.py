"""How long a fault lasted for shoppers: the definitions of endcap.recovery as properties."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from endcap.objectives import Good, Objective, Objectives
from endcap.records import FaultRecord, RequestRecord, TargetEvent
from endcap.recovery import Span, held, measure_recovery, span_of

OBJECTIVES = Objectives(
    "recommender",
    "recommender",
    (
        Objective("availability", 0.999, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.9, Good.ANSWERED, 100, None, 0.01, None),
        Objective("click-through", 0.5, Good.CLICKED, None, 5.0, None, 0.1),
    ),
)
START_S, FAULT_S, END_S = 1000.0, 1010.0, 1040.0
SPAN = Span(START_S, FAULT_S, None, END_S)


def load(
    *, failing: frozenset[int] = frozenset(), slow: frozenset[int] = frozenset(), silent: frozenset[int] = frozenset()
) -> list[RequestRecord]:
    """Ten requests a second; in the seconds named (counted from the fault) they fail, are slow, or are not sent."""
    records = []
    for number in range(int(END_S - START_S) * 10):
        at_s = START_S + number / 10 + 0.05
        second = int((at_s - FAULT_S) // 1)
        if second in silent:
            continue
        status, latency_s = (0, 3.0) if second in failing else (200, 0.5 if second in slow else 0.01)
        records.append(RequestRecord(f"r-{number}", "recommend", "1", at_s, at_s, at_s + latency_s, status))
    return records


def test_a_fault_that_no_shopper_noticed_has_an_rto_of_zero() -> None:
    recovery = measure_recovery(OBJECTIVES, load(), [], SPAN)
    assert (recovery.rto_s, recovery.failed_requests, recovery.bad_windows) == (0.0, 0, 0)
    assert recovery.first_failure_s is recovery.detected_s is recovery.first_good_s is None
    assert recovery.requests == 400
    assert held(recovery, failed_requests_allowed=0)


def test_an_outage_lasts_until_the_end_of_its_last_bad_second() -> None:
    events = [
        TargetEvent(FAULT_S - 5, "replica_died", "1", "a", "0"),
        TargetEvent(FAULT_S + 1.25, "replica_unhealthy", "1", "a", "0"),
        TargetEvent(FAULT_S + 0.25, "replica_started", "1", "a", "0"),
    ]
    recovery = measure_recovery(OBJECTIVES, load(failing=frozenset({0, 1}), slow=frozenset({3})), events, SPAN)
    assert recovery.rto_s == 4.0
    assert recovery.failed_requests == 20
    assert recovery.detected_s == 1.25
    assert recovery.first_failure_s is not None
    assert abs(recovery.first_failure_s - 0.05) < 1e-6
    assert recovery.first_good_s is not None
    assert abs(recovery.first_good_s - 2.05) < 1e-6
    assert held(recovery)
    assert not held(recovery, failed_requests_allowed=0)


def test_never_steady_again_is_not_a_time_and_not_held() -> None:
    recovery = measure_recovery(OBJECTIVES, load(failing=frozenset(range(60))), [], SPAN)
    assert recovery.rto_s is None
    assert not held(recovery)


def test_what_happens_long_after_has_another_cause_and_is_told() -> None:
    recovery = measure_recovery(OBJECTIVES, load(slow=frozenset({1, 12})), [], SPAN)
    assert (recovery.rto_s, recovery.bad_windows, recovery.other_bad_windows) == (2.0, 2, 1)


def test_the_return_of_a_lost_zone_is_measured_apart() -> None:
    span = Span(START_S, FAULT_S, FAULT_S + 15, END_S)
    recovery = measure_recovery(OBJECTIVES, load(failing=frozenset({0}), slow=frozenset({16})), [], span)
    assert (recovery.rto_s, recovery.failback_s, recovery.other_bad_windows) == (1.0, 2.0, 0)


def test_no_request_and_no_fault_are_no_pass() -> None:
    assert not held(measure_recovery(OBJECTIVES, [], [], SPAN))
    unhurt = measure_recovery(OBJECTIVES, load(), [], Span(START_S, None, None, END_S))
    assert unhurt.rto_s is None
    assert not held(unhurt)


def test_silence_does_not_end_an_outage() -> None:
    recovery = measure_recovery(OBJECTIVES, load(failing=frozenset({0, 1}), silent=frozenset(range(2, 60))), [], SPAN)
    assert recovery.rto_s is None


@given(
    failing=st.frozensets(st.integers(0, 29)),
    slow=st.frozensets(st.integers(0, 29)),
    seed=st.integers(),
)
def test_the_measure_is_bounded_by_what_was_bad(failing: frozenset[int], slow: frozenset[int], seed: int) -> None:
    records = load(failing=failing, slow=slow)
    random.Random(seed).shuffle(records)
    recovery = measure_recovery(OBJECTIVES, records, [], SPAN)
    bad = failing | slow
    assert recovery.bad_windows == len(bad)
    assert recovery.failed_requests == 10 * len(failing)
    if recovery.rto_s is not None:
        assert recovery.rto_s == 0 or recovery.rto_s - 1 in bad
        assert recovery.rto_s <= (max(bad) + 1 if bad else 0)
        assert recovery.other_bad_windows == sum(second >= recovery.rto_s for second in bad)
        # Whatever else went wrong did so after a stretch of steady seconds.
        later = [second for second in bad if second >= recovery.rto_s]
        assert not later or min(later) - recovery.rto_s >= 5


@given(seconds=st.sets(st.integers(0, 29)), more=st.integers(0, 29))
def test_one_more_failure_never_makes_a_shorter_outage(seconds: set[int], more: int) -> None:
    before = measure_recovery(OBJECTIVES, load(failing=frozenset(seconds)), [], SPAN).rto_s
    after = measure_recovery(OBJECTIVES, load(failing=frozenset(seconds | {more})), [], SPAN).rto_s
    assert after is None or (before is not None and after >= before)


def test_a_drills_span_is_read_from_the_faults_of_its_own_time() -> None:
    faults = [
        FaultRecord(900.0, "zone-loss", "hang", "injected", "1-a-0"),
        FaultRecord(1010.0, "zone-loss", "hang", "injected", "1-a-0"),
        FaultRecord(1010.1, "zone-loss", "hang", "injected", "1-a-1"),
        FaultRecord(1012.0, "replica-kill", "kill", "injected", "1-b-1"),
        FaultRecord(1018.0, "zone-loss", "hang", "reverted", "1-a-0"),
        FaultRecord(1018.1, "zone-loss", "hang", "reverted", "1-a-1"),
    ]
    span = span_of("zone-loss", faults, started_at_s=START_S, ended_at_s=END_S)
    assert span == Span(START_S, 1010.0, 1018.1, END_S)
    assert span_of("zone-loss", [], started_at_s=START_S, ended_at_s=END_S).fault_at_s is None
