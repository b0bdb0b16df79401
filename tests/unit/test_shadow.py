"""The comparator against a reference that keeps everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.evidence import Counts
from serving.server.answers import LoggedAnswer
from serving.shadow import Comparator
from serving.targets import ShadowObservation

SHADOW = "7"
STABLE = "6"
PATIENCE_S = 5.0


def line(
    request_id: str, version: str, *, code: int = 200, ms: float = 2.0, scores: dict[str, float] | None = None
) -> bytes:
    scores = {"a": 3.0, "b": 2.0, "c": 1.0} if scores is None else scores
    items, values = (list(scores), list(scores.values())) if code == 200 else ([], [])
    return LoggedAnswer(request_id, version, version == SHADOW, code, ms, items, values).line()


def comparator(**more: Any) -> Comparator:
    return Comparator(SHADOW, [STABLE, f"{STABLE}-baseline"], thresholds_ms=[10, 100], patience_s=PATIENCE_S, **more)


def test_equal_answers_overlap_wholly_and_do_not_drift() -> None:
    found = comparator()
    found.add([line("1", STABLE), line("1", SHADOW, ms=10.0), line("2", f"{STABLE}-baseline")], 0.0)
    found.add([line("2", SHADOW, ms=10.5)], 1.0)
    assert found.observe() == ShadowObservation(
        SHADOW, Counts(2, 2), {10: Counts(1, 2), 100: Counts(2, 2)}, pairs=2, overlap=1.0, score_drift=0.0
    )


def test_nothing_seen_is_nothing_counted() -> None:
    assert comparator().observe() == ShadowObservation(SHADOW, within_ms={10: Counts(), 100: Counts()})


def test_overlap_and_drift_are_those_of_the_first_items() -> None:
    found = comparator(k=2)
    found.add([line("1", STABLE, scores={"a": 3.0, "b": 1.0, "c": 0.5})], 0.0)
    found.add([line("1", SHADOW, scores={"a": 3.5, "c": 9.0, "b": 0.0})], 0.0)
    seen = found.observe()
    assert (seen.pairs, seen.overlap) == (1, 0.5)
    assert seen.score_drift == pytest.approx(0.5 / 1.0)  # scores 3 and 1 spread by 1


def test_a_short_answer_is_compared_by_what_there_is() -> None:
    found = comparator()
    found.add([line("1", STABLE, scores={"a": 1.0}), line("1", SHADOW, scores={"a": 1.0})], 0.0)
    found.add([line("2", STABLE, scores={}), line("2", SHADOW, scores={})], 0.0)
    found.add([line("3", STABLE, scores={"a": 1.0}), line("3", SHADOW, scores={})], 0.0)
    assert found.observe().overlap == pytest.approx(2 / 3)


def test_scores_that_do_not_spread_drift_by_a_finite_figure() -> None:
    found = comparator()
    found.add([line("1", STABLE, scores={"a": 1.0}), line("1", SHADOW, scores={"a": 1.5})], 0.0)
    assert math.isfinite(found.observe().score_drift)
    assert found.observe().score_drift > 1000


def test_a_shadow_that_does_not_come_in_time_has_not_answered() -> None:
    found = comparator()
    found.add([line("1", STABLE)], 0.0)
    found.add([], 4.9)
    assert found.observe().answered == Counts(0, 0)
    found.add([], 5.0)
    assert found.observe().answered == Counts(0, 1)
    found.add([line("1", SHADOW), line("1", STABLE)], 6.0)
    found.add([], 60.0)
    assert found.observe().answered == Counts(0, 1)


def test_a_reader_that_was_held_up_makes_no_answer_late() -> None:
    found = comparator()
    found.add([line("1", STABLE)], 0.0)
    found.add([line("2", STABLE)], 60.0)
    found.add([line("2", SHADOW), line("1", SHADOW)], 60.0)
    assert found.observe().answered == Counts(2, 2)


@pytest.mark.parametrize(
    ("serving", "shadow", "answered"),
    [(200, 200, 1), (200, 500, 0), (200, 400, 0), (200, 429, 0), (400, 400, 1), (503, 200, 1), (503, 503, 0),
     (400, 500, 0)],
)  # fmt: skip
def test_what_a_shadow_has_answered(serving: int, shadow: int, answered: int) -> None:
    found = comparator()
    found.add([line("1", SHADOW, code=shadow), line("1", STABLE, code=serving)], 0.0)
    found.add([], PATIENCE_S)
    seen = found.observe()
    assert seen.answered == Counts(answered, 1)
    assert seen.pairs == (serving == shadow == 200)


def test_an_answer_that_the_gateway_got_in_the_end_is_the_one_compared() -> None:
    found = comparator()
    found.add([line("1", STABLE, code=503), line("1", SHADOW), line("1", STABLE), line("1", STABLE, code=503)], 0.0)
    found.add([], PATIENCE_S)
    seen = found.observe()
    assert (seen.answered, seen.pairs) == (Counts(1, 1), 1)


def test_a_shadow_that_was_alone_counts_nowhere() -> None:
    found = comparator()
    found.add([line("1", SHADOW)], 0.0)
    found.add([], 60.0)
    assert found.observe().answered == Counts(0, 0)
    found.add([line("1", STABLE)], 60.0)
    found.add([], 120.0)
    assert found.observe().answered == Counts(0, 0)


DAMAGE: list[dict[str, Any]] = [
    {"request_id": ""}, {"request_id": 5}, {"request_id": "x" * 300}, {"version": None}, {"shadow": 1}, {"code": "200"},
    {"code": True}, {"code": 99}, {"ms": -1}, {"ms": True}, {"ms": None}, {"items": "ab"}, {"items": ["a"]},
    {"items": ["a", 5]}, {"scores": [1.0, None]}, {"scores": [1.0, 1e200]}, {"scores": [1.0, True]},
    {"items": ["a"] * 2000, "scores": [1.0] * 2000}, {"shadow": True}, {"version": "5"}, {"version": SHADOW},
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGE, ids=str)
def test_a_line_of_another_form_or_version_is_counted_and_left(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"request_id": "1", "version": STABLE, "shadow": False, "code": 200, "ms": 1,
                            "items": ["a", "b"], "scores": [1.0, 0]}  # fmt: skip
    found = comparator()
    found.add([orjson.dumps(good | change)], 0.0)
    found.add([], 60.0)
    assert found.damaged_lines == 1
    assert found.observe().answered == Counts(0, 0)
    found.add([orjson.dumps(good)], 60.0)
    assert found.damaged_lines == 1


def test_memory_is_bounded_and_what_was_forgotten_counts_nowhere() -> None:
    found = comparator(max_pending=100)
    for number in range(5000):
        found.add([line(f"s-{number}", STABLE)], 0.0)
        found.add([line(f"a-{number}", SHADOW)], 0.0)
    assert len(found._waiting) <= 100
    assert len(found._done) <= 100
    found.add([], 60.0)
    assert found.observe().answered == Counts(0, 5000 - found.forgotten)
    assert found.forgotten >= 4900


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["request_id", "version", "shadow", "code", "ms", "items", "scores"]), inner, max_size=7
        ),
    ),
    max_leaves=15,
)


@given(st.lists(st.one_of(st.binary(max_size=60), JSON.map(orjson.dumps)), max_size=5))
def test_any_bytes_are_counted_or_left(raw: list[bytes]) -> None:
    found = Comparator(SHADOW)
    found.add(raw, 0.0)
    found.add([], 60.0)
    seen = found.observe()
    assert seen.answered.total + found.damaged_lines <= len(raw)
    assert math.isfinite(seen.score_drift)


# Against a reference


@dataclass(frozen=True)
class Came:
    at_s: float
    request: int
    shadow: bool
    code: int
    ms: float
    scores: tuple[tuple[str, float], ...]

    @property
    def raw(self) -> bytes:
        return line(str(self.request), SHADOW if self.shadow else STABLE, code=self.code, ms=self.ms,
                    scores=dict(self.scores))  # fmt: skip


SCORES = st.dictionaries(st.sampled_from("abcdef"), st.floats(-100, 100), max_size=5).map(lambda d: tuple(d.items()))
CAME = st.builds(
    Came, st.floats(0, 20), st.integers(0, 6), st.booleans(), st.sampled_from([200, 200, 200, 400, 503]),
    st.floats(0, 200), SCORES,
)  # fmt: skip


def reference(came: list[Came], end_s: float, k: int) -> tuple[Counts, int, int, float, float]:
    """(answered, within 10 ms, pairs, overlap, drift), request by request from the whole story."""
    answered = copied = within = 0
    overlaps: list[float] = []
    differences: list[float] = []
    spread: list[float] = []
    for request in {one.request for one in came}:
        own = [one for one in came if one.request == request]
        last_s = own[0].at_s + PATIENCE_S
        own = [one for one in own if one.at_s < last_s]
        serving, shadow = None, None
        done = False
        for one in own:
            if one.shadow:
                shadow = shadow or one
            elif serving is None or (serving.code == 503 and one.code != 503):
                serving = one
            if serving and shadow and serving.code != 503:
                done = True
                break
        if serving is None or not (done or last_s <= end_s):
            continue
        copied += 1
        if shadow is None or shadow.code == 503 or (serving.code == 200 != shadow.code):
            continue
        answered += 1
        within += shadow.ms <= 10
        if serving.code == shadow.code == 200:
            ours, theirs = dict(serving.scores[:k]), dict(shadow.scores[:k])
            common = ours.keys() & theirs.keys()
            overlaps.append(len(common) / max(len(ours), len(theirs)) if ours or theirs else 1.0)
            differences += [abs(ours[item] - theirs[item]) for item in common]
            spread += ours.values()
    difference = sum(differences) / len(differences) if differences else 0.0
    mean = sum(spread) / len(spread) if spread else 0.0
    deviation = math.sqrt(sum((score - mean) ** 2 for score in spread) / len(spread)) if spread else 0.0
    drift = difference / deviation if deviation > 1e-6 else math.nan
    return (Counts(answered, copied), within, len(overlaps), sum(overlaps) / len(overlaps) if overlaps else 0.0,
            drift if difference else 0.0)  # fmt: skip


@given(came=st.lists(CAME, max_size=40), k=st.integers(1, 4), more_s=st.floats(0, 10), often=st.booleans())
def test_it_counts_as_the_reference_does_in_any_order(came: list[Came], k: int, more_s: float, often: bool) -> None:
    came = sorted(came, key=lambda one: one.at_s)
    found = comparator(k=k)
    for one in came:
        found.add([], one.at_s)
        found.observe()  # what is over is over before this line is read
        found.add([one.raw], one.at_s)
        if often:
            found.observe()
    end_s = (came[-1].at_s if came else 0.0) + more_s
    found.add([], end_s)
    seen = found.observe()
    answered, within, pairs, overlap, drift = reference(came, end_s, k)
    assert (seen.answered, seen.within_ms[10], seen.pairs) == (answered, Counts(within, answered.good), pairs)
    assert seen.overlap == pytest.approx(overlap)
    if not math.isnan(drift):
        assert seen.score_drift == pytest.approx(min(drift, 1e6), rel=1e-6, abs=1e-9)
