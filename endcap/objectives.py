"""What a service promises, declared once and judged everywhere (rollout gates, load thresholds, drills, alerts).

Every objective is a share of good events among all events (Beyer et al., *Site Reliability Engineering*, ch. 4),
so one piece of statistics judges them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from endcap.documents import Document, Name, SpecModel, load_documents
from endcap.errors import InputError

__all__ = ["Good", "Objective", "Objectives", "ObjectivesDocument", "load_objectives"]


class Good(StrEnum):
    """What makes an event good."""

    ANSWERED = "answered"
    """The attempt got an answer that is no server error; with ``within_ms``, in that time."""
    CLICKED = "clicked"
    """The impression was clicked before its attribution window closed."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise: at least ``goal`` of the events are good.

    ``within_ms``: an answer later than this is not good (None: any time will do).
    ``window_s``: how long an impression may wait for its click (clicked objectives only).
    ``margin``: how much worse than control, as an absolute share, a canary may be shown to be before it fails;
    ``margin_relative``: the same as a part of control's own share. Exactly one is set.
    """

    name: str
    goal: float
    good: Good
    within_ms: int | None
    window_s: float | None
    margin: float | None
    margin_relative: float | None


@dataclass(frozen=True, slots=True)
class Objectives:
    name: str
    service: str
    objectives: tuple[Objective, ...]

    def named(self, name: str) -> Objective:
        for objective in self.objectives:
            if objective.name == name:
                return objective
        raise InputError(f"no objective named {name!r} in {self.name!r}")

    @property
    def latency_thresholds_ms(self) -> tuple[int, ...]:
        return tuple(sorted({o.within_ms for o in self.objectives if o.within_ms is not None}))

    @property
    def click_window_s(self) -> float | None:
        """The one attribution window; None where no objective is about clicks."""
        return next((o.window_s for o in self.objectives if o.window_s is not None), None)


class ObjectiveModel(SpecModel):
    name: Name
    goal: float = Field(gt=0, lt=1)
    good: Good
    within_ms: int | None = Field(default=None, ge=1, le=60_000)
    window_seconds: float | None = Field(default=None, gt=0, le=86_400)
    margin: float | None = Field(default=None, gt=0, lt=1)
    margin_relative: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> ObjectiveModel:
        if self.good is Good.CLICKED and self.window_seconds is None:
            raise ValueError("good: clicked needs windowSeconds")
        if self.good is Good.CLICKED and self.within_ms is not None:
            raise ValueError("withinMs goes with good: answered")
        if self.good is Good.ANSWERED and self.window_seconds is not None:
            raise ValueError("windowSeconds goes with good: clicked")
        if self.margin is not None and self.margin_relative is not None:
            raise ValueError("margin or marginRelative, not both")
        return self

    def to_domain(self) -> Objective:
        margin, relative = self.margin, self.margin_relative
        if margin is None and relative is None:
            if self.good is Good.CLICKED:
                relative = 0.1
            else:
                # What the objective itself allows to be bad, and no less than a hundredth: narrower
                # margins need more requests than a canary step sees.
                margin = max(1 - self.goal, 0.01)
        return Objective(self.name, self.goal, self.good, self.within_ms, self.window_seconds, margin, relative)


class ObjectivesSpec(SpecModel):
    service: Name
    objectives: tuple[ObjectiveModel, ...] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _names_differ(self) -> ObjectivesSpec:
        names = [objective.name for objective in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError("two objectives have the same name")
        return self

    @model_validator(mode="after")
    def _one_window(self) -> ObjectivesSpec:
        if len({o.window_seconds for o in self.objectives if o.window_seconds is not None}) > 1:
            raise ValueError("windowSeconds differ: a service's feedback collector has one window")
        return self


class ObjectivesDocument(Document):
    kind: Literal["Objectives"] = "Objectives"
    spec: ObjectivesSpec

    def to_domain(self) -> Objectives:
        return Objectives(self.metadata.name, self.spec.service, tuple(o.to_domain() for o in self.spec.objectives))


def load_objectives(path: Path) -> Objectives:
    """The single ``Objectives`` document of a file."""
    documents: Sequence[ObjectivesDocument] = load_documents(path, [ObjectivesDocument])
    if len(documents) != 1:
        raise InputError("more than one Objectives document", where=path)
    return documents[0].to_domain()
