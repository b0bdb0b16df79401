"""What a user relies on: gates refuse what is shown worse, say when they cannot tell, and bad input is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endcap.errors import InputError, StateError
from endcap.evidence import Verdict
from endcap.files import write_json
from endcap.objectives import Good, Objective, Objectives
from endcap.shoppers import Shopper
from serving.gates import GateReport, GateResult, GateSettings, run_gates
from serving.gates.answers import (
    Answer,
    LatencyGoal,
    Replayed,
    binomial_tail,
    judge_replay,
    latency_goals,
    read_answer,
)
from serving.gates.job import Job
from serving.gates.quality import LEAST_DIFFERING, compare, judge_offline, judge_segments, segment
from serving.gates.recorded import read_recorded
from serving.gates.scoring import Scored, score
from serving.server.service import load_service
from tests.packages import ITEMS, make_package

SETTINGS = GateSettings()
OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.999, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.99, Good.ANSWERED, 100, None, 0.01, None),
        Objective("clicks", 0.1, Good.CLICKED, None, 2.0, None, 0.1),
    ),
)  # fmt: skip


def write_shoppers(path: Path, shoppers: list[tuple[str, list[str], str | None]]) -> Path:
    lines = (json.dumps({"shopper": who, "history": bought, "next": then}) for who, bought, then in shoppers)
    path.write_text("\n".join(lines) + "\n")
    return path


def scored(ndcg: list[float] | np.ndarray) -> Scored:
    gains = np.array(ndcg, np.float64)
    return Scored(gains, (gains > 0).astype(np.float64))


def draws(share: float, size: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(size) < share).astype(np.float64)


# ---- the recorded shoppers -------------------------------------------------------------------------------------------


def test_the_sample_is_bounded_seeded_and_has_each_shopper_once(tmp_path):
    shoppers = [(str(n % 300), [str(n)], "7" if n % 3 else None) for n in range(900)]
    forward = write_shoppers(tmp_path / "a.jsonl", shoppers)
    found = read_recorded(forward, purchases=50, requests=20, seed=1)
    assert (len(found.purchases), len(found.requests)) == (50, 20)
    assert len({one.shopper for one in found.purchases}) == 50
    assert all(one.next_item for one in found.purchases)
    assert all(int(one.history[0]) < 300 for one in found.requests), "a shopper's first line counts"
    assert read_recorded(forward, purchases=50, requests=20, seed=1) == found
    assert read_recorded(forward, purchases=50, requests=20, seed=2) != found
    everybody = read_recorded(forward, purchases=9999, requests=9999, seed=1)
    assert (len(everybody.purchases), len(everybody.requests)) == (200, 300)


def test_the_sample_does_not_hang_on_the_order_of_the_file(tmp_path):
    shoppers = [(str(n), [str(n)], "7") for n in range(200)]
    forward = write_shoppers(tmp_path / "a.jsonl", shoppers)
    backward = write_shoppers(tmp_path / "b.jsonl", shoppers[::-1])
    one, other = (read_recorded(path, purchases=30, requests=9, seed=4) for path in (forward, backward))
    assert one == other


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no shoppers in the file"),
        ("\n\n", "no shoppers in the file"),
        ('{"shopper": "1", "history": [], "next": "2"}\n{"shopper": 1}\n', "line 2"),
        ('{"shopper": "1", "history": [], "next": "2"}\nnonsense\n', "line 2"),
        ('{"shopper": "1", "history": [4], "next": "2"}\n', "line 1"),
        ('{"shopper": "1", "history": ["4"], "next": null}\n{"shopper": "2", "history": ["4"]}\n', "next item"),
        ('{"shopper": "", "history": ["4"], "next": "2"}\n', "1 to 256"),
        ('{"shopper": "1", "history": ["\\ud800"], "next": "2"}\n', "not Unicode"),
        ('{"shopper": "1", "history": ["' + "x" * 40_000 + '"], "next": "2"}\n', "too long"),
        ('{"shopper": "1", "history": ["' + "x" * (1 << 20) + '"], "next": "2"}\n', "longer than"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_bad_file_is_said_with_its_place(tmp_path, text, what):
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_recorded(path, purchases=10, requests=10, seed=1)
    assert what in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(InputError, match="recorded requests"):
        read_recorded(tmp_path / "none.jsonl", purchases=10, requests=10, seed=1)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("recorded") / "requests.jsonl"
    path.write_bytes(raw)
    try:
        assert read_recorded(path, purchases=3, requests=3, seed=1).purchases
    except InputError as error:
        assert error.where is not None


# ---- offline quality -------------------------------------------------------------------------------------------------


def test_a_package_is_scored_as_its_server_would_answer(tmp_path):
    folder = make_package(tmp_path / "package", fails_on=[ITEMS[30]])
    service = load_service(folder, tmp_path / "keys" / "signing.pub")
    shoppers = [
        Shopper("1", (ITEMS[3],), ITEMS[4]),  # the first place
        Shopper("2", (ITEMS[3],), ITEMS[6]),  # the third
        Shopper("3", (ITEMS[3],), ITEMS[20]),  # beyond the first ten
        Shopper("4", (ITEMS[4], ITEMS[3]), ITEMS[4]),  # bought before: never shown
        Shopper("5", ("unheard of",), ITEMS[-1]),  # the fallback's first
        Shopper("6", (ITEMS[30],), ITEMS[31]),  # the graph fails
    ]
    found = score(service, shoppers, who="candidate")
    assert found.ndcg.tolist() == [1.0, pytest.approx(1 / math.log2(4)), 0.0, 0.0, 1.0, 0.0]
    assert found.hits.tolist() == [1, 1, 0, 0, 1, 0]
    assert (found.failed, found.timed_out, found.fallbacks, found.complete) == (1, 0, 1, True)


def test_what_is_shown_worse_fails_and_what_is_the_same_passes():
    stable = scored(draws(0.3, 1000, 1))
    same = judge_offline(stable, stable, SETTINGS)
    assert (same.verdict, same.passed) == (Verdict.PASS, True)
    quarter_worse = stable.ndcg * (draws(0.75, 1000, 2))
    worse = judge_offline(scored(quarter_worse), stable, SETTINGS)
    assert (worse.verdict, worse.passed) == (Verdict.FAIL, False)
    assert "worse than stable by more than 5%" in worse.reason
    assert worse.figures["against_margin"]["high"] < 0
    better = judge_offline(scored(np.maximum(stable.ndcg, draws(0.1, 1000, 3))), stable, SETTINGS)
    assert better.verdict is Verdict.PASS


def test_worse_within_the_margin_does_not_fail():
    stable = scored(draws(0.5, 2000, 1))
    candidate = stable.ndcg.copy()
    candidate[np.flatnonzero(candidate)[:30]] = 0.0  # about 3 %
    assert judge_offline(scored(candidate), stable, SETTINGS).verdict is Verdict.PASS
    assert judge_offline(scored(candidate), stable, replace(SETTINGS, offline_margin_relative=0.01)).passed is False


def test_few_shoppers_are_no_reason_to_refuse():
    stable, candidate = scored([1.0] * 10 + [0.0] * 30), scored([0.0] * 40)
    found = judge_offline(candidate, stable, SETTINGS)
    assert (found.verdict, found.passed) == (Verdict.INCONCLUSIVE, True)
    assert compare(candidate, stable, margin=0.05, seed=7).differing < LEAST_DIFFERING


def test_no_hit_at_all_is_no_pass():
    nothing = scored([0.0] * 500)
    assert judge_offline(nothing, nothing, SETTINGS).verdict is Verdict.INCONCLUSIVE


def test_a_candidate_at_the_margin_seldom_fails():
    """One in forty is the level; 60 trials of two independent versions of which one is worse by just the margin."""
    wide = replace(SETTINGS, offline_margin_relative=0.2)
    fails = sum(
        not judge_offline(scored(draws(0.24, 200, seed)), scored(draws(0.3, 200, 10_000 + seed)), wide).passed
        for seed in range(60)
    )
    assert fails <= 6


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), kept=st.floats(0, 1), size=st.integers(1, 80))
def test_a_candidate_that_is_nowhere_worse_never_fails(seed, share, kept, size):
    stable = scored(draws(share, size, seed))
    candidate = scored(np.maximum(stable.ndcg, draws(kept, size, seed + 1)))
    assert judge_offline(candidate, stable, SETTINGS).passed


# ---- segments --------------------------------------------------------------------------------------------------------


def test_segments_are_by_length_and_by_what_the_packages_know_of_the_next_item():
    items, popular = list("abcdef"), list("badc")
    shoppers = [
        Shopper(str(n), tuple("a" for _ in range(length)), then)
        for n, (length, then) in enumerate([(0, "a"), (1, "b"), (4, "d"), (5, "c"), (19, "f"), (20, "new"), (900, "a")])
    ]
    members = {one.name: one.members.tolist() for one in segment(shoppers, items=items, popular=popular)}
    assert members == {
        "history of 1-4": [False, True, True, False, False, False, False],
        "history of 5-9": [False, False, False, True, False, False, False],
        "history of 10-19": [False, False, False, False, True, False, False],
        "history of 20 or more": [False, False, False, False, False, True, True],
        "new or rare items": [False, False, False, True, True, True, False],
    }


def test_a_segment_that_got_worse_fails_though_the_whole_is_better():
    shoppers = [Shopper(str(n), ("a",) * (2 if n < 300 else 12), "a") for n in range(1500)]
    segments = segment(shoppers, items=["a"], popular=["a"])
    stable = draws(0.3, 1500, 1)
    candidate = np.maximum(stable, draws(0.2, 1500, 2))
    candidate[:300] = stable[:300] * draws(0.4, 300, 3)
    assert judge_offline(scored(candidate), scored(stable), SETTINGS).passed
    found = judge_segments(scored(candidate), scored(stable), segments, SETTINGS)
    assert found.verdict is Verdict.FAIL
    assert "history of 1-4" in found.reason
    assert "10-19" not in found.reason
    assert found.figures["history of 5-9"] == {"verdict": None, "shoppers": 0}
    same = judge_segments(scored(stable), scored(stable), segments, SETTINGS)
    assert same.verdict is Verdict.PASS
    assert "2 of 5 judged" in same.reason


def test_segments_too_small_are_not_judged():
    shoppers = [Shopper(str(n), ("a",), "a") for n in range(99)]
    stable, candidate = scored([1.0] * 99), scored([0.0] * 99)
    found = judge_segments(candidate, stable, segment(shoppers, items=["a"], popular=["a"]), SETTINGS)
    assert (found.verdict, found.passed) == (Verdict.INCONCLUSIVE, True)
    assert "no segment has 100" in found.reason


# ---- answers and their time ------------------------------------------------------------------------------------------

GOOD = Answer(200, 5.0, ("c", "d", "e"), (0.9, 0.5, 0.5))
GOALS = (LatencyGoal("latency", 100, 0.99),)
REQUESTS = [Shopper(str(n), ("a", "b"), None) for n in range(100)]
KNOWN = frozenset("abcdefg")


def replayed(first: list[Answer], *, second: list[Answer] | None = None, stable: Answer = GOOD) -> GateResult:
    whole = Replayed([stable] * len(first), first, first if second is None else second)
    return judge_replay(REQUESTS, whole, k=3, known=KNOWN, goals=GOALS)


def test_good_answers_pass():
    found = replayed([GOOD] * 100)
    assert found.verdict is Verdict.PASS
    assert found.figures["mean_overlap_with_stable"] == 1.0
    assert "100 of 100 within 100 ms" in found.reason


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (replace(GOOD, items=("c", "d"), scores=(0.9, 0.5)), "fewer items"),
        (replace(GOOD, items=("c", "d", "e", "f"), scores=(4.0, 3.0, 2.0, 1.0)), "more items"),
        (replace(GOOD, items=("c", "c", "e")), "an item twice"),
        (replace(GOOD, items=("c", "d", "z")), "does not name"),
        (replace(GOOD, items=("c", "d", "a")), "own history"),
        (replace(GOOD, scores=(0.9, 0.5)), "not one score"),
        (replace(GOOD, scores=(math.inf, 0.5, 0.4)), "no finite number"),
        (replace(GOOD, scores=(0.9, math.nan, 0.4)), "no finite number"),
        (replace(GOOD, scores=(0.9, 0.4, 0.5)), "do not descend"),
        (replace(GOOD, fallback="popular"), "popular items where"),
        (read_answer(500, b"", 3.0), "answered 500"),
        (read_answer(200, b"[]", 3.0), "no items and scores"),
        (read_answer(200, b'{"items": [1], "scores": [1], "fallback": null}', 3.0), "no items and scores"),
        (Answer(0, 5000.0, error="no answer within 5 s"), "no answer within 5 s"),
    ],
)
def test_one_bad_answer_of_a_hundred_fails_and_is_named(answer, what):
    found = replayed([GOOD] * 41 + [answer] + [GOOD] * 58)
    assert (found.verdict, found.passed) == (Verdict.FAIL, False)
    assert what in found.reason
    assert "first: request 42" in found.reason


def test_an_answer_that_changes_fails():
    other = replace(GOOD, items=("d", "c", "e"))
    assert "another answer" in replayed([GOOD] * 10, second=[GOOD] * 9 + [other]).reason


def test_what_stable_does_too_is_no_fault():
    error = read_answer(500, b"", 3.0)
    fewer = replace(GOOD, items=("c",), scores=(1.0,))
    popular = replace(GOOD, fallback="popular")
    for answer in (error, fewer, popular):
        assert replayed([answer] * 5, stable=answer).passed


def test_an_error_that_does_not_come_back_is_borne_and_many_are_not():
    error = read_answer(504, b"", 2000.0)
    once = replayed([GOOD] * 99 + [error], second=[GOOD] * 100)
    assert once.passed
    assert once.figures["errors"] == 1
    many = replayed([error] * 5 + [GOOD] * 95, second=[GOOD] * 100)
    assert "5 of 200 answers failed (answered 504)" in many.reason
    assert not many.passed


def test_a_replay_that_was_cut_short_fails_with_what_it_saw():
    error = read_answer(500, b"", 3.0)
    found = replayed([GOOD] * 3 + [error] * 20, second=[])
    assert "answered 500: 20 of 23 requests (first: request 4)" in found.reason


def test_slow_answers_fail_beside_a_fast_stable():
    found = replayed([replace(GOOD, ms=300.0)] * 12 + [GOOD] * 88)
    assert found.verdict is Verdict.FAIL
    assert "88 of 100 within 100 ms, stable 100 of 100" in found.reason


def test_slow_answers_beside_a_slow_stable_say_nothing_of_the_candidate():
    slow = replace(GOOD, ms=300.0)
    assert replayed([slow] * 100, stable=slow).verdict is Verdict.INCONCLUSIVE


def test_a_single_slow_answer_is_no_reason_to_refuse():
    found = replayed([replace(GOOD, ms=300.0)] * 2 + [GOOD] * 98)
    assert (found.verdict, found.passed) == (Verdict.INCONCLUSIVE, True)


@given(total=st.integers(1, 300), goal=st.floats(0.01, 0.999), data=st.data())
def test_the_binomial_tail_is_exact(total, goal, data):
    good = data.draw(st.integers(0, total))
    exact = math.fsum(math.comb(total, n) * goal**n * (1 - goal) ** (total - n) for n in range(good + 1))
    assert binomial_tail(good, total, goal) == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_only_objectives_about_the_time_of_an_answer_are_latency_goals():
    assert latency_goals(OBJECTIVES) == GOALS


# ---- the report ------------------------------------------------------------------------------------------------------


def test_a_report_comes_back_from_its_file(tmp_path):
    report = GateReport((
        GateResult("verify", Verdict.PASS, "well", {"files": 5}),
        GateResult("offline", Verdict.INCONCLUSIVE, "not run: no recorded requests"),
        GateResult("replay", Verdict.FAIL, "answered 500", {"faults": {"a": [1, None, 2.5]}}),
    ))  # fmt: skip
    path = tmp_path / "gates.json"
    write_json(path, report.to_json())
    again = GateReport.from_json(json.loads(path.read_text()), where=path)
    assert again == report
    assert (again.passed, again.reason) == (False, "replay: answered 500")


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)
                 | st.dictionaries(st.sampled_from(["gates", "name", "verdict", "reason", "figures"]), inner))
)  # fmt: skip
def test_a_damaged_report_is_an_error_that_names_the_file(document):
    try:
        assert GateReport.from_json(document, where=Path("gates.json")).gates
    except StateError as error:
        assert error.where == "gates.json"


@pytest.mark.parametrize(
    "wrong",
    [{"offline_margin_relative": 0.0}, {"segment_margin_relative": 1.0}, {"segment_min_shoppers": 0},
     {"max_shoppers": 0}, {"replayed_requests": -1}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        GateSettings(**wrong)


def test_the_same_inputs_have_the_same_digest_and_a_changed_byte_another(tmp_path):
    packages = [make_package(tmp_path / name, sign=False) for name in ("candidate", "stable")]
    key, requests = tmp_path / "key.pub", write_shoppers(tmp_path / "r.jsonl", [("1", [], "2")])
    key.write_text("key")
    job = Job(SETTINGS, packages[0], packages[1], key, requests, GOALS)
    seen = {job.digest}
    assert replace(job).digest in seen
    for changed in (
        replace(job, settings=replace(SETTINGS, seed=8)), replace(job, goals=()), replace(job, requests=None),
        replace(job, candidate=tmp_path / "nothing"),
    ):  # fmt: skip
        assert changed.digest not in seen
        seen.add(changed.digest)
    for path in (packages[0] / "model.onnx", packages[1] / "items.json", key, requests):
        path.write_bytes(path.read_bytes() + b" ")
        assert job.digest not in seen
        seen.add(job.digest)


def test_a_damaged_report_is_never_a_fresh_start(tmp_path):
    (tmp_path / "gates.json").write_text("{")
    with pytest.raises(StateError, match=r"gates\.json"):
        run_gates(SETTINGS, tmp_path, tmp_path, tmp_path, OBJECTIVES, requests=None, folder=tmp_path)
