"""What a rollout's engine asks of the place that keeps its truth: a folder, or an object of a cluster.

Two rules hold for every store. What :meth:`Store.keep` took is durable when it returns, before anything is done; and a
store that somebody else has written to since is a :class:`~endcap.errors.FencedError`, never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from endcap.objectives import Objectives
from serving.rollout.events import Commanded
from serving.rollout.sight import Sight
from serving.rollout.spec import RolloutSpec
from serving.rollout.state import State
from serving.targets.base import Observation

__all__ = ["Kept", "Store"]


@dataclass(frozen=True, slots=True)
class Kept:
    """One decision to be kept. ``record``: its line of the audit log, which holds the event and what it stood on.

    ``changed``: it changed the state; one that did not is a look, and may be lost. ``sight``: all that the looks came
    to, as JSON when it is called: a store that keeps raw looks needs it now and then only.
    """

    record: Mapping[str, Any]
    after: State
    changed: bool
    sight: Callable[[], dict[str, Any]]


class Store(Protocol):
    """Belongs to the one engine that holds the rollout."""

    @property
    def where(self) -> str:
        """What people find it by; stands in messages."""

    def declare(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Keep what the rollout is begun with: durable with the first decision at the latest."""

    def check_declared(self, spec: RolloutSpec, objectives: Objectives) -> None:
        """Refuse another declaration than what the rollout was begun with (InputError)."""

    def resume(self, spec: RolloutSpec) -> State | None:
        """Where the rollout stands; None where it has not begun. StateError where that is damaged."""

    def recall(self, sight: Sight) -> bool:
        """Bring ``sight``, which has seen nothing, to what the looks so far came to; whether there were any."""

    def add_look(self, seen: Observation) -> None:
        """One raw look, which the decision that follows stands on."""

    def keep(self, kept: Kept) -> None:
        """The decision, durable when this returns if it changed anything."""

    def publish(self, state: State) -> None:
        """Show where it stands, now that it is kept: a derived view, which may lag and be made again."""

    def has_commands(self, *, after: int) -> bool:
        """Whether people may have asked for something since the first ``after`` commands; cheap."""

    def new_commands(self, *, after: int) -> list[Commanded]:
        """What people asked for since, numbered from ``after + 1`` on."""
