"""What people ask of a rollout: one line each in its folder, which its engine takes up in their order.

Asking is safe to repeat. What is asked while no engine runs is kept, and taken up by the one that goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from endcap.errors import BusyError, InputError, StateError
from endcap.files import FolderLock, JsonLines
from serving.rollout.events import Command, Commanded
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Outcome, State
from serving.rollout.store import COMMANDS_FILE, DECISIONS_FILE, load_state, read_commands

__all__ = ["MAX_NAME", "ask", "engine_process", "engine_runs", "open_rollout", "step_waiting"]

MAX_NAME = 200
_LOCK = ".commands.lock"
_WRITER_S = 5.0
"""Another writer appends one line; one that takes longer than this hangs."""


def open_rollout(folder: Path) -> State:
    """Where the rollout of a folder stands.

    Raises:
        InputError: there is none, or it was cut off as it began. StateError: its state is damaged.
    """
    state = load_state(folder)
    if state is not None:
        return state
    path = folder / DECISIONS_FILE
    if path.exists() and path.stat().st_size > 0:
        raise InputError("this rollout was cut off as it began", where=folder,
                         next_step="go on with it: endcap rollout start")  # fmt: skip
    raise InputError("no rollout here", where=folder, next_step="name the folder that endcap rollout start was given")


def ask(
    folder: Path, command: Command, *, by: str, step: int | None = None, at_s: float | None = None,
    wait_s: float = _WRITER_S,
) -> int:  # fmt: skip
    """Ask ``command`` of the rollout in ``folder`` on behalf of ``by``; returns its number among all commands, from 1.

    The line is on disk when this returns. The same that waits to be taken up already is not asked twice: its number is
    returned. ``step``: for an approval, the step (from 1) that may begin. ``at_s``: Unix time (default: now).

    Raises:
        InputError: there is no rollout, it has ended, or ``by`` names nobody.
        BusyError: another process has been writing commands for ``wait_s`` seconds.
        StateError: a file of the rollout is damaged; the message names it.
    """
    if not by.strip() or len(by) > MAX_NAME or not by.isprintable():
        raise InputError(f"a printable name of 1 to {MAX_NAME} characters says who asks", where="--by")
    state = open_rollout(folder)
    if state.ended:
        raise InputError(f"the rollout has ended: {_said(state.outcome)}", where=folder,
                         next_step="for another one give endcap rollout start another --folder")  # fmt: skip
    with _writing(folder, wait_s=wait_s):
        asked = read_commands(folder)
        if len(asked) < state.commands:  # what is asked now would have a number that was taken up already
            raise StateError(f"{state.commands} commands were taken up, and {len(asked)} are left",
                             where=folder / COMMANDS_FILE, next_step="restore the file; to return the traffic without "
                             f"it end the engine, then endcap serve restore {state.stable}")  # fmt: skip
        waiting = [known for known in asked if known.number > state.commands]
        if waiting and _same(waiting[-1], command, step):
            return waiting[-1].number
        line: dict[str, str | float | int] = {
            "command": command.value, "by": by, "at_s": time.time() if at_s is None else at_s,
        }  # fmt: skip
        if step is not None:
            line["step"] = step
        with JsonLines(folder / COMMANDS_FILE, sync=True) as lines:
            lines.append(line)
        return len(asked) + 1


def engine_runs(folder: Path) -> bool:
    """Whether an engine holds the rollout's folder now."""
    return FolderLock(folder).is_held


def engine_process(folder: Path) -> str:
    """The id of the process that holds, or last held, the rollout's folder; "unknown" where that cannot be told."""
    return FolderLock(folder).holder


def step_waiting(spec: RolloutSpec, state: State) -> int | None:
    """The step, from 1, that could begin and waits for a person's approval; None where none does.

    None too while the rollout is paused, or before the step is due: nobody approves what they have not seen the step
    before of, and an approval given twice then approves no later step.
    """
    step = state.next_step + 1
    due = state.waiting is not None and state.paused_at_s is None and state.outcome is None and step <= len(spec.steps)
    return step if due and spec.steps[step - 1].approval and state.approved < step else None


@contextmanager
def _writing(folder: Path, *, wait_s: float) -> Iterator[None]:
    ends_s = time.monotonic() + wait_s
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(FolderLock(folder, name=_LOCK))
                break
            except BusyError:
                if time.monotonic() >= ends_s:
                    raise
                time.sleep(0.02)
        yield


def _same(known: Commanded, command: Command, step: int | None) -> bool:
    return known.command is command and known.step == step


def _said(outcome: Outcome | None) -> str:
    return "unknown" if outcome is None else outcome.value.replace("_", " ")
