"""From what a target counts to what each look adds: strata for the evidence, and what versions received."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from endcap.evidence import Counts, Stratum
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.events import NOTHING_RECEIVED, Received
from serving.targets.base import Observation, ShadowObservation, VersionObservation

__all__ = [
    "BESIDE_S", "KEPT", "TROUBLE_DEVIATIONS", "TROUBLE_EVENTS", "Lately", "Look", "LookFold", "Split",
    "observation_from_json", "observation_to_json", "shadow_from_json", "shadow_strata", "shadow_to_json",
]  # fmt: skip

KEPT = 0.9
"""What a look leaves of those before it, for :class:`Lately`: about ten of them count."""
TROUBLE_DEVIATIONS, TROUBLE_EVENTS = 5.0, 2.0
"""A goal is missed by more than chance explains: so many standard deviations and events beyond what is due."""
BESIDE_S = 60.0
"""How long canary's events wait for control's at most: scrapes of two processes come apart by their interval."""


@dataclass(frozen=True, slots=True)
class Split:
    """Shoppers counted for the first time in a look, of canary and of all, and the share that decided which."""

    canary: int
    total: int
    share: float


@dataclass(frozen=True, slots=True)
class Look:
    """What one look adds. ``received``: since the rollout began. ``split``: None while it cannot be told."""

    strata: Mapping[str, Stratum]
    received: Received
    canary_new: int = 0
    control_new: int = 0
    split: Split | None = None


class LookFold:
    """Turns observations, in their order, into looks. Its size does not depend on how many there were.

    The first observation is where counting begins. A counter that went back was restarted: all it holds is new. What an
    observation does not tell of a version is no data: its counts go on from where they were last seen.

    Canary's events with none of control's beside them compare with nothing, so they wait for the next of control's, and
    a stratum is then of several looks: where there are few events, or a source tells of one process at a time. That
    hangs on how many events came, never on what became of them.
    """

    def __init__(self, objectives: Objectives, *, canary: str, baseline: str | None = None) -> None:
        self._objectives, self._canary, self._baseline = objectives, canary, baseline
        self._last: dict[tuple[str, str], Counts] = {}
        self._received = NOTHING_RECEIVED
        self._at_s: float | None = None
        self._share: float | None = None
        self._share_since_s = 0.0
        self._shoppers_at_s: float | None = None
        """The last look that told of new shoppers: what a collector that was away tells may be of any time since."""
        self._waiting: dict[str, tuple[float, Counts]] = {}
        """By objective, canary's events that wait for control's, and since when."""

    @property
    def received(self) -> Received:
        return self._received

    def to_json(self) -> dict[str, Any]:
        """What was folded so far. Its size hangs on how many versions and counters there are."""
        last: dict[str, dict[str, list[int]]] = {}
        for (label, what), counts in self._last.items():
            last.setdefault(label, {})[what] = _pair(counts)
        return {
            "last": last, "received": asdict(self._received), "at_s": self._at_s, "share": self._share,
            "share_since_s": self._share_since_s, "shoppers_at_s": self._shoppers_at_s,
            "waiting": {name: [since_s, *_pair(counts)] for name, (since_s, counts) in self._waiting.items()},
        }  # fmt: skip

    def restore(self, document: Mapping[str, Any]) -> None:
        """Go on from what :meth:`to_json` gave. Raises KeyError, TypeError or ValueError on anything else."""
        self._last = {
            (str(label), str(what)): _counts(pair)
            for label, by_counter in document["last"].items()
            for what, pair in by_counter.items()
        }
        self._received = Received(**{name: int(value) for name, value in document["received"].items()})
        self._at_s, self._share = _maybe(document["at_s"]), _maybe(document["share"])
        self._share_since_s, self._shoppers_at_s = float(document["share_since_s"]), _maybe(document["shoppers_at_s"])
        self._waiting = {
            str(name): (float(since_s), Counts(int(good), int(total)))
            for name, (since_s, good, total) in document["waiting"].items()
        }

    def fold(self, seen: Observation) -> Look:
        """What ``seen`` adds to the observations before it."""
        new = self._new(seen)
        first = self._at_s is None
        self._at_s = seen.at_s
        share = seen.shares.get(self._canary, 0.0)
        if share != self._share:
            self._share, self._share_since_s = share, seen.at_s
        if first:
            return Look({}, self._received)
        requests = {label: new.get((label, "requests"), Counts()).total for label in seen.versions}
        attempts = new.get((self._canary, "attempts"), Counts()).total
        canary_new = requests.get(self._canary, 0)
        control_new = sum(requests.values()) - canary_new
        before = self._received
        self._received = Received(
            before.canary_attempts + attempts, before.canary_requests + canary_new,
            before.requests + canary_new + control_new,
        )  # fmt: skip
        strata = {
            objective.name: self._beside(
                objective.name, self._stratum(objective, seen, new, control_requests=control_new), seen
            )
            for objective in self._objectives.objectives
        }
        return Look(strata, self._received, canary_new, control_new, self._split(seen, new))

    def _new(self, seen: Observation) -> Mapping[tuple[str, str], Counts]:
        new = {}
        for label, version in seen.versions.items():
            for what, counts in _counters(self._objectives, version).items():
                known = self._last.get((label, what))
                new[label, what] = counts.since(known or Counts())
                self._last[label, what] = counts
        return new

    def _stratum(
        self, objective: Objective, seen: Observation, new: Mapping[tuple[str, str], Counts], *, control_requests: int
    ) -> Stratum:
        what = _counter(objective)
        canary, control = Counts(), Counts()
        beside = [label for label in seen.versions if label != self._canary]
        if objective.within_ms is not None and self._baseline is not None and seen.shares.get(self._baseline):
            beside = [self._baseline]  # as young as canary: what age changes hits both alike
        for label in beside:
            control += new.get((label, what), Counts())
        canary += new.get((self._canary, what), Counts())
        if what == "first attempts" and canary.total == 0:
            canary = self._lost(seen, control_requests)
        return Stratum(canary, control)

    def _beside(self, name: str, new: Stratum, seen: Observation) -> Stratum:
        """``new`` with what waited; nothing of canary's while that goes on to wait."""
        since_s, waited = self._waiting.pop(name, (seen.at_s, Counts()))
        canary = waited + new.canary
        alone = seen.shares.get(self._canary, 0.0) == 1
        if new.control.total or not canary.total or alone or seen.at_s - since_s >= BESIDE_S:
            return Stratum(canary, new.control)
        self._waiting[name] = since_s, canary
        return Stratum(Counts(), Counts())

    def _lost(self, seen: Observation, control_requests: int) -> Counts:
        """A canary with a share and no ready replica fails its share of the requests, whoever answered them instead.

        A gateway may give the share of a version that is not ready to another, silently: that is no missing data.
        """
        version, share = seen.versions.get(self._canary), seen.shares.get(self._canary, 0.0)
        if version is None or version.replicas == 0 or version.ready_replicas > 0 or not 0 < share < 1:
            return Counts()
        return Counts(0, round(control_requests * share))

    def _split(self, seen: Observation, new: Mapping[tuple[str, str], Counts]) -> Split | None:
        """Of shoppers, once all impressions that closed in this look were issued under one share."""
        total = sum(counts.total for (_, what), counts in new.items() if what == "shoppers")
        if total == 0:
            return None
        since_s, self._shoppers_at_s = self._shoppers_at_s, seen.at_s
        if seen.window_s is None or self._share is None or since_s is None or not 0 < self._share < 1:
            return None
        if since_s - seen.window_s < self._share_since_s:
            return None
        return Split(new.get((self._canary, "shoppers"), Counts()).total, total, self._share)


class Lately:
    """What canary did in about the last ten looks (exponentially weighted), held against the goals alone."""

    def __init__(self, objectives: Objectives) -> None:
        self._goals = {objective.name: objective.goal for objective in objectives.objectives}
        self._seen = dict.fromkeys(self._goals, (0.0, 0.0))

    def take(self, look: Look) -> None:
        for name, stratum in look.strata.items():
            bad, total = self._seen[name]
            counts = stratum.canary
            self._seen[name] = (bad * KEPT + counts.total - counts.good, total * KEPT + counts.total)

    def to_json(self) -> dict[str, list[float]]:
        return {name: list(seen) for name, seen in self._seen.items()}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Go on from what :meth:`to_json` gave. Raises KeyError, TypeError or ValueError on anything else."""
        if document.keys() != self._goals.keys():
            raise ValueError("looks at other objectives")
        self._seen = {str(name): (float(bad), float(total)) for name, (bad, total) in document.items()}

    @property
    def troubled(self) -> str | None:
        """Which goal is missed by more than chance explains (five standard deviations and two events)."""
        for name, (bad, total) in self._seen.items():
            due = (1 - self._goals[name]) * total
            if bad > due + TROUBLE_DEVIATIONS * math.sqrt(due) + TROUBLE_EVENTS:
                return f"{name} is {1 - bad / total:.1%} of late, its goal {self._goals[name]:.4g}"
        return None


def _counter(objective: Objective) -> str:
    if objective.good is Good.COUNTED:
        return f"measured {objective.name}"
    if objective.good is Good.CLICKED:
        return "shoppers"
    return "first attempts" if objective.within_ms is None else f"within {objective.within_ms}"


def _counters(objectives: Objectives, version: VersionObservation) -> dict[str, Counts]:
    found = {
        "attempts": version.attempts, "first attempts": version.first_attempts, "requests": version.requests,
        "shoppers": version.shoppers,
    }  # fmt: skip
    found |= {f"within {ms}": counts for ms, counts in version.within_ms.items()}
    found |= {f"measured {name}": counts for name, counts in version.measured.items()}
    wanted = {"attempts", "requests", "shoppers"} | {_counter(objective) for objective in objectives.objectives}
    return {what: counts for what, counts in found.items() if what in wanted}


def shadow_strata(objectives: Objectives, before: ShadowObservation | None,
                  now: ShadowObservation) -> Mapping[str, Stratum]:  # fmt: skip
    """What the shadow's answers add to the objectives that they can tell of; there is no control."""
    strata = {}
    for objective in objectives.objectives:
        if objective.good is not Good.ANSWERED:
            continue
        counts = _shadow_counts(objective, now)
        known = Counts() if before is None else _shadow_counts(objective, before)
        strata[objective.name] = Stratum(counts.since(known), Counts())
    return strata


def _shadow_counts(objective: Objective, seen: ShadowObservation) -> Counts:
    return seen.answered if objective.within_ms is None else seen.within_ms.get(objective.within_ms, Counts())


def _pair(counts: Counts) -> list[int]:
    return [counts.good, counts.total]


def _counts(pair: Sequence[int]) -> Counts:
    good, total = pair
    return Counts(int(good), int(total))


def _maybe(value: Any) -> float | None:
    return None if value is None else float(value)


def observation_to_json(seen: Observation) -> dict[str, Any]:
    """A raw look as it is kept in looks.jsonl: cumulative counts as [good, total]."""
    shadow = seen.shadow
    return {
        "at_s": seen.at_s,
        "shares": dict(seen.shares),
        "outcomes": _pair(seen.outcomes),
        "window_s": seen.window_s,
        "versions": {
            label: {
                "attempts": _pair(v.attempts),
                "first_attempts": _pair(v.first_attempts),
                "within_ms": {str(ms): _pair(c) for ms, c in v.within_ms.items()},
                "requests": _pair(v.requests),
                "impressions": _pair(v.impressions),
                "impressions_open": v.impressions_open,
                "shoppers": _pair(v.shoppers),
                "measured": {name: _pair(c) for name, c in v.measured.items()},
                "ready_replicas": v.ready_replicas,
                "replicas": v.replicas,
            }
            for label, v in seen.versions.items()
        },
        "shadow": None if shadow is None else shadow_to_json(shadow),
    }


def shadow_to_json(shadow: ShadowObservation) -> dict[str, Any]:
    return {
        "version": shadow.version, "answered": _pair(shadow.answered),
        "within_ms": {str(ms): _pair(c) for ms, c in shadow.within_ms.items()},
        "pairs": shadow.pairs, "overlap": shadow.overlap, "score_drift": shadow.score_drift,
    }  # fmt: skip


def shadow_from_json(document: Mapping[str, Any]) -> ShadowObservation:
    """The inverse of :func:`shadow_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    return ShadowObservation(
        str(document["version"]), _counts(document["answered"]),
        {int(ms): _counts(c) for ms, c in document["within_ms"].items()},
        int(document["pairs"]), float(document["overlap"]), float(document["score_drift"]),
    )  # fmt: skip


def observation_from_json(document: Mapping[str, Any]) -> Observation:
    """The inverse of :func:`observation_to_json`. Raises KeyError, TypeError or ValueError on anything else."""
    window, shadow = document["window_s"], document["shadow"]
    return Observation(
        at_s=float(document["at_s"]),
        shares={str(k): float(v) for k, v in document["shares"].items()},
        outcomes=Counts(*document["outcomes"]),
        window_s=None if window is None else float(window),
        versions={
            str(label): VersionObservation(
                attempts=Counts(*v["attempts"]),
                first_attempts=Counts(*v["first_attempts"]),
                within_ms={int(ms): Counts(*c) for ms, c in v["within_ms"].items()},
                requests=Counts(*v["requests"]),
                impressions=Counts(*v["impressions"]),
                impressions_open=int(v["impressions_open"]),
                shoppers=Counts(*v["shoppers"]),
                measured={str(name): Counts(*c) for name, c in v["measured"].items()},
                ready_replicas=int(v["ready_replicas"]),
                replicas=int(v["replicas"]),
            )
            for label, v in document["versions"].items()
        },
        shadow=None if shadow is None else shadow_from_json(shadow),
    )
