"""The feedback collector of a local target: its process, started again when it dies, and its evidence."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from endcap.errors import EndcapError, TargetError
from endcap.processes import free_port, last_line, spawn, stop
from serving.gateway import Endpoint
from serving.targets.children import exit_of, until_ready
from serving.targets.config import SupervisorConfig
from serving.targets.fleet import TargetEvent, backoff_s

__all__ = ["Collector", "CollectorEvidence", "VersionEvidence"]

_TRIES = 3
_READY_S = 15.0
_STEADY_S = 5.0
_MAX_LAST = 8

log = logging.getLogger("endcap.target")


class VersionEvidence(BaseModel):
    """One version's impressions: ``closed`` windows, those of them that were ``clicked``, and those still ``open``.

    ``shoppers``: those whose first closed impression since the asked time was this version's; ``shoppers_clicked`` of
    them clicked it.
    """

    model_config = ConfigDict(frozen=True)
    closed: int = 0
    clicked: int = 0
    open: int = 0
    shoppers: int = 0
    shoppers_clicked: int = 0


class _Evidence(BaseModel):
    model_config = ConfigDict(frozen=True)
    window_s: float
    versions: dict[str, VersionEvidence] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CollectorEvidence:
    """Counts by version label. ``window_s``: the attribution window; None where no collector runs."""

    window_s: float | None = None
    versions: Mapping[str, VersionEvidence] = field(default_factory=dict)


class Collector:
    """One collector, on one port from its first start on: the gateway retries until it is back."""

    def __init__(self, config: SupervisorConfig, *, impression_key: Path, emit: Callable[[TargetEvent], None]) -> None:
        self._config = config
        self._impression_key = impression_key
        self._emit = emit
        self._log = config.folder / "logs" / "feedback.log"
        self._client = httpx.AsyncClient(trust_env=False, timeout=1.0)
        self._process: subprocess.Popen[bytes] | None = None
        self._last: OrderedDict[str | None, CollectorEvidence] = OrderedDict()  # by the time asked from
        self.at: Endpoint | None = None

    @property
    def url(self) -> str | None:
        return None if self.at is None else f"http://{self.at.host}:{self.at.port}"

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers.

        Raises:
            TargetError: it did not, three times; with its own last words.
        """
        reason = ""
        for _ in range(_TRIES):  # another process may take the free port first
            at = Endpoint("", free_port(self._config.host), self._config.host)
            process, ready = await self._run(at)
            if ready:
                self.at = at
                return
            code = await asyncio.to_thread(stop, process, grace_s=1)
            reason = f"code {code}: {last_line(self._log)}"
        raise TargetError(f"the feedback collector does not start ({reason})", where=self._log)

    async def _run(self, at: Endpoint) -> tuple[subprocess.Popen[bytes], bool]:
        config = self._config
        argv = [
            sys.executable, "-m", str(config.feedback_module), "--database", str(config.folder / "feedback.sqlite"),
            "--impression-key", str(self._impression_key), "--window-s", f"{config.window_s:g}",
            "--host", at.host, "--port", str(at.port),
        ]  # fmt: skip
        process = self._process = spawn(argv, log=self._log, leash=True)
        url = f"http://{at.host}:{at.port}/healthz"
        return process, await until_ready(self._client, url, process, within_s=_READY_S)

    async def watch(self) -> None:
        """Start it again whenever it dies. Runs until cancelled; needs :meth:`start` to have returned."""
        at, process = self.at, self._process
        if at is None or process is None:
            return
        failures = 0
        while True:
            started_s = time.monotonic()
            code = await exit_of(process)
            self._emit(TargetEvent("feedback_died", detail=f"code {code}"))
            failures = 0 if time.monotonic() - started_s > _STEADY_S else failures + 1
            await asyncio.sleep(backoff_s(failures))
            try:
                process, ready = await self._run(at)
                if ready:
                    self._emit(TargetEvent("feedback_ready"))
                else:
                    await asyncio.to_thread(stop, process, grace_s=1)
            except EndcapError as error:
                log.error("%s", error)

    async def evidence(self, shoppers_since_s: float | None = None) -> CollectorEvidence:
        """Counts by version since the collector's database was made: while it is away, the last ones still hold.

        Args:
            shoppers_since_s: Unix time; count shoppers by their first closed impression since then. None: none.

        Raises:
            TargetError: it is away and there are no last ones for the same ``shoppers_since_s``; counts of zero would
                make all that was counted before look new when it is back.
        """
        if self.url is None:
            return CollectorEvidence()
        asked = None if shoppers_since_s is None else f"{shoppers_since_s:.6f}"
        query = "" if asked is None else f"?shoppers_since_s={asked}"
        try:
            response = await self._client.get(f"{self.url}/v1/evidence{query}")
            response.raise_for_status()
            found = _Evidence.model_validate_json(response.content)
            self._last[asked] = CollectorEvidence(found.window_s, found.versions)
        except (httpx.HTTPError, ValidationError) as error:
            log.warning("no evidence from the feedback collector: %r", error)
            if asked not in self._last:
                raise TargetError("the feedback collector does not answer", where=self._log) from error
        self._last.move_to_end(asked)
        if len(self._last) > _MAX_LAST:
            self._last.popitem(last=False)
        return self._last[asked]

    async def stop(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(stop, self._process, grace_s=3)
        await self._client.aclose()
