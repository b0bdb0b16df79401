"""A stand-in for a target, in memory or in a file, so that hours of rollout take milliseconds.

No kinder than a real one: older tokens are refused, traffic without capacity too, a version with traffic is not
retired, impressions close a window after they were issued, and any call can be cut off before or after its effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from endcap.errors import CapacityError, FencedError, TargetError
from endcap.evidence import Counts
from endcap.objectives import Good, Objective, Objectives
from serving.rollout.spec import RolloutSpec, Step
from serving.targets.base import ModelVersion, Observation, ShadowObservation, StickyKey, VersionObservation

__all__ = ["CANARY", "OBJECTIVES", "SPEC", "Behaviour", "Killed", "SimulatedClock", "SimulatedTarget"]

WINDOW_S = 5.0
OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.95, Good.ANSWERED, 100, None, 0.05, None),
        Objective("click-through", 0.05, Good.CLICKED, None, WINDOW_S, None, 0.2),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "shop", "shop", "models:/shop/2", "shop",
    tuple(Step(share, 100, 5, 120) for share in (0.05, 0.25, 0.5, 1.0)), 0.05, 0.05, 1.0,
)  # fmt: skip
CANARY = ModelVersion("2", Path("two"))


class Killed(BaseException):
    """The process dies here (not an Exception: nothing may catch it)."""


@dataclass
class Behaviour:
    """Of one version: the share of attempts answered, of answers in time, of shoppers who click."""

    answered: float = 1.0
    fast: float = 1.0
    clicked: float = 0.08


class SimulatedClock:
    def __init__(self, now_s: float = 1_000.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def wait(self, seconds: float) -> None:
        self._now_s += seconds


@dataclass
class _Served:
    """Cumulative sums of one version, whole events being taken from them only when they are looked at."""

    attempts: float = 0.0
    answered: float = 0.0
    fast: float = 0.0
    shoppers: float = 0.0
    clicked: float = 0.0


@dataclass
class SimulatedTarget:
    """Counts grow by exact shares. ``rate``: requests a second, each by a shopper of its own."""

    behaviours: Mapping[str, Behaviour]
    clock: SimulatedClock
    rate: float = 200.0
    shares: dict[str, float] = field(default_factory=lambda: {"1": 1.0})
    capacity: set[str] = field(default_factory=lambda: {"1"})
    served: dict[str, _Served] = field(default_factory=dict)
    followed: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """What versions receive of the shares that were set; None: just those."""
    shoppers_follow: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    unready: frozenset[str] = frozenset()
    """Versions that have no ready replica: others get their requests, silently."""
    sticky: StickyKey | None = None
    shadow: tuple[str, float] | None = None
    shadow_overlap: float = 0.9
    mirrored: float = 0.0
    token: int = 0
    calls: int = 0
    die_at: tuple[int, str] | None = None
    refuse: Exception | None = None
    refuse_from_share: float = 0.0
    short_of_stable: bool = False
    away_at: range = range(0)
    """Calls, by number, that find nobody."""
    log: list[str] = field(default_factory=list)
    """What was done, in order."""
    _taken_s: float = -1.0
    _pending: list[tuple[float, str, float]] = field(default_factory=list)
    """Impressions whose window is open: when issued, of which version, how many shoppers."""

    def __post_init__(self) -> None:
        self._taken_s = self.clock.now_s()

    def _call(self, when: str) -> None:
        if when == "before":
            self.calls += 1
        if self.die_at == (self.calls, when):
            raise Killed
        if self.calls in self.away_at:
            raise TargetError("the target does not answer")

    def _fence(self, token: int) -> None:
        if token < self.token:
            raise FencedError("another engine has taken over")

    def acquire(self, holder: str) -> int:
        self.token += 1
        return self.token

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        self._call("before")
        self._fence(token)
        if self.refuse and any(v == CANARY and share >= self.refuse_from_share for v, share in shares.items()):
            raise self.refuse
        if self.short_of_stable and {version.label for version in shares} == {"1"}:
            raise CapacityError("a zone is lost")
        self.capacity |= {version.label for version in shares}
        self.log.append(f"capacity {' '.join(version.label for version in shares)}")
        self._call("after")

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        self._call("before")
        self._fence(token)
        self._serve()
        assert abs(sum(shares.values()) - 1) < 1e-9
        assert {version.label for version in shares} <= self.capacity, "traffic without capacity"
        self.shares = {version.label: share for version, share in shares.items()}
        self.sticky = sticky
        self.log.append("shares " + " ".join(f"{label}={share:g}" for label, share in self.shares.items()))
        self._call("after")

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        self._call("before")
        self._fence(token)
        self._serve()
        assert version is None or version.label in self.capacity, "a shadow without capacity"
        self.shadow = None if version is None else (version.label, share)
        self.log.append("shadow off" if version is None else f"shadow {version.label}={share:g}")
        self._call("after")

    def retire(self, label: str, *, token: int) -> None:
        self._call("before")
        self._fence(token)
        assert not self.shares.get(label), "a version with traffic was retired"
        assert self.shadow is None or self.shadow[0] != label, "a shadow was retired"
        self.capacity.discard(label)
        self.log.append(f"retire {label}")
        self._call("after")

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        self._call("before")
        self._serve()
        self._call("after")
        return Observation(
            self.clock.now_s(), dict(self.shares),
            {label: self._observed(label) for label in sorted(self.served.keys() | self.capacity)},
            window_s=WINDOW_S, shadow=self._shadowed(),
        )  # fmt: skip

    def _behaviour(self, label: str) -> Behaviour:
        return self.behaviours[label.removesuffix("-baseline")]

    def _serve(self) -> None:
        """Bring all counts up to now."""
        now_s = self.clock.now_s()
        requests, self._taken_s = self.rate * (now_s - self._taken_s), now_s
        received = dict(self.followed(self.shares) if self.followed else self.shares)
        for label in self.unready & received.keys():
            lost = received.pop(label)
            received["1"] = received.get("1", 0.0) + lost
        shoppers = self.shoppers_follow(self.shares) if self.shoppers_follow else received
        for label, share in received.items():
            behaviour, served = self._behaviour(label), self.served.setdefault(label, _Served())
            served.attempts += requests * share
            served.answered += requests * share * behaviour.answered
            served.fast += requests * share * behaviour.answered * behaviour.fast
            new = requests * shoppers.get(label, 0.0) * behaviour.answered
            if new > 0:
                self._pending.append((now_s, label, new))
        if self.shadow is not None:
            self.mirrored += requests * self.shadow[1]
        closed = [impression for impression in self._pending if impression[0] + WINDOW_S <= now_s]
        self._pending = [impression for impression in self._pending if impression[0] + WINDOW_S > now_s]
        for _, label, number in closed:
            self.served[label].shoppers += number
            self.served[label].clicked += number * self._behaviour(label).clicked

    def _observed(self, label: str) -> VersionObservation:
        served = self.served.get(label, _Served())
        answered = int(served.answered)
        shoppers = Counts(int(served.clicked), int(served.shoppers))
        ready = 0 if label in self.unready else 2
        return VersionObservation(
            attempts=Counts(answered, int(served.attempts)), first_attempts=Counts(answered, int(served.attempts)),
            within_ms={100: Counts(int(served.fast), answered)},
            requests=Counts(int(served.attempts), int(served.attempts)), impressions=shoppers, shoppers=shoppers,
            ready_replicas=ready if label in self.capacity else 0, replicas=2 if label in self.capacity else 0,
        )  # fmt: skip

    def _shadowed(self) -> ShadowObservation | None:
        if self.shadow is None:
            return None
        behaviour, mirrored = self._behaviour(self.shadow[0]), int(self.mirrored)
        answered = int(mirrored * behaviour.answered)
        return ShadowObservation(
            self.shadow[0], Counts(answered, mirrored), {100: Counts(int(answered * behaviour.fast), answered)},
            answered, self.shadow_overlap, 0.0,
        )  # fmt: skip
