"""The process that owns a local target: Envoy, the feedback collector and every replica are its children.

``python -m serving.targets.supervisor --config F/config.json [--bind-parent]``. It ends them in order on SIGTERM, and
the kernel ends them when it is killed. What was achieved (fencing token, versions, shares) is kept in
``F/state.json``; one that starts again resumes with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path

from endcap.errors import (
    CapacityError,
    EndcapError,
    FencedError,
    InputError,
    StateError,
    StorageError,
    TargetError,
    VerificationError,
)
from endcap.files import FolderLock, JsonLines, write_atomic, write_json
from endcap.processes import bind_to_parent
from serving.gateway import AttemptCounts, Envoy, GatewaySettings, Tail, Tally, cluster_name, weights
from serving.targets.base import Counts, ModelVersion, Observation, VersionObservation
from serving.targets.children import exit_of
from serving.targets.collector import Collector, VersionEvidence
from serving.targets.config import (
    FAILED_FILE,
    TARGET_FILE,
    Kept,
    KeptVersion,
    SupervisorConfig,
    TargetFile,
    read_config,
    read_state,
    write_state,
)
from serving.targets.control import control_app, serve_control
from serving.targets.fleet import Fleet, Slot, TargetEvent, backoff_s
from serving.targets.wire import (
    AcquireReply,
    AcquireRequest,
    ObservationReply,
    ReplicaReply,
    RetireRequest,
    SharesRequest,
    StateReply,
)

__all__ = ["Supervisor", "main", "run_supervisor"]

log = logging.getLogger("endcap.target")
_LOG_READ_S = 1.0
_HEALTHY_WAIT_S = 5.0


class Supervisor:
    """See the module. One instance, one event loop, in the main thread (children are bound to the thread)."""

    def __init__(self, config: SupervisorConfig, kept: Kept | None) -> None:
        self.config = config
        self.kept = kept or Kept()
        self._fresh = kept is None or not kept.versions
        self._events = JsonLines(config.records / "target.jsonl")
        port = config.gateway_port or _still_free(config.host, self.kept.gateway_port)
        settings = GatewaySettings(
            config.folder / "xds", config.records, zones=config.zones, host=config.host, port=port
        ).patient_for(config.thresholds_ms)
        self.envoy = Envoy(settings, log=config.folder / "logs" / "envoy.log")
        self._impression_key = _impression_key(config.folder)
        self.fleet = Fleet(config, impression_key=self._impression_key, emit=self.emit, publish=self._publish)
        if kept is None:
            self.kept = Kept(attempts_offset=_size(settings.attempts_log), access_offset=_size(settings.access_log))
        self._attempts = Tail(settings.attempts_log, offset=self.kept.attempts_offset)
        self._outcomes = Tail(settings.access_log, offset=self.kept.access_offset)
        self.tally = Tally(config.thresholds_ms)
        self._tally_lock = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._growing = asyncio.Lock()
        self._placing = asyncio.Lock()
        self._unpublished: set[str] = set()
        self._clustered: list[str] = []
        self.collector = Collector(config, impression_key=self._impression_key, emit=self.emit)
        self._tasks: set[asyncio.Task[None]] = set()
        self._control_token = secrets.token_urlsafe(32)
        self._control_url = ""
        self._started_at_s = time.time()
        self._fault: str | None = None
        self.stopping = asyncio.Event()

    # Life

    async def run(self) -> None:
        """Start everything, serve until :attr:`stopping`, and end everything in order, whatever happened."""
        listener = _listen(self.config.host, self.config.control_port, "control")
        try:
            if self.config.gateway_port:
                _listen(self.config.host, self.config.gateway_port, "gateway").close()
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
        await self._place_clusters([])
        if self._fresh:
            if self.config.stable is not None:
                stable = ModelVersion(self.config.stable.label, self.config.stable.package)
                await self._grow({stable: 1.0}, self.kept.token)
                await self._share({stable.label: 1.0})
        else:
            await self._resume()
        self._save(gateway_port=self.envoy.settings.port)

    async def _resume(self) -> None:
        """Bring back what was served. A version with a share and no replica at all is a failure; fewer are not."""
        shares = dict(self.kept.shares)
        labels = [version.label for version in self.kept.versions]
        await self._place_clusters(labels)
        for version in self.kept.versions:
            self.fleet.add(ModelVersion(version.label, version.package), version.replicas_per_zone)
        for label in (label for label, share in shares.items() if share > 0):
            slots = self.fleet.of(label)
            try:
                await self.fleet.until_ready(slots, within_s=self.config.capacity_s, check=lambda: None)
            except (CapacityError, VerificationError) as error:
                if not any(slot.ready for slot in slots):
                    raise
                log.warning("version %s resumes with fewer replicas: %s", label, error)
        if shares:
            await self.envoy.set_routes(weights(shares))

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.envoy.stop()
        await self.fleet.close()
        await self.collector.stop()
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

    def _save(self, **changes: object) -> None:
        kept = self.kept.model_copy(update=changes)
        write_state(self.config.folder, kept)
        self.kept = kept

    def _write_target_file(self) -> None:
        document = TargetFile(
            pid=os.getpid(), gateway_url=self.envoy.url, control_url=self._control_url,
            control_token=self._control_token, envoy_admin_url=self.envoy.admin.url,
            feedback_url=self.collector.url,
            records=self.config.records, public_key=self.config.public_key, started_at_s=self._started_at_s,
        )  # fmt: skip
        write_json(self.config.folder / TARGET_FILE, document.model_dump(mode="json"), mode=0o600)

    # The gateway

    async def _place_clusters(self, labels: list[str]) -> None:
        """The gateway's clusters are ``labels``; each one's replicas are written first."""
        async with self._placing:
            for label in labels:
                await self.envoy.set_endpoints(self.fleet.endpoints(label))
            await self.envoy.set_clusters(labels, self.collector.at)
            self._clustered = labels

    async def _publish(self, label: str) -> None:
        if label not in self._clustered:
            return
        first = label not in self._unpublished
        self._unpublished.add(label)
        try:
            async with self._placing:  # one writer: what is read is what is written last
                await self.envoy.set_endpoints(self.fleet.endpoints(label))
        except StorageError as error:  # tried again with each look at the gateway's health
            if first:
                log.error("replicas of version %s not published: %s", label, error)
        else:
            self._unpublished.discard(label)

    async def _watch_gateway(self) -> None:
        failures = 0
        while True:
            code = await exit_of(self.envoy.process)
            self.emit(TargetEvent("gateway_died", detail=f"code {code}"))
            while True:
                try:
                    await self.envoy.start()
                    break
                except TargetError as error:
                    failures += 1
                    log.error("%s", error)
                    await asyncio.sleep(backoff_s(failures))
            failures = 0
            self._write_target_file()

    async def _watch_health(self) -> None:
        while True:
            with contextlib.suppress(TargetError):  # a gateway that is being started again
                await self.fleet.saw(await self.envoy.admin.hosts())
            for label in list(self._unpublished):
                await self._publish(label)
            await asyncio.sleep(self.config.health_poll_s)

    async def _watch_logs(self) -> None:
        while True:
            await self._read_logs()
            await asyncio.sleep(_LOG_READ_S)

    async def _read_logs(self) -> None:
        async with self._tally_lock:
            self.tally.add_attempts(await asyncio.to_thread(self._attempts.lines))
            self.tally.add_outcomes(await asyncio.to_thread(self._outcomes.lines))

    # What may be asked of the target

    def _fence(self, token: int) -> None:
        if token != self.kept.token:
            raise FencedError(f"token {token} is not in force: {self.kept.holder or 'nobody'} holds {self.kept.token}",
                              where=self.config.folder, next_step="acquire the target again")  # fmt: skip

    async def acquire(self, request: AcquireRequest) -> AcquireReply:
        async with self._writing:
            self._save(token=self.kept.token + 1, holder=request.holder)
            return AcquireReply(token=self.kept.token)

    async def ensure_capacity(self, request: SharesRequest) -> None:
        await self._grow(request.to_domain(), request.token)

    async def _grow(self, shares: Mapping[ModelVersion, float], token: int) -> None:
        self._fence(token)
        async with self._growing:
            self._fence(token)
            for version in shares:
                known = self.kept.version(version.label)
                if known is not None and known.package != version.package:
                    raise InputError(f"version {version.label} is served from {known.package}, not {version.package}",
                                     next_step="give another package another version")  # fmt: skip
            needs = {v: n for v, share in shares.items() if (n := self.config.replicas_per_zone(share))}
            before = list(self._clustered)
            fresh = [version.label for version in needs if version.label not in before]
            added = [slot for version, count in needs.items() for slot in self.fleet.add(version, count)]
            try:
                await self._place_clusters(before + fresh)
                wanted = [
                    self.fleet.slots[version.label, zone, index]
                    for version, count in needs.items()
                    for zone in self.config.zones
                    for index in range(count)
                ]
                await self.fleet.until_ready(wanted, within_s=self.config.capacity_s, check=lambda: self._fence(token))
                async with self._writing:
                    self._fence(token)
                    self._keep_versions(needs)
            except BaseException:
                await asyncio.shield(self._undo(before, added))
                raise

    async def _undo(self, clusters: list[str], added: list[Slot]) -> None:
        """Take back the replicas of an attempt at capacity that failed; shares were never touched."""
        leaving = [slot for slot in self.fleet.slots.values() if slot in added]
        for slot in leaving:
            self.fleet.slots.pop((slot.version.label, slot.zone, slot.index), None)
        try:
            await self._place_clusters(clusters)
        except StorageError as error:  # the first error is the one to report; without a share nobody is sent there
            log.error("%s", error)
        await self.fleet.remove(leaving)

    def _keep_versions(self, needs: Mapping[ModelVersion, int]) -> None:
        kept = {version.label: version for version in self.kept.versions}
        for version, count in needs.items():
            known = kept.get(version.label)
            count = max(count, known.replicas_per_zone if known else 0)
            kept[version.label] = KeptVersion(label=version.label, package=version.package, replicas_per_zone=count)
        self._save(versions=tuple(kept.values()))

    async def set_shares(self, request: SharesRequest) -> None:
        self._fence(request.token)
        shares = {version.label: version.share for version in request.versions}
        if len(shares) != len(request.versions):
            raise InputError("a version is named twice")
        given = weights(shares)
        for label in given:
            await self._need_capacity(label, request.token)
        async with self._writing:
            self._fence(request.token)
            await self._share(shares)

    async def _need_capacity(self, label: str, token: int) -> None:
        """A version that is to get requests has at least one replica that the gateway holds for healthy.

        One is enough: a share may have to move while a zone is lost. What the share needs is ensure_capacity's.
        """
        ends_at = time.monotonic() + _HEALTHY_WAIT_S
        while True:
            self._fence(token)
            if self.kept.version(label) is None:
                raise CapacityError(f"version {label} has no replicas", next_step="ensure its capacity first")
            if any(slot.ready for slot in self.fleet.of(label)):
                return
            if time.monotonic() > ends_at:
                raise CapacityError(f"no replica of version {label} is healthy", where=self.config.folder / "logs")
            await asyncio.sleep(0.05)

    async def _share(self, shares: Mapping[str, float]) -> None:
        before = self.kept.shares
        given = weights(shares)
        self._save(shares=tuple((label, share) for label, share in shares.items() if share > 0))
        try:
            await self.envoy.set_routes(given)
        except TargetError:
            self._save(shares=before)
            # A gateway that starts again must not find shares that nobody was told are in force.
            await self.envoy.write_routes(weights(dict(before)) if before else {})
            raise
        self.emit(TargetEvent("shares_set", detail=" ".join(f"{k}={v / 100:g}%" for k, v in given.items())))

    async def retire(self, request: RetireRequest) -> None:
        label = request.label
        async with self._writing:
            self._fence(request.token)
            if self.kept.version(label) is None and label not in self._clustered:
                return
            if dict(self.kept.shares).get(label, 0) > 0:
                raise TargetError(f"version {label} still has a share", next_step="give its share to another first")
            self._save(versions=tuple(version for version in self.kept.versions if version.label != label))
        async with self._growing:
            if self.kept.version(label) is not None:
                return  # wanted again meanwhile
            await self._drain(label)
            leaving = self.fleet.of(label)
            await self._place_clusters([other for other in self._clustered if other != label])
            await self.fleet.remove(leaving)
        self.emit(TargetEvent("version_retired", label))

    async def _drain(self, label: str) -> None:
        """Wait until the gateway has no request open with the version, at most ``drain_s``."""
        ends_at = time.monotonic() + self.config.drain_s
        quiet = 0
        while time.monotonic() < ends_at and quiet < 3:
            try:
                active = await self.envoy.admin.active_requests(cluster_name(label))
            except TargetError:
                return
            quiet = quiet + 1 if active == 0 else 0
            await asyncio.sleep(0.05)

    async def observe(self) -> ObservationReply:
        await self._read_logs()
        impressions = await self.collector.evidence()
        attempts = self.tally.versions()
        labels = {v.label for v in self.kept.versions} | set(attempts) | set(impressions)
        observation = Observation(
            at_s=time.time(),
            shares=dict(self.kept.shares),
            versions={
                label: self._observed(label, attempts.get(label), impressions.get(label)) for label in sorted(labels)
            },
            outcomes=Counts(self.tally.outcomes_good, self.tally.outcomes_total),
        )
        return ObservationReply.of(observation)

    def _observed(
        self, label: str, attempts: AttemptCounts | None, impressions: VersionEvidence | None
    ) -> VersionObservation:
        counts, seen = attempts or AttemptCounts(), impressions or VersionEvidence()
        slots = self.fleet.of(label)
        return VersionObservation(
            attempts=Counts(counts.good, counts.total),
            within_ms={ms: Counts(counts.within_ms.get(ms, 0), counts.good) for ms in self.config.thresholds_ms},
            impressions=Counts(seen.clicked, seen.closed),
            impressions_open=seen.open,
            ready_replicas=sum(slot.ready for slot in slots),
            replicas=len(slots),
        )

    async def state(self) -> StateReply:
        process = self.envoy.process
        return StateReply(
            token=self.kept.token,
            holder=self.kept.holder,
            shares=self.kept.shares,
            versions={version.label: version.package for version in self.kept.versions},
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
                for slot in self.fleet.slots.values()
            ),
            gateway_pid=process.pid if process.poll() is None else None,
            feedback_pid=self.collector.pid,
            damaged_lines=self.tally.damaged_lines,
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _listen(host: str, port: int, name: str) -> socket.socket:
    """A listening socket. Raises InputError, naming the port, when it is in use."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if error.errno == errno.EADDRINUSE else "may not be opened"
            raise InputError(f"port {port} {why}", where=f"{name} port",
                             next_step="choose another port, or 0 for any free one") from error  # fmt: skip
        raise TargetError(f"{error.strerror}", where=f"{name} {host}:{port}") from error
    return listener


def _still_free(host: str, port: int) -> int:
    """The port of an earlier run when it can be had again, else 0."""
    if port == 0:
        return 0
    try:
        _listen(host, port, "gateway").close()
    except EndcapError:
        return 0
    return port


def _impression_key(folder: Path) -> Path:
    path = folder / "impression.key"
    if not path.exists():
        write_atomic(path, secrets.token_hex(32) + "\n", mode=0o600)
    elif path.stat().st_size == 0:
        raise StateError("the impression key is empty", where=path)
    return path


async def _run(config: SupervisorConfig, kept: Kept | None) -> None:
    supervisor = Supervisor(config, kept)
    running = asyncio.create_task(supervisor.run())
    loop = asyncio.get_running_loop()

    def end() -> None:
        # While starting there is nothing to serve out: give up at once; children are still ended in order.
        if supervisor._control_url:
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
