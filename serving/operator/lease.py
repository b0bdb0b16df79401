"""Which replica drives: a coordination Lease, as client-go's leader election has it. Its transitions are the fence.

Clocks of other machines are not believed: a holder is silent when its record has not changed for ``lease_s`` seconds by
our own clock. A holder that cannot renew gives up by itself before another may take over.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import uuid4

from endcap.errors import TargetError
from serving.operator.objects import Json, lease_path
from serving.operator.store import Api
from serving.targets.kserve.errors import ConflictError

__all__ = ["Election", "Leadership"]

log = logging.getLogger("endcap.operator")


@dataclass(frozen=True, slots=True)
class _Record:
    holder: str
    transitions: int
    renewed_at: str
    resource_version: str


class Election:
    """One replica's part, an attempt at a time. ``now``: seconds that only grow; ``wall``: Unix time, for people."""

    def __init__(
        self, api: Api, namespace: str, name: str, identity: str, *, lease_s: float,
        now: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._api, self._namespace, self._name, self._lease_s = api, namespace, name, lease_s
        self.identity = f"{identity}_{uuid4().hex[:12]}"
        self._now, self._wall = now, wall
        self._seen: _Record | None = None
        self._seen_at_s = 0.0
        self._renewed_at_s = float("-inf")
        self.fence: int | None = None
        """The Lease's transitions while this replica has it; None while it has not."""

    def attempt(self) -> bool:
        """Take or renew the Lease; whether this replica has it."""
        try:
            self.fence = self._attempt()
        except TargetError as error:
            if self.fence is not None and self._now() - self._renewed_at_s >= self._lease_s * 2 / 3:
                log.warning("the lease could not be renewed: %s", error.what)
                self.fence = None
        return self.fence is not None

    def release(self) -> None:
        """Let the next one take it at once. The fence of who had it is not given out again."""
        if self.fence is None:
            return
        self.fence = None
        try:
            found = self._api.get(self._path)
            if found is not None and (found.get("spec") or {}).get("holderIdentity") == self.identity:
                self._api.replace(self._path, {**found, "spec": {**found["spec"], "holderIdentity": ""}})
        except TargetError as error:
            log.warning("the lease was not released: %s", error.what)

    @property
    def _path(self) -> str:
        return lease_path(self._namespace, self._name)

    def _attempt(self) -> int | None:
        found = self._api.get(self._path)
        try:
            if found is None:
                fence = 1
                self._api.create(lease_path(self._namespace), self._object({}, fence, acquired=True))
            else:
                record = _record(found)
                if record != self._seen:
                    self._seen, self._seen_at_s = record, self._now()
                mine = record.holder == self.identity
                if not mine and record.holder and self._now() - self._seen_at_s < self._lease_s:
                    return None
                fence = record.transitions if mine else record.transitions + 1
                self._api.replace(self._path, self._object(found, fence, acquired=not mine))
        except ConflictError:
            return None  # another was quicker; where it was nobody but us, the next attempt says so
        self._renewed_at_s = self._now()
        return fence

    def _object(self, found: Json, fence: int, *, acquired: bool) -> Json:
        now = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            **(found.get("spec") or {}), "holderIdentity": self.identity, "renewTime": now, "leaseTransitions": fence,
            "leaseDurationSeconds": max(1, round(self._lease_s)),
        }  # fmt: skip
        if acquired:
            spec["acquireTime"] = now
        meta = found.get("metadata") or {
            "name": self._name, "namespace": self._namespace, "labels": {"app.kubernetes.io/part-of": "endcap"},
        }  # fmt: skip
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}


def _record(found: Json) -> _Record:
    spec = found.get("spec") or {}
    return _Record(
        str(spec.get("holderIdentity") or ""), int(spec.get("leaseTransitions") or 0), str(spec.get("renewTime")),
        str(found["metadata"]["resourceVersion"]),
    )  # fmt: skip


class Leadership:
    """Keeps trying in a thread; tells when this replica begins to drive, with its fence, and when it has to stop."""

    def __init__(
        self, election: Election, *, every_s: float, begin: Callable[[int], None], end: Callable[[], None]
    ) -> None:
        self._election, self._every_s, self._begin, self._end = election, every_s, begin, end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="endcap-lease", daemon=True)
        self._fence: int | None = None
        self.beat_s = time.monotonic()
        """When it last tried."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._tell(None)
        self._election.release()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._election.attempt()
            self.beat_s = time.monotonic()
            self._tell(self._election.fence)
            self._stopping.wait(self._every_s)

    def _tell(self, fence: int | None) -> None:
        before, self._fence = self._fence, fence
        if before is not None and before != fence:
            log.warning("this replica drives no longer")
            self._end()
        if fence is not None and before != fence:
            log.info("this replica drives, with fence %d", fence)
            self._begin(fence)
