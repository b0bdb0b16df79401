"""A rollout's folder: what was declared, where it stands, what it saw, what it decided.

``declared.json`` is written once; ``state.json`` is replaced whole; ``looks.jsonl`` and ``decisions.jsonl`` only grow.
A damaged file is an error that names it, never a fresh start.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from endcap.errors import InputError, StateError
from endcap.files import JsonLines, read_json, read_json_lines, write_json
from endcap.objectives import Objectives
from serving.rollout.looks import observation_from_json, observation_to_json
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import State
from serving.targets.base import Observation

__all__ = ["RolloutStore"]


class RolloutStore:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state_file = folder / "state.json"
        self._declared_file = folder / "declared.json"
        self._looks_file = folder / "looks.jsonl"
        self._looks = JsonLines(self._looks_file)
        self._decisions = JsonLines(folder / "decisions.jsonl", sync=True)

    def declare(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Keep what the rollout was begun with."""
        write_json(self._declared_file, _declared(spec, objectives))

    def check_declared(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Refuse another declaration: the evidence so far, and the bounds on its errors, stand on the first one.

        Raises:
            InputError: something differs; the message names it.
        """
        kept, asked = read_json(self._declared_file), json.loads(json.dumps(_declared(spec, objectives)))
        differ = [name for name, value in asked.items() if not isinstance(kept, dict) or kept.get(name) != value]
        if differ:
            raise InputError(f"the rollout here was begun with other {', '.join(differ)}", where=self._declared_file,
                             next_step="go on with what it was begun with, or choose another folder")  # fmt: skip

    def load_state(self) -> State | None:
        """None where the rollout has not begun."""
        if not self.state_file.exists():
            return None
        return State.from_json(read_json(self.state_file), where=self.state_file)

    def save_state(self, state: State) -> None:
        write_json(self.state_file, state.to_json())

    def load_looks(self) -> list[Observation]:
        looks = []
        for number, record in enumerate(read_json_lines(self._looks_file), 1):
            try:
                looks.append(observation_from_json(record))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise StateError(f"line {number} is damaged ({error!r})", where=self._looks_file) from error
        return looks

    def add_look(self, seen: Observation) -> None:
        self._looks.append(observation_to_json(seen))

    def add_decision(self, record: Mapping[str, Any]) -> None:
        self._decisions.append(record)

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._looks.close()
        self._decisions.close()


def _declared(spec: RolloutSpec, objectives: Objectives) -> dict[str, Any]:
    return {**asdict(spec), "objectives": asdict(objectives)}
