"""An InferenceService in Knative mode as a target: two versions, one of them the newest revision.

What is to be written next is planned in :mod:`serving.targets.kserve.knative`, which also says what KServe and Knative
do; how it is written, and fenced, is said in :mod:`serving.targets.kserve.service`. Knative's own autoscaler gives
revisions their pods: what is waited for is that a revision is ready, which it is with the ``minReplicas`` pods that
the service asks for. No test here has run on a Knative: what is tested are the objects.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from endcap.errors import CapacityError, EndcapError, FencedError, InputError, TargetError
from serving.targets.base import ModelVersion, StickyKey
from serving.targets.kserve import knative, plan
from serving.targets.kserve.cluster import Cluster, Json, path_of
from serving.targets.kserve.delivery import Delivery
from serving.targets.kserve.errors import Reason, ServiceError
from serving.targets.kserve.knative import RevisedService, Revision
from serving.targets.kserve.names import BASELINE, ISVC_LABEL
from serving.targets.kserve.plan import Predictor, Spec, There, Workload
from serving.targets.kserve.reading import trouble_of
from serving.targets.kserve.service import ServiceTarget, lost_of, said
from serving.targets.kserve.telemetry import Telemetry, is_ready
from serving.targets.kserve.waits import Patience

__all__ = ["KnativeTarget"]

log = logging.getLogger("endcap.target")
_REVISION_LABEL = "serving.knative.dev/revision"
"""Knative's, on a revision's pods."""


class KnativeTarget(ServiceTarget[RevisedService]):
    """One service in Knative mode. ``delivery`` says where versions lie that are not served yet."""

    def __init__(
        self,
        cluster: Cluster,
        service: str,
        namespace: str,
        delivery: Delivery,
        *,
        telemetry: Telemetry | None = None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(cluster, service, namespace, delivery, telemetry=telemetry, patience=patience, clock=clock)

    # ---- what may be asked ----

    def check(self) -> None:
        """See :class:`.ServiceTarget`."""
        self._read()
        if self._revisions() is None:
            raise ServiceError(Reason.NO_KNATIVE, "the cluster has no Knative (no Revisions of serving.knative.dev)",
                               where=self._where, next_step="install Knative Serving, or make the service anew in "
                               "Standard mode")  # fmt: skip

    def check_asked(self, *, sticky: StickyKey | None, shadow: bool, baseline: bool) -> None:
        """See :class:`.ServiceTarget`."""
        if sticky is not None:
            raise _cannot("keep shoppers to a version", "sticky: {} in the Rollout leaves it out")
        if shadow:
            raise _cannot("copy requests to a version", "leave shadow out")
        if baseline:
            raise _cannot("split traffic between more than two versions", "leave baseline out")

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        """See :class:`~serving.targets.base.Target`."""
        wanted = [version.label for version, share in shares.items() if share > 0]
        there, _ = self._there(token, back=True)
        before, stable = there.spec, there.spec.stable.label
        others = [label for label in wanted if label != stable]
        self.check_asked(sticky=None, shadow=False, baseline=len(others) > 1 or stable + BASELINE in others)
        back = not others
        there, service = self._there(token, back=back)
        needed = {label: max(1, self._least(label, service)) for label in wanted}
        candidate = self._candidate(others[0], there.spec) if others else None

        def wished(there: There, service: RevisedService) -> Spec:
            if candidate is not None:
                return knative.forward(service, candidate)
            return knative.returned(there.spec) if plan.short_of(there, needed) else there.spec

        if candidate is not None:  # what was just made of stable is not told of at once
            self._patience.until(lambda: self._rolled_out(token), within_s=self._patience.route_s)
        try:
            self._until_grown(token, needed, wished, back=back)
        except FencedError:
            raise
        except EndcapError:
            self._undo(before, token)
            raise
        self._begin_counting()

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        """See :class:`~serving.targets.base.Target`."""
        by_label = {version.label: share for version, share in shares.items() if share > 0}
        there, _ = self._there(token, back=True)
        stable = there.spec.stable.label
        others = len(by_label.keys() - {stable})
        self.check_asked(sticky=sticky if len(by_label) > 1 else None, shadow=False, baseline=others > 1)
        given = plan.percents(by_label, stable)
        self._until_served([label for label, percent in given.items() if percent > 0], token)
        self._write(token, lambda now: knative.share_out(now.spec, given), back=not others)
        self._until_split(given, token)

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        """See :class:`~serving.targets.base.Target`. There is none here: ending it is all that may be asked."""
        self._there(token, back=True)
        self.check_asked(sticky=None, shadow=version is not None, baseline=False)

    def retire(self, label: str, *, token: int) -> None:
        """See :class:`~serving.targets.base.Target`. That of stable, when canary has all the traffic, promotes it.

        A canary goes once a new revision of stable's model is ready, which then gets all the traffic: until then the
        revision that served before has it.
        """
        there, service = self._there(token, back=True)
        spec = there.spec
        newest = spec.canaries[0].predictor if spec.canaries else None
        if newest is None:
            self._settle(service, spec)  # who was killed before may not have come to that
        elif label == spec.stable.label != newest.label:
            knative.promote(spec)  # refused before anything is waited for
            self._until_served([newest.label], token)
            self._until_split({newest.label: 100}, token)
            self._write(token, lambda now: knative.promote(now.spec))
            self._until_split({newest.label: 100}, token)
        elif label == newest.label or spec.canaries[0].percent == 0:  # the latter: another model, put in by hand
            self._withdraw(token)

    # ---- the ways of these ----

    def _least(self, label: str, service: RevisedService) -> int:
        """Replicas of a version that is ready: what its revision was made with, which is not what the next one will."""
        made = [one.least for one in knative.revisions_of(self._revisions() or ()).values() if one.version == label]
        known = [least for least in made if least is not None]
        return min(known) if known and label == service.spec.stable.label else service.least

    def _candidate(self, label: str, spec: Spec) -> Predictor:
        """A version as the predictor; as it is there, where it is there already."""
        for canary in spec.canaries:
            if canary.predictor.label == label:
                return canary.predictor
        storage = self._delivery.storage(label)
        return Predictor(label, spec.stable.name, storage.uri, storage.runtime or spec.stable.runtime,
                         sha256=storage.digest or "none")  # fmt: skip

    def _withdraw(self, token: int) -> None:
        """Stable's model into the predictor, and all the traffic to it once its revision is ready."""
        there, _ = self._there(token, back=True)
        stable = there.spec.stable
        if there.spec.canaries[0].predictor != stable:
            knative.withdrawn(there.spec)  # refused before anything is waited for
            self._until_split({stable.label: 100}, token)
            if self._patience.until(lambda: self._taken_up(token), within_s=self._patience.route_s):
                self._write(token, lambda now: knative.withdrawn(now.spec), back=True)
                self._until_stable_again(token)
            # Else KServe never took the version up, and stable's revision is the newest still: split with itself it
            # would lose its traffic to the one before it, so the split goes in the same write as the model.
        else:
            self._until_stable_again(token)
        self._write(token, lambda now: Spec(now.spec.stable), back=True)
        self._until_split({stable.label: 100}, token)

    def _rolled_out(self, token: int) -> bool | None:
        there, service = self._there(token)
        return True if there.spec.canaries or knative.is_rolled_out(service) else None

    def _taken_up(self, token: int) -> bool | None:
        """The predictor's version has a revision."""
        there, service = self._there(token, back=True)
        newest = knative.revisions_of(self._revisions() or ()).get(service.created)
        return True if newest is not None and newest.version == there.spec.canaries[0].predictor.label else None

    def _until_stable_again(self, token: int) -> None:
        def look() -> bool | None:
            there, _ = self._there(token, back=True)
            return True if there.available(_newest(there.spec)) > 0 else None

        if self._patience.until(look, within_s=self._patience.capacity_s) is None:
            there, service = self._there(token, back=True)
            reason, _, _ = self._trouble(there, service, _newest(there.spec))
            raise CapacityError(f"the new revision of version {there.spec.stable.label} is not ready after "
                                f"{self._patience.capacity_s:g} s: {reason}; the one that served before has all the "
                                "traffic", where=self._where)  # fmt: skip

    def _undo(self, before: Spec, token: int) -> None:
        """Take back what an attempt at capacity asked for, where it asked for something; shares were not touched, but
        for the one percent that woke stable's pods up."""
        try:
            there, _ = self._there(token, back=True)
            if there.spec == before:
                return
            if before.canaries and before.canaries[0].percent == 100:
                self._write(token, lambda now: before, back=True)
            elif not before.canaries or before.canaries[0].percent == 0:
                self._withdraw(token)
        except EndcapError as error:  # the first error is the one to report
            log.error("what was asked for could not be taken back: %s", error)

    def _until_split(self, given: Mapping[str, int], token: int) -> None:
        """Knative has set up its routes for these percents; on the way back, the canary gets nothing any more."""
        wanted = {label: percent for label, percent in given.items() if percent > 0}
        seen: dict[str, int] | None = None

        def look() -> bool | None:
            nonlocal seen
            there, service = self._there(token, back=True)
            seen = _by_version(service, knative.revisions_of(self._revisions() or ()))
            if seen is None:
                return None
            stable, others = there.spec.stable.label, [one.predictor.label for one in there.spec.canaries]
            is_back = wanted == {stable: 100} and others not in ([], [stable]) and not seen.get(others[0])
            return True if seen == wanted or is_back else None

        if self._patience.until(look, within_s=self._patience.route_s):
            return
        there, _ = self._there(token, back=True)
        if lost := lost_of(there, wanted):
            raise CapacityError(f"version {', '.join(lost)} is not ready any more", where=self._where)
        raise TargetError(f"{said(wanted)} was set, and after {self._patience.route_s:g} s Knative "
                          + ("has not set up its routes" if seen is None else f"says {said(seen) or 'nothing'}"),
                          where=self._where, next_step="see whether KServe's controller and Knative run")  # fmt: skip

    # ---- what is there, and how it is written ----

    def _read(self) -> RevisedService:
        document = self._cluster.get(self._path)
        wishes = () if document is None else self._record(document["metadata"]["uid"]).wishes
        return knative.read_revised(document, name=self.service, namespace=self.namespace,
                                    stable=wishes[0].stable if wishes else None)  # fmt: skip

    def _revisions(self) -> list[Json] | None:
        return self._cluster.items(path_of("revisions", self.namespace), labels={ISVC_LABEL: self.service})

    def _now(self) -> tuple[There, RevisedService]:
        service = self._read()
        revisions = knative.revisions_of(self._revisions() or ())
        pods = self._service_pods()

        def workload(names: list[str]) -> Workload:
            mine = [pod for pod in pods if _revision(pod) in names]
            ready = sum(is_ready(pod) for pod in mine)
            fit = any(not revisions[name].reason for name in names)
            if service.least == 0 and fit:  # a revision without pods is given one by its first request
                ready = max(1, ready)
            return Workload(len(mine), ready, ready)

        spec, ready = service.spec, frozenset[str]()
        stables = [name for name, one in revisions.items() if one.version == spec.stable.label]
        workloads = {spec.stable.label: workload(stables)}
        if spec.canaries:
            newest = _newest(spec)
            made = revisions.get(service.created)
            is_its = made is not None and made.version == spec.canaries[0].predictor.label
            workloads[newest] = Workload(0, 0, 0)
            if made is not None and is_its and service.created == service.ready and not made.reason:
                ready = frozenset({newest})
                workloads[newest] = workload([service.created])
        return There(spec, workloads, ready, self._record(service.uid).rest), service

    def _trouble(self, there: There, service: RevisedService, label: str) -> tuple[str, int, int | None]:
        revisions = knative.revisions_of(self._revisions() or ())
        names = [name for name, one in revisions.items() if one.version == label]
        if there.spec.canaries and label == _newest(there.spec):
            names = [service.created]
        reason, restarts, code = trouble_of(pod for pod in self._service_pods() if _revision(pod) in names)
        told = next((revisions[name] for name in names if name in revisions and revisions[name].reason), None)
        if told is None or code is not None:
            return reason, restarts, code
        if told.exit_code is not None:  # Knative has given it up, and taken its pods away
            return told.reason, self._patience.restarts, told.exit_code
        return told.reason, restarts, code

    def _body(self, service: RevisedService, wish: Spec) -> Json:
        return knative.body_of(service, wish)


def _newest(spec: Spec) -> str:
    """What the newest revision's version is called here: also where it is stable's own once more."""
    label = spec.canaries[0].predictor.label
    return label if label != spec.stable.label else f"{label} (newest)"


def _revision(pod: Json) -> str:
    return str((pod["metadata"].get("labels") or {}).get(_REVISION_LABEL, ""))


def _by_version(service: RevisedService, revisions: Mapping[str, Revision]) -> dict[str, int] | None:
    """What each version is sent; a revision that is not known goes by its own name. None while that is not set up."""
    if service.traffic is None:
        return None
    found: dict[str, int] = {}
    for name, percent in service.traffic.items():
        label = revisions[name].version if name in revisions else name
        if percent > 0:
            found[label] = found.get(label, 0) + percent
    return found


def _cannot(what: str, instead: str) -> InputError:
    return InputError(f"Knative cannot {what}", next_step=f"{instead}, or make the service anew in Standard mode")
