"""The file that declares a rollout, and the typed value it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AwareDatetime, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from endcap.documents import Document, Name, SpecModel, load_documents
from endcap.errors import InputError
from endcap.objectives import Objectives
from serving.rollout.freeze import DateFreeze, Freeze, WeeklyFreeze
from serving.targets.base import StickyKey

__all__ = ["GatesSpec", "Margin", "Mode", "RolloutDocument", "RolloutSpec", "ShadowSpec", "Step", "load_rollout"]


class Mode(StrEnum):
    CANARY = "canary"
    """Shares grow while nothing fails; promoted when shown to be no worse than control within the margins."""
    AB = "ab"
    """A fixed split until a decision; promoted when the primary objective is shown to be better than control's."""


@dataclass(frozen=True, slots=True)
class Step:
    """One share, and how long it is looked at.

    The step ends well when ``min_requests`` attempts reached canary, ``min_s`` seconds have passed and nothing fails.
    After ``max_s`` without that the rollout is inconclusive. ``approval``: a person has to let it begin.
    """

    share: float
    min_requests: int
    min_s: float
    max_s: float
    approval: bool = False


@dataclass(frozen=True, slots=True)
class ShadowSpec:
    """Before any traffic ``share`` of the requests are copied to the candidate until ``min_requests`` were compared.

    ``min_overlap``: the least mean share of the first items that both versions named.
    """

    share: float
    min_requests: int
    max_s: float
    min_overlap: float | None


@dataclass(frozen=True, slots=True)
class Margin:
    """How much worse than control is worse: an absolute share, or a part of control's own. Exactly one is set."""

    absolute: float | None = None
    relative: float | None = None


@dataclass(frozen=True, slots=True)
class GatesSpec:
    """What is checked before any traffic. ``requests``: recorded shoppers; without them only the package is."""

    requests: str | None = None
    offline_margin_relative: float = 0.05
    segment_margin_relative: float = 0.1
    segment_min_shoppers: int = 100
    max_shoppers: int = 2000
    replayed_requests: int = 200


@dataclass(frozen=True, slots=True)
class RolloutSpec:
    """``alpha``: bound on the chance of failing a good candidate; ``beta``: of passing one worse than the margin.

    ``hold_s``: how long an inconclusive rollout keeps its share, waiting for evidence or a person, before the
    traffic is returned. ``baseline``: a fresh copy of stable of canary's size and age is control for latency.
    ``webhook_from``: the environment variable that holds the address for notices.
    """

    name: str
    service: str
    candidate: str
    objectives: str
    steps: tuple[Step, ...]
    alpha: float
    beta: float
    look_s: float
    mode: Mode = Mode.CANARY
    primary: str | None = None
    margins: Mapping[str, Margin] = field(default_factory=dict)
    hold_s: float = 0.0
    shadow: ShadowSpec | None = None
    gates: GatesSpec = GatesSpec()
    sticky: StickyKey | None = None
    baseline: bool = False
    freeze: tuple[Freeze, ...] = ()
    webhook_from: str | None = None
    prometheus_url: str | None = None

    def judged(self, objectives: Objectives) -> Objectives:
        """``objectives`` with this rollout's margins.

        Raises:
            InputError: the rollout asks for other objectives, or names one that they do not have.
        """
        if objectives.name != self.objectives:
            raise InputError(f"the rollout asks for objectives {self.objectives!r}; these are {objectives.name!r}")
        if objectives.service != self.service:
            raise InputError(f"the rollout is of service {self.service!r}; the objectives are of "
                             f"{objectives.service!r}")  # fmt: skip
        known = {objective.name: objective for objective in objectives.objectives}
        for name in (*self.margins, *([self.primary] if self.primary else [])):
            if name not in known:
                raise InputError(f"no objective is called {name!r}", where=f"rollout {self.name}",
                                 next_step=f"known: {', '.join(known)}")  # fmt: skip
        for name, margin in self.margins.items():
            known[name] = replace(known[name], margin=margin.absolute, margin_relative=margin.relative)
        return replace(objectives, objectives=tuple(known.values()))

    def baseline_share(self, step: int) -> float:
        """As many requests as canary gets, while that leaves stable some: half the requests are control enough."""
        share = self.steps[step].share
        return share if self.baseline and share < 0.5 else 0.0


class StepModel(SpecModel):
    share: float = Field(ge=0.0001, le=1)
    """The gateway's weights are ten-thousandths: less would get more than was declared."""
    min_requests: int = Field(default=100, ge=1)
    """Attempts that must have reached the candidate before the step may end; 100 where it is not given."""
    min_seconds: float = Field(default=30, ge=0)
    """The least time of the step; 30 where it is not given."""
    max_seconds: float = Field(default=3600, gt=0, le=30 * 86_400)
    """After so long without a verdict the rollout is inconclusive; 3600 where it is not given."""
    approval: bool = False
    """A person has to let it begin."""

    @model_validator(mode="after")
    def _in_order(self) -> StepModel:
        if self.max_seconds < self.min_seconds:
            raise ValueError("maxSeconds is below minSeconds")
        return self

    def to_domain(self) -> Step:
        return Step(self.share, self.min_requests, self.min_seconds, self.max_seconds, self.approval)


class MarginModel(SpecModel):
    absolute: float | None = Field(default=None, gt=0, lt=1)
    relative: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one(self) -> MarginModel:
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give absolute or relative, one of them")
        return self


class InconclusiveModel(SpecModel):
    hold_seconds: float = Field(default=600, ge=0, le=30 * 86_400)


class ShadowModel(SpecModel):
    share: float = Field(default=0.1, gt=0, le=1)
    min_requests: int = Field(default=200, ge=1)
    max_seconds: float = Field(default=600, gt=0, le=30 * 86_400)
    min_overlap: float | None = Field(default=None, gt=0, le=1)


class OfflineModel(SpecModel):
    margin_relative: float = Field(default=0.05, gt=0, lt=1)
    shoppers: int = Field(default=2000, ge=1, le=100_000)


class SegmentsModel(SpecModel):
    margin_relative: float = Field(default=0.1, gt=0, lt=1)
    min_shoppers: int = Field(default=100, ge=10)


class ReplayModel(SpecModel):
    requests: int = Field(default=200, ge=1, le=10_000)


class GatesModel(SpecModel):
    requests: str | None = Field(default=None, min_length=1, max_length=4096)
    """A file of recorded shoppers, one JSON object a line; a relative path is relative to this document."""
    offline: OfflineModel = OfflineModel()
    segments: SegmentsModel = SegmentsModel()
    replay: ReplayModel = ReplayModel()

    def to_domain(self, folder: Path) -> GatesSpec:
        requests = None if self.requests is None else str((folder / self.requests).absolute())
        return GatesSpec(
            requests, self.offline.margin_relative, self.segments.margin_relative, self.segments.min_shoppers,
            self.offline.shoppers, self.replay.requests,
        )  # fmt: skip


class StickyModel(SpecModel):
    header: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    cookie: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,64}$")

    @model_validator(mode="after")
    def _one(self) -> StickyModel:
        if self.header is not None and self.cookie is not None:
            raise ValueError("give header or cookie, one of them")
        return self

    def to_domain(self) -> StickyKey | None:
        """None where neither is given: kubectl drops a null, so ``sticky: {}`` says the same."""
        return None if self.header is None and self.cookie is None else StickyKey(self.header, self.cookie)


_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
Day = Literal["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]


def _minute(value: Any) -> Any:
    """``18:00`` as minutes of the day. YAML 1.1 reads it, unquoted, as the number 1080: the same thing."""
    if isinstance(value, str) and len(parts := value.split(":")) == 2 and all(part.isdigit() for part in parts):
        hours, minutes = (int(part) for part in parts)
        return hours * 60 + minutes if minutes < 60 else value
    return value


Minute = Annotated[int, BeforeValidator(_minute), Field(ge=0, lt=1440)]
Reason = Annotated[str, Field(min_length=1, max_length=200)]


class DateFreezeModel(SpecModel):
    from_: AwareDatetime = Field(alias="from")
    until: AwareDatetime
    reason: Reason = "a freeze window"

    @model_validator(mode="after")
    def _in_order(self) -> DateFreezeModel:
        if self.until <= self.from_:
            raise ValueError("until is not after from")
        return self

    def to_domain(self) -> Freeze:
        return DateFreeze(self.from_.timestamp(), self.until.timestamp(), self.reason)


class WeeklyFreezeModel(SpecModel):
    days: tuple[Day, ...] = Field(min_length=1)
    from_: Minute = Field(alias="from")
    until: Minute
    timezone: str = "UTC"
    reason: Reason = "a weekly freeze window"

    @field_validator("timezone")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"no time zone is called {name!r}") from error
        return name

    def to_domain(self) -> Freeze:
        days = tuple(sorted({_DAYS.index(day) for day in self.days}))
        return WeeklyFreeze(days, self.from_, self.until, self.timezone, self.reason)


def _freeze_kind(document: Any) -> str:
    weekly = "days" in document if isinstance(document, dict) else isinstance(document, WeeklyFreezeModel)
    return "weekly" if weekly else "dates"


FreezeModel = Annotated[
    Annotated[DateFreezeModel, Tag("dates")] | Annotated[WeeklyFreezeModel, Tag("weekly")],
    Discriminator(_freeze_kind),
]


class NotifyModel(SpecModel):
    webhook_from: str = Field(default="ENDCAP_WEBHOOK_URL", pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
    """The environment variable that holds the address: it is a secret, so it stands in no file."""


class PrometheusModel(SpecModel):
    url: str = Field(pattern=r"^https?://[^\s]+$", max_length=2048)


def _default_sticky() -> StickyModel:
    return StickyModel(header="x-endcap-shopper")


class RolloutSpecModel(SpecModel):
    service: Name
    """What shoppers call: the local target's service, or the InferenceService of that name."""
    candidate: str = Field(min_length=1, max_length=512)
    """The model version to roll out, as models:/NAME/VERSION."""
    objectives: Name | None = None
    """The Objectives document that judges it; the one with the service's name where it is not given."""
    mode: Mode = Mode.CANARY
    """canary: shares grow while nothing fails. ab: one split, until the primary objective is shown to be better."""
    primary: Name | None = None
    """The objective that has to be shown to be better (mode: ab)."""
    steps: tuple[StepModel, ...] | None = Field(default=None, min_length=1, max_length=32)
    """Shares that grow to 1; 0.05, 0.25, 0.5 and 1 where they are not given."""
    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    """Bound on the chance of failing a good candidate; 0.01 where it is not given."""
    beta: float = Field(default=0.05, gt=0, lt=0.5)
    """Bound on the chance of passing one that is worse by its margin; 0.05 where it is not given."""
    look_seconds: float = Field(default=1.0, ge=0.1, le=60)
    """The time from one look to the next; 1 where it is not given."""
    margins: dict[Name, MarginModel] = Field(default_factory=dict, max_length=16)
    """By objective, how much worse than control is worse: instead of what the objectives say."""
    inconclusive: InconclusiveModel = InconclusiveModel()
    shadow: ShadowModel | None = None
    """Copies of requests that the candidate answers before it gets any traffic."""
    gates: GatesModel = GatesModel()
    """What is checked before any traffic."""
    sticky: StickyModel | None = Field(default_factory=_default_sticky)
    """What shoppers are known by, so that they keep their version; {}: nothing. x-endcap-shopper if not given."""
    baseline: bool = False
    """A fresh copy of stable, of canary's size and age, is control for latency."""
    freeze: tuple[FreezeModel, ...] = Field(default=(), max_length=64)
    """Times in which no version is given more traffic. May be changed while the rollout runs."""
    notify: NotifyModel = NotifyModel()
    prometheus: PrometheusModel | None = None
    """The Prometheus server that counted objectives are read from."""

    @model_validator(mode="after")
    def _grow_to_all(self) -> RolloutSpecModel:
        if self.steps is None:
            return self
        shares = [step.share for step in self.steps]
        if shares != sorted(set(shares)):
            raise ValueError("steps: each share must be greater than the one before")
        if shares[-1] != 1:
            raise ValueError("steps: the last share must be 1")
        if len(shares) < 2:
            raise ValueError("steps: a share below 1 is needed first, or there is nothing to compare with")
        return self

    @model_validator(mode="after")
    def _mode_fits(self) -> RolloutSpecModel:
        if self.mode is Mode.CANARY and self.primary is not None:
            raise ValueError("primary goes with mode: ab")
        if self.mode is Mode.AB:
            if self.primary is None:
                raise ValueError("mode: ab needs primary, the objective that has to be better")
            if self.steps is not None and len(self.steps) != 2:
                raise ValueError("mode: ab has one split and then all: two steps")
            if self.sticky is None or self.sticky.to_domain() is None:
                raise ValueError("mode: ab needs sticky: shoppers have to keep their version")
            if self.baseline:
                raise ValueError("baseline goes with mode: canary")
        return self

    def given_steps(self) -> tuple[StepModel, ...]:
        if self.steps is not None:
            return self.steps
        if self.mode is Mode.AB:
            return (StepModel(share=0.5, min_requests=1000, max_seconds=14 * 86_400), StepModel(share=1))
        return tuple(StepModel(share=share) for share in (0.05, 0.25, 0.5, 1.0))


class RolloutDocument(Document):
    kind: Literal["Rollout"] = "Rollout"
    spec: RolloutSpecModel

    def to_domain(self, *, folder: Path = Path()) -> RolloutSpec:
        """``folder``: where relative paths of the document begin."""
        spec, shadow = self.spec, self.spec.shadow
        return RolloutSpec(
            name=self.metadata.name,
            service=spec.service,
            candidate=spec.candidate,
            objectives=spec.objectives or spec.service,
            steps=tuple(step.to_domain() for step in spec.given_steps()),
            alpha=spec.alpha,
            beta=spec.beta,
            look_s=spec.look_seconds,
            mode=spec.mode,
            primary=spec.primary,
            margins={name: Margin(margin.absolute, margin.relative) for name, margin in spec.margins.items()},
            hold_s=spec.inconclusive.hold_seconds,
            shadow=None if shadow is None else ShadowSpec(
                shadow.share, shadow.min_requests, shadow.max_seconds, shadow.min_overlap
            ),
            gates=spec.gates.to_domain(folder),
            sticky=None if spec.sticky is None else spec.sticky.to_domain(),
            baseline=spec.baseline,
            freeze=tuple(freeze.to_domain() for freeze in spec.freeze),
            webhook_from=spec.notify.webhook_from,
            prometheus_url=None if spec.prometheus is None else spec.prometheus.url,
        )  # fmt: skip


def load_rollout(path: Path) -> RolloutSpec:
    """The single ``Rollout`` document of a file."""
    documents = load_documents(path, [RolloutDocument])
    if len(documents) != 1:
        raise InputError("more than one Rollout document", where=path)
    return documents[0].to_domain(folder=path.parent)
