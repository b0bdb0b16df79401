"""The process that owns a local target: Envoy, the feedback collector and every replica are its children.

``python -m serving.targets.supervisor --config F/config.json [--bind-parent]``. It ends them in order on SIGTERM, and
the kernel ends them when it is killed. What was achieved (fencing token, versions, shares) is kept in
``F/state.json``; one that starts again resumes with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path

from endcap.errors import EndcapError, StorageError, TargetError
from endcap.files import FolderLock, JsonLines, write_json
from endcap.processes import bind_to_parent
from serving.asgi import listen
from serving.gateway import Envoy, GatewaySettings, TallyCounts, VersionCounts, traces_of
from serving.impressions import ensure_key
from serving.targets.base import Counts, ModelVersion, Observation, ShadowObservation, VersionObservation
from serving.targets.children import exit_of
from serving.targets.collector import Collector, VersionEvidence
from serving.targets.comparing import Comparing
from serving.targets.config import (
    FAILED_FILE,
    TARGET_FILE,
    Kept,
    SupervisorConfig,
    TargetFile,
    read_config,
    read_state,
)
from serving.targets.control import control_app, serve_control
from serving.targets.counting import Counting
from serving.targets.fleet import TargetEvent, backoff_s
from serving.targets.placement import Placement
from serving.targets.wire import (
    AcquireReply,
    AcquireRequest,
    ObservationReply,
    ReplicaReply,
    RetireRequest,
    ShadowRequest,
    SharesRequest,
    StateReply,
)

__all__ = ["Supervisor", "main", "run_supervisor"]

log = logging.getLogger("endcap.target")
_LOG_READ_S = 1.0
_LOG_KEEP_S = 3.0
_ANSWERS_LAG_S = 2.5
"""How much later than it was given an answer may be found in its replica's log, by a busy machine."""


class Supervisor:
    """See the module. One instance, one event loop, in the main thread (children are bound to the thread)."""

    def __init__(self, config: SupervisorConfig, kept: Kept | None) -> None:
        self.config = config
        self._events = JsonLines(config.records / "target.jsonl")
        port = config.gateway_port or _still_free(config.host, kept.gateway_port if kept else 0)
        settings = GatewaySettings(
            config.folder / "xds",
            config.records,
            zones=config.zones,
            host=config.host,
            port=port,
            traces=traces_of(os.environ),
        ).patient_for(config.thresholds_ms)
        if kept is None:
            kept = Kept(attempts_offset=_size(settings.attempts_log), access_offset=_size(settings.access_log))
        key = config.folder / "impression.key"
        ensure_key(key)
        self.envoy = Envoy(settings, log=config.folder / "logs" / "envoy.log")
        self.collector = Collector(config, impression_key=key, emit=self.emit)
        self.placement = Placement(config, kept, self.envoy, self.collector, impression_key=key, emit=self.emit)
        self._counting = Counting(config.folder, settings, config.thresholds_ms, kept)
        self._comparing = Comparing(
            config.folder, config.thresholds_ms, patience_s=settings.request_timeout_s + _ANSWERS_LAG_S
        )
        self._damaged_lines = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._control_token = secrets.token_urlsafe(32)
        self._control_url = ""
        self._started_at_s = time.time()
        self._fault: str | None = None
        self.stopping = asyncio.Event()

    @property
    def serves(self) -> bool:
        """It has begun to serve: from now on it ends in order."""
        return bool(self._control_url)

    # Life

    async def run(self) -> None:
        """Start everything, serve until :attr:`stopping`, and end everything in order, whatever happened."""
        listener = listen(self.config.host, self.config.control_port)
        try:
            if self.config.gateway_port:
                listen(self.config.host, self.config.gateway_port).close()
            await self._start()
            self._control_url = f"http://{self.config.host}:{listener.getsockname()[1]}"
            self._write_target_file()
            log.info("serving at %s", self.envoy.url)
            await serve_control(control_app(self, self._control_token), listener, stopping=self.stopping.wait())
            if self._fault is not None:
                raise TargetError(self._fault, where=self.config.folder / "logs" / "supervisor.log",
                                  next_step="start the target again; it resumes with the same shares")  # fmt: skip
        finally:
            self.stopping.set()
            listener.close()
            (self.config.folder / TARGET_FILE).unlink(missing_ok=True)
            await self._close()

    async def _start(self) -> None:
        self.envoy.prepare()
        if self.config.feedback_module is None:
            await self.envoy.start()
        else:
            await asyncio.gather(self.collector.start(), self.envoy.start())
            self._keep(self.collector.watch(), "feedback")
        self._keep(self._watch_gateway(), "gateway")
        self._keep(self._watch_health(), "health")
        self._keep(self._watch_logs(), "logs")
        stable = self.config.stable
        await self.placement.begin(None if stable is None else ModelVersion(stable.label, stable.package))
        self.placement.save(gateway_port=self.envoy.settings.port)
        self._keep(self.placement.resume_shadow(), "shadow")

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.envoy.stop()
        await self.placement.fleet.close()
        await self.collector.stop()
        with contextlib.suppress(StorageError):
            await self._read_logs()
        await self._keep_counts()
        self._events.close()

    def _keep(self, work: Coroutine[None, None, None], name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("%s ended", task.get_name(), exc_info=task.exception())
            self._fault = self._fault or f"its watch over {task.get_name()} failed: {task.exception()!r}"
            self.stopping.set()

    def emit(self, event: TargetEvent) -> None:
        """Write an event to the records. A full disk must not take the service down with it."""
        try:
            self._events.append({"at_s": time.time(), **{k: getattr(event, k) for k in event.__slots__}})
        except StorageError as error:
            log.error("event lost: %s: %s", event, error)

    def _write_target_file(self) -> None:
        document = TargetFile(
            pid=os.getpid(), gateway_url=self.envoy.url, control_url=self._control_url,
            control_token=self._control_token, envoy_admin_url=self.envoy.admin.url,
            feedback_url=self.collector.url,
            records=self.config.records, public_key=self.config.public_key, started_at_s=self._started_at_s,
        )  # fmt: skip
        write_json(self.config.folder / TARGET_FILE, document.model_dump(mode="json"), mode=0o600)

    # Watches

    async def _watch_gateway(self) -> None:
        failures = 0
        while True:
            code = await exit_of(self.envoy.process)
            self.emit(TargetEvent("gateway_died", detail=f"code {code}"))
            while True:
                try:
                    await self.envoy.start()
                    break
                except EndcapError as error:
                    failures += 1
                    log.error("%s", error)
                    await asyncio.sleep(backoff_s(failures))
            failures = 0
            if self.serves:
                try:
                    self._write_target_file()
                except StorageError as error:  # only the admin interface's address is an old one in it
                    log.error("%s", error)

    async def _watch_health(self) -> None:
        while True:
            with contextlib.suppress(TargetError):  # a gateway that is being started again
                await self.placement.fleet.saw(await self.envoy.admin.hosts())
            await self.placement.publish_again()
            await asyncio.sleep(self.config.health_poll_s)

    async def _watch_logs(self) -> None:
        keep_at_s = time.monotonic() + _LOG_KEEP_S
        while True:
            await self._read_logs()
            await self._read_answers()
            if time.monotonic() > keep_at_s:
                await self._keep_counts()
                keep_at_s = time.monotonic() + _LOG_KEEP_S
            await asyncio.sleep(_LOG_READ_S)

    async def _read_logs(self) -> TallyCounts:
        counts = await self._counting.read()
        self._damaged_lines = counts.damaged_lines
        return counts

    async def _read_answers(self) -> ShadowObservation | None:
        try:
            return await self._comparing.read(self.placement.kept.shadow)
        except StorageError as error:  # no data about a shadow; what serves goes on
            log.error("%s", error)
            return None

    async def _keep_counts(self) -> None:
        try:
            await self._counting.save()
        except StorageError as error:  # the logs can be counted again
            log.error("%s", error)

    # What may be asked of the target

    async def acquire(self, request: AcquireRequest) -> AcquireReply:
        return await self.placement.acquire(request)

    async def ensure_capacity(self, request: SharesRequest) -> None:
        await self.placement.ensure_capacity(request)

    async def set_shares(self, request: SharesRequest) -> None:
        await self.placement.set_shares(request)

    async def set_shadow(self, request: ShadowRequest) -> None:
        await self.placement.set_shadow(request)

    async def retire(self, request: RetireRequest) -> None:
        await self.placement.retire(request)

    async def observe(self, shoppers_since_s: float | None) -> ObservationReply:
        counts = await self._read_logs()
        seen = await self.collector.evidence(shoppers_since_s)
        kept = self.placement.kept
        labels = {version.label for version in kept.versions} | set(counts.versions) | set(seen.versions)
        observation = Observation(
            at_s=time.time(),
            shares=dict(kept.shares),
            versions={
                label: self._observed(
                    label,
                    counts.versions.get(label, VersionCounts()),
                    seen.versions.get(label, VersionEvidence()),
                )
                for label in sorted(labels)
            },
            outcomes=Counts(counts.outcomes_good, counts.outcomes_total),
            window_s=seen.window_s,
            shadow=await self._read_answers(),
        )
        return ObservationReply.of(observation)

    def _observed(self, label: str, counts: VersionCounts, seen: VersionEvidence) -> VersionObservation:
        slots = self.placement.fleet.of(label)
        return VersionObservation(
            attempts=Counts(counts.good, counts.total),
            first_attempts=Counts(counts.first_good, counts.first_total),
            within_ms={ms: Counts(counts.within_ms.get(ms, 0), counts.good) for ms in self.config.thresholds_ms},
            requests=Counts(counts.requests_good, counts.requests_total),
            impressions=Counts(seen.clicked, seen.closed),
            impressions_open=seen.open,
            shoppers=Counts(seen.shoppers_clicked, seen.shoppers),
            ready_replicas=sum(slot.ready for slot in slots),
            replicas=len(slots),
        )

    async def state(self) -> StateReply:
        process, kept = self.envoy.process, self.placement.kept
        return StateReply(
            token=kept.token,
            holder=kept.holder,
            shares=kept.shares,
            versions={version.label: version.package for version in kept.versions},
            sticky=kept.sticky,
            shadow=kept.shadow,
            replicas=tuple(
                ReplicaReply(
                    version=slot.version.label,
                    zone=slot.zone,
                    index=slot.index,
                    pid=slot.pid,
                    port=slot.port,
                    phase=slot.phase.value,
                    ready=slot.ready,
                    reasons=slot.reasons,
                )
                for slot in self.placement.fleet.slots.values()
            ),
            gateway_pid=process.pid if process.poll() is None else None,
            feedback_pid=self.collector.pid,
            damaged_lines=self._damaged_lines,
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _still_free(host: str, port: int) -> int:
    """The port of an earlier run when it can be had again, else 0."""
    if port == 0:
        return 0
    try:
        listen(host, port).close()
    except EndcapError:
        return 0
    return port


async def _run(config: SupervisorConfig, kept: Kept | None) -> None:
    supervisor = Supervisor(config, kept)
    running = asyncio.create_task(supervisor.run())
    loop = asyncio.get_running_loop()

    def end() -> None:
        # While starting there is nothing to serve out: give up at once; children are still ended in order.
        if supervisor.serves:
            supervisor.stopping.set()
        else:
            running.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    with contextlib.suppress(asyncio.CancelledError):
        await running


def run_supervisor(config: SupervisorConfig) -> None:
    """Run a target in this process until SIGTERM or SIGINT. Call it from the main thread.

    Raises:
        BusyError: another supervisor holds the folder.
        StateError: the kept state is damaged; the message names the file.
        InputError: a fixed port is in use; the message names it.
        VerificationError, CapacityError, TargetError: the stable version cannot be served.
    """
    with _reporting(config.folder), FolderLock(config.folder):
        (config.folder / FAILED_FILE).unlink(missing_ok=True)
        (config.folder / TARGET_FILE).unlink(missing_ok=True)
        asyncio.run(_run(config, read_state(config.folder)))


@contextlib.contextmanager
def _reporting(folder: Path) -> Iterator[None]:
    """Leave the error where whoever started us looks for it."""
    try:
        yield
    except EndcapError as error:
        with contextlib.suppress(StorageError):
            write_json(folder / FAILED_FILE, {"pid": os.getpid(), **error.to_json()})
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving.targets.supervisor")
    parser.add_argument("--config", type=Path, required=True, help="the target's config.json")
    parser.add_argument("--bind-parent", action="store_true", help="end when the process that started this one ends")
    options = parser.parse_args(argv)
    if options.bind_parent:
        bind_to_parent(signal.SIGTERM)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run_supervisor(read_config(options.config))
    except EndcapError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
