"""A report is computed from raw records alone: its figures, its verdict, what it says of missing and damaged parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from endcap.errors import InputError, StateError
from endcap.objectives import load_objectives
from endcap.outcomes import judge_requests
from endcap.records import TargetEvent, read_requests
from endcap.report import build
from endcap.report.page import SECTIONS, metric
from endcap.report.run import read_run, shares_set
from tests.run_folder import EXPECTED, OBJECTIVES, make_run_folder, write_offline

SUMMARY_KEYS = {
    "data": {"name", "users", "items", "interactions", "synthetic"},
    "training": {
        "seconds", "epochs", "ndcg_at_10", "hr_at_10", "transformer_ndcg_at_10", "knn_ndcg_at_10",
        "popularity_ndcg_at_10",
    },
    "rollouts": {"from", "to", "verdict", "reason", "seconds", "canary_requests", "failed_requests"},
    "drills": {"name", "requests", "failed_requests", "detected_s", "rto_s", "held"},
    "load": {"requests", "failed", "offered_rps", "achieved_rps", "p50_ms", "p95_ms", "p99_ms"},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run_folder(tmp_path_factory.mktemp("whole") / "demo", rate=10.0)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A whole run folder of the test's own."""
    return Path(shutil.copytree(whole, tmp_path / "demo"))


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text()


class _Seen(HTMLParser):
    """Elements, attributes and words of a page, as a browser would have them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---- a small run made by hand ------------------------------------------------------------------------


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _request(number: int, **changes: Any) -> dict[str, Any]:
    """Request ``number`` of one a second from Unix second 1000, answered by version 1 after 10 ms."""
    at_s = 1000.0 + number
    record = {
        "request_id": f"r{number}", "kind": "recommend", "shopper": "7", "intended_s": at_s, "sent_s": at_s,
        "done_s": at_s + 0.010, "status": 200, "version": "1", "impression": f"i{number}", "clicked": False,
    }  # fmt: skip
    return record | changes


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Ten requests, one a second; a canary that got two of them; one failed while the rollout ran."""
    folder = tmp_path / "small"
    write_offline(folder)
    (folder / "run.json").write_text(json.dumps({"name": "small", "seed": 1}))
    changed = {
        3: {"version": "2", "done_s": 1003.5, "clicked": True},
        4: {"status": 504, "error": "HTTP 504", "version": None, "impression": None, "done_s": 1006.5},
        5: {"version": "2", "done_s": 1005.020},
        9: {"status": 429, "version": None, "impression": None},
    }
    asked = [_request(n, **changed.get(n, {})) for n in range(10)]
    beacon = _request(3, request_id="f3", kind="feedback", version=None, impression=None, status=0, error="reset")
    _write_lines(folder / "records" / "requests-1.jsonl", [*asked, beacon])
    sent = {3: ["2"], 4: ["2", "1", "2"], 5: ["2"]}
    attempts = [
        {
            "at_s": f"{1000 + n}.0",
            "request_id": f"r{n}",
            "cluster": f"version-{version}",
            "code": 503 if n == 4 else 200,
        }
        for n in range(10)
        for version in sent.get(n, ["1"])
    ]
    _write_lines(folder / "records" / "attempts.jsonl", attempts)
    home = folder / "rollouts" / "01-2"
    decision = {"rollout": "one", "from": "1", "to": "2", "step": 1, "verdict": "inconclusive", "evidence": {}}
    _write_lines(home / "decisions.jsonl", [
        {**decision, "at_s": 1002.0, "share": 0.5, "action": "start", "outcome": None, "reason": "started"},
        {**decision, "at_s": 1006.0, "share": 0.0, "action": "end", "outcome": "held", "reason": "no data"},
    ])  # fmt: skip
    state = {"stable": "1", "canary": "2", "started_at_s": 1002.0, "ended_at_s": 1006.25, "verdict": "held",
             "reason": "no data"}  # fmt: skip
    (home / "state.json").write_text(json.dumps(state))
    return folder


def test_the_figures_of_a_small_run_are_those_counted_by_hand(small: Path) -> None:
    summary = build(small).to_json()
    assert summary["load"] == {
        "requests": 10, "failed": 2, "offered_rps": 1.0, "achieved_rps": round(8 / 9.01, 2),
        "p50_ms": 10.0, "p95_ms": 2500.0, "p99_ms": 2500.0,
    }  # fmt: skip
    assert summary["rollouts"] == [
        {"from": "1", "to": "2", "verdict": "held", "reason": "no data", "seconds": 4.25, "canary_requests": 3,
         "failed_requests": 1}
    ]  # fmt: skip
    assert summary["training"]["ndcg_at_10"] == 0.0561
    assert summary["training"]["knn_ndcg_at_10"] == 0.0496
    assert summary["ok"] is True


def test_feedback_is_no_request_of_a_shopper_but_its_failures_are_shown(small: Path) -> None:
    build(small)
    assert "Feedback failed 1" in _Seen(page_of(small)).text


def test_requests_that_a_killed_load_left_behind_are_taken_in(small: Path) -> None:
    build(small)
    assert (small / "records" / "requests.parquet").exists()
    assert build(small).load is not None


# ---- summary.json ------------------------------------------------------------------------------------


def test_summary_has_exactly_the_declared_keys(folder: Path) -> None:
    build(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == [*SUMMARY_KEYS, "ok"]
    for name, keys in SUMMARY_KEYS.items():
        parts = summary[name] if isinstance(summary[name], list) else [summary[name]]
        assert parts
        assert all(set(part) == keys for part in parts)
    assert summary["ok"] is True


def test_a_drill_reports_what_recovery_measures(folder: Path) -> None:
    kill, zone = build(folder).drills
    assert (kill.name, kill.failed_requests, kill.rto_s, kill.held) == ("replica-kill", 0, 0.0, True)
    assert zone.name == "zone-loss"
    assert zone.rto_s == 2.0
    assert zone.detected_s == pytest.approx(0.9)


def test_objectives_are_read_as_everywhere_else(folder: Path) -> None:
    build(folder)
    outcomes = judge_requests(load_objectives(folder / "objectives.yaml"), read_requests(folder / "records"))
    text = _Seen(page_of(folder)).text
    for outcome in outcomes:
        assert f"{outcome.counts.good:,} of {outcome.counts.total:,}" in text


def test_shares_as_the_target_tells_them() -> None:
    told = shares_set((
        TargetEvent(5.0, "shares_set", detail="1=95% given-2=5%"), TargetEvent(6.0, "version_retired", version="1"),
        TargetEvent(7.0, "shares_set", detail="damaged"), TargetEvent(8.0, "shares_set", detail="given-2=100%"),
    ))  # fmt: skip
    assert told == [(5.0, {"1": 0.95, "given-2": 0.05}), (8.0, {"given-2": 1.0})]


# ---- ok and why not ----------------------------------------------------------------------------------


def _expect(folder: Path, **changes: Any) -> tuple[str, ...]:
    run = json.loads((folder / "run.json").read_text())
    run["expected"] = EXPECTED | changes
    (folder / "run.json").write_text(json.dumps(run))
    summary = build(folder)
    assert summary.ok is not bool(summary.reasons)
    for reason in summary.reasons:
        assert reason in _Seen(page_of(folder)).text
    return summary.reasons


def test_all_as_expected(folder: Path) -> None:
    assert _expect(folder) == ()
    assert "All outcomes as expected" in page_of(folder)


def test_another_verdict_than_the_expected_one(folder: Path) -> None:
    reasons = _expect(folder, rollouts={"2": "promoted", "3": "promoted"})
    assert reasons == ("Version 3 was rolled back and should have been promoted",)


def test_an_expected_rollout_or_drill_that_did_not_happen(folder: Path) -> None:
    reasons = _expect(folder, rollouts={"9": "refused"}, drills={"flood": "held"})
    assert reasons == (
        "Version 9 should have been refused, and no rollout of it began",
        "The drill flood did not happen",
    )


def test_a_promotion_that_lost_a_request_is_not_ok(small: Path) -> None:
    state = json.loads((small / "rollouts/01-2/state.json").read_text()) | {"verdict": "promoted"}
    (small / "rollouts/01-2/state.json").write_text(json.dumps(state))
    reasons = _expect(small, rollouts={"2": "promoted"}, drills={})
    assert reasons == ("The promotion of version 2 was to lose no request, and 1 failed",)


def test_a_drill_that_lost_more_than_it_may(folder: Path) -> None:
    reasons = _expect(folder, drills={"zone-loss": {"held": True, "failed_requests": 0}})
    lost = build(folder).drills[1].failed_requests
    assert reasons == ((f"The drill zone-loss: {lost} failed requests, at most 0 allowed",) if lost else ())


def test_a_slow_recovery_is_reported_and_does_not_decide(folder: Path) -> None:
    assert _expect(folder, drills={"zone-loss": {"held": True, "rto_s": 0.5}}) == ()


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "nothing declared"])
@pytest.mark.parametrize(
    ("held", "reason"),
    [(False, "The drill zone-loss was not held: too slow"), (None, "The drill zone-loss did not end")],
)
def test_a_drill_that_was_not_held(folder: Path, held: bool | None, reason: str, declared: bool) -> None:
    path = folder / "drills/zone-loss/drill.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held": held, "reason": "too slow"}))
    if not declared:
        (folder / "run.json").write_text(json.dumps({"name": "demo"}))
    assert build(folder).reasons == (reason,)


def test_a_rollout_that_was_stopped_before_its_first_decision(folder: Path) -> None:
    (folder / "rollouts/06-7").mkdir()
    (folder / "rollouts/06-7/rollout.yaml").write_text("{}")
    (reason,) = build(folder).reasons
    assert reason.startswith("rollouts/06-7/state.json is missing")


def test_a_rollout_that_was_cut_off(folder: Path) -> None:
    path = folder / "rollouts/02-3/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": None, "ended_at_s": None}))
    summary = build(folder)
    assert summary.reasons == ("The rollout of version 3 did not end",)
    assert summary.rollouts[1].seconds is None


# ---- rollouts ----------------------------------------------------------------------------------------


def test_what_the_evidence_did_not_decide_is_counted_apart(folder: Path) -> None:
    build(folder)
    tallied = "Promoted 1 Rolled back 3 Held, inconclusive 0 Refused 1 Aborted 1"
    assert tallied in _Seen(page_of(folder)).text


def test_a_rollout_s_share_is_plotted_with_its_holds_and_pauses(folder: Path) -> None:
    build(folder)
    labels = [str(attributes.get("aria-label")) for _, attributes in _Seen(page_of(folder)).tags]
    (promoted,) = [label for label in labels if label.startswith("Share of version 2 over time")]
    assert "5 % after 6 s, 25 % after 24 s, 50 % after 40 s, 100 % after 54 s" in promoted
    assert (
        "copies of requests only, before any traffic for 5.8 s; paused by a person for 5 s; waits for 3 s" in promoted
    )
    (held,) = [label for label in labels if label.startswith("Share of version 4 over time")]
    assert "held for" in held
    assert not any(label.startswith("Share of version tampered") for label in labels)


def test_of_a_rollout_of_weeks_as_many_looks_are_read_as_a_plot_can_show(folder: Path) -> None:
    path = folder / "rollouts/02-3/decisions.jsonl"
    lines = path.read_text().splitlines()
    look = next(line for line in lines if json.loads(line)["action"] == "look")
    path.write_text("\n".join([*lines[:-2], *[look] * 20_001, *lines[-2:]]) + "\n")
    rollout = read_run(folder).rollouts[1]
    assert 1000 <= len(rollout.decisions) <= 2100
    assert rollout.decisions[0].action == "start"
    assert [decision.action for decision in rollout.decisions[-2:]] == ["returning", "end"]


# ---- missing parts -----------------------------------------------------------------------------------

PARTS = (
    "run.json", "data.json", "training.json", "evaluation.json", "objectives.yaml", "records/requests.parquet",
    "records/attempts.jsonl", "rollouts", "drills",
)  # fmt: skip


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_and_the_rest_is_reported(folder: Path, part: str) -> None:
    _remove(folder / part)
    summary = build(folder)
    assert not summary.ok
    assert any(part in reason for reason in summary.reasons)
    seen = _Seen(page_of(folder))
    assert {id_ for id_, _ in SECTIONS} <= {attributes.get("id") for _, attributes in seen.tags}
    assert all(reason in seen.text for reason in summary.reasons)


def test_a_run_stopped_after_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "demo", "seed": 7, "expected": EXPECTED}))
    summary = build(tmp_path)
    assert not summary.ok
    assert summary.load is None
    assert summary.to_json()["data"] is None
    assert "Version 2 should have been promoted, and no rollout of it began" in summary.reasons


@pytest.mark.parametrize("log", ["access", "faults", "target"])
def test_a_log_that_only_some_runs_have_may_be_absent(folder: Path, log: str) -> None:
    (folder / "records" / f"{log}.jsonl").unlink()
    assert build(folder).load is not None


def test_a_load_without_a_request_is_not_ok(folder: Path) -> None:
    from endcap import records

    (folder / "records/requests.parquet").unlink()
    (folder / "records/requests-1.jsonl").touch()
    records.convert_requests(folder / "records")
    summary = build(folder)
    assert "The load sent no request" in summary.reasons


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing of a run"):
        build(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        build(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


# ---- damaged parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        "run.json", "data.json", "training.json", "evaluation.json", "records/requests.parquet",
        "records/attempts.jsonl", "records/faults.jsonl", "records/target.jsonl", "rollouts/01-2/state.json",
        "rollouts/01-2/decisions.jsonl", "drills/zone-loss/drill.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", [b"\x00\xff garbage\n", b'{"unexpected": []}\n'])
def test_a_damaged_part_is_named_and_nothing_is_written(folder: Path, part: str, damage: bytes) -> None:
    (folder / part).write_bytes(damage)
    if part == "records/attempts.jsonl" and damage.startswith(b"{"):
        damage = b'{"at_s": "soon"}\n'
        (folder / part).write_bytes(damage)
    with pytest.raises(StateError, match=Path(part).name):
        build(folder)
    assert not (folder / "report.html").exists()
    assert not (folder / "summary.json").exists()


def test_a_damaged_objectives_file_is_named(folder: Path) -> None:
    (folder / "objectives.yaml").write_text(OBJECTIVES.replace("0.999", "often"))
    with pytest.raises(InputError, match=r"objectives\.yaml"):
        build(folder)


# ---- the page ----------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    build(folder)
    first = [(folder / name).read_bytes() for name in ("report.html", "summary.json")]
    build(folder)
    assert [(folder / name).read_bytes() for name in ("report.html", "summary.json")] == first
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    build(moved)
    assert [(moved / name).read_bytes() for name in ("report.html", "summary.json")] == first


def test_the_page_asks_nothing_of_anyone_and_stays_small(folder: Path) -> None:
    build(folder)
    page = page_of(folder)
    assert len(page.encode()) < 1_000_000
    seen = _Seen(page)
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in seen.tags}
    for tag, attributes in seen.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        if "href" in attributes:
            assert str(attributes["href"]).startswith("data:" if tag == "link" else "#")
    assert "url(" not in page
    assert "@import" not in page


def test_every_plot_says_its_main_figure_in_words(folder: Path) -> None:
    build(folder)
    plots = [attributes for _, attributes in _Seen(page_of(folder)).tags if attributes.get("role") == "img"]
    assert len(plots) > 12
    assert all(any(mark.isdigit() for mark in str(attributes["aria-label"])) for attributes in plots)


def test_synthetic_data_is_said_in_the_title_and_at_the_top(tmp_path: Path) -> None:
    folder = make_run_folder(tmp_path / "demo", rate=5.0, synthetic=True)
    assert build(folder).data is not None
    seen = _Seen(page_of(folder))
    assert "<title>Synthetic data" in page_of(folder)
    assert seen.text.index("not real shoppers") < seen.text.index("Version 2 was promoted")


def test_what_is_to_be_known_of_the_data_is_on_the_page(folder: Path) -> None:
    build(folder)
    assert "Purchases of the same day stand in the order" in (folder / "report.html").read_text()


def test_every_metric_of_every_model_is_on_the_page_with_its_interval(folder: Path) -> None:
    build(folder)
    seen = " ".join(_Seen(page_of(folder)).text.split())
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    for model in models.values():
        for value in [*model["metrics"].values(), *(group["hr_at_10"] for group in model["by_history_length"])]:
            assert f"{metric(value['value'])} {metric(value['low'])}–{metric(value['high'])}" in seen
        for value in (model["coverage_at_10"], model["popularity_bias_at_10"]):
            assert value["low"] < value["value"] < value["high"]
    assert "77.0 %" in seen
    assert "+0.11" in seen and "+0.09 to +0.13" in seen
    assert "10,120" in seen and "20+" in seen


def test_a_real_data_set_is_not_called_synthetic(folder: Path) -> None:
    build(folder)
    assert "ynthetic" not in _Seen(page_of(folder)).text


HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}</style>&"


def test_hostile_labels_stay_words(folder: Path) -> None:
    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            names = (HOSTILE if name in ("availability", "item-knn") else name for name in value)
            return {name: spoil(inner, old) for name, (old, inner) in zip(names, value.items(), strict=True)}
        if isinstance(value, list):
            return [spoil(inner, key) for inner in value]
        return HOSTILE if isinstance(value, str) and key in labels else value

    labels = {"name", "git_commit", "reason", "fault", "canary", "to", "split", "candidate", "1", "sha256"}
    for name in ("run.json", "data.json", "evaluation.json", "drills/zone-loss/drill.json"):
        path = folder / name
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    for name in ("state.json", "decisions.jsonl"):
        path = folder / "rollouts/02-3" / name
        path.write_text("".join(json.dumps(spoil(json.loads(line))) + "\n" for line in _documents(path)))
    build(folder)
    seen = _Seen(page_of(folder))
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert "alert(1)" in seen.text
    assert "{{ 7*7 }}" in seen.text


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]
