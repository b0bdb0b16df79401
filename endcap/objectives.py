"""What a service promises, declared once and judged everywhere (rollout gates, load thresholds, drills, alerts).

Every objective is a share of good events among all events (Beyer et al., *Site Reliability Engineering*, ch. 4),
so one piece of statistics judges them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from endcap.documents import Document, Name, SpecModel, load_documents
from endcap.errors import InputError
from endcap.selectors import Selector, parse_selector

__all__ = [
    "CountedBy", "EnvoyCounters", "Good", "Objective", "Objectives", "ObjectivesDocument", "SeriesCounters",
    "load_objectives",
]  # fmt: skip


class Good(StrEnum):
    """What makes an event good."""

    ANSWERED = "answered"
    """The attempt got an answer that is no server error; with ``within_ms``, in that time."""
    CLICKED = "clicked"
    """The impression was clicked before its attribution window closed."""
    COUNTED = "counted"
    """A counter beside the target says which are good and how many there are; the objective says where it is."""


class CountedBy(StrEnum):
    """Where the counters of a counted objective are read."""

    PROMETHEUS = "prometheus"
    """A Prometheus server, by its query API."""
    METRICS = "metrics"
    """The servers' own metrics endpoints (Prometheus' text format), read directly."""


@dataclass(frozen=True, slots=True)
class SeriesCounters:
    """Two selectors of counters: good events, and all events.

    ``version_label``: the label that tells the version; ``version_prefix`` is taken off its value, and series whose
    value lacks it are no version's. ``replica_labels``: labels in which the copies of a pair of Prometheus servers
    that scrape the same differ; their series count once.
    """

    by: CountedBy
    good: Selector
    total: Selector
    version_label: str
    version_prefix: str
    replica_labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EnvoyCounters:
    """Attempts as Envoy itself counts them. The version is its cluster's name without ``cluster_prefix``."""

    cluster_prefix: str


@dataclass(frozen=True, slots=True)
class Objective:
    """One promise: at least ``goal`` of the events are good.

    ``within_ms``: an answer later than this is not good (None: any time will do).
    ``window_s``: how long an impression may wait for its click (clicked objectives only).
    ``margin``: how much worse than control, as an absolute share, a canary may be shown to be before it fails;
    ``margin_relative``: the same as a part of control's own share. Exactly one is set.
    ``counted``: where its events are counted (counted objectives only).
    """

    name: str
    goal: float
    good: Good
    within_ms: int | None
    window_s: float | None
    margin: float | None
    margin_relative: float | None
    counted: SeriesCounters | EnvoyCounters | None = None


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


LabelName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$", max_length=128)]


class SeriesModel(SpecModel):
    good: str
    total: str
    version_label: LabelName = "version"
    version_prefix: str = Field(default="", max_length=128)
    replica_labels: tuple[LabelName, ...] = Field(default=("prometheus_replica", "replica"), max_length=8)

    def to_domain(self, by: CountedBy, service: str) -> SeriesCounters:
        """Raises InputError where ``good`` or ``total`` is no selector."""
        good, total = (parse_selector(text.replace("$service", service)) for text in (self.good, self.total))
        if good == total:
            raise InputError("good and total select the same series: every event would be good",
                             next_step="let good ask for more, as code!~\"5..\"")  # fmt: skip
        if self.version_label in self.replica_labels:
            raise InputError("versionLabel is among replicaLabels: versions would count as copies of each other")
        return SeriesCounters(by, good, total, self.version_label, self.version_prefix, self.replica_labels)


class EnvoyModel(SpecModel):
    cluster_prefix: str = Field(default="version-", max_length=128)


class ObjectiveModel(SpecModel):
    name: Name
    goal: float = Field(gt=0, lt=1)
    good: Good
    within_ms: int | None = Field(default=None, ge=1, le=60_000)
    window_seconds: float | None = Field(default=None, gt=0, le=86_400)
    margin: float | None = Field(default=None, gt=0, lt=1)
    margin_relative: float | None = Field(default=None, gt=0, lt=1)
    prometheus: SeriesModel | None = None
    metrics: SeriesModel | None = None
    envoy: EnvoyModel | None = None

    @model_validator(mode="after")
    def _fits(self) -> ObjectiveModel:
        if self.good is Good.CLICKED and self.window_seconds is None:
            raise ValueError("good: clicked needs windowSeconds")
        if self.good is not Good.ANSWERED and self.within_ms is not None:
            raise ValueError("withinMs goes with good: answered")
        if self.good is not Good.CLICKED and self.window_seconds is not None:
            raise ValueError("windowSeconds goes with good: clicked")
        sources = sum(source is not None for source in (self.prometheus, self.metrics, self.envoy))
        if self.good is Good.COUNTED and sources != 1:
            raise ValueError("good: counted needs one of prometheus, metrics and envoy, which say where it is counted")
        if self.good is not Good.COUNTED and sources:
            raise ValueError("prometheus, metrics and envoy go with good: counted; others are counted by the target")
        if self.margin is not None and self.margin_relative is not None:
            raise ValueError("margin or marginRelative, not both")
        return self

    @field_validator("prometheus", "metrics")
    @classmethod
    def _selectors(cls, series: SeriesModel | None) -> SeriesModel | None:
        if series is not None:
            try:
                series.to_domain(CountedBy.PROMETHEUS, "service")
            except InputError as error:
                raise ValueError(f"{error.what}; {error.next_step}" if error.next_step else error.what) from error
        return series

    def to_domain(self, service: str) -> Objective:
        margin, relative = self.margin, self.margin_relative
        if margin is None and relative is None:
            if self.good is Good.CLICKED:
                relative = 0.1
            else:
                # What the objective itself allows to be bad, and no less than a hundredth: narrower
                # margins need more requests than a canary step sees.
                margin = max(1 - self.goal, 0.01)
        return Objective(self.name, self.goal, self.good, self.within_ms, self.window_seconds, margin, relative,
                         self._counted(service))  # fmt: skip

    def _counted(self, service: str) -> SeriesCounters | EnvoyCounters | None:
        if self.prometheus is not None:
            return self.prometheus.to_domain(CountedBy.PROMETHEUS, service)
        if self.metrics is not None:
            return self.metrics.to_domain(CountedBy.METRICS, service)
        return None if self.envoy is None else EnvoyCounters(self.envoy.cluster_prefix)


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
        service = self.spec.service
        return Objectives(self.metadata.name, service, tuple(o.to_domain(service) for o in self.spec.objectives))


def load_objectives(path: Path) -> Objectives:
    """The single ``Objectives`` document of a file."""
    documents: Sequence[ObjectivesDocument] = load_documents(path, [ObjectivesDocument])
    if len(documents) != 1:
        raise InputError("more than one Objectives document", where=path)
    return documents[0].to_domain()
