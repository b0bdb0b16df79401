"""What rollouts on an InferenceService have in common, whatever mode KServe serves it in.

Every write is a server-side apply of the fields that are ours, on the very object that the fence was read in: a writer
that slept while another acquired the service is refused by the API server. What is to be gone back to, and what was
written last, is kept in the service's Lease; nothing is kept here that a new process would miss.
"""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

from endcap.errors import CapacityError, EndcapError, FencedError, TargetError, VerificationError
from serving.targets.base import Counts, ModelVersion, Observation, ShadowObservation, StickyKey, VersionObservation
from serving.targets.kserve import plan
from serving.targets.kserve.cluster import Cluster, Json, path_of
from serving.targets.kserve.delivery import Delivery
from serving.targets.kserve.errors import ConflictError, Reason, ServiceError
from serving.targets.kserve.names import FENCE_ANNOTATION, ISVC_LABEL, REST_ANNOTATION, VERSION_LABEL, lease_name
from serving.targets.kserve.plan import Spec, There
from serving.targets.kserve.reading import Record, read_record
from serving.targets.kserve.telemetry import NoTelemetry, Telemetry
from serving.targets.kserve.waits import Patience

__all__ = ["TRIES", "ServiceTarget", "lost_of", "said"]

log = logging.getLogger("endcap.target")
TRIES = 20
"""Of a write that finds the object changed: KServe writes its status all the time while pods come and go."""
_PACKAGE_EXIT = VerificationError.exit_code


class Held(Protocol):
    """An InferenceService as read. ``token``: the fence; ``writers``: who wrote it last, beside us and KServe."""

    @property
    def uid(self) -> str: ...
    @property
    def resource_version(self) -> str: ...
    @property
    def spec(self) -> Spec: ...
    @property
    def token(self) -> int: ...
    @property
    def writers(self) -> str: ...


S = TypeVar("S", bound=Held)


class ServiceTarget(ABC, Generic[S]):
    """One service. Implements :class:`serving.targets.base.Target`; safe to use from one thread at a time."""

    def __init__(
        self, cluster: Cluster, service: str, namespace: str, delivery: Delivery, *, telemetry: Telemetry | None,
        patience: Patience, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.service, self.namespace = service, namespace
        self._cluster, self._delivery = cluster, delivery
        self._telemetry: Telemetry = telemetry or NoTelemetry()
        self._patience, self._clock = patience, clock
        self._copied: dict[str, VersionObservation] = {}
        """By version, what it did with copies of requests: that is no shopper's."""
        self._where = f"inferenceservice {namespace}/{service}"

    # ---- what differs by mode ----

    @abstractmethod
    def check(self) -> None:
        """What has to be there before anything is changed.

        Raises:
            ServiceError: something of it is not; it says what, and what to do.
        """

    def check_asked(self, *, sticky: StickyKey | None, shadow: bool, baseline: bool) -> None:
        """Whether a rollout asks for what this mode can never do, whatever else the service is given.

        Raises:
            InputError: it does.
        """

    @abstractmethod
    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None: ...

    @abstractmethod
    def set_shares(
        self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None
    ) -> None: ...

    @abstractmethod
    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None: ...

    @abstractmethod
    def retire(self, label: str, *, token: int) -> None: ...

    @abstractmethod
    def _read(self) -> S: ...

    @abstractmethod
    def _now(self) -> tuple[There, S]: ...

    @abstractmethod
    def _body(self, service: S, wish: Spec) -> Json:
        """The fields of ``wish`` that are ours, for a server-side apply that fails when the service has changed."""

    @abstractmethod
    def _trouble(self, there: There, service: S, label: str) -> tuple[str, int, int | None]:
        """Why a version is not ready, how often it started again, and the exit code of what ended last."""

    def _before_taken(self) -> None:
        """What is written before a token is given out."""

    def _taken(self, token: int) -> None:
        """What an older writer may have read is to be old too."""

    def _copies_of(self, there: There, service: S) -> str | None:
        """The version that is sent copies of requests."""
        return None

    # ---- what may be asked in every mode ----

    def acquire(self, holder: str) -> int:
        """See :class:`~serving.targets.base.Target`.

        Raises:
            ServiceError: there is nothing here that a rollout could be done on; nothing was changed.
        """
        self.check()
        self._before_taken()
        for _ in range(TRIES):
            lease, service = self._lease(), self._read()
            token = max(_transitions(lease), service.token) + 1
            spec = {"holderIdentity": holder[:200], "leaseTransitions": token, "acquireTime": _micro(self._clock())}
            try:
                if lease is None:
                    self._cluster.create(path_of("leases", self.namespace), self._new_lease(spec))
                else:
                    self._cluster.replace(self._lease_path, {**lease, "spec": {**(lease.get("spec") or {}), **spec}})
                self._cluster.merge(
                    f"{self._path}/status",
                    {"metadata": {"resourceVersion": service.resource_version},
                     "status": {"annotations": {FENCE_ANNOTATION: str(token)}}},
                )  # fmt: skip
            except ConflictError:
                self._patience.sleep(0.05)
                continue
            self._taken(token)
            return token
        raise TargetError("it is written too often for a token to be taken", where=self._where)

    def observe(self, *, shoppers_since_s: float | None = None) -> Observation:
        """See :class:`~serving.targets.base.Target`. ``shares`` are those set; who received what is counted."""
        there, service = self._now()
        spec = there.spec
        labels = [spec.stable.label, *(canary.predictor.label for canary in spec.canaries)]
        counted = self._telemetry.observe(self._service_pods(), shoppers_since_s=shoppers_since_s)
        copied_to = self._copies_of(there, service)
        versions: dict[str, VersionObservation] = {}
        shadow = None
        for label in dict.fromkeys([*counted.versions, *labels]):
            canary, workload = spec.canary(label), there.workloads.get(label)
            seen = counted.version(label)
            if label == copied_to:
                self._copied[label] = seen
                shadow = ShadowObservation(label, seen.attempts, seen.within_ms, pairs=seen.attempts.good)
            versions[label] = replace(
                _beside(seen, self._copied.get(label)),
                ready_replicas=0 if workload is None else workload.serving,
                replicas=canary.replicas if canary and canary.replicas else 0 if workload is None else workload.wanted,
            )
        shares = {label: percent / 100 for label, percent in spec.percents.items() if percent > 0}
        outcomes = sum((one.requests for one in versions.values()), Counts())
        return Observation(self._clock(), shares, versions, outcomes, counted.window_s, shadow)

    # ---- waiting ----

    def _begin_counting(self) -> None:
        """Before the first request of a version."""
        with contextlib.suppress(EndcapError):
            self._telemetry.read(self._service_pods())

    def _until_grown(self, token: int, needed: Mapping[str, int], wished: Callable[[There, S], Spec], *,
                     back: bool) -> None:  # fmt: skip
        """Write what is ``wished`` for, as things come, until each version has the replicas that it needs."""

        def look() -> bool | None:
            there, service = self._there(token, back=back)
            wish = wished(there, service)
            if wish != there.spec:
                self._apply(service, wish, token)
                return None
            if not plan.short_of(there, needed):
                return True
            self._check_starting(there, service, needed)
            return None

        patience = self._patience
        if patience.until(lambda: _retried(look), within_s=patience.capacity_s):
            return
        there, service = self._there(token, back=back)
        missing = plan.short_of(there, needed)
        if not missing:
            return
        label = next(iter(missing))
        reason, _, _ = self._trouble(there, service, label)
        raise CapacityError(
            f"version {label} has {there.available(label)} of {needed[label]} replicas after "
            f"{patience.capacity_s:g} s: {_readable(reason)}", where=self._where,
            next_step="see kubectl describe pods -l " + f"{VERSION_LABEL}={label}",
        )  # fmt: skip

    def _check_starting(self, there: There, service: S, needed: Mapping[str, int]) -> None:
        """Give up at once on a server that ends while it starts, however long one may wait for a node."""
        for label in plan.short_of(there, needed):
            reason, restarts, code = self._trouble(there, service, label)
            if code is None or restarts < self._patience.restarts:
                continue
            kind = VerificationError if code == _PACKAGE_EXIT else CapacityError
            raise kind(f"version {label} does not start: {reason}", where=self._where,
                       next_step=f"see kubectl logs --previous -l {VERSION_LABEL}={label}")  # fmt: skip

    def _until_served(self, labels: list[str], token: int) -> None:
        """Each version that is to get requests has a pod that they are sent to: else others get them, silently."""

        def look() -> There | None:
            there, _ = self._there(token, back=True)
            stable = there.spec.stable.label
            ok = all(there.available(one) > 0 and (one == stable or one in there.ready) for one in labels)
            return there if ok else None

        if self._patience.until(look, within_s=self._patience.healthy_s) is None:
            there, _ = self._there(token, back=True)
            held = (*there.ready, there.spec.stable.label)
            short = [one for one in labels if there.available(one) == 0 or one not in held]
            raise CapacityError(f"version {', '.join(short or labels)} has no ready replica", where=self._where,
                                next_step="ensure its capacity first")  # fmt: skip

    # ---- what is there ----

    @property
    def _path(self) -> str:
        return path_of("inferenceservices", self.namespace, self.service)

    @property
    def _lease_path(self) -> str:
        return path_of("leases", self.namespace, lease_name(self.service))

    def _lease(self) -> Json | None:
        return self._cluster.get(self._lease_path)

    def _record(self, uid: str) -> Record:
        lease = self._lease() or {}
        text = (lease.get("metadata", {}).get("annotations") or {}).get(REST_ANNOTATION)
        return read_record(text, uid=uid, where=f"lease {self.namespace}/{lease_name(self.service)}")

    def _there(self, token: int, *, back: bool = False) -> tuple[There, S]:
        """What is there, if ``token`` is in force and nobody else has changed what is ours.

        ``back``: on the way to stable alone, what was done to canaries by hand is no obstacle.
        """
        there, service = self._now()
        if service.token != token:
            raise FencedError(f"token {token} is not in force: {service.token} is", where=self._where,
                              next_step="acquire the target again")  # fmt: skip
        wishes = self._record(service.uid).wishes
        if wishes and there.spec not in wishes:
            same = any(wish.stable == there.spec.stable for wish in wishes)
            if not (back and same):
                changed = _changes(wishes[-1], there.spec)
                by = f" ({service.writers})" if service.writers else ""
                raise ServiceError(Reason.EDITED, f"somebody else changed what the rollout is about: {changed}{by}",
                                   where=self._where, next_step="put it back, or abort the rollout and start another "
                                   "from what serves now")  # fmt: skip
        return there, service

    def _service_pods(self) -> list[Json]:
        return self._cluster.items(path_of("pods", self.namespace), labels={ISVC_LABEL: self.service}) or []

    # ---- writing ----

    def _write(self, token: int, planned: Callable[[There], Spec], *, back: bool = False) -> Spec:
        """Plan on what is there and write it, again when somebody wrote in between. What is there already is not."""
        for _ in range(TRIES):
            there, service = self._there(token, back=back)
            wish = planned(there)
            if wish == there.spec:
                self._settle(service, wish)
                return wish
            with contextlib.suppress(ConflictError):
                self._apply(service, wish, token)
                self._settle(service, wish)
                return wish
            self._patience.sleep(0.05)
        raise TargetError("it is written too often for a change of ours to get through", where=self._where)

    def _apply(self, service: S, wish: Spec, token: int) -> None:
        record = self._record(service.uid)
        rest = record.rest
        if rest is None and wish.canaries:
            there, _ = self._now()
            rest = plan.begin_rest(there)
        self._keep(replace(record, rest=rest, wishes=(service.spec, wish)), token)
        self._cluster.apply(self._path, self._body(service, wish))

    def _settle(self, service: S, wish: Spec) -> None:
        """With no canary left the rollout is over, and what it was begun from is forgotten."""
        record = self._record(service.uid)
        if not wish.canaries and (record.rest is not None or record.wishes):
            self._keep(Record(service.uid), service.token)

    def _keep(self, record: Record, token: int) -> None:
        lease = self._lease()
        if lease is None:
            raise TargetError("its Lease is gone", where=f"lease {self.namespace}/{lease_name(self.service)}",
                              next_step="acquire the target again")  # fmt: skip
        if _transitions(lease) != token:
            raise FencedError(f"token {token} is not in force: {_transitions(lease)} is", where=self._where)
        metadata = lease["metadata"]
        annotations = {**(metadata.get("annotations") or {}), REST_ANNOTATION: record.to_text()}
        self._cluster.replace(self._lease_path, {**lease, "metadata": {**metadata, "annotations": annotations}})

    def _new_lease(self, spec: Json) -> Json:
        return {
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec,
            "metadata": {"name": lease_name(self.service), "namespace": self.namespace,
                         "labels": {"app.kubernetes.io/part-of": "endcap", "endcap.dev/service": self.service}},
        }  # fmt: skip


def _beside(seen: VersionObservation, copied: VersionObservation | None) -> VersionObservation:
    """``seen`` without what was copies of requests."""
    if copied is None:
        return seen
    within = {ms: _less(counts, copied.within_ms.get(ms, Counts())) for ms, counts in seen.within_ms.items()}
    return replace(seen, attempts=_less(seen.attempts, copied.attempts), requests=_less(seen.requests, copied.requests),
                   first_attempts=_less(seen.first_attempts, copied.first_attempts), within_ms=within)  # fmt: skip


def _less(all_of: Counts, some: Counts) -> Counts:
    good = max(0, all_of.good - some.good)
    return Counts(good, good + max(0, (all_of.total - all_of.good) - (some.total - some.good)))


def _retried(look: Callable[[], bool | None]) -> bool | None:
    """``look``, to be repeated where somebody wrote in between."""
    try:
        return look()
    except ConflictError:
        return None


def _transitions(lease: Json | None) -> int:
    return int(((lease or {}).get("spec") or {}).get("leaseTransitions") or 0)


def _micro(at_s: float) -> str:
    whole, part = divmod(at_s, 1)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{int(part * 1e6):06d}Z"


def lost_of(there: There, labels: Iterable[str]) -> list[str]:
    """Of versions that are to get requests, canaries that are not ready any more."""
    return [label for label in labels if label != there.spec.stable.label and label not in there.ready]


def said(given: Mapping[str, int]) -> str:
    return ", ".join(f"{percent} % for version {label}" for label, percent in given.items())


def _readable(reason: str) -> str:
    """The scheduler's "0/3 nodes are available" as people say it."""
    return reason.replace("/", " of ", 1) if reason[:1].isdigit() and " nodes are available" in reason else reason


def _changes(wish: Spec, now: Spec) -> str:
    found = []
    if wish.stable != now.stable:
        found.append(f"the predictor is version {now.stable.label} ({now.stable.storage_uri}), and was "
                     f"{wish.stable.label} ({wish.stable.storage_uri})")  # fmt: skip
    if wish.canaries != now.canaries:
        shown = [", ".join(f"version {c.predictor.label} ({c.predictor.storage_uri}): {c.replicas} replicas, "
                           f"{c.percent} %" for c in one.canaries) or "none" for one in (now, wish)]  # fmt: skip
        found.append(f"the canaries are {shown[0]}, and were {shown[1]}")
    if (wish.min_replicas, wish.max_replicas) != (now.min_replicas, now.max_replicas):
        found.append(f"minReplicas is {now.min_replicas} and maxReplicas {now.max_replicas}, and they were "
                     f"{wish.min_replicas} and {wish.max_replicas}")  # fmt: skip
    return "; ".join(found)
