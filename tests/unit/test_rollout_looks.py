"""From cumulative counts to what each look adds: gaps, restarts, lost readiness, the split of shoppers."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from endcap.evidence import Counts, Stratum
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.events import Received
from serving.rollout.looks import LookFold, observation_from_json, observation_to_json
from serving.targets.base import Observation, ShadowObservation, VersionObservation
from tests.simulated import OBJECTIVES

COUNTED = Objectives(
    "shop", "shop", (*OBJECTIVES.objectives, Objective("baskets", 0.3, Good.COUNTED, None, None, None, 0.2))
)


def version(total: int, good: int | None = None, **more: object) -> VersionObservation:
    counts = Counts(total if good is None else good, total)
    fields = {
        "attempts": counts, "first_attempts": counts, "requests": counts, "within_ms": {100: counts},
        "shoppers": counts,
    } | more  # fmt: skip
    return VersionObservation(**fields)  # type: ignore[arg-type]


def seen(at_s: float, share: float = 0.1, **versions: VersionObservation) -> Observation:
    labels = {name.removeprefix("v").replace("_", "-"): found for name, found in versions.items()}
    return Observation(at_s, {"2": share, "1": 1 - share}, labels, window_s=5.0)


def test_the_first_observation_is_where_counting_begins() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    look = fold.fold(seen(0, v1=version(900), v2=version(50)))
    assert look.strata == {}
    look = fold.fold(seen(1, v1=version(990), v2=version(60, 55)))
    assert look.strata["availability"] == Stratum(Counts(5, 10), Counts(90, 90))
    assert look.received == Received(10, 10, 100)
    assert (look.canary_new, look.control_new) == (10, 90)


def test_what_an_observation_does_not_tell_is_counted_once_it_is_told_again() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    fold.fold(seen(0, v1=version(0), v2=version(0)))
    fold.fold(seen(1, v1=version(90), v2=version(10)))
    look = fold.fold(seen(2, v1=version(180)))
    assert look.strata["availability"] == Stratum(Counts(), Counts(90, 90))
    look = fold.fold(seen(3, v1=version(270), v2=version(30)))
    assert look.strata["availability"].canary == Counts(20, 20), "neither twice nor not at all"


def test_a_source_that_was_silent_invents_nothing_when_it_is_back() -> None:
    fold = LookFold(COUNTED, canary="2")
    told = {"measured": {"baskets": Counts(30, 100)}}
    fold.fold(seen(0, v1=version(0, **told), v2=version(0, **told)))
    look = fold.fold(seen(1, v1=version(90), v2=version(10)))
    assert look.strata["baskets"] == Stratum(Counts(), Counts())
    later = {"measured": {"baskets": Counts(40, 130)}}
    look = fold.fold(seen(2, v1=version(90, **later), v2=version(10, **told)))
    assert look.strata["baskets"] == Stratum(Counts(), Counts(10, 30))


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100), st.booleans(), st.booleans()), max_size=30))
def test_all_events_are_counted_once_whatever_restarts_and_gaps_there_are(
    steps: list[tuple[int, int, bool, bool]],
) -> None:
    fold, kept, events = LookFold(OBJECTIVES, canary="2"), Counts(), 0
    fold.fold(seen(0, v1=version(0)))
    told = Counts()
    for second, (good, bad, restarts, missing) in enumerate(steps, 1):
        if restarts and told.total > 0 and not missing:
            kept = Counts()
        grown = Counts(good, good + bad)
        if restarts and kept == Counts() and grown.total >= told.total and grown.good >= told.good:
            kept = told  # a restart that cannot be told from going on is none
        kept += grown
        events += grown.total
        versions = {} if missing else {"v2": version(kept.total, kept.good)}
        fold.fold(seen(second, v1=version(0), **versions))
        told = told if missing else kept
    fold.fold(seen(99, v1=version(0), v2=version(kept.total, kept.good)))
    assert fold.received.canary_attempts <= events
    if not any(restarts for _, _, restarts, _ in steps):
        assert fold.received.canary_attempts == events


def test_a_canary_without_a_ready_replica_fails_its_share_of_what_others_answered() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    lost = {"replicas": 2, "ready_replicas": 0}
    fold.fold(seen(0, v1=version(0), v2=version(0, **lost)))
    look = fold.fold(seen(1, v1=version(200), v2=version(0, **lost)))
    assert look.strata["availability"] == Stratum(Counts(0, 20), Counts(200, 200))
    look = fold.fold(seen(2, share=0.0, v1=version(400), v2=version(0, **lost)))
    assert look.strata["availability"].canary == Counts(), "without a share nothing was lost"


def test_what_fails_whoever_tries_it_fails_once_however_often_it_is_tried() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    fold.fold(seen(0, v1=version(0), v2=version(0)))
    tried = {"attempts": Counts(8, 14), "first_attempts": Counts(8, 10)}
    look = fold.fold(seen(1, v1=version(90), v2=version(10, **tried)))
    assert look.strata["availability"].canary == Counts(8, 10)
    assert look.received.canary_attempts == 14


def test_latency_is_judged_beside_the_baseline_and_the_rest_beside_everything() -> None:
    fold = LookFold(OBJECTIVES, canary="2", baseline="1-baseline")
    shares = {"2": 0.1, "1": 0.8, "1-baseline": 0.1}
    first = replace(seen(0, v1=version(0), v2=version(0), v1_baseline=version(0)), shares=shares)
    fold.fold(first)
    look = fold.fold(replace(seen(1, v1=version(80), v2=version(10), v1_baseline=version(9, 7)), shares=shares))
    assert look.strata["latency"].control == Counts(7, 9)
    assert look.strata["availability"].control == Counts(87, 89)


def test_the_split_of_shoppers_is_told_only_when_one_share_decided_all_of_it() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    splits = [
        fold.fold(seen(second, 0.1 if second < 20 else 0.5, v1=version(90 * second), v2=version(10 * second))).split
        for second in range(40)
    ]  # fmt: skip
    told = [second for second, split in enumerate(splits) if split is not None]
    assert told == [*range(6, 20), *range(26, 40)], "a window after the share was set, until it is set again"
    assert splits[10] is not None
    assert (splits[10].canary, splits[10].total, splits[10].share) == (10, 100, 0.1)


def test_shoppers_that_a_collector_tells_of_late_are_not_held_against_the_share_that_came_since() -> None:
    fold, splits = LookFold(OBJECTIVES, canary="2"), []
    for second in range(40):
        told = min(second, 8) if second < 30 else second  # it was away from 8 to 30, and the share was changed at 10
        share = 0.1 if second < 10 else 0.5
        splits.append(fold.fold(seen(second, share, v1=version(90 * told), v2=version(10 * told))).split)
    assert [second for second, split in enumerate(splits) if split is not None] == [6, 7, 8, *range(31, 40)]


def test_canary_s_events_wait_for_control_s_where_a_source_tells_of_one_at_a_time() -> None:
    fold, strata = LookFold(COUNTED, canary="2"), []
    for second in range(60):
        by_version = {
            "v1": version(0, measured={"baskets": Counts(9, 30)} if second % 15 == 3 else {}),
            "v2": version(0, measured={"baskets": Counts(1, 5)} if second % 15 == 9 else {}),
        }
        times = second // 15 + 1
        for name, one in by_version.items():
            grown = {what: Counts(c.good * times, c.total * times) for what, c in one.measured.items()}
            by_version[name] = replace(one, measured=grown)
        look = fold.fold(seen(second, **by_version))
        stratum = look.strata.get("baskets", Stratum(Counts(), Counts()))
        if stratum.canary.total:
            strata.append((second, stratum))
    assert strata == [(second, Stratum(Counts(1, 5), Counts(9, 30))) for second in (18, 33, 48)]


def test_canary_s_events_wait_for_nobody_where_it_has_all_the_traffic_or_control_has_been_silent_for_long() -> None:
    fold = LookFold(OBJECTIVES, canary="2")
    fold.fold(seen(0, v1=version(0), v2=version(0)))
    alone = [fold.fold(seen(second, v1=version(0), v2=version(10 * second))) for second in range(1, 63)]
    told = [(look.strata["availability"].canary.total, at_s) for at_s, look in enumerate(alone, 1)]
    assert [one for one in told if one[0]] == [(610, 61)]
    look = fold.fold(seen(63, share=1.0, v1=version(0), v2=version(630)))
    assert look.strata["availability"] == Stratum(Counts(20, 20), Counts())


def test_a_look_on_disk_is_the_look() -> None:
    whole = replace(
        seen(7.5, v1=version(90, measured={"baskets": Counts(1, 2)}), v2=version(10, 7, replicas=2)),
        shadow=ShadowObservation("2", Counts(9, 10), {100: Counts(8, 9)}, 9, 0.5, 0.1), outcomes=Counts(99, 100),
    )  # fmt: skip
    assert observation_from_json(json.loads(json.dumps(observation_to_json(whole)))) == whole
