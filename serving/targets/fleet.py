"""The replicas of a local target: started a few at a time, restarted when they die, known to the gateway when ready.

A slot is a place for one replica in one zone; processes come and go in it, each on a fresh port. Health is the
gateway's word (:meth:`Fleet.saw`), not ours.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import httpx

from endcap.errors import CapacityError, EndcapError, VerificationError
from endcap.processes import free_port, last_line, spawn, stop
from serving.gateway import Endpoint, HostHealth, VersionEndpoints, cluster_name
from serving.targets.base import ModelVersion
from serving.targets.children import exit_of, until_ready
from serving.targets.comparing import answers_file
from serving.targets.config import SupervisorConfig

__all__ = ["Fleet", "Phase", "Slot", "TargetEvent", "backoff_s"]

REFUSED_EXIT_CODE = 3
_TRIES = 3
"""Starts in a row that may fail before capacity is said not to come."""
_STEADY_S = 10.0
"""A replica that lived this long starts again at once."""

log = logging.getLogger("endcap.target")


class Phase(StrEnum):
    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    REFUSED = "refused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class TargetEvent:
    """One line of ``records/target.jsonl``."""

    event: str
    version: str | None = None
    zone: str | None = None
    replica: int | None = None
    detail: str | None = None


@dataclass(slots=True, eq=False)
class Slot:
    version: ModelVersion
    zone: str
    index: int
    phase: Phase = Phase.WAITING
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    healthy: bool = False
    seen_healthy: bool = False
    """The gateway has held this process for healthy once; losing that is news, not having it yet is not."""
    reasons: tuple[str, ...] = ()
    failed_starts: int = 0
    reason: str = ""
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return f"{self.version.label}-{self.zone}-{self.index}"

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    @property
    def ready(self) -> bool:
        return self.phase is Phase.READY and self.healthy


def backoff_s(failures: int) -> float:
    """How long to wait before the next start: none after a death in good health, then 0.2 s doubling up to 5 s."""
    return 0.0 if failures <= 0 else min(5.0, 0.2 * 2 ** (failures - 1))


class Fleet:
    """All slots of a target. ``publish`` tells the gateway what :meth:`endpoints` of a version are now."""

    def __init__(
        self,
        config: SupervisorConfig,
        *,
        impression_key: Path,
        emit: Callable[[TargetEvent], None],
        publish: Callable[[str], Awaitable[None]],
    ) -> None:
        self._config = config
        self._impression_key = impression_key
        self._emit = emit
        self._publish = publish
        self._starting = asyncio.Semaphore(config.starting_at_once)
        self._client = httpx.AsyncClient(trust_env=False)
        self._changed = asyncio.Condition()
        self.slots: dict[tuple[str, str, int], Slot] = {}

    def of(self, label: str) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.version.label == label]

    def endpoints(self, label: str) -> VersionEndpoints:
        """The replicas that the gateway should know: those that said they are ready."""
        here = [slot for slot in self.of(label) if slot.phase is Phase.READY]
        return VersionEndpoints(label, tuple(sorted(Endpoint(s.zone, s.port, self._config.host) for s in here)))

    def add(self, version: ModelVersion, per_zone: int) -> list[Slot]:
        """Slots for ``per_zone`` replicas in each zone; returns those that are new. Never takes one away.

        Zones alternate, so that each has its first replica before any has its second. One that refused its package
        before is tried again.
        """
        new = []
        for index in range(per_zone):
            for zone in self._config.zones:
                key = (version.label, zone, index)
                slot = self.slots.get(key)
                if slot is None:
                    slot = self.slots[key] = Slot(version, zone, index)
                    new.append(slot)
                elif slot.phase is not Phase.REFUSED:
                    continue
                slot.phase, slot.failed_starts = Phase.WAITING, 0
                slot.task = asyncio.create_task(self._keep(slot), name=f"replica {slot.name}")
        return new

    async def remove(self, slots: Iterable[Slot]) -> None:
        """Stop and forget. The caller has taken them out of the gateway first."""
        leaving = list(slots)
        for slot in leaving:
            slot.phase = Phase.STOPPED
            self.slots.pop((slot.version.label, slot.zone, slot.index), None)
            if slot.task is not None:
                slot.task.cancel()
        await asyncio.gather(*(self._end(slot) for slot in leaving))
        await self._notify()

    async def _end(self, slot: Slot) -> None:
        if slot.task is not None:
            with suppress(asyncio.CancelledError):
                await slot.task
        if slot.process is not None:
            await asyncio.to_thread(stop, slot.process, grace_s=self._config.drain_s + 1)

    async def close(self) -> None:
        await self.remove(list(self.slots.values()))
        await self._client.aclose()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def saw(self, hosts: Sequence[HostHealth]) -> None:
        """Take in the gateway's view of every replica."""
        by_place = {(host.cluster, host.port): host for host in hosts}
        for slot in self.slots.values():
            if slot.phase is not Phase.READY:
                continue
            host = by_place.get((cluster_name(slot.version.label), slot.port))
            if host is None:
                continue  # the gateway has not read the file yet
            slot.reasons = host.reasons
            if host.healthy and not slot.healthy and slot.seen_healthy:
                self._tell(slot, "replica_healthy")
            if not host.healthy and slot.healthy:
                self._tell(slot, "replica_unhealthy", ", ".join(host.reasons))
            slot.healthy = host.healthy
            slot.seen_healthy = slot.seen_healthy or host.healthy
        await self._notify()

    async def until_ready(self, slots: Sequence[Slot], *, within_s: float, check: Callable[[], None]) -> None:
        """Return when the gateway holds every slot for healthy. ``check`` may raise to give up early.

        Raises:
            VerificationError: a replica refused its package; the message is the replica's own.
            CapacityError: a replica could not be started, or did not become ready in time.
        """
        ends_at = time.monotonic() + within_s
        while True:
            check()
            for slot in slots:
                if slot.phase is Phase.REFUSED:
                    raise _refusal(slot)
                if slot.failed_starts >= _TRIES:
                    raise CapacityError(f"replica {slot.name} does not start: {slot.reason}", where=self._log(slot))
            missing = [slot.name for slot in slots if not slot.ready]
            if not missing:
                return
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                raise CapacityError(f"not ready after {within_s:g} s: {', '.join(missing)}",
                                    where=self._config.folder / "logs")  # fmt: skip
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, 0.5)), self._changed:
                    await self._changed.wait()

    def _log(self, slot: Slot) -> Path:
        return self._config.folder / "logs" / f"replica-{slot.name}.log"

    def _tell(self, slot: Slot, event: str, detail: str | None = None) -> None:
        self._emit(TargetEvent(event, slot.version.label, slot.zone, slot.index, detail))

    async def _keep(self, slot: Slot) -> None:
        """One slot's life: start, watch, start again. Ends when the replica refuses its package."""
        while True:
            try:
                again = await self._one_life(slot)
            except EndcapError as error:  # no disk, no process: as bad as a death, and as passing
                log.exception("replica %s", slot.name)
                slot.phase, slot.reason = Phase.DOWN, str(error)
                slot.failed_starts += 1
                again = True
            await self._notify()
            if not again:
                return
            await asyncio.sleep(backoff_s(slot.failed_starts))

    async def _one_life(self, slot: Slot) -> bool:
        """From start to end of one process. False: it must not be started again."""
        config, log_file = self._config, self._log(slot)
        async with self._starting:
            slot.phase, slot.port = Phase.STARTING, free_port(config.host)
            slot.healthy = slot.seen_healthy = False
            slot.reasons = ()
            log_from = log_file.stat().st_size if log_file.exists() else 0
            started_s = time.monotonic()
            process = slot.process = spawn(self._argv(slot), log=log_file, leash=True,
                                           env={"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})  # fmt: skip
            self._tell(slot, "replica_started", f"pid {process.pid}, port {slot.port}")
            url = f"http://{config.host}:{slot.port}/v2/health/ready"
            ready = await until_ready(self._client, url, process, within_s=config.ready_s)
            if not ready and process.poll() is None:
                await asyncio.to_thread(stop, process, grace_s=1)
                return self._died(slot, f"not ready after {config.ready_s:g} s")
        if ready:
            slot.phase = Phase.READY
            slot.failed_starts = 0
            self._tell(slot, "replica_ready", f"{time.monotonic() - started_s:.2f} s after its start")
            await self._publish(slot.version.label)
            await self._notify()
        code = await exit_of(process)
        reason = last_line(log_file, since=log_from)
        if code == REFUSED_EXIT_CODE:
            slot.phase, slot.reason = Phase.REFUSED, reason
            self._tell(slot, "replica_refused", reason)
            return False
        again = self._died(slot, f"signal {-code}" if code < 0 else f"exit code {code}: {reason}")
        if ready:
            if time.monotonic() - started_s > _STEADY_S:
                slot.failed_starts = 0
            await self._publish(slot.version.label)
        return again

    def _died(self, slot: Slot, reason: str) -> bool:
        slot.phase, slot.reason = Phase.DOWN, reason
        slot.healthy = False
        slot.failed_starts += 1
        self._tell(slot, "replica_died", reason)
        return True

    def _argv(self, slot: Slot) -> list[str]:
        config = self._config
        return [
            sys.executable, "-m", config.server_module, "--package", str(slot.version.package),
            "--public-key", str(config.public_key), "--version", slot.version.label, "--zone", slot.zone,
            "--host", config.host, "--port", str(slot.port), "--impression-key", str(self._impression_key),
            "--answers", str(answers_file(config.folder, slot.name)),
            *(["--thresholds-ms", ",".join(map(str, config.thresholds_ms))] if config.thresholds_ms else []),
            *config.server_arguments,
        ]  # fmt: skip


def _refusal(slot: Slot) -> VerificationError:
    """The replica's last words, ``where: what; next: ...`` on one line, as the error that they were."""
    what, _, next_step = slot.reason.partition("; next: ")
    return VerificationError(
        what.removeprefix(f"{slot.version.package}: "), where=slot.version.package,
        next_step=next_step or "see what is wrong with it: endcap model verify",
    )  # fmt: skip
