"""A rollout's folder: what was declared, what was asked, what it saw, what it decided, where it stands.

``declared.json`` is written once. ``decisions.jsonl`` is the log of what was decided, synced before anything is done;
``state.json``, replaced whole, is a checkpoint of it. ``looks.jsonl`` holds the raw looks; ``sight.json``, replaced now
and then, is what they come to up to some line, so that going on takes no longer after a month than after a minute.
``commands.jsonl`` holds what people asked for. A damaged file is an error that names it, never a fresh start.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from endcap.errors import InputError, StateError, StorageError
from endcap.files import JsonLines, read_json, read_json_lines, write_json
from endcap.objectives import Objectives
from serving.rollout.audit import replay
from serving.rollout.base import Kept
from serving.rollout.declared import DECLARED_FILE, declared_json, differing, read_declaration
from serving.rollout.events import Command, Commanded
from serving.rollout.looks import observation_from_json, observation_to_json
from serving.rollout.sight import Sight
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import State
from serving.targets.base import Observation

__all__ = [
    "COMMANDS_FILE", "DECISIONS_FILE", "LOOKS_FILE", "SIGHT_EVERY", "SIGHT_FILE", "STATE_FILE", "RolloutStore",
    "load_state", "read_commands",
]  # fmt: skip

STATE_FILE = "state.json"
DECISIONS_FILE = "decisions.jsonl"
LOOKS_FILE = "looks.jsonl"
SIGHT_FILE = "sight.json"
COMMANDS_FILE = "commands.jsonl"
SIGHT_EVERY = 1000
"""Looks: to fold so many again takes about a second."""
_LONGEST_LOOK = 1 << 20


def load_state(folder: Path) -> State | None:
    """The checkpoint of a rollout; None where none has begun.

    Raises:
        StateError: it is damaged; the message names the file.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        return State.from_json(read_json(path), where=path)
    except StateError as error:
        raise StateError(error.what, where=error.where, next_step="move it away: endcap rollout start reads where the "
                         f"rollout stands from {DECISIONS_FILE}, and goes on") from error  # fmt: skip


def read_commands(folder: Path, *, after: int = 0) -> list[Commanded]:
    """What people asked of a rollout beyond the first ``after`` commands.

    Raises:
        StateError: a line is damaged; the message names the file.
    """
    path, found = folder / COMMANDS_FILE, []
    for number, line in enumerate(read_json_lines(path), 1):
        if number <= after:
            continue
        try:
            step = line.get("step")
            found.append(
                Commanded(Command(line["command"]), str(line["by"]), number, None if step is None else int(step))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"line {number} is damaged ({error!r})", where=path) from error
    return found


class RolloutStore:
    """Belongs to the one engine that holds the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._decisions = JsonLines(folder / DECISIONS_FILE)
        self._looks = JsonLines(folder / LOOKS_FILE)
        self._commands_bytes, self._commands = -1, 0
        self._begun_at_s: float | None = None
        self._looks_since_sight = 0

    @property
    def where(self) -> str:
        return str(self.folder)

    def declare(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Keep what the rollout was begun with."""
        write_json(self.folder / DECLARED_FILE, declared_json(spec, objectives))

    def check_declared(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Refuse another declaration: the evidence so far, and the bounds on its errors, stand on the first one.

        Raises:
            InputError: something differs; the message names it.
        """
        path = self.folder / DECLARED_FILE
        differ = differing(read_declaration(self.folder), declared_json(spec, objectives))
        if differ:
            raise InputError(f"the rollout here was begun with other {', '.join(differ)}", where=path,
                             next_step="go on with what it was begun with, or choose another folder")  # fmt: skip

    def resume(self, spec: RolloutSpec) -> State | None:
        """Where the rollout stands: the checkpoint, and what was decided after it. None where it has not begun.

        The checkpoint is brought up to date, for those who only read it.
        """
        path, checkpoint = self.folder / DECISIONS_FILE, load_state(self.folder)
        state = replay(spec, read_json_lines(path), where=path, checkpoint=checkpoint)
        if state is not None and state != checkpoint:
            self.publish(state)
        self._begun_at_s = None if state is None else state.started_at_s
        return state

    def publish(self, state: State) -> None:
        """Replace the checkpoint."""
        self._begun_at_s = state.started_at_s
        write_json(self.folder / STATE_FILE, state.to_json())

    def recall(self, sight: Sight) -> bool:
        """What ``sight.json`` holds, and the raw looks after it. Those of another rollout are an error."""
        from_byte = self._recall_sight(sight)
        for seen in self._looks_from(from_byte):
            sight.take(seen)
            self._looks_since_sight += 1
        return sight.looked_at_s is not None

    def _recall_sight(self, sight: Sight) -> int:
        """Bring ``sight`` to what was kept; returns where in the raw looks those begin that it does not hold."""
        path, looks = self.folder / SIGHT_FILE, self.folder / LOOKS_FILE
        if not path.exists():
            return 0
        document = read_json(path)
        try:
            end, begun_at_s = int(document["looks_bytes"]), document["begun_at_s"]
            last = _line_before(looks, end)
            sight.restore(document["sight"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"damaged, not what the looks come to ({error!r})", where=path,
                             next_step="move it away: all looks are then folded again") from error  # fmt: skip
        if begun_at_s != self._begun_at_s or last != (self._begun_at_s, sight.looked_at_s):
            raise StateError(f"it is not what {LOOKS_FILE} comes to", where=path, next_step="restore the one that was "
                             f"exchanged; where {LOOKS_FILE} is whole, moving this one away suffices")  # fmt: skip
        return end

    def _looks_from(self, byte: int) -> Iterator[Observation]:
        path = self.folder / LOOKS_FILE
        for number, record in enumerate(read_json_lines(path, from_byte=byte), 1):
            place = f"line {number}" if byte == 0 else f"line {number} after byte {byte}"
            if record.get("begun_at_s", self._begun_at_s) != self._begun_at_s:
                raise StateError(f"{place} is another rollout's", where=path, next_step="restore the file")
            try:
                yield observation_from_json(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise StateError(f"{place} is damaged ({error!r})", where=path) from error

    def add_look(self, seen: Observation) -> None:
        self._looks.append({**observation_to_json(seen), "begun_at_s": self._begun_at_s})
        self._looks_since_sight += 1

    def keep(self, kept: Kept) -> None:
        """On disk when this returns, if it changed anything: a look that changed nothing may be lost."""
        self._decisions.append(kept.record, sync=kept.changed)
        if self._looks_since_sight >= SIGHT_EVERY:
            with contextlib.suppress(StorageError):  # the decision is kept; this only saves time later
                self._keep_sight(kept.sight())

    def _keep_sight(self, sight: Mapping[str, Any]) -> None:
        end = self._looks.sync()
        write_json(self.folder / SIGHT_FILE, {"looks_bytes": end, "begun_at_s": self._begun_at_s, "sight": sight})
        self._looks_since_sight = 0

    def has_commands(self, *, after: int) -> bool:
        """Whether people may have asked for something since; costs a look at the file's size."""
        path = self.folder / COMMANDS_FILE
        size = path.stat().st_size if path.exists() else 0
        return size != self._commands_bytes or after < self._commands

    def new_commands(self, *, after: int) -> list[Commanded]:
        """What people asked for since."""
        if not self.has_commands(after=after):
            return []
        path = self.folder / COMMANDS_FILE
        size = path.stat().st_size if path.exists() else 0
        found = read_commands(self.folder, after=after)
        self._commands_bytes, self._commands = size, found[-1].number if found else after
        return found

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._looks.close()
        self._decisions.close()


def _line_before(path: Path, end: int) -> tuple[float | None, float]:
    """When the rollout of the line that ends at byte ``end`` began, and when it looked."""
    with path.open("rb") as file:
        file.seek(max(0, end - _LONGEST_LOOK))
        held = file.read(min(end, _LONGEST_LOOK))
    if len(held) < min(end, _LONGEST_LOOK) or not held.endswith(b"\n"):
        raise ValueError(f"{LOOKS_FILE} does not reach to byte {end}")
    record = json.loads(held[held.rfind(b"\n", 0, -1) + 1 :])
    return record.get("begun_at_s"), float(record["at_s"])
