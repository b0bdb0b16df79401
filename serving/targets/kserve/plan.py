"""What the InferenceService has to say next, from what is wanted and what is there. Pure.

KServe's arithmetic (Standard mode), which every plan here reckons with:

- canaries have as many replicas as they say, at most as many as stable's ``minReplicas``;
- a canary is *ready* with one available pod, and then **all** its replicas are subtracted from stable's
  ``minReplicas`` (never below 1): stable shrinks by pods that may not be there yet;
- the share of a canary that is not ready goes back to stable, and nothing says so;
- shares are whole percents.

So a version gets one pod first; the rest are asked for once it is ready, in the same write that raises stable's
``minReplicas`` by as many: what is left to stable is then what it is to have, at every moment. A canary that cannot
start costs stable nothing but one pod too many for a while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from endcap.errors import InputError, TargetError

__all__ = [
    "Canary", "Predictor", "Rest", "Sizing", "Spec", "There", "Workload", "begin_rest", "grow", "needs", "percents",
    "promote", "retire", "share_out", "short_of",
]  # fmt: skip

_LEAST_PERCENT = 1
_ROUNDED_BY = 0.1
"""A share may be rounded to a whole percent by this part of itself."""


@dataclass(frozen=True, slots=True)
class Predictor:
    """One version as a predictor. ``labelled``: its pods carry its version as a label.

    ``sha256``: what its pods say of the package's digest; None: nothing (a canary then says "none": it would else
    say what stable says).
    """

    label: str
    name: str
    storage_uri: str | None = None
    runtime: str | None = None
    labelled: bool = True
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    predictor: Predictor
    replicas: int
    percent: int


@dataclass(frozen=True, slots=True)
class Spec:
    """The fields of an InferenceService that are ours. ``min_replicas``: None is KServe's 1; likewise no maximum."""

    stable: Predictor
    min_replicas: int | None = None
    max_replicas: int | None = None
    canaries: tuple[Canary, ...] = ()

    def canary(self, label: str) -> Canary | None:
        return next((canary for canary in self.canaries if canary.predictor.label == label), None)

    @property
    def percents(self) -> dict[str, int]:
        """What is set, by version, summing to 100: canaries first, as the engine lists them."""
        given = {canary.predictor.label: canary.percent for canary in self.canaries}
        return {**given, self.stable.label: 100 - sum(given.values())}

    @property
    def reserved(self) -> int:
        """Replicas of all canaries."""
        return sum(canary.replicas for canary in self.canaries)


@dataclass(frozen=True, slots=True)
class Workload:
    """One Deployment. ``available``: of the newest template; 0 until the controllers have seen the newest wish.
    ``serving``: available ones of whatever template."""

    wanted: int
    available: int
    serving: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """Stable as it was before the rollout: what it goes back to. ``running``: replicas then (an HPA's choice)."""

    min_replicas: int | None
    max_replicas: int | None
    running: int


@dataclass(frozen=True, slots=True)
class Sizing:
    """How many replicas a share needs. ``keep_stable``: stable keeps all it had, so that the way back is open at once;
    else it shrinks with its share (where every replica holds a GPU), and the way back has to wait for its pods."""

    keep_stable: bool = True


@dataclass(frozen=True, slots=True)
class There:
    """What is on the cluster. ``workloads`` and ``ready`` by version label; ``rest``: None while no rollout runs."""

    spec: Spec
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    ready: frozenset[str] = frozenset()
    """Canaries that KServe holds for ready."""
    rest: Rest | None = None

    def running(self, label: str) -> int:
        return self.workloads[label].wanted if label in self.workloads else 0

    def available(self, label: str) -> int:
        return self.workloads[label].available if label in self.workloads else 0


def percents(shares: Mapping[str, float], stable: str) -> dict[str, int]:
    """Whole percents of the canaries; ``stable`` gets what is left.

    Raises:
        InputError: the shares do not sum to 1, or a share is no whole percent, not even nearly.
    """
    if any(not 0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError("shares are parts of 1 and sum to 1")
    given: dict[str, int] = {}
    for label, share in shares.items():
        if label == stable:
            continue
        percent = max(_LEAST_PERCENT, round(share * 100)) if share > 0 else 0
        if abs(percent - share * 100) > _ROUNDED_BY * share * 100 + 1e-9:
            raise InputError(f"version {label} is to get {share * 100:g} % of the requests, and KServe splits them by "
                             "whole percents", next_step="choose steps of whole percents")  # fmt: skip
        given[label] = percent
    left = 100 - sum(given.values())
    if left < 0 or (stable not in shares and left > 0) or (shares.get(stable, 0) > 0 and left == 0):
        raise InputError(f"whole percents of these shares do not sum to 100: {given}",
                         next_step="choose steps of whole percents")  # fmt: skip
    return {**given, stable: left}


def begin_rest(there: There) -> Rest:
    """What to go back to, taken before the first write of a rollout."""
    stable = there.spec
    return Rest(stable.min_replicas, stable.max_replicas, max(1, there.running(stable.stable.label)))


def whole(there: There) -> int:
    """Replicas that all the traffic needs.

    What ran before, or was asked for; more where an autoscaler has since given stable more than the least it was told
    to: then it is stable's replicas that say how much its share needs.
    """
    rest = there.rest or begin_rest(there)
    before = max(1, rest.min_replicas or 1, rest.running)
    share = there.spec.percents[there.spec.stable.label] / 100
    running = there.running(there.spec.stable.label)
    least = _left_to_stable(there.spec, there.ready)
    if share > 0 and running > max(before, least):
        return math.ceil(running / share - 1e-9)
    return before


def needs(there: There, shares: Mapping[str, float], sizing: Sizing) -> dict[str, int]:
    """Replicas by version that these shares need; a version without a share needs none."""
    total = whole(there)
    found: dict[str, int] = {}
    for label, share in shares.items():
        if share > 0:
            found[label] = max(1, math.ceil(share * total - 1e-9))
    if sizing.keep_stable and there.spec.stable.label in found:
        found[there.spec.stable.label] = total
    return found


def _left_to_stable(spec: Spec, ready: frozenset[str]) -> int:
    """What KServe makes of stable's ``minReplicas``."""
    least = 1 if spec.min_replicas is None else spec.min_replicas
    subtracted = sum(canary.replicas for canary in spec.canaries if canary.predictor.label in ready)
    if not subtracted or spec.min_replicas is None:
        return max(1, least)
    return max(least - subtracted, 1)


def _sized(spec: Spec, rest: Rest, stable: int) -> Spec:
    """``spec`` with a minimum that leaves ``stable`` replicas when all canaries are ready."""
    if not spec.canaries:
        return replace(spec, min_replicas=rest.min_replicas, max_replicas=rest.max_replicas)
    least = stable + spec.reserved
    most = None if rest.max_replicas is None else max(rest.max_replicas, least)
    return replace(spec, min_replicas=least, max_replicas=most)


def _kept_for_stable(spec: Spec, rest: Rest) -> int:
    """What stable is to have now."""
    if not spec.canaries:
        return max(1, rest.min_replicas or 1)
    return max(1, (spec.min_replicas or 1) - spec.reserved)


def grow(there: There, versions: Mapping[str, Predictor], needed: Mapping[str, int]) -> Spec:
    """The next wish on the way to ``needed`` replicas; equal to what is there when nothing more is to be asked for.

    It only ever adds: shares stay as they are. Asked again after each change that KServe has taken up.
    """
    spec, rest = there.spec, there.rest or begin_rest(there)
    stable = max(_kept_for_stable(spec, rest), needed.get(spec.stable.label, 0))
    canaries = []
    for canary in spec.canaries:
        label = canary.predictor.label
        ready = label in there.ready and there.available(label) > 0
        more = max(canary.replicas, needed.get(label, 0)) if ready else canary.replicas
        if needed.get(label, 0) > 0:
            more = max(1, more)
        canaries.append(replace(canary, replicas=more))
    for label, count in needed.items():
        if count > 0 and label != spec.stable.label and spec.canary(label) is None:
            canaries.append(Canary(versions[label], 1, 0))
    grown = replace(spec, canaries=tuple(canaries))
    if not grown.canaries:  # a way back without a canary: nothing to reckon with but stable itself
        least = max(stable, needed.get(spec.stable.label, 0))
        if rest.min_replicas is not None and least > rest.min_replicas:
            most = None if rest.max_replicas is None else max(rest.max_replicas, least)
            return replace(grown, min_replicas=least, max_replicas=most)
        return grown
    return _sized(grown, rest, stable)


def short_of(there: There, needed: Mapping[str, int]) -> dict[str, int]:
    """By version, how many available replicas are missing."""
    return {label: count - there.available(label) for label, count in needed.items() if there.available(label) < count}


def share_out(there: There, given: Mapping[str, int], sizing: Sizing, *, trim: bool) -> Spec:
    """The wish that puts ``given`` percents in force. Canaries that are not named get nothing.

    ``trim``: the traffic has moved, so stable may shrink to what its share needs (where it is not to be kept).

    Raises:
        TargetError: a version is no predictor yet.
    """
    spec = there.spec
    for label, percent in given.items():
        if percent > 0 and label != spec.stable.label and spec.canary(label) is None:
            raise TargetError(f"version {label} is no predictor of this service", next_step="ensure its capacity first")
    canaries = tuple(replace(canary, percent=given.get(canary.predictor.label, 0)) for canary in spec.canaries)
    shared = replace(spec, canaries=canaries)
    if trim and not sizing.keep_stable and canaries and there.rest is not None:
        share = given.get(spec.stable.label, 0) / 100
        return _sized(shared, there.rest, max(1, math.ceil(share * whole(there) - 1e-9)))
    return shared


def retire(there: There, label: str) -> Spec:
    """Without the canary ``label``; stable is what it was before once no canary is left.

    Raises:
        TargetError: it has a share.
    """
    spec = there.spec
    canary = spec.canary(label)
    if canary is None:
        return spec
    if canary.percent > 0:
        raise TargetError(f"version {label} still has a share", next_step="give its share to another first")
    stable = _kept_for_stable(spec, there.rest or begin_rest(there))
    left = replace(spec, canaries=tuple(one for one in spec.canaries if one is not canary))
    return _sized(left, there.rest or begin_rest(there), stable)


def promote(there: There) -> Spec:
    """The canary that has all the traffic becomes the stable predictor: same name, so no pod restarts.

    Raises:
        TargetError: no canary has all of it, or it has no replica.
    """
    spec, rest = there.spec, there.rest or begin_rest(there)
    canary = next((one for one in spec.canaries if one.percent == 100), None)
    if canary is None:
        raise TargetError(f"version {spec.stable.label} still has a share", next_step="give its share to another first")
    label = canary.predictor.label
    if there.available(label) < 1:
        raise TargetError(f"version {label} has no replica available", next_step="wait for one: version "
                          f"{spec.stable.label} is the way back as long as it is there")  # fmt: skip
    left = Spec(canary.predictor, spec.min_replicas, spec.max_replicas,
                tuple(one for one in spec.canaries if one is not canary))  # fmt: skip
    return _sized(left, rest, canary.replicas)
