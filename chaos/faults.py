"""Faults on a local target's replicas, each recorded as it is injected and reverted, and never left in force.

Three nets under a stopped process: the experiment's own rollback, the control that ends every experiment
(:mod:`chaos.controls`), and a guard process that outlives even a SIGKILL of the drill (:mod:`chaos.guard`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from endcap.errors import TargetError
from endcap.records import FAULTS_FILE, FaultRecord, append_fault
from serving.targets import Replica

__all__ = ["HANG", "KILL", "choose_replica", "choose_zone", "kill", "revert_all", "stop", "subject_of"]

KILL = "replica killed (SIGKILL)"
HANG = "zone hangs (SIGSTOP)"
GUARD_DEADLINE_S = 300.0
_GUARD = Path(__file__).with_name("guard.py")


def subject_of(replica: Replica) -> str:
    """``version-zone-index``, as the target names its replicas."""
    return f"{replica.version}-{replica.zone}-{replica.index}"


def choose_replica(replicas: Iterable[Replica], *, seed: int, version: str | None, zone: str | None) -> Replica:
    """A ready replica, by seed; of ``version`` and ``zone`` where they are given. Pure.

    Raises:
        TargetError: there is none, or it is the only ready one of its version (that is another drill).
    """
    ready = _ready(replicas)
    found = [one for one in ready if version in (None, one.version) and zone in (None, one.zone)]
    if not found:
        raise TargetError("no ready replica to kill", where=f"version {version or 'any'}, zone {zone or 'any'}")
    chosen = random.Random(f"replica-{seed}").choice(found)  # noqa: S311 - a choice, not a secret
    if sum(one.version == chosen.version for one in ready) < 2:
        raise TargetError(f"{subject_of(chosen)} is the only ready replica of its version",
                          next_step="wait until the target has all its replicas")  # fmt: skip
    return chosen


def choose_zone(replicas: Iterable[Replica], *, seed: int, zone: str | None) -> list[Replica]:
    """All live replicas of one zone, by seed or by name. Pure.

    Raises:
        TargetError: no such zone, or no other zone would be left to serve.
    """
    live = sorted((one for one in replicas if one.pid is not None), key=subject_of)
    zones = sorted({one.zone for one in live})
    if len(zones) < 2:
        raise TargetError(f"only the zone {zones[0]!r} has replicas" if zones else "no replica runs",
                          next_step="a zone can be lost where there are two")  # fmt: skip
    chosen = zone or random.Random(f"zone-{seed}").choice(zones)  # noqa: S311 - a choice, not a secret
    if chosen not in zones:
        raise TargetError(f"no zone {chosen!r}", next_step=f"zones: {', '.join(zones)}")
    return [one for one in live if one.zone == chosen]


def _ready(replicas: Iterable[Replica]) -> list[Replica]:
    return sorted((one for one in replicas if one.ready and one.pid is not None), key=subject_of)


def kill(replica: Replica, *, drill: str, records: Path) -> None:
    """SIGKILL a replica. Nothing to revert: the target starts it again.

    Raises:
        TargetError: it was gone already.
    """
    if replica.pid is None:
        raise TargetError("not running", where=subject_of(replica))
    at_s = time.time()
    try:
        os.kill(replica.pid, signal.SIGKILL)
    except ProcessLookupError as error:
        raise TargetError(f"process {replica.pid} is gone", where=subject_of(replica)) from error
    append_fault(records, FaultRecord(at_s, drill, KILL, "injected", subject_of(replica)))


class _Stopped:
    """Processes that we stopped, with their guard."""

    def __init__(self, replicas: Sequence[Replica], *, drill: str, records: Path) -> None:
        self._drill = drill
        self._records = records
        self._handles = []
        for replica in replicas:
            if replica.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._handles.append((os.pidfd_open(replica.pid), replica))
        self._guard = self._start_guard()

    def _start_guard(self) -> subprocess.Popen[bytes]:
        held = [f"{replica.pid}={subject_of(replica)}" for _, replica in self._handles]
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), str(self._records / FAULTS_FILE), self._drill, HANG,
             str(GUARD_DEADLINE_S), *held],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert guard.stdout is not None  # noqa: S101 - a pipe was asked for
        said = guard.stdout.readline()
        guard.stdout.close()
        if said != b"ready\n":
            guard.kill()
            guard.wait()
            raise TargetError("the guard that would let the processes go on did not start; nothing was stopped")
        return guard

    def stop(self) -> None:
        for handle, replica in self._handles:
            at_s = time.time()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGSTOP)
                append_fault(self._records, FaultRecord(at_s, self._drill, HANG, "injected", subject_of(replica)))

    def revert(self) -> None:
        # All of them first: a record that finds no space must keep none of them stopped.
        reverted = []
        for handle, replica in self._handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)
            os.close(handle)
            reverted.append(FaultRecord(time.time(), self._drill, HANG, "reverted", subject_of(replica)))
        self._handles = []
        if self._guard.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(b"done\n")
                self._guard.stdin.close()
        self._guard.wait()
        for record in reverted:
            append_fault(self._records, record)


_in_force: list[_Stopped] = []


def stop(replicas: Sequence[Replica], *, drill: str, records: Path) -> None:
    """SIGSTOP replicas: their connections are accepted by the kernel and never answered.

    They go on at :func:`revert_all`, or when this process ends in whatever way.
    """
    stopped = _Stopped(replicas, drill=drill, records=records)
    _in_force.append(stopped)
    stopped.stop()


def revert_all() -> int:
    """Let everything that this process stopped go on; returns how many faults were in force. Safe to repeat."""
    count = 0
    while _in_force:
        _in_force.pop().revert()
        count += 1
    return count
