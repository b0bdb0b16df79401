"""The parts of the benchmark: each returns its keys of ``serving.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.client import GRPC_METHOD, Client, grpc_body, http_body, write_bodies
from benchmarks.serving.figures import spread
from benchmarks.serving.packages import Made, encoder_package, inputs_of, sasrec_package
from benchmarks.serving.servers import ENDCAP, KSERVE, MLSERVER, Running, cpu_s, memory_mb, serve
from endcap.errors import OutcomeError

__all__ = ["PARTS", "Bench", "Part"]

Part = dict[str, Any]
_SERVERS = (ENDCAP, KSERVE, MLSERVER)
_REQUESTS = 512
"""Different ones, sent in turn."""
_CONNECTIONS = 32
_WINDOWS = 4
"""Of one measurement where servers are compared; they take turns at each."""
_P99_CONNECTIONS = 128
_BATCH = 32
_OVERLOAD_CONNECTIONS = 512
_PEAK_CONNECTIONS = 128
_HEAVY_CONNECTIONS = 64
_PATIENT = ("--timeout-s", "30")
"""Who asks for a rate has no deadline: nothing is to be turned away, however little of its core a server gets."""
_IN_TIME_MS = 1000.0
"""An answer under overload that comes later is no good one."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Good answers by the clock's second, and by the second of processor time that the server had: on a machine that
    others use too the second says more of the server, the first more of what shoppers would feel."""

    a_second: float
    a_cpu_second: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What the parts share. ``seconds``: of one measurement; ``repeats``: how often each is made, servers in turn."""

    folder: Path
    client: Client
    core: str
    mlserver_python: Callable[[], Path]
    minilm_python: Callable[[], Path]
    seconds: float
    repeats: int
    overload_s: float
    seed: int
    say: Callable[[str], None]

    def sasrec(self) -> Made:
        return sasrec_package(self.folder, seed=self.seed)

    def heavy(self) -> Made:
        return encoder_package(self.folder, self.minilm_python())

    def bodies(self, made: Made, *, grpc: bool = False) -> Path:
        requests = inputs_of(made.name, _REQUESTS, seed=self.seed)
        made_bodies = [grpc_body(made.name, one) if grpc else http_body(one) for one in requests]
        return write_bodies(self.folder / f"{made.name}-{'grpc' if grpc else 'http'}.json", made_bodies)

    def serve(self, name: str, made: Made, *more: str) -> Any:
        python = self.mlserver_python() if name == MLSERVER else None
        return serve(name, made, self.folder, core=self.core, mlserver_python=python, more=more)

    def closed(self, running: Running, bodies: Path, *, grpc: bool = False, connections: int = _CONNECTIONS,
               warm: float = 0.5) -> Rate:  # fmt: skip
        """Good answers of a server that is never idle.

        Raises:
            OutcomeError: a request failed: a rate of errors means nothing.
        """
        used_s = cpu_s(running.process)
        found = self.client.load(
            running.grpc if grpc else running.http, GRPC_METHOD if grpc else running.infer_path, bodies,
            connections=connections, seconds=self.seconds, warm=warm, protocol="grpc" if grpc else "http",
        )  # fmt: skip
        if found["failures"] or set(found["statuses"]) - {"200", "1000"}:
            raise OutcomeError(f"{running.name} failed: {found.get('failure', '')} {found['statuses']}",
                               where=running.log)  # fmt: skip
        if found["client_cpu_s"] > 0.8 * (self.seconds + warm):
            self.say(f"the client used {found['client_cpu_s']:.1f} s of processor time: it may be the limit")
        used_s = (cpu_s(running.process) - used_s) * self.seconds / (self.seconds + warm)
        return Rate(float(found["good_rps"]), found["good"] / used_s if used_s else 0.0)


def one_row_http(bench: Bench) -> Part:
    """Requests a second of each server, then the latencies where the slower peer is at its limit."""
    made = bench.sasrec()
    bodies = bench.bodies(made)
    part = _compared(bench, made, bodies, grpc=False)
    rate = min(part["kserve_rps"], part["mlserver_rps"])
    p99: dict[str, list[float]] = {name: [] for name in _SERVERS}
    with _all_running(bench, made) as every:
        for _ in range(bench.repeats * _WINDOWS):
            for name, running in every.items():
                found = bench.client.load(running.http, running.infer_path, bodies, connections=_P99_CONNECTIONS,
                                          seconds=bench.seconds / _WINDOWS, rate=rate, warm=0.5)  # fmt: skip
                p99[name].append(found["answered"]["p99_ms"])
            bench.say(f"p99 at {rate:.0f}/s, ms: " + ", ".join(f"{name} {one[-1]:.1f}" for name, one in p99.items()))
    medians = {name: statistics.median(found) for name, found in p99.items()}
    return {"one_row_http": {**part, "p99_ms": medians, "p99_rate": rate, "p99_all": p99}}


def one_row_grpc(bench: Bench) -> Part:
    made = bench.sasrec()
    return {"one_row_grpc": _compared(bench, made, bench.bodies(made, grpc=True), grpc=True)}


def _compared(bench: Bench, made: Made, bodies: Path, *, grpc: bool) -> Part:
    rates: dict[str, list[Rate]] = {name: [] for name in _SERVERS}
    short = dataclasses.replace(bench, seconds=bench.seconds / _WINDOWS)
    with _all_running(bench, made) as every:
        for _ in range(bench.repeats * _WINDOWS):
            for name, running in every.items():
                rates[name].append(short.closed(running, bodies, grpc=grpc))
            bench.say(
                f"{'gRPC' if grpc else 'HTTP'}, requests/s (a second of processor time): "
                + ", ".join(
                    f"{name} {one[-1].a_second:.0f} ({one[-1].a_cpu_second:.0f})" for name, one in rates.items()
                )
            )
    by_clock = {name: spread([one.a_second for one in found]) for name, found in rates.items()}
    by_cpu = {name: spread([one.a_cpu_second for one in found]) for name, found in rates.items()}
    part: Part = {f"{name}_rps": found["median"] for name, found in by_clock.items()}
    times = {
        name: spread([own.a_second / other.a_second for own, other in zip(rates[ENDCAP], rates[name], strict=True)])
        for name in (KSERVE, MLSERVER)
    }
    return {**part, "spread": by_clock, "per_cpu_s": by_cpu, "times": times, "connections": _CONNECTIONS}


@contextlib.contextmanager
def _all_running(bench: Bench, made: Made) -> Iterator[dict[str, Running]]:
    """Every server, idle but for the one that is measured: what is compared is measured seconds apart, because a
    machine that others use too gives now more and now less of its core."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(bench.serve(name, made)) for name in _SERVERS}


def start(bench: Bench) -> Part:
    """How soon a server is ready, its package verified, and what it holds in memory after answering."""
    made = bench.sasrec()
    bodies = bench.bodies(made)
    ready, used, memory = [], [], []
    for _ in range(bench.repeats):
        with bench.serve(ENDCAP, made) as running:
            ready.append(running.ready_s)
            used.append(cpu_s(running.process))
            bench.closed(running, bodies)
            memory.append(memory_mb(running.process))
    bench.say(
        f"ready after {statistics.median(ready):.2f} s ({statistics.median(used):.2f} s of processor time), "
        f"{statistics.median(memory):.0f} MB"
    )
    return {"ready_s": statistics.median(ready), "rss_mb": statistics.median(memory),
            "start": {"ready_s": spread(ready), "ready_cpu_s": spread(used), "rss_mb": spread(memory)}}  # fmt: skip


def heavy(bench: Bench) -> Part:
    """Rows a second of the heavy model over HTTP beside the same graph in batches without a server, in turn."""
    made = bench.heavy()
    bodies = bench.bodies(made)
    served: list[Rate] = []
    alone: list[Rate] = []
    for _ in range(bench.repeats):
        alone.append(_in_process(bench, made))
        with bench.serve(ENDCAP, made, *_PATIENT) as running:
            served.append(bench.closed(running, bodies, connections=_HEAVY_CONNECTIONS, warm=1.0))
        bench.say(f"heavy: {served[-1].a_second:.0f} rows/s over HTTP, {alone[-1].a_second:.0f} without a server; by "
                  f"processor time {served[-1].a_cpu_second:.0f} and {alone[-1].a_cpu_second:.0f}")  # fmt: skip
    pairs = list(zip(served, alone, strict=True))
    shares = [one.a_second / other.a_second for one, other in pairs]
    by_cpu = [one.a_cpu_second / other.a_cpu_second for one, other in pairs]
    return {"heavy_share_of_ort": statistics.median(shares),
            "heavy": {"served_rps": spread([one.a_second for one in served]),
                      "ort_rps": spread([one.a_second for one in alone]), "share": spread(shares),
                      "share_per_cpu_s": spread(by_cpu), "ort_batch": _BATCH,
                      "model": "all-MiniLM-L6-v2"}}  # fmt: skip


def _in_process(bench: Bench, made: Made) -> Rate:
    argv = ["taskset", "-c", bench.core, sys.executable, "-m", "benchmarks.serving.inprocess", "--graph",
            str(made.graph), "--name", made.name, "--count", str(_REQUESTS), "--seed", str(bench.seed),
            "--batch", str(_BATCH), "--seconds", str(bench.seconds)]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OutcomeError(f"onnxruntime alone failed: {done.stderr.strip()[-300:]}")
    found = json.loads(done.stdout)
    return Rate(found["rows_per_s"], found["rows_per_cpu_s"])


def cache(bench: Bench) -> Part:
    """The heavy model's rate with every answer kept, by its own without."""
    made = bench.heavy()
    bodies = bench.bodies(made)
    without, kept = [], []
    for _ in range(bench.repeats):
        with bench.serve(ENDCAP, made, *_PATIENT) as running:
            without.append(bench.closed(running, bodies).a_second)
        with bench.serve(ENDCAP, made, "--cache", "memory:10000", "--cache-ttl-s", "3600") as running:
            _ask_each_once(running, made, bench.seed)
            kept.append(bench.closed(running, bodies).a_second)
        bench.say(f"heavy: {without[-1]:.0f} rows/s, {kept[-1]:.0f} with every answer kept")
    ratios = [one / other for one, other in zip(kept, without, strict=True)]
    return {"cache_ratio": statistics.median(ratios),
            "cache": {"kept_rps": spread(kept), "without_rps": spread(without), "ratio": spread(ratios)}}  # fmt: skip


def _ask_each_once(running: Running, made: Made, seed: int) -> None:
    with httpx.Client(timeout=10.0, trust_env=False) as client:
        for one in inputs_of(made.name, _REQUESTS, seed=seed):
            client.post(f"http://{running.http}{running.infer_path}", content=http_body(one)).raise_for_status()


def overload(bench: Bench) -> Part:
    """The heavy model offered three times its saturation rate."""
    made = bench.heavy()
    bodies = bench.bodies(made)
    peaks = _peaks(bench, made, bodies)
    peak = statistics.median(one.a_second for one in peaks)
    with bench.serve(ENDCAP, made) as running:
        _good_rate(bench, running, bodies)
        before, used_s = memory_mb(running.process), cpu_s(running.process)
        found = bench.client.load(running.http, running.infer_path, bodies, connections=_OVERLOAD_CONNECTIONS,
                                  seconds=bench.overload_s, rate=3 * peak, warm=1.0,
                                  in_time_ms=_IN_TIME_MS)  # fmt: skip
        used_s = (cpu_s(running.process) - used_s) * bench.overload_s / (bench.overload_s + 1.0)
        running.check_alive()
        after = memory_mb(running.process)
        later = _good_rate(bench, running, bodies)
    peaks += _peaks(bench, made, bodies)
    peak = statistics.median(one.a_second for one in peaks)
    peak_by_cpu = statistics.median(one.a_cpu_second for one in peaks)
    share, by_cpu = found["good_rps"] / peak, found["good"] / used_s / peak_by_cpu
    bench.say(f"overload: {found['good_rps']:.0f} good answers/s of {peak:.0f} (by processor time {by_cpu:.2f} of the "
              f"peak's), {found['statuses']}, refusals' p99 {found['refused']['p99_ms']:.0f} ms, "
              f"memory {before:.0f} to {after:.0f} MB")  # fmt: skip
    return {
        "overload_goodput_share": share,
        "overload": {
            "peak_rps": peak, "peaks_rps": [one.a_second for one in peaks],
            "offered_rps": found["due"] / bench.overload_s,
            "goodput_share_per_cpu_s": by_cpu, "seconds": bench.overload_s, "good_rps": found["good_rps"],
            "in_time_ms": _IN_TIME_MS, "late": found["late"], "refused_p99_ms": found["refused"]["p99_ms"],
            "answered_p99_ms": found["answered"]["p99_ms"],
            "refused_ms": found["refused"], "sent_behind_ms": found["sent_behind"], "statuses": found["statuses"],
            "failures": found["failures"], "rss_before_mb": before, "rss_after_mb": after, "rps_after": later,
            "good_each_second": found["good_each_second"],
        },
    }  # fmt: skip


def _peaks(bench: Bench, made: Made, bodies: Path) -> list[Rate]:
    """The most that it answers: nobody has a deadline or is turned away, and batches are never short of requests."""
    with bench.serve(ENDCAP, made, *_PATIENT) as running:
        return [bench.closed(running, bodies, connections=_PEAK_CONNECTIONS, warm=1.0) for _ in range(bench.repeats)]


def _good_rate(bench: Bench, running: Running, bodies: Path) -> float:
    """Good answers a second to askers with a deadline, of a server that may turn them away."""
    found = bench.client.load(running.http, running.infer_path, bodies, connections=_CONNECTIONS,
                              seconds=bench.seconds, in_time_ms=_IN_TIME_MS)  # fmt: skip
    return float(found["good_rps"])


PARTS: Mapping[str, Callable[[Bench], Part]] = {
    "one_row_http": one_row_http, "start": start, "cache": cache, "overload": overload, "one_row_grpc": one_row_grpc,
    "heavy": heavy,
}  # fmt: skip
"""What can be measured, in this order."""
