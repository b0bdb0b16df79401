"""What replicas log of their answers reaches the comparator once, from the shadow's beginning on."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from serving.targets.base import ShadowObservation
from serving.targets.comparing import Comparing, answers_file, answers_until_now, drop_answers
from serving.targets.config import KeptShadow


class Answers:
    """A target's folder in which stable "1" and the shadow "2" answer requests alike."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0

    def more(self, count: int) -> None:
        for _ in range(count):
            self.number += 1
            for version in ("1", "2"):
                path = answers_file(self.folder, f"{version}-a-0")
                path.parent.mkdir(exist_ok=True)
                line = {
                    "request_id": f"r{self.number}", "version": version, "shadow": version == "2", "code": 200,
                    "ms": 3.0, "items": ["a", "b"], "scores": [2.0, 1.0],
                }  # fmt: skip
                with path.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def rotate(self) -> None:
        for version in ("1", "2"):
            path = answers_file(self.folder, f"{version}-a-0")
            path.rename(path.with_name(f"{path.name}.1"))

    def begin(self, label: str = "2", at_s: float = 1.0) -> KeptShadow:
        return KeptShadow(label=label, share=0.5, began_at_s=at_s, answers_from=answers_until_now(self.folder))

    def comparing(self) -> Comparing:
        return Comparing(self.folder, (100,), patience_s=5.0)


def read(comparing: Comparing, shadow: KeptShadow | None) -> ShadowObservation | None:
    return asyncio.run(comparing.read(shadow))


def pairs(comparing: Comparing, shadow: KeptShadow | None) -> int:
    seen = read(comparing, shadow)
    assert seen is not None
    assert (seen.answered.good, seen.within_ms[100].good) == (seen.pairs, seen.pairs)
    return seen.pairs


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    return Answers(tmp_path)


def test_without_a_shadow_nothing_is_compared(answers: Answers) -> None:
    answers.more(2)
    assert read(answers.comparing(), None) is None
    assert pairs(answers.comparing(), KeptShadow(label="2", share=0.1)) == 2


def test_what_was_answered_before_a_shadow_began_is_no_part_of_it(answers: Answers) -> None:
    comparing = answers.comparing()
    answers.more(3)
    first = answers.begin()
    assert pairs(comparing, first) == 0
    answers.more(2)
    assert pairs(comparing, first) == 2
    answers.more(1)
    assert pairs(comparing, first.model_copy(update={"share": 0.9})) == 3, "another share begins nothing anew"
    again = answers.begin(at_s=2.0)
    answers.more(4)
    assert pairs(comparing, again) == 4, "ended and begun again between two looks"
    assert read(comparing, None) is None


def test_a_supervisor_that_starts_again_compares_from_the_beginning_over_a_rotation_too(answers: Answers) -> None:
    answers.more(3)
    shadow = KeptShadow.model_validate_json(answers.begin().model_dump_json())
    answers.more(2)
    answers.rotate()
    answers.more(5)
    assert pairs(answers.comparing(), shadow) == 7


def test_a_replica_that_is_gone_for_good_leaves_no_answers(answers: Answers) -> None:
    answers.more(1)
    answers.rotate()
    answers.more(1)
    for _ in range(2):
        drop_answers(answers.folder, "2-a-0")
    assert sorted(path.name for path in (answers.folder / "answers").iterdir()) == ["1-a-0.jsonl", "1-a-0.jsonl.1"]
