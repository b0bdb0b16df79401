"""Which versions have replicas, clusters and shares. Every change is fenced, and kept so that a restart resumes it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from endcap.errors import (
    CapacityError,
    EndcapError,
    FencedError,
    InputError,
    StorageError,
    TargetError,
    VerificationError,
)
from serving.gateway import Copies, Envoy, Routing, cluster_name, shadow_name, weights
from serving.targets.base import ModelVersion
from serving.targets.collector import Collector
from serving.targets.comparing import answers_until_now, drop_answers
from serving.targets.config import Kept, KeptShadow, KeptVersion, SupervisorConfig, write_state
from serving.targets.fleet import Fleet, Slot, TargetEvent
from serving.targets.wire import AcquireReply, AcquireRequest, RetireRequest, ShadowRequest, SharesRequest

__all__ = ["Placement"]

log = logging.getLogger("endcap.target")
_HEALTHY_WAIT_S = 5.0


class Placement:
    """Owns the fleet and ``F/state.json``; tells the gateway. Use from one event loop.

    Locks, always taken in this order: ``_growing`` (replicas come or go: long), ``_writing`` (the kept state changes:
    short), ``_placing`` (what the gateway reads is written).
    """

    def __init__(
        self,
        config: SupervisorConfig,
        kept: Kept,
        envoy: Envoy,
        collector: Collector,
        *,
        impression_key: Path,
        emit: Callable[[TargetEvent], None],
    ) -> None:
        self.kept = kept
        self.fleet = Fleet(config, impression_key=impression_key, emit=emit, publish=self._publish)
        self._config = config
        self._envoy = envoy
        self._collector = collector
        self._emit = emit
        self._growing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._placing = asyncio.Lock()
        self._clustered: list[str] = []
        self._shadow_clustered: str | None = None
        self._shadow_waits = False
        """A shadow that was kept has no healthy replica yet; copies that cannot go would look like its failures."""
        self._unpublished: set[str] = set()

    # The beginning

    async def begin(self, stable: ModelVersion | None) -> None:
        """Serve ``stable``, if any, or what was kept.

        Raises:
            VerificationError, CapacityError, TargetError: it cannot be served.
        """
        await self._place_clusters([], shadow=None)
        if self.kept.versions:
            await self._resume()
        elif stable is not None:
            await self._grow({stable: 1.0}, self.kept.token)
            async with self._writing:
                await self._route(shares=((stable.label, 1.0),))

    async def _resume(self) -> None:
        """Bring back what was served. A version with a share and no replica at all is a failure; fewer are not."""
        shares, shadow = dict(self.kept.shares), self.kept.shadow
        await self._place_clusters(
            [version.label for version in self.kept.versions], shadow=None if shadow is None else shadow.label
        )
        for version in self.kept.versions:
            self.fleet.add(ModelVersion(version.label, version.package), version.replicas_per_zone)
        for label in (label for label, share in shares.items() if share > 0):
            slots = self.fleet.of(label)
            try:
                await self.fleet.until_ready(slots, within_s=self._config.capacity_s, check=lambda: None)
            except (CapacityError, VerificationError) as error:
                if not any(slot.ready for slot in slots):
                    raise
                log.warning("version %s resumes with fewer replicas: %s", label, error)
        self._shadow_waits = shadow is not None
        if shares:
            await self._envoy.set_routes(self._routing(self.kept))

    async def resume_shadow(self) -> None:
        """Let copies go on as they were kept, once the shadow has a healthy replica or another is asked for."""
        while self._shadow_waits and (shadow := self.kept.shadow) is not None:
            try:
                if any(slot.ready for slot in self.fleet.of(shadow.label)) and await self._copies_can_go(shadow.label):
                    async with self._writing:
                        if self._shadow_waits and self.kept.shadow == shadow:
                            self._shadow_waits = False
                            await self._envoy.set_routes(self._routing(self.kept))
                    return
            except EndcapError as error:
                self._shadow_waits = True
                log.error("copies do not go on: %s", error)
            await asyncio.sleep(self._config.health_poll_s)

    def save(self, **changes: object) -> None:
        kept = self.kept.model_copy(update=changes)
        write_state(self._config.folder, kept)
        self.kept = kept

    # The gateway's files

    async def _place_clusters(self, labels: list[str], *, shadow: str | None) -> None:
        """The gateway's clusters are ``labels``, one of them for copies too; each one's replicas are written first."""
        async with self._placing:
            for label in labels:
                await self._envoy.set_endpoints(self.fleet.endpoints(label))
            await self._envoy.set_clusters(labels, self._collector.at, shadow=shadow)
            self._clustered, self._shadow_clustered = labels, shadow

    async def _publish(self, label: str) -> None:
        if label not in self._clustered:
            return
        first = label not in self._unpublished
        self._unpublished.add(label)
        try:
            async with self._placing:  # one writer: what is read is what is written last
                await self._envoy.set_endpoints(self.fleet.endpoints(label))
        except StorageError as error:
            if first:
                log.error("replicas of version %s not published: %s", label, error)
        else:
            self._unpublished.discard(label)

    async def publish_again(self) -> None:
        """Try what could not be written before (a full disk)."""
        for label in list(self._unpublished):
            await self._publish(label)

    # What may be asked

    def _fence(self, token: int) -> None:
        if token != self.kept.token:
            raise FencedError(f"token {token} is not in force: {self.kept.holder or 'nobody'} holds {self.kept.token}",
                              where=self._config.folder, next_step="acquire the target again")  # fmt: skip

    async def acquire(self, request: AcquireRequest) -> AcquireReply:
        async with self._writing:
            self.save(token=self.kept.token + 1, holder=request.holder)
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
            needs = {v: n for v, share in shares.items() if (n := self._config.replicas_per_zone(share))}
            before = list(self._clustered)
            fresh = [version.label for version in needs if version.label not in before]
            added = [slot for version, count in needs.items() for slot in self.fleet.add(version, count)]
            try:
                await self._place_clusters(before + fresh, shadow=self._shadow_clustered)
                wanted = [
                    self.fleet.slots[version.label, zone, index]
                    for version, count in needs.items()
                    for zone in self._config.zones
                    for index in range(count)
                ]
                await self.fleet.until_ready(wanted, within_s=self._config.capacity_s, check=lambda: self._fence(token))
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
            await self._place_clusters(clusters, shadow=self._shadow_clustered)
        except StorageError as error:  # the first error is the one to report; without a share nobody is sent there
            log.error("%s", error)
        await self.fleet.remove(leaving)

    def _keep_versions(self, needs: Mapping[ModelVersion, int]) -> None:
        kept = {version.label: version for version in self.kept.versions}
        for version, count in needs.items():
            known = kept.get(version.label)
            count = max(count, known.replicas_per_zone if known else 0)
            kept[version.label] = KeptVersion(label=version.label, package=version.package, replicas_per_zone=count)
        self.save(versions=tuple(kept.values()))

    async def set_shares(self, request: SharesRequest) -> None:
        self._fence(request.token)
        shares = {version.label: version.share for version in request.versions}
        if len(shares) != len(request.versions):
            raise InputError("a version is named twice")
        given = weights(shares)
        for label in given:
            await self._until_one_is_healthy(label, request.token)
        async with self._writing:
            self._fence(request.token)
            for label in given:
                self._need_replicas(label)
            await self._route(
                shares=tuple((label, share) for label, share in shares.items() if share > 0), sticky=request.sticky
            )
        self._emit(TargetEvent("shares_set", detail=" ".join(f"{k}={v / 100:g}%" for k, v in given.items())))

    def _need_replicas(self, label: str) -> None:
        if self.kept.version(label) is None:
            raise CapacityError(f"version {label} has no replicas", next_step="ensure its capacity first")

    async def _until_one_is_healthy(self, label: str, token: int) -> None:
        """A version that is to get requests has at least one replica that the gateway holds for healthy.

        One is enough: a share may have to move while a zone is lost. What the share needs is ensure_capacity's.
        """
        ends_at = time.monotonic() + _HEALTHY_WAIT_S
        while True:
            self._fence(token)
            self._need_replicas(label)
            if any(slot.ready for slot in self.fleet.of(label)):
                return
            if time.monotonic() > ends_at:
                raise CapacityError(f"no replica of version {label} is healthy", where=self._config.folder / "logs")
            await asyncio.sleep(0.05)

    async def _route(self, **changes: object) -> None:
        """Keep ``changes`` and put the routes they make in force: both, or neither. The caller holds ``_writing``."""
        before, waited = self.kept, self._shadow_waits
        self.save(**changes)
        self._shadow_waits = waited and "shadow" not in changes
        try:
            await self._envoy.set_routes(self._routing(self.kept))
        except EndcapError:
            # Neither a gateway nor a supervisor that starts again must find routes that nobody was told are in force.
            self._shadow_waits = waited
            with contextlib.suppress(StorageError):
                await self._envoy.write_routes(self._routing(before))
            self.save(**{name: getattr(before, name) for name in changes})
            raise

    async def set_shadow(self, request: ShadowRequest) -> None:
        """Copies go where ``request`` says once this returns; a second call with the same changes nothing."""
        self._fence(request.token)
        async with self._growing:
            self._fence(request.token)
            if request.label is None:
                await self._end_shadow(request.token)
                return
            if request.share <= 0:
                raise InputError("a shadow needs a share", next_step="give it one, or end the shadow")
            now = self.kept.shadow
            same = now is not None and (now.label, now.share) == (request.label, request.share)
            if same and not self._shadow_waits:
                return
            await self._until_one_is_healthy(request.label, request.token)
            if now is not None and now.label == request.label:
                shadow = now.model_copy(update={"share": request.share})
            else:
                shadow = KeptShadow(
                    label=request.label, share=request.share, began_at_s=time.time(),
                    answers_from=answers_until_now(self._config.folder),
                )  # fmt: skip
            before = self._shadow_clustered
            if before != shadow.label:
                await self._end_shadow(request.token)
                before = None
            try:
                await self._place_clusters(self._clustered, shadow=shadow.label)
                await self._until_copies_can_go(shadow.label, request.token)
                async with self._writing:
                    self._fence(request.token)
                    self._need_replicas(shadow.label)
                    await self._route(shadow=shadow)
            except BaseException:
                with contextlib.suppress(StorageError):
                    await asyncio.shield(self._place_clusters(self._clustered, shadow=before))
                raise
        self._emit(TargetEvent("shadow_set", shadow.label, detail=f"{shadow.share * 100:g}% of the requests"))

    async def _copies_can_go(self, label: str) -> bool:
        with contextlib.suppress(TargetError):  # a gateway that is being started again
            hosts = await self._envoy.admin.hosts()
            return any(host.cluster == shadow_name(label) and host.healthy for host in hosts)
        return False

    async def _until_copies_can_go(self, label: str, token: int) -> None:
        """The gateway has the shadow's cluster with a healthy replica: a copy dropped now would look like a failure."""
        ends_at = time.monotonic() + _HEALTHY_WAIT_S
        while True:
            self._fence(token)
            if await self._copies_can_go(label):
                return
            if time.monotonic() > ends_at:
                raise CapacityError(f"no replica of version {label} is healthy for copies",
                                    where=self._config.folder / "logs")  # fmt: skip
            await asyncio.sleep(0.02)

    async def _end_shadow(self, token: int) -> None:
        """No copies any more. The caller holds ``_growing``."""
        shadow = self.kept.shadow
        if shadow is not None:
            async with self._writing:
                self._fence(token)
                await self._route(shadow=None)
            self._emit(TargetEvent("shadow_ended", shadow.label))
        if self._shadow_clustered is not None:
            await self._place_clusters(self._clustered, shadow=None)

    async def retire(self, request: RetireRequest) -> None:
        """Copies to the version end first; then it has no share, no replicas and no cluster."""
        label = request.label
        async with self._writing:
            self._fence(request.token)
            if self.kept.version(label) is None and label not in self._clustered:
                return
            if dict(self.kept.shares).get(label, 0) > 0:
                raise TargetError(f"version {label} still has a share", next_step="give its share to another first")
            if self.kept.shadow is not None and self.kept.shadow.label == label:
                await self._route(shadow=None)
                self._emit(TargetEvent("shadow_ended", label))
            self.save(versions=tuple(version for version in self.kept.versions if version.label != label))
        async with self._growing:
            if self.kept.version(label) is not None or label not in self._clustered:
                return  # wanted again, or gone, meanwhile
            await self._drain(label)
            leaving = self.fleet.of(label)
            shadow = None if self._shadow_clustered == label else self._shadow_clustered
            await self._place_clusters([other for other in self._clustered if other != label], shadow=shadow)
            await self.fleet.remove(leaving)
        for slot in leaving:
            drop_answers(self._config.folder, slot.name)
        self._emit(TargetEvent("version_retired", label))

    async def _drain(self, label: str) -> None:
        """Wait until the gateway has no request open with the version, at most ``drain_s``."""
        ends_at = time.monotonic() + self._config.drain_s
        quiet = 0
        while time.monotonic() < ends_at and quiet < 3:
            try:
                active = await self._envoy.admin.active_requests(cluster_name(label))
            except TargetError:
                return
            quiet = quiet + 1 if active == 0 else 0
            await asyncio.sleep(0.05)

    def _routing(self, kept: Kept) -> Routing:
        """The gateway's routes for what is kept."""
        shares, sticky, shadow = dict(kept.shares), kept.sticky, None if self._shadow_waits else kept.shadow
        return Routing(
            weights(shares) if shares else {},
            sticky_header=None if sticky is None else sticky.header,
            sticky_cookie=None if sticky is None else sticky.cookie,
            copies=None if shadow is None else Copies(shadow.label, shadow.share),
        )
