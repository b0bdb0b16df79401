"""What people ask of a Rollout, as annotations: ``endcap.dev/pause``, ``resume``, ``approve``, ``promote``, ``abort``.

The value says who asks. It is taken up once: an annotation whose value was heard already says nothing new, and it is
removed when the decision that it led to is kept. So ``kubectl annotate`` does, and ``endcap rollout ... --context``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from serving.operator.objects import ASK_PREFIX, RolloutObject
from serving.rollout.commands import MAX_NAME, step_waiting
from serving.rollout.events import Command, Commanded
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import Phase, State

__all__ = ["DELETION", "Ask", "ask_value", "asks_of", "commanded"]

DELETION = "deletion"
"""What a deletion is heard as."""
_ORDER = (Command.RESUME, Command.PAUSE, Command.APPROVE, Command.PROMOTE, Command.ABORT)
"""Of what is asked at once: what takes traffic away comes last and stands."""


@dataclass(frozen=True, slots=True)
class Ask:
    """``name``: by which it is heard; ``value``: what was heard. ``step``: of an approval, where one was named."""

    name: str
    value: str
    command: Command
    by: str
    step: int | None = None


def asks_of(rollout: RolloutObject, state: State, heard: Mapping[str, str]) -> list[Ask]:
    """What was not heard yet, in the order in which it is to be taken up."""
    found = []
    for command in _ORDER:
        value = rollout.annotations.get(f"{ASK_PREFIX}{command}")
        if value is not None and heard.get(command) != value:
            step, by = _read(command, value)
            found.append(Ask(command.value, value, command, by, step))
    returning = state.phase in (Phase.RETURNING, Phase.RETIRING) or state.ended
    if rollout.is_deleted and not returning and heard.get(DELETION) != rollout.uid:
        found.append(Ask(DELETION, rollout.uid, Command.ABORT, "the deletion of the Rollout"))
    return found


def commanded(ask: Ask, spec: RolloutSpec, state: State, number: int) -> Commanded:
    """The event. An approval that names no step is of the one that waits."""
    step = ask.step
    if ask.command is Command.APPROVE and step is None:
        step = step_waiting(spec, state)
    return Commanded(ask.command, ask.by, number, step)


def ask_value(by: str, now: str, *, step: int | None = None) -> str:
    """What a program writes: no two are alike, so asking again is heard again."""
    return f"{'' if step is None else f'step {step} '}{by} at {now}"


def _read(command: Command, value: str) -> tuple[int | None, str]:
    step = None
    if command is Command.APPROVE and (named := re.match(r"\s*(?:step\s+)?(\d{1,2})\b\s*", value)):
        step, value = int(named[1]), value[named.end() :]
    by = "".join(letter for letter in value.rpartition(" at ")[0] or value if letter.isprintable())
    return step, by.strip()[:MAX_NAME] or "somebody"
