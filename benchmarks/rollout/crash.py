"""The engine killed at every write and at every call to its target, one run a point, and run again to its end.

The engine runs in a child process and kills itself with SIGKILL at the n-th point: before, in the middle of and after
every line it appends, around every sync and every rename, and before and after the effect of every call to the target.
Then a second child goes on with the folder. Nothing is sampled.

The target here is a stand-in that outlives the engine in a file of its own; it refuses what a real one refuses (older
tokens, traffic without capacity, retiring what has traffic). Kills of engines over real targets are in tests/local.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from endcap.errors import FencedError, TargetError
from endcap.evidence import Counts
from endcap.files import JsonLines, read_json_lines
from endcap.objectives import Good, Objective, Objectives
from serving.rollout import store
from serving.rollout.audit import replay
from serving.rollout.engine import run_rollout
from serving.rollout.spec import RolloutSpec, ShadowSpec, Step
from serving.rollout.store import load_state
from serving.targets.base import ModelVersion, Observation, ShadowObservation, StickyKey, VersionObservation

__all__ = ["SCENARIOS", "CrashResult", "Scenario", "crash_points"]

WINDOW_S = 2.0
RATE = 4000.0
OBJECTIVES = Objectives(
    "shop", "shop",
    (
        Objective("availability", 0.99, Good.ANSWERED, None, None, 0.02, None),
        Objective("click-through", 0.05, Good.CLICKED, None, WINDOW_S, None, 0.3),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "shop", "shop", "models:/shop/2", "shop", (Step(0.2, 50, 2, 60), Step(0.5, 50, 1, 60), Step(1.0, 50, 0, 60)),
    0.01, 0.05, 1.0, hold_s=5.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """``clicked``: canary's share of shoppers who click (stable's is 0.1). ``asks``: commands by time since start.

    ``sight_every``: after how many looks what they come to is kept; the engine's own number is never reached here.
    """

    name: str
    expected: str
    clicked: float = 0.1
    spec: RolloutSpec = SPEC
    asks: Mapping[float, str] = field(default_factory=dict)
    sight_every: int | None = None


SCENARIOS = (
    Scenario("promoted", "promoted"),
    Scenario("rolled back", "rolled_back", clicked=0.02),
    Scenario("held", "held", spec=replace(SPEC, steps=(Step(0.2, 10**9, 1, 4), Step(1.0, 50, 0, 60)))),
    Scenario(
        "shadow, baseline, paused", "promoted",
        spec=replace(SPEC, shadow=ShadowSpec(0.1, 200, 30, None), baseline=True, sticky=StickyKey(header="shopper")),
        asks={4.0: "pause", 7.0: "resume"},
    ),
    Scenario("aborted", "aborted", asks={3.0: "abort"}),
    Scenario("rolled back, looks folded", "rolled_back", clicked=0.02, sight_every=2),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CrashResult:
    """``wrong``: the points at which a run did not end as it had to, with what it came to."""

    tried: int
    wrong: tuple[str, ...]

    @property
    def right(self) -> int:
        return self.tried - len(self.wrong)


def crash_points(folder: Path, scenarios: tuple[Scenario, ...] = SCENARIOS) -> CrashResult:
    """Enumerate all points of all ``scenarios``. ``folder`` must be empty; runs that went right leave nothing in it."""
    tried, wrong = 0, []
    for scenario in scenarios:
        whole = folder / scenario.name.replace(" ", "-").replace(",", "")
        points = _points(scenario, whole)
        for point in range(1, points + 1):
            home = folder / f"{whole.name}-{point}"
            problem = _killed_and_resumed(scenario, home, point)
            tried += 1
            if problem is None:
                _remove(home)
            else:
                wrong.append(f"{scenario.name}, point {point}: {problem}")
    return CrashResult(tried, tuple(wrong))


def _points(scenario: Scenario, home: Path) -> int:
    """How many points a whole run has; it must itself end as expected."""
    code = _in_child(lambda: _life(scenario, home, die_at=None))
    problem = f"the child ended with {code}" if code else _judge(scenario, home)
    if problem is not None:
        raise AssertionError(f"{scenario.name}: {problem}")
    return int((home / "points").read_text())


def _killed_and_resumed(scenario: Scenario, home: Path, point: int) -> str | None:
    code = _in_child(lambda: _life(scenario, home, die_at=point))
    if code != -signal.SIGKILL:
        return f"the first child ended with {code}, not by its kill"
    code = _in_child(lambda: _life(scenario, home, die_at=None))
    return f"the second child ended with {code}" if code else _judge(scenario, home)


def _judge(scenario: Scenario, home: Path) -> str | None:
    state, target = load_state(home / "rollout"), _World.load(home)
    if state is None or not state.ended:
        return "the rollout did not end"
    if state.outcome != scenario.expected:
        return f"{state.outcome}: {state.reason}"
    served = "2" if scenario.expected == "promoted" else "1"
    if target.shares != {served: 1.0} or set(target.capacity) != {served} or target.shadow is not None:
        return f"shares {target.shares}, capacity {target.capacity}, shadow {target.shadow}"
    log = home / "rollout" / "decisions.jsonl"
    if replay(scenario.spec, read_json_lines(log), where=log) != state:
        return "the audit log leads to another state"
    return None


def _in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001 - the child must not go on as a second parent
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


# ---- in the child ------------------------------------------------------------------------------------


class _Killer:
    """Counts the points that are passed, and dies at the given one."""

    def __init__(self, die_at: int | None) -> None:
        self.passed, self._die_at = 0, die_at

    def due(self) -> bool:
        self.passed += 1
        return self.passed == self._die_at

    def point(self) -> None:
        if self.due():
            os.kill(os.getpid(), signal.SIGKILL)


def _life(scenario: Scenario, home: Path, *, die_at: int | None) -> None:
    """One life of an engine: from wherever it stands, to its end or its death."""
    killer = _Killer(die_at)
    world = _World.load(home)
    _watch_writes(killer)
    if scenario.sight_every is not None:
        store.SIGHT_EVERY = scenario.sight_every
    target = _Target(world, killer, scenario)
    run_rollout(
        scenario.spec, OBJECTIVES, ModelVersion("2", Path("two")), target, home / "rollout",
        packages={"1": Path("one")}, clock=_Clock(world, scenario, home / "rollout"),
    )  # fmt: skip
    (home / "points").write_text(str(killer.passed))


def _watch_writes(killer: _Killer) -> None:
    """Put points around everything that reaches the disk through :mod:`endcap.files`. Only ever in a child."""
    append, fsync, rename = JsonLines.append, os.fsync, Path.replace

    def appended(lines: JsonLines, record: Mapping[str, Any], *, sync: bool | None = None) -> None:
        killer.point()
        if killer.due():
            whole = json.dumps(record, separators=(",", ":")).encode()
            with lines.path.open("ab", buffering=0) as file:
                file.write(whole[: len(whole) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(lines, record, sync=sync)
        killer.point()

    def synced(handle: int) -> None:
        killer.point()
        fsync(handle)
        killer.point()

    def renamed(path: Path, other: Path) -> Path:
        killer.point()
        result = rename(path, other)
        killer.point()
        return result

    JsonLines.append = appended  # type: ignore[method-assign, assignment]
    os.fsync = synced  # type: ignore[assignment]
    Path.replace = renamed  # type: ignore[method-assign, assignment]


_rename = os.rename
"""The world's own writes are no points of the engine's."""


@dataclass
class _World:
    """What outlives the engine: the target's state and the time."""

    home: Path
    now_s: float = 1000.0
    taken_s: float = 1000.0
    token: int = 0
    shares: dict[str, float] = field(default_factory=lambda: {"1": 1.0})
    capacity: list[str] = field(default_factory=lambda: ["1"])
    shadow: list[Any] | None = None
    served: dict[str, float] = field(default_factory=dict)
    mirrored: float = 0.0
    asked: int = 0

    @staticmethod
    def load(home: Path) -> _World:
        path = home / "world.json"
        home.mkdir(exist_ok=True)
        return _World(home, **json.loads(path.read_text())) if path.exists() else _World(home)

    def save(self) -> None:
        kept = {name: value for name, value in vars(self).items() if name != "home"}
        scratch = self.home / "world.new"
        scratch.write_text(json.dumps(kept))
        _rename(scratch, self.home / "world.json")


class _Clock:
    """Time that passes only while the engine waits; at their hours people ask for something."""

    def __init__(self, world: _World, scenario: Scenario, folder: Path) -> None:
        self._world, self._asks, self._folder = world, sorted(scenario.asks.items()), folder

    def now_s(self) -> float:
        return self._world.now_s

    def wait(self, seconds: float) -> None:
        world = self._world
        world.now_s += seconds
        for after_s, command in self._asks[world.asked :]:
            if world.now_s >= 1000.0 + after_s:
                world.asked += 1
                world.save()
                with (self._folder / "commands.jsonl").open("a") as file:
                    file.write(json.dumps({"command": command, "by": "someone"}) + "\n")
        world.save()


class _Target:
    """Counts grow by exact shares with the time that passed. Points before and after the effect of every call."""

    def __init__(self, world: _World, killer: _Killer, scenario: Scenario) -> None:
        self._world, self._killer = world, killer
        self._clicked = {"1": 0.1, "1-baseline": 0.1, "2": scenario.clicked}

    def _fence(self, token: int) -> None:
        if token != self._world.token:
            raise FencedError("another engine has taken over")

    def _done(self) -> None:
        self._world.save()
        self._killer.point()

    def acquire(self, holder: str) -> int:
        self._killer.point()
        self._world.token += 1
        self._done()
        return self._world.token

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        self._killer.point()
        self._fence(token)
        self._world.capacity = sorted({*self._world.capacity, *(version.label for version in shares)})
        self._done()

    def set_shares(
        self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None
    ) -> None:  # fmt: skip
        self._killer.point()
        self._fence(token)
        self._serve()
        given = {version.label: share for version, share in shares.items()}
        if abs(sum(given.values()) - 1) > 1e-9 or not given.keys() <= set(self._world.capacity):
            raise TargetError(f"shares {given} with capacity for {self._world.capacity}")
        self._world.shares = given
        self._done()

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        self._killer.point()
        self._fence(token)
        self._serve()
        self._world.shadow = None if version is None else [version.label, share]
        self._done()

    def retire(self, label: str, *, token: int) -> None:
        self._killer.point()
        self._fence(token)
        if self._world.shares.get(label) or (self._world.shadow and self._world.shadow[0] == label):
            raise TargetError(f"version {label} has traffic")
        self._world.capacity = [other for other in self._world.capacity if other != label]
        self._done()

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        self._killer.point()
        self._serve()
        self._done()
        world = self._world
        versions = {}
        for label in sorted(world.served.keys() | set(world.capacity)):
            n = int(world.served.get(label, 0.0))
            shoppers = Counts(int(n * self._clicked[label]), n)
            ready = 2 if label in world.capacity else 0
            versions[label] = VersionObservation(
                attempts=Counts(n, n), first_attempts=Counts(n, n), requests=Counts(n, n), impressions=shoppers,
                shoppers=shoppers, ready_replicas=ready, replicas=ready,
            )  # fmt: skip
        copied = int(world.mirrored)
        shadow = ShadowObservation(world.shadow[0], Counts(copied, copied), {}, copied, 0.9) if world.shadow else None
        return Observation(world.now_s, dict(world.shares), versions, window_s=WINDOW_S, shadow=shadow)

    def _serve(self) -> None:
        world = self._world
        requests, world.taken_s = RATE * (world.now_s - world.taken_s), world.now_s
        for label, share in world.shares.items():
            world.served[label] = world.served.get(label, 0.0) + requests * share
        if world.shadow is not None:
            world.mirrored += requests * world.shadow[1]
