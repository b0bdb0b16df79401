"""``python -m benchmarks.rollout.local``: rollouts in a row on a real target, under a load that never ends.

Real Envoy, model servers and feedback collector, and an open-loop load of held-out shoppers who click what they bought
next. What has to become of each candidate is fixed before the first rollout. Each rollout has the checks that need no
recorded requests (the package verifies): the quality gates would refuse the worse candidates before any traffic, and
here live traffic has to find them.

**Failed requests by the engine's doing.** A request has failed when the client got no answer (status 0), a server
error or a refusal for load. Looked at are all requests that were meant to be sent from a rollout's start until a
second after its end. In a rollout of a candidate that neither fails nor stalls (promoted, refused, or
rolled back for its clicks) every one of them counts. In one of a candidate that does, a failed request counts unless
that candidate was asked for it (Envoy's log of attempts says so) or had a share at any moment between the request's
sending and its end (the target's log of shares says so): a version that stalls takes processors from its neighbours.
Those are reported apart, ``candidate_failures``.

``local.json`` is written after each rollout. Killed, the benchmark leaves its target running, and the same command goes
on with the rollout that was under way; where the target is gone it starts anew. A target that nobody goes on with is
ended by ``endcap serve down --target DIR/local/target``.
"""

from __future__ import annotations

import argparse
import os
import platform
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from benchmarks.command import ending
from benchmarks.rollout.local_figures import (
    Failures,
    failing_objectives,
    is_right,
    samples,
    share_spans,
    shares_seen,
    whose_failures,
)
from benchmarks.rollout.local_packages import STABLE, Kind, Prepared, plan, prepare
from endcap.errors import EndcapError, InputError, OutcomeError, StateError, TargetError
from endcap.files import FolderLock, read_json, read_json_lines, write_json
from endcap.objectives import Good, Objective, Objectives
from endcap.records import ATTEMPTS_FILE, RequestRecord, read_target_events
from loadtests.client import SHOPPER_HEADER
from loadtests.run import LoadConfig, LoadProcess, start_load
from serving.gates import GateSettings, run_gates
from serving.gateway import Tail, cluster_name
from serving.rollout.engine import RolloutResult, run_rollout
from serving.rollout.events import Gated
from serving.rollout.spec import RolloutSpec, Step
from serving.rollout.store import DECISIONS_FILE, load_state
from serving.targets import LocalTarget, ModelVersion, StableVersion, StickyKey, SupervisorConfig, start_local_target
from serving.targets.local import open_target

__all__ = ["LocalResult", "local_rollouts", "main"]

ROLLOUTS = 20
RATE_RPS = 200.0
K = 100
"""Items an answer has: on Beauty every fifth shopper's next purchase is among them."""
SEED = 20_261_122
LATE_MS = 250
WINDOW_S = 3.0
TIMEOUT_S = 3.0
_LOAD_WAIT_S = 60.0
_FILE = "local.json"

OBJECTIVES = Objectives(
    "recommender", "recommender",
    (
        Objective("availability", 0.99, Good.ANSWERED, None, None, 0.01, None),
        Objective("latency", 0.9, Good.ANSWERED, LATE_MS, None, 0.05, None),
        Objective("click-through", 0.05, Good.CLICKED, None, WINDOW_S, None, 0.1),
    ),
)  # fmt: skip
SPEC = RolloutSpec(
    "recommender", "recommender", "models:/recommender/candidate", "recommender",
    (Step(0.05, 60, 5, 120), Step(0.5, 500, 5, 600), Step(1.0, 200, 2, 60)), 0.01, 0.05, 1.0,
    hold_s=60.0, sticky=StickyKey(header=SHOPPER_HEADER),
)  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LocalResult:
    """``requests``: all that shoppers asked for during the rollouts; ``failed_requests``: by the engine's doing.

    ``details``: data, settings, machine, and each rollout.
    """

    rollouts: int
    right: int
    requests: int
    failed_requests: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def local_rollouts(
    folder: Path, *, rollouts: int = ROLLOUTS, rate_rps: float = RATE_RPS, seed: int = SEED, say: Say | None = None
) -> LocalResult:  # fmt: skip
    """Run ``rollouts`` in a row in ``folder``, or go on with those of an earlier call that was killed.

    Raises:
        InputError: no rollouts are asked for. BusyError: another one runs in the folder.
        EndcapError: the target, the load or a rollout could not go on; the target is ended.
    """
    if rollouts < 1:
        raise InputError("at least one rollout is needed", where="--rollouts")
    with FolderLock(folder / "local"):
        return _Run(folder.absolute(), rollouts, rate_rps, seed, say or _silent).all()


class _Run:
    def __init__(self, folder: Path, rollouts: int, rate_rps: float, seed: int, say: Say) -> None:
        self._folder, self._work, self._path = folder, folder / "local", folder / _FILE
        self._plan, self._rate_rps, self._seed, self._say = plan(rollouts), rate_rps, seed, say
        self._each: list[dict[str, Any]] = []
        self._details: dict[str, Any] = {}

    def all(self) -> LocalResult:
        target = self._running()
        if target is None:
            self._clean()
        prepared = prepare(self._work / "packages", k=K, seed=self._seed, say=self._say)
        if target is None:
            self._details = self._describe(prepared)
            target = self._start(prepared)
            self._keep()
        with _ended_with_us(target), self._load(target, prepared) as load:
            traffic = _Traffic(target.records)
            for number in range(len(self._each), len(self._plan)):
                self._each.append(self._roll(number + 1, self._plan[number], target, load, prepared, traffic))
                self._keep()
        self._details |= {"finished": True, "load_after": os.getloadavg(), "seconds": time.time() - self._began_s}
        self._keep()
        return self.result

    @property
    def result(self) -> LocalResult:
        each = self._each
        return LocalResult(
            len(each), sum(one["right"] for one in each), sum(one["requests"] for one in each),
            sum(one["failed_requests"] for one in each), {**self._details, "each": each},
        )  # fmt: skip

    @property
    def _began_s(self) -> float:
        return float(self._details["began_at_s"])

    # ---- beginning, and going on ----

    def _running(self) -> LocalTarget | None:
        """The target of a call that was killed, with what it had got to; None where there is none to go on with."""
        if not self._path.exists():
            return None
        try:
            document = read_json(self._path)
            target = open_target(self._work / "target")
        except (StateError, TargetError):
            return None
        details = document["details"]
        if details["finished"] or details["settings"] != self._settings() or len(details["each"]) > len(self._plan):
            _end(target)
            return None
        self._each = details.pop("each")
        self._details = details
        self._say(f"goes on with rollout {len(self._each) + 1} of {len(self._plan)}")
        return target

    def _clean(self) -> None:
        for path in self._work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        self._path.unlink(missing_ok=True)

    def _settings(self) -> dict[str, Any]:
        return {
            "rate_rps": self._rate_rps, "k": K, "seed": self._seed, "window_s": WINDOW_S, "late_ms": LATE_MS,
            "alpha": SPEC.alpha, "steps": [asdict(step) for step in SPEC.steps],
            "objectives": [asdict(objective) for objective in OBJECTIVES.objectives],
        }  # fmt: skip

    def _describe(self, prepared: Prepared) -> dict[str, Any]:
        return {
            "began_at_s": time.time(),
            "finished": False,
            "settings": self._settings(),
            "data": dict(prepared.data),
            "synthetic": prepared.data["synthetic"],
            "offline_hits": dict(prepared.hits),
            "old_part": prepared.old_part,
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "load_before": os.getloadavg(),
            "expected": [f"{kind.name}: {kind.expected}" for kind in self._plan],
        }

    def _start(self, prepared: Prepared) -> LocalTarget:
        config = SupervisorConfig(
            folder=self._work / "target", records=self._work / "records", public_key=prepared.public_key,
            stable=StableVersion(label="stable", package=prepared.packages[STABLE]), thresholds_ms=(LATE_MS,),
            window_s=WINDOW_S, replicas_full=1,
        )  # fmt: skip
        return start_local_target(config, bind=False)

    @contextmanager
    def _load(self, target: LocalTarget, prepared: Prepared) -> Iterator[LoadProcess]:
        load = start_load(
            LoadConfig(shoppers=prepared.shoppers, out=target.records, target=target.folder, rate_rps=self._rate_rps,
                       k=K, seed=self._seed, timeout_s=TIMEOUT_S, thresholds=False)
        )  # fmt: skip
        try:
            load.wait_until_answered()
            yield load
        finally:
            if load.running():
                summary = load.stop()
                self._details["load"] = asdict(replace(summary, thresholds=()))

    def _keep(self) -> None:
        write_json(self._path, self.result.to_json())

    # ---- one rollout ----

    def _roll(
        self, number: int, kind: Kind, target: LocalTarget, load: LoadProcess, prepared: Prepared, traffic: _Traffic
    ) -> dict[str, Any]:  # fmt: skip
        label = f"r{number:02d}-{kind.name}"
        self._say(f"rollout {number} of {len(self._plan)}: {kind.about}; has to be {_said(kind.expected)}")
        folder = self._work / "rollouts" / label
        result = self._rollout(label, prepared.packages[kind.name], target, folder)
        state = load_state(folder)
        if state is None or state.ended_at_s is None:
            raise StateError("the rollout has not ended", where=folder)
        begin_s, end_s = state.started_at_s, state.ended_at_s
        seen = traffic.of(label, begin_s, end_s, load)
        lines = list(read_json_lines(folder / DECISIONS_FILE))
        decided = next(line for line in lines if line["outcome"] is not None)
        spans = share_spans(read_target_events(target.records), label, until_s=end_s)
        failed = [record for record in seen.requests if record.failed]
        failures = whose_failures(kind, failed, seen.tried, spans)
        failing = failing_objectives(decided)
        right = is_right(kind, result.outcome.value, failing)
        self._tell(result, right, seen, failures)
        canary = [record for record in seen.requests if record.version == label]
        return {
            "number": number, "version": label, "about": kind.about, "expected": kind.expected.value,
            "expected_by": list(kind.by), "outcome": result.outcome.value, "by": failing, "right": right,
            "reason": result.reason, "stable": result.stable, "seconds": result.seconds,
            "verdict_after_s": decided["at_s"] - begin_s, "requests": len(seen.requests), "failed_requests":
            failures.engine, "candidate_failures": {"asked": failures.tried, "beside": failures.beside},
            "shoppers_hurt": {
                "failed": failures.tried + failures.beside,
                "late": sum(record.latency_s * 1000 > LATE_MS for record in canary if not record.failed),
                "saw_the_candidate": len({record.shopper for record in canary}),
            },
            "samples": samples(decided), "shares": shares_seen(lines), "looks": len(lines),
            "load_average": os.getloadavg()[0],
        }  # fmt: skip

    def _rollout(self, label: str, package: Path, target: LocalTarget, folder: Path) -> RolloutResult:
        spec, public_key = replace(SPEC, candidate=f"models:/recommender/{label}"), target.found.public_key
        judged = spec.judged(OBJECTIVES)

        def check(candidate: Path, stable: Path) -> Gated:
            report = run_gates(GateSettings(), candidate, stable, public_key, judged, requests=None, folder=folder)
            return Gated(report.passed, report.reason)

        return run_rollout(spec, OBJECTIVES, ModelVersion(label, package), target, folder,
                           packages=target.state().versions, gates=check)  # fmt: skip

    def _tell(self, result: RolloutResult, right: bool, seen: _Seen, failures: Failures) -> None:
        own = failures.tried + failures.beside
        self._say(
            f"  {'right' if right else 'WRONG'}: {_said(result.outcome)} after {result.seconds:.0f} s, "
            f"{failures.engine} of {len(seen.requests):,} requests failed"
            + (f" ({own} more by the candidate's doing)" if own else "") + f"; {result.reason}"
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Seen:
    """The requests of a rollout, and the ids of those for which its candidate was asked."""

    requests: list[RequestRecord]
    tried: set[str]


class _Traffic:
    """What the load and the gateway keep, read on from rollout to rollout."""

    def __init__(self, records: Path) -> None:
        self._records = records
        self._attempts = Tail(records / ATTEMPTS_FILE)
        self._tails: dict[Path, Tail] = {}

    def of(self, label: str, begin_s: float, end_s: float, load: LoadProcess) -> _Seen:
        """The requests of a rollout, once all of them have come to their end.

        Raises:
            EndcapError: the load has ended, or keeps no records any more.
        """
        requests: dict[str, RequestRecord] = {}
        until_s, newest_s, gives_up_at = end_s + 1.0, 0.0, time.monotonic() + _LOAD_WAIT_S
        while newest_s < until_s + TIMEOUT_S + 0.5:
            for record in self._new():
                newest_s = max(newest_s, record.intended_s)
                if begin_s <= record.intended_s <= until_s:
                    requests[record.request_id] = record
            if not load.running():
                load.summary()
                raise EndcapError("the load has ended", where=load.log)
            if time.monotonic() > gives_up_at:
                raise EndcapError(f"the load kept nothing new for {_LOAD_WAIT_S:g} s", where=load.log)
            time.sleep(0.2)
        cluster = cluster_name(label).encode()
        tried = {
            str(line["request_id"])
            for raw in self._attempts.lines()
            if cluster in raw and (line := orjson.loads(raw))["cluster"] == cluster.decode()
        }
        return _Seen(sorted(requests.values(), key=lambda record: record.intended_s), tried)

    def _new(self) -> Iterator[RequestRecord]:
        for path in sorted(self._records.glob("requests-*.jsonl")):
            for raw in self._tails.setdefault(path, Tail(path)).lines():
                record = RequestRecord(**orjson.loads(raw))
                if record.kind == "recommend":
                    yield record


@contextmanager
def _ended_with_us(target: LocalTarget) -> Iterator[None]:
    """The target ends when we end in order, or by an error or Ctrl-C; killed, we leave it to the next call."""
    try:
        yield
    finally:
        _end(target)


def _end(target: LocalTarget, *, within_s: float = 30.0) -> None:
    target.close()
    try:
        handle = os.pidfd_open(target.found.pid)
    except ProcessLookupError:
        return
    try:
        os.kill(target.found.pid, signal.SIGTERM)
        ended, _, _ = select.select([handle], [], [], within_s)
    finally:
        os.close(handle)
    if not ended:
        raise TargetError(f"the target has not ended after {within_s:g} s", where=target.folder)


def _said(outcome: str) -> str:
    return outcome.replace("_", " ")


def _silent(_: str) -> None:
    """Nobody wants to know."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout.local", description=__doc__.split("\n")[0])
    parser.add_argument("--rollouts", type=int, default=ROLLOUTS, help=f"how many in a row ({ROLLOUTS})")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where local.json goes (out/bench)")
    parser.add_argument("--rate", type=float, default=RATE_RPS, help=f"requests a second ({RATE_RPS:g})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"everything drawn follows from it ({SEED})")
    given = parser.parse_args()
    with ending():
        result = local_rollouts(given.out, rollouts=given.rollouts, rate_rps=given.rate, seed=given.seed, say=_say)
        sys.stdout.write(f"{result.right} of {result.rollouts} right, {result.failed_requests} of {result.requests:,} "
                         f"requests failed; results: {given.out / _FILE}\n")  # fmt: skip
        if result.right < result.rollouts or result.failed_requests:
            raise OutcomeError("not as it must be", where=given.out / _FILE)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
