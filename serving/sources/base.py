"""What counts an objective's events beside the target, and how that joins what the target counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from endcap.errors import SourceError
from endcap.evidence import Counts
from endcap.objectives import SeriesCounters
from endcap.selectors import Operator
from serving.sources.folding import Series, digest
from serving.targets.base import Observation

__all__ = ["Measured", "Reading", "Source", "measured", "note_of", "read_all", "selected"]

Measured: TypeAlias = Mapping[str, Mapping[str, Counts]]
"""By objective and version, what was counted since the source began."""

_PROCESS_LABELS = ("job", "instance", "namespace", "pod", "cluster")
"""What tells whose counters they are. Prometheus gives ``job`` and ``instance`` to all that it scrapes."""


class Source(Protocol):
    """Counts events of some objectives. One that has nothing new to say of a version leaves it out: no data."""

    @property
    def name(self) -> str:
        """What it reads, in words."""

    @property
    def notes(self) -> Mapping[str, str]:
        """By objective, why the last read gave nothing, or less than it could."""

    def read(self, now_s: float) -> Measured:
        """What was counted up to about now.

        Raises:
            SourceError: it does not answer, or nothing that can be believed. No data then, never zero.
        """

    def close(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What all sources said in one look. ``notes``: by objective or source, why something is not there."""

    measured: Measured
    notes: Mapping[str, str]


def note_of(error: SourceError) -> str:
    """What went wrong and where, as one line: it becomes a part of a rollout's reason."""
    return str(error).partition("\n")[0]


def read_all(sources: Iterable[Source], now_s: float) -> Reading:
    """Read every source; one that fails is a note and no data, and does not keep the others from being read."""
    found: dict[str, Mapping[str, Counts]] = {}
    notes: dict[str, str] = {}
    for source in sources:
        try:
            found |= source.read(now_s)
        except SourceError as error:
            notes[source.name] = note_of(error)
        else:
            notes |= source.notes
    return Reading(found, notes)


def measured(seen: Observation, counts: Measured) -> Observation:
    """``seen`` with what sources counted of the versions that it knows."""
    versions = {
        label: replace(version, measured={**version.measured, **_of(label, counts)})
        for label, version in seen.versions.items()
    }
    return replace(seen, versions=versions)


def _of(label: str, counts: Measured) -> dict[str, Counts]:
    return {name: by_version[label] for name, by_version in counts.items() if label in by_version}


@dataclass(frozen=True, slots=True)
class RawSeries:
    """One series as it was read: its labels without the name, and its samples."""

    name: str
    labels: Mapping[str, str]
    samples: Sequence[tuple[float, float]]


def selected(
    counters: SeriesCounters, raw: Iterable[RawSeries], *, process: str = "", version: str | None = None
) -> list[Series]:
    """What an objective's selectors take of ``raw``, told apart by version and process.

    ``version``: whose they are, where not a label but who was asked tells. Series of no version are left out.

    Raises:
        SourceError: ``good`` asks for a label that no series has (every event would be good, or none), or no series
            has the version's label.
    """
    found = []
    labels_seen: set[str] = set()
    of_no_version = False
    narrowing = counters.good.narrows(counters.total)
    for one in raw:
        total = counters.total.matches(one.name, one.labels)
        good = counters.good.matches(one.name, one.labels)
        if not (good or total):
            continue
        if total:
            labels_seen.update(one.labels)
        label = _version(counters, one.labels) if version is None else version
        if label is None:
            of_no_version = True
            continue
        copy = digest(*(one.labels[name] for name in counters.replica_labels if name in one.labels))
        kept = sorted((k, v) for k, v in one.labels.items() if k not in counters.replica_labels)
        key = digest(one.name, *(part for pair in kept for part in pair))
        whose = digest(
            process, label, *(f"{name}={one.labels[name]}" for name in _PROCESS_LABELS if name in one.labels)
        )
        found.append(Series(label, whose, key, good, total, one.samples, copy))
    if labels_seen and narrowing:
        for matcher in narrowing:
            asks_for_none = matcher.operator is Operator.EQUAL and not matcher.value
            if matcher.label not in labels_seen and not asks_for_none:
                raise SourceError(f"good asks for the label {matcher.label!r}, which no series of {counters.total} has",
                                  next_step="correct the selector")  # fmt: skip
    if of_no_version and not found:
        raise SourceError(f"no series of {counters.total} tells a version by its label {counters.version_label!r}",
                          next_step="correct versionLabel and versionPrefix")  # fmt: skip
    return found


def _version(counters: SeriesCounters, labels: Mapping[str, str]) -> str | None:
    value = labels.get(counters.version_label, "")
    if not value.startswith(counters.version_prefix):
        return None
    return value[len(counters.version_prefix) :] or None
