"""The file that declares a rollout, and the typed value it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from endcap.documents import Document, Name, SpecModel, load_documents
from endcap.errors import InputError

__all__ = ["RolloutDocument", "RolloutSpec", "Step", "load_rollout"]


@dataclass(frozen=True, slots=True)
class Step:
    """One share, and how long it is looked at.

    The step ends well when ``min_requests`` attempts reached canary, ``min_s`` seconds have passed and nothing fails.
    After ``max_s`` without that the rollout is inconclusive.
    """

    share: float
    min_requests: int
    min_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """``alpha``: bound on the chance of failing a good candidate; ``beta``: of passing one worse than the margin."""

    name: str
    service: str
    candidate: str
    objectives: str
    steps: tuple[Step, ...]
    alpha: float
    beta: float
    look_s: float


class StepModel(SpecModel):
    share: float = Field(gt=0, le=1)
    min_requests: int = Field(default=100, ge=1)
    min_seconds: float = Field(default=10, ge=0)
    max_seconds: float = Field(default=300, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> StepModel:
        if self.max_seconds < self.min_seconds:
            raise ValueError("maxSeconds is below minSeconds")
        return self


def _default_steps() -> tuple[StepModel, ...]:
    return tuple(StepModel(share=share) for share in (0.05, 0.25, 0.5, 1.0))


class RolloutSpecModel(SpecModel):
    service: Name
    candidate: str = Field(min_length=1, max_length=512)
    objectives: Name | None = None
    steps: tuple[StepModel, ...] = Field(default_factory=_default_steps, min_length=1, max_length=32)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    beta: float = Field(default=0.05, gt=0, lt=0.5)
    look_seconds: float = Field(default=1.0, ge=0.1, le=60)

    @model_validator(mode="after")
    def _grow_to_all(self) -> RolloutSpecModel:
        shares = [step.share for step in self.steps]
        if shares != sorted(set(shares)):
            raise ValueError("steps: each share must be greater than the one before")
        if shares[-1] != 1:
            raise ValueError("steps: the last share must be 1")
        if len(shares) < 2:
            raise ValueError("steps: a share below 1 is needed first, or there is nothing to compare with")
        return self


class RolloutDocument(Document):
    kind: Literal["Rollout"] = "Rollout"
    spec: RolloutSpecModel

    def to_domain(self) -> RolloutSpec:
        spec = self.spec
        return RolloutSpec(
            name=self.metadata.name,
            service=spec.service,
            candidate=spec.candidate,
            objectives=spec.objectives or spec.service,
            steps=tuple(Step(s.share, s.min_requests, s.min_seconds, s.max_seconds) for s in spec.steps),
            alpha=spec.alpha,
            beta=spec.beta,
            look_s=spec.look_seconds,
        )


def load_rollout(path: Path) -> RolloutSpec:
    """The single ``Rollout`` document of a file."""
    documents = load_documents(path, [RolloutDocument])
    if len(documents) != 1:
        raise InputError("more than one Rollout document", where=path)
    return documents[0].to_domain()
