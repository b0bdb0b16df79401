"""What a user relies on: a step's own error reaches them, whatever happened between."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.steps.progress import PROGRESS_VARIABLE, step
from endcap.errors import DataError, EndcapError, StepError, StorageError
from endcap.files import read_json_lines
from pipelines.run import StepEvent, _raise_failure, _Tail


@pytest.fixture
def told(tmp_path, monkeypatch):
    path = tmp_path / "progress.jsonl"
    monkeypatch.setenv(PROGRESS_VARIABLE, str(path))
    return path


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (DataError("too short", where="a.txt, line 3", next_step="mend it"), DataError, "a.txt, line 3: too short"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), StorageError, "no space left"),
        (ZeroDivisionError("division by zero"), EndcapError, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_step_tells_its_own_error_and_the_caller_raises_it(told: Path, raised, kind, words):
    with pytest.raises(kind), step("ingest"):
        raise raised
    events = _Tail(told).new()
    assert [event.event for event in events] == ["started", "failed"]
    with pytest.raises(StepError, match="step ingest") as failed:
        _raise_failure(events, 1, told)
    assert type(failed.value.__cause__) is kind
    assert words.rpartition(": ")[2] in str(failed.value)


def test_a_step_that_was_killed_is_named(told: Path):
    with pytest.raises(StepError, match=r"step train: ended without a word"):
        _raise_failure([StepEvent(1.0, "train", "started")], 1, told)
    with pytest.raises(StepError, match="the pipeline: could not be run"):
        _raise_failure([], 1, told)


def test_a_disk_too_full_for_a_last_word_is_told_as_such(told: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(StepError, match="step train: no space left"):
        _raise_failure([StepEvent(1.0, "train", "started")], 1, told)


def test_a_step_that_ends_well_says_what_it_made(told: Path):
    with step("split") as progress:
        progress.produced("shoppers.jsonl", "/somewhere/shoppers")
    events = list(read_json_lines(told))
    assert [event["event"] for event in events] == ["started", "produced", "finished"]
    assert events[1]["file"] == "shoppers.jsonl"


def test_a_line_that_is_still_being_written_waits(told: Path):
    with step("split"):
        pass
    raw = told.read_bytes()
    cut = raw.index(b"\n") + 5
    told.write_bytes(raw[:cut])
    tail = _Tail(told)
    assert [event.event for event in tail.new()] == ["started"]
    told.write_bytes(raw)
    assert [event.event for event in tail.new()] == ["finished"]


def test_without_a_listener_nothing_is_told(monkeypatch):
    monkeypatch.delenv(PROGRESS_VARIABLE, raising=False)
    with step("split") as progress:
        progress.tell("epoch", epoch=1)
