"""Notices of a rollout: what is told, that it arrives, and that nothing about it can hold the rollout up."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from endcap.errors import InputError
from endcap.evidence import Counts, Evidence, Stratum
from endcap.files import JsonLines, read_json_lines
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.audit import Decision, decision_record
from serving.rollout.decide import begin
from serving.rollout.events import Command, Commanded, Gated
from serving.rollout.notices import NOTICES_FILE, Notice, Notifier, Told, notice_of, notices_of, webhook_url
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.state import Outcome, Phase, State
from serving.rollout.store import DECISIONS_FILE
from tests.webhook import SECRET, Hook

OBJECTIVES = Objectives(
    "recommender", "recommender", (Objective("availability", 0.9, Good.ANSWERED, None, None, 0.05, None),)
)
SPEC = RolloutSpec(
    "recommender", "recommender", "models:/recommender/3", "recommender",
    (Step(0.1, 30, 2, 90), Step(0.5, 100, 3, 120, approval=True), Step(1.0, 50, 1, 60)), 0.05, 0.05, 0.5,
)  # fmt: skip
EVIDENCE = Evidence.start(OBJECTIVES).update({"availability": Stratum(Counts(90, 100), Counts(990, 1000))})
START = begin(SPEC, stable="2", canary="3", now_s=100.0)
OBSERVING = START.with_(phase=Phase.OBSERVING, intent=(), seq=3)


def decided(before: State | None, after: State, event: Any = None) -> Decision:
    return Decision(before, event or (None if before is None else Gated(True, "")), after, 100.0 + after.seq, EVIDENCE)


def told(before: State | None, after: State, event: Any = None) -> Notice | None:
    last = None if before is None else Told.of(decision_record(SPEC, decided(before, before)))
    return notice_of(last, Told.of(decision_record(SPEC, decided(before, after, event))))


# ---- what is worth a notice ----


def test_the_start_a_hold_a_wait_and_the_end_are_told_and_nothing_else() -> None:
    growing = OBSERVING.with_(phase=Phase.GROWING, step=1, seq=4)
    holding = OBSERVING.with_(phase=Phase.HOLDING, held_at_s=9.0, reason="inconclusive after 90 s at 10%", seq=4)
    waiting = OBSERVING.with_(waiting="step 2 (50%) waits for approval", seq=4)
    back = OBSERVING.with_(phase=Phase.RETURNING, outcome=Outcome.ROLLED_BACK, reason="availability: worse", seq=4)
    kinds = [
        told(None, START), told(START, OBSERVING), told(OBSERVING, growing), told(OBSERVING, holding),
        told(holding, holding.with_(seq=5)), told(OBSERVING, waiting), told(waiting, waiting.with_(seq=5)),
        told(OBSERVING, back), told(back, back.with_(phase=Phase.DONE, seq=5)),
    ]  # fmt: skip
    assert [None if notice is None else notice.kind for notice in kinds] == [
        "start", None, None, "hold", None, "waiting", None, "rolled_back", None,
    ]  # fmt: skip


def test_a_step_back_from_all_the_traffic_is_told() -> None:
    last = OBSERVING.with_(step=2, seq=7)
    notice = told(last, last.with_(phase=Phase.GROWING, step=1, reason="back to 50%, to be compared again", seq=8))
    assert notice is not None
    assert (notice.kind, notice.title) == ("hold", "recommender: version 3 goes back to 50%")


def test_nobody_is_told_that_somebody_paused_it() -> None:
    paused = OBSERVING.with_(paused_at_s=5.0, waiting="paused by ann", seq=4)
    assert told(OBSERVING, paused, Commanded(Command.PAUSE, "ann", 1)) is None


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_ending_says_who_gets_the_traffic(outcome: Outcome) -> None:
    notice = told(OBSERVING, OBSERVING.with_(phase=Phase.RETURNING, outcome=outcome, reason="why", seq=4))
    assert notice is not None
    said = notice.body()["text"]
    assert "version 3" in said and "why" in said and "traffic" in said and "version 2" in said


def test_an_abort_after_a_promotion_was_decided_is_told_too() -> None:
    promoted = OBSERVING.with_(phase=Phase.RETIRING, outcome=Outcome.PROMOTED, seq=4)
    notice = told(promoted, promoted.with_(phase=Phase.RETURNING, outcome=Outcome.ABORTED, seq=5))
    assert notice is not None and notice.kind == "aborted"


def test_a_body_is_what_slack_takes_with_the_figures_and_no_markup_of_others() -> None:
    reason = "aborted by <!channel> & <http://evil|me>" + "x" * 5000
    notice = told(OBSERVING, OBSERVING.with_(outcome=Outcome.ABORTED, reason=reason, phase=Phase.RETURNING, seq=4))
    assert notice is not None
    body = json.loads(json.dumps(notice.body()))
    assert set(body) == {"text", "blocks"}
    assert "<" not in json.dumps(body)
    assert "90.00% of 100 against 99.00%" in json.dumps(body)
    for block in body["blocks"]:
        words = block["text"]["text"] if block["type"] == "section" else block["elements"][0]["text"]
        assert 0 < len(words) <= 3000


def test_an_address_is_read_from_the_environment_and_never_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", f"https://hooks.example/{SECRET}")
    assert webhook_url("HOOK") == f"https://hooks.example/{SECRET}"
    assert webhook_url("NOT_SET") is None
    assert webhook_url(None) is None
    for wrong in (
        SECRET,
        f"ftp://hooks.example/{SECRET}",
        f"https:///{SECRET}",
        f"https://hooks.example:port/{SECRET}",
    ):
        with pytest.raises(InputError, match="HOOK: holds no http") as caught:
            webhook_url("HOOK", {"HOOK": wrong})
        assert SECRET not in str(caught.value)


# ---- sending ----


@pytest.fixture
def hook() -> Iterator[Callable[..., Hook]]:
    opened: list[Hook] = []

    def open_hook(*answers: int | None, **headers: str) -> Hook:
        opened.append(Hook(list(answers), {name.replace("_", "-"): value for name, value in headers.items()}))
        return opened[-1]

    yield open_hook
    for one in opened:
        one.close()


BACK = OBSERVING.with_(phase=Phase.RETURNING, outcome=Outcome.ROLLED_BACK, reason="availability: worse", seq=4)
DECISIONS = (decided(None, START), decided(START, OBSERVING), decided(OBSERVING, BACK))


def notifier(url: str, folder: Path, **changes: Any) -> Notifier:
    return Notifier(url, SPEC, folder, **({"answer_s": 2.0, "backoff_s": (0.01,) * 4, "flush_s": 5.0} | changes))


def roll(url: str, folder: Path, **changes: Any) -> float:
    """Decide, as the engine does, and return how long the deciding took with its telling, in seconds."""
    with JsonLines(folder / DECISIONS_FILE) as log, notifier(url, folder, **changes) as told_by:
        began_s = time.perf_counter()
        for decision in DECISIONS:
            log.append(decision_record(SPEC, decision))
            told_by.tell(decision)
        return time.perf_counter() - began_s


def kept(folder: Path) -> list[tuple[str, str]]:
    return [(line["kind"], line["result"]) for line in read_json_lines(folder / NOTICES_FILE)]


def test_errors_of_the_server_are_tried_again_until_it_takes_the_notice(
    hook: Callable[..., Hook], tmp_path: Path
) -> None:
    there = hook(500, 503, 429, 200, 200, retry_after="0")
    roll(there.url, tmp_path)
    assert len(there.bodies) == 5
    assert kept(tmp_path) == [("start", "delivered"), ("rolled_back", "delivered")]
    assert [line["tries"] for line in read_json_lines(tmp_path / NOTICES_FILE)] == [4, 1]


def test_a_refusal_is_final_and_the_next_notice_is_sent(hook: Callable[..., Hook], tmp_path: Path) -> None:
    there = hook(404, 200)
    roll(there.url, tmp_path)
    assert kept(tmp_path) == [("start", "given up"), ("rolled_back", "delivered")]


def test_a_redirect_is_not_followed(hook: Callable[..., Hook], tmp_path: Path) -> None:
    elsewhere = hook()
    there = hook(302, 302, location=elsewhere.url)
    roll(there.url, tmp_path)
    assert elsewhere.bodies == []
    assert kept(tmp_path) == [("start", "given up"), ("rolled_back", "given up")]


def test_a_server_that_asks_to_be_left_alone_is(hook: Callable[..., Hook], tmp_path: Path) -> None:
    there = hook(429, retry_after="3600")
    with JsonLines(tmp_path / DECISIONS_FILE) as log, notifier(there.url, tmp_path, flush_s=0.2) as told_by:
        log.append(decision_record(SPEC, DECISIONS[0]))
        told_by.tell(DECISIONS[0])
        assert there.answered.acquire(timeout=10)
    assert len(there.bodies) <= 2, "only the end may cut the wait short"


@pytest.mark.parametrize("gone", ["hangs", "refuses", "breaks off"])
def test_a_webhook_that_is_no_use_holds_nothing_up(gone: str, hook: Callable[..., Hook], tmp_path: Path) -> None:
    there = hook(*[None] * 9)
    if gone == "refuses":
        there.close()
    if gone == "breaks off":
        there._closed.set()
    began_s = time.perf_counter()
    took_s = roll(there.url, tmp_path, flush_s=0.3, backoff_s=(60.0,))
    assert took_s < 20
    assert time.perf_counter() - began_s < 40, "an attempt waits 60 s for the next"
    assert ("start", "delivered") not in kept(tmp_path)


def test_what_was_not_delivered_is_sent_by_the_next_engine_and_what_was_is_not_repeated(
    hook: Callable[..., Hook], tmp_path: Path
) -> None:
    first = hook(200, 404)
    with JsonLines(tmp_path / DECISIONS_FILE) as log, notifier(first.url, tmp_path) as told_by:
        for decision in DECISIONS[:2]:
            log.append(decision_record(SPEC, decision))
            told_by.tell(decision)
    with JsonLines(tmp_path / DECISIONS_FILE) as log:  # killed after the log's line, before any notice of it
        log.append(decision_record(SPEC, DECISIONS[2]))
    second = hook()
    with notifier(second.url, tmp_path) as told_by:
        told_by.tell(decided(BACK, BACK.with_(phase=Phase.DONE, seq=5)))
    assert [text.split(":")[1] for text in first.texts + second.texts] == [
        " version 3 begins its rollout beside version 2", " version 3 is rolled back",
    ]  # fmt: skip
    third = hook()
    with notifier(third.url, tmp_path):
        pass
    assert third.bodies == []


def test_the_first_decision_of_an_engine_that_goes_on_is_seen_against_the_one_before(
    hook: Callable[..., Hook], tmp_path: Path
) -> None:
    there = hook()
    with notifier(there.url, tmp_path) as told_by:
        told_by.tell(decided(BACK, BACK.with_(phase=Phase.DONE, seq=5)))
    assert there.bodies == []


def test_a_step_that_waits_again_for_the_same_is_told_once(hook: Callable[..., Hook], tmp_path: Path) -> None:
    there = hook()
    waiting = OBSERVING.with_(waiting="step 2 (50%) waits for approval", seq=4)
    with notifier(there.url, tmp_path) as told_by:
        for seq in range(4, 12, 2):
            told_by.tell(decided(OBSERVING, waiting.with_(seq=seq)))
            told_by.tell(decided(waiting, OBSERVING.with_(seq=seq + 1)))
    assert len(there.bodies) == 1


def test_the_address_is_in_no_file_and_no_log(
    hook: Callable[..., Hook], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    there = hook(500, 404)
    roll(there.url, tmp_path)
    assert "given up" in caplog.text
    assert SECRET not in caplog.text
    assert all(SECRET not in path.read_text() for path in tmp_path.iterdir())


def test_a_damaged_log_is_for_the_engine_to_say(hook: Callable[..., Hook], tmp_path: Path) -> None:
    (tmp_path / DECISIONS_FILE).write_text('{"action": "growing"}\n')
    there = hook()
    with notifier(there.url, tmp_path):
        pass
    assert there.bodies == []
    with pytest.raises(Exception, match=DECISIONS_FILE):
        list(notices_of(tmp_path))
