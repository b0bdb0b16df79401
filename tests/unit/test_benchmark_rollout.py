"""The figures of `make bench-rollout`: a short run has the whole shape, and the yardsticks measure what they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.rollout import __main__ as benchmark
from benchmarks.rollout import parts
from benchmarks.rollout.oracle import Crossings, LogRatio, one_sample, two_samples
from benchmarks.rollout.peers import peers
from benchmarks.rollout.replay import differences
from benchmarks.rollout.scenarios import DETECTION, FIXED, OBJECTIVES, SPEC, line
from benchmarks.rollout.table import shortfalls, table
from endcap.errors import OutcomeError
from endcap.files import read_json, write_json
from serving.rollout.simulate import RecordedRun
from serving.rollout.traffic import Seen

SIMULATED = ("failing", "look")


def look(*, canary: tuple[int, int, int], control: tuple[int, int, int], of: tuple[int, int] = (100, 900)) -> Seen:
    """One run's look: bad events by objective, out of ``of``."""
    impressions = np.array([[of[0] - canary[2], of[0], of[1] - control[2], of[1]]])
    total, control_total = np.full((1, 3), float(of[0])), np.full((1, 3), float(of[1]))
    none = np.zeros(1, dtype=np.int64)
    return Seen(
        np.array([canary], dtype=float), total, np.array([control], dtype=float), control_total,
        np.array([of[0]]), np.array([of[1]]), none, none, impressions,
    )  # fmt: skip


def test_a_short_run_measures_and_keeps_what_was_measured_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(tmp_path / "rollout.json", {"local": {"rollouts": 20, "right": 20, "requests": 9, "failed_requests": 0}})
    benchmark.bench(tmp_path, SIMULATED, runs=20, seed=5)
    document = read_json(tmp_path / "rollout.json")
    assert isinstance(document, dict)
    assert document["seed"] == 5
    assert document["local"]["right"] == 20
    assert document["rolled_back_within_10s_share"] >= 0.9
    assert document["sudden_failure"]["shoppers_hurt"]["median"] >= 1
    assert document["decide_us_p99"] > 0
    assert document["look"]["bytes_late"] <= 1.1 * document["look"]["bytes_early"]
    assert document["replayed"] == 10
    said = capsys.readouterr().out
    assert "seed 5" in said
    assert "rolled back within 10 s" in said


def test_a_run_that_decide_judges_otherwise_fails_the_benchmark() -> None:
    quiet = np.zeros((3, 4, 3))
    wrong = RecordedRun(quiet, np.zeros((3, 2), dtype=np.int64), "promoted", 2.0)
    assert differences(OBJECTIVES, SPEC, (wrong,)) == [
        "run 0: simulated promoted after 2 s, decided undecided after 3 s"
    ]
    with pytest.raises(OutcomeError, match="replayed runs differ"):
        parts.check(OBJECTIVES, SPEC, (wrong,), "a scenario")


def test_false_rollbacks_and_detection_have_the_shape_that_is_published() -> None:
    quiet: list[str] = []
    found = parts.finding(10, 5, quiet.append, cases=DETECTION[1:2], peers_too=False)
    assert {"case", "median_samples", "oracle_samples", "ratio", "sprt_samples"} <= set(found["detection"][0])
    aa = parts.false_rollbacks(10, 5, quiet.append, only=("plain",))
    row = aa["aa"][0]
    assert {"scenario", "runs", "false_rollbacks", "rate", "upper95", "promoted_rate"} <= set(row)
    assert (row["false_rollbacks"], row["promoted_rate"]) == (0, 1.0)
    assert all({"rule", "rate"} <= set(one) for one in aa["aa_peers"])
    shown = table({**aa, **found, "peers_find": []})
    assert "| plain | 10 | 0 |" in shown
    assert "errors 1 % -> 5 %" in shown


def test_what_falls_short_is_said() -> None:
    aa = {"scenario": "plain", "upper95": 0.013, "promoted_rate": 0.94}
    document = {
        "aa": [aa], "detection": [{"case": "errors", "ratio": 1.6}], "rolled_back_within_10s_share": 0.98,
        "decide_us_p99": 101.0, "look": {"bytes_early": 100, "bytes_late": 200},
        "crash_points": {"tried": 3, "right": 2},
        "local": {"rollouts": 20, "right": 20, "requests": 10, "failed_requests": 1},
    }  # fmt: skip
    assert len(shortfalls(document)) == 8
    assert shortfalls({"aa": [{**aa, "upper95": 0.012, "promoted_rate": 0.95}]}) == []


def test_the_oracle_stands_on_the_hardest_point_of_the_hypothesis() -> None:
    for case in DETECTION:
        control, canary, share = 1 - case.control, 1 - case.canary, FIXED.steps[0].share
        slope, constant = line(case.objectives.objectives[case.column])

        def information(x: float, y: float, u: float = control, v: float = canary, part: float = share) -> float:
            return (1 - part) * _divergence(u, x) + part * _divergence(v, y)

        ratio = two_samples(control, canary, slope=slope, constant=constant, share=share)
        x = control / math.exp(ratio.control_bad)
        assert canary / math.exp(ratio.canary_bad) == pytest.approx(slope * x + constant)
        least = information(x, slope * x + constant)
        assert all(information(x * by, slope * x * by + constant) > least for by in (0.98, 0.995, 1.005, 1.02))
        assert one_sample(canary, slope * control + constant).control_bad == 0


def _divergence(p: float, q: float) -> float:
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def test_crossings_count_the_canary_events_up_to_the_look_of_the_verdict() -> None:
    tests = {"quick": LogRatio(1.0, 0.0), "slow": LogRatio(0.5, 0.0), "never": LogRatio(0.0, 0.0)}
    crossings = Crossings(tests, column=0, runs=1, alpha=math.exp(-10))
    for at_s in range(1, 5):
        crossings.look(np.array([0]), float(at_s), look(canary=(6, 0, 0), control=(0, 0, 0)))
    assert [crossings.samples(name)[0] for name in tests] == [200, 400, math.inf]


def test_peers_decide_as_their_users_write_them() -> None:
    rules = {rule.name.split(":")[0]: rule for rule in peers(OBJECTIVES, 1)}
    quiet, failing = look(canary=(0, 1, 92), control=(0, 9, 828)), look(canary=(3, 1, 92), control=(0, 9, 828))
    for second in range(1, 601):
        for rule in rules.values():
            rule.look(np.array([0]), float(second), quiet if second <= 120 else failing)
    when = {name: rule.rolled_back_s[0] for name, rule in rules.items()}
    assert 120 < when["z-test at 1 %, repeated each second"] < 180
    assert when["Argo Rollouts at the goals"] == 360, "the fourth failed minute"
    assert when["Flagger at the goals"] == 420, "the fifth"
    assert when["Flagger, its documentation's"] == 420
    assert when["Argo Rollouts, its documentation's"] == math.inf
