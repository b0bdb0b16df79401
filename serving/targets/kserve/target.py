"""The second adapter: an InferenceService of KServe's in Standard mode, behind the Gateway API.

What is to be written next is planned in :mod:`serving.targets.kserve.plan`; how it is written, and fenced, is said in
:mod:`serving.targets.kserve.service`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from endcap.errors import CapacityError, EndcapError, FencedError, InputError, TargetError
from serving.targets.base import ModelVersion, StickyKey
from serving.targets.kserve import plan
from serving.targets.kserve.cluster import Cluster, Json, path_of
from serving.targets.kserve.delivery import Delivery
from serving.targets.kserve.errors import ConflictError, Reason, RefusedError, ServiceError
from serving.targets.kserve.gateway import ensure_policy
from serving.targets.kserve.names import BASELINE, FENCE_ANNOTATION, ISVC_LABEL, predictor_name, workload_name
from serving.targets.kserve.plan import Predictor, Sizing, Spec, There
from serving.targets.kserve.reading import Service, accepted, body_of, read_service, trouble_of, weights_of, workload_of
from serving.targets.kserve.routes import Shares, checked_sticky, route_body, route_name, sticky_of
from serving.targets.kserve.service import TRIES, ServiceTarget, lost_of, said
from serving.targets.kserve.telemetry import Telemetry
from serving.targets.kserve.waits import Patience

__all__ = ["KServeTarget"]

log = logging.getLogger("endcap.target")


class KServeTarget(ServiceTarget[Service]):
    """One service in Standard mode.

    ``delivery`` says where versions lie that are not served yet. ``fallback_runtime``: what serves a version that finds
    no GPU node (its latency is then judged as it is). ``policy``: tell Envoy Gateway to try again where a pod was lost
    (:mod:`serving.targets.kserve.gateway`).
    """

    def __init__(
        self,
        cluster: Cluster,
        service: str,
        namespace: str,
        delivery: Delivery,
        *,
        telemetry: Telemetry | None = None,
        sizing: Sizing = Sizing(),  # noqa: B008 - frozen
        patience: Patience = Patience(),  # noqa: B008 - frozen
        fallback_runtime: str | None = None,
        policy: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(cluster, service, namespace, delivery, telemetry=telemetry, patience=patience, clock=clock)
        self._sizing, self._fallback, self._policy = sizing, fallback_runtime, policy

    # ---- what may be asked ----

    def check(self) -> None:
        """See :class:`.ServiceTarget`."""
        service = self._read()
        routes = self._cluster.items(path_of("httproutes", self.namespace), limit="1")
        if routes is None:
            raise ServiceError(Reason.NO_GATEWAY_API, "the cluster has no Gateway API (no HTTPRoutes)",
                               where=self._where, next_step="install the Gateway API's CRDs and a gateway, and tell "
                               "KServe: enableGatewayApi: true in its ConfigMap inferenceservice-config")  # fmt: skip
        if service.local and service.own_route is None:
            raise ServiceError(Reason.GATEWAY_API_OFF, "KServe makes no route of a cluster-local service",
                               where=self._where, next_step="remove its label networking.kserve.io/visibility; or "
                               "annotate it with endcap.dev/gateway and endcap.dev/hostnames")  # fmt: skip
        if not service.local and service.is_ready and self._route() is None:
            raise ServiceError(Reason.GATEWAY_API_OFF, "the service is ready and KServe made it no HTTPRoute",
                               where=self._where, next_step="set enableGatewayApi: true in KServe's ConfigMap "
                               "inferenceservice-config (section ingress), and restart its controller")  # fmt: skip

    def check_asked(self, *, sticky: StickyKey | None, shadow: bool, baseline: bool) -> None:
        """See :class:`.ServiceTarget`."""
        if self._read().own_route is None:
            if sticky is not None:
                raise _no_own_route("keep shoppers to a version", "sticky: {} in the Rollout leaves it out")
            if shadow:
                raise _no_own_route("copy requests to a version", "leave shadow out of the Rollout")
        checked_sticky(sticky)

    def ensure_capacity(self, shares: Mapping[ModelVersion, float], *, token: int) -> None:
        """See :class:`~serving.targets.base.Target`."""
        by_label = {version.label: share for version, share in shares.items()}
        there, _ = self._there(token, back=True)
        back = set(by_label) == {there.spec.stable.label}
        there, service = self._there(token, back=back)
        before = there.spec
        versions = self._predictors(by_label, there)
        needed = plan.needs(there, by_label, self._sizing)
        try:
            self._grow(token, versions, needed, back=back)
        except FencedError:
            raise
        except EndcapError:
            self._undo(before, token)
            raise
        if service.own_route is not None and not back:  # known to the gateway before the first request of theirs
            self._put_route(token, self._header(), self._copies(), warm=frozenset(needed))
            self._patience.until(self._is_taken_up, within_s=self._patience.route_s)
        self._begin_counting()

    def set_shares(self, shares: Mapping[ModelVersion, float], *, token: int, sticky: StickyKey | None = None) -> None:
        """See :class:`~serving.targets.base.Target`."""
        by_label = {version.label: share for version, share in shares.items() if share > 0}
        there, service = self._there(token, back=True)
        header = checked_sticky(sticky) if len(by_label) > 1 else None  # on the way back there is nothing to keep to
        if header is not None and service.own_route is None:
            raise _no_own_route("keep shoppers to a version", "sticky: {} in the Rollout leaves it out")
        given = plan.percents(by_label, there.spec.stable.label)
        self._until_served([label for label, percent in given.items() if percent > 0], token)
        back = set(by_label) == {there.spec.stable.label}
        self._write(token, lambda now: plan.share_out(now, given, self._sizing, trim=False), back=back)
        if service.own_route is not None:
            self._put_route(token, header, self._copies())
        self._until_routed(given, token)
        self._write(token, lambda now: plan.share_out(now, given, self._sizing, trim=True), back=back)

    def set_shadow(self, version: ModelVersion | None, *, share: float = 0.0, token: int) -> None:
        """See :class:`~serving.targets.base.Target`. Only by a route of endcap's own; see :mod:`.routes`."""
        there, service = self._there(token, back=True)
        if service.own_route is None:
            if version is not None:
                raise _no_own_route("copy requests to a version", "leave shadow out of the Rollout")
            return
        if version is None:
            if (copies := self._copies()) is not None:
                self._end_copies(copies[0], there)
                self._put_route(token, self._header(), None)
            return
        self._until_served([version.label], token)
        there, _ = self._there(token)
        canary = there.spec.canary(version.label)
        if canary is None:
            raise CapacityError(f"version {version.label} has no replicas", next_step="ensure its capacity first")
        self._put_route(token, self._header(), (workload_name(self.service, canary.predictor.name), share))

    def retire(self, label: str, *, token: int) -> None:
        """See :class:`~serving.targets.base.Target`. That of stable, when a canary has all the traffic, promotes it."""
        there, service = self._there(token, back=True)
        canary = there.spec.canary(label)
        if there.spec.stable.label == label:
            self._until_served([one.predictor.label for one in there.spec.canaries if one.percent == 100], token)
            self._write(token, plan.promote)
            self._until_gone(there.spec.stable, token)
        elif canary is not None:
            self._write(token, lambda now: plan.retire(now, label), back=True)
            self._until_gone(canary.predictor, token)
        else:
            self._settle(service, there.spec)  # who was killed before may not have come to that

    # ---- the ways of these ----

    def _predictors(self, shares: Mapping[str, float], there: There) -> dict[str, Predictor]:
        """The versions of ``shares`` as predictors; those that are served already as they are."""
        stable, found = there.spec.stable, {}
        for label, share in shares.items():
            canary = there.spec.canary(label)
            if label == stable.label or share <= 0:
                continue
            if canary is not None:
                found[label] = canary.predictor
                continue
            uri, runtime, sha256 = stable.storage_uri, stable.runtime, stable.sha256
            if label != stable.label + BASELINE:
                storage = self._delivery.storage(label)
                uri, runtime, sha256 = storage.uri, storage.runtime or stable.runtime, storage.digest
            name = predictor_name(self.service, label)
            found[label] = Predictor(label, name, uri, runtime, sha256=sha256 or "none")
        return found

    def _grow(self, token: int, versions: Mapping[str, Predictor], needed: Mapping[str, int], *, back: bool) -> None:
        unplaced: dict[str, float] = {}

        def wished(there: There, service: Service) -> Spec:
            wish = plan.grow(there, versions, needed)
            return self._without_gpu(there, needed, unplaced) if wish == there.spec else wish

        self._until_grown(token, needed, wished, back=back)

    def _without_gpu(self, there: There, needed: Mapping[str, int], unplaced: dict[str, float]) -> Spec:
        """The wish that serves a version by the other runtime, when no GPU node has come for it; else what is there."""
        spec = there.spec
        if self._fallback is None:
            return spec
        for label in plan.short_of(there, needed):
            canary = spec.canary(label)
            if canary is None or canary.percent > 0 or canary.predictor.runtime == self._fallback:
                continue
            reason, _, _ = trouble_of(self._pods_of(spec, label))
            if "nvidia.com/gpu" not in reason:
                unplaced.pop(label, None)
                continue
            if self._patience.now() - unplaced.setdefault(label, self._patience.now()) >= self._patience.node_s:
                log.warning("version %s gets no GPU (%s): it is served by %s", label, reason, self._fallback)
                other = replace(canary, predictor=replace(canary.predictor, runtime=self._fallback))
                canaries = tuple(other if one is canary else one for one in spec.canaries)
                spec = replace(spec, canaries=canaries)
        return spec

    def _undo(self, before: Spec, token: int) -> None:
        """Take back what an attempt at capacity asked for; shares were never touched."""
        known = {canary.predictor.label: canary for canary in before.canaries}

        def smaller(now: There) -> Spec:
            spec = now.spec
            for canary in spec.canaries:
                label = canary.predictor.label
                if label not in known and canary.percent == 0:
                    spec = plan.retire(replace(now, spec=spec), label)
                elif label in known and canary.replicas > known[label].replicas:
                    canaries = tuple(known[label] if one is canary else one for one in spec.canaries)
                    spec = replace(spec, canaries=canaries, min_replicas=before.min_replicas,
                                   max_replicas=before.max_replicas)  # fmt: skip
            return spec

        try:
            self._write(token, smaller, back=True)
        except EndcapError as error:  # the first error is the one to report
            log.error("what was asked for could not be taken back: %s", error)

    def _until_routed(self, given: Mapping[str, int], token: int) -> None:
        wanted = {label: percent for label, percent in given.items() if percent > 0}
        seen: dict[str, int] | None = None

        def look() -> bool | None:
            nonlocal seen
            there, service = self._there(token, back=True)
            route = self._route() if service.own_route is None else self._own()
            seen = None if route is None else weights_of(route, self.service, there.spec)
            return True if seen is not None and {k: v for k, v in seen.items() if v > 0} == wanted else None

        if self._patience.until(look, within_s=self._patience.route_s):
            return
        there, _ = self._there(token, back=True)
        if lost := lost_of(there, wanted):
            raise CapacityError(f"version {', '.join(lost)} is not ready any more, and KServe gives its share to "
                                "stable", where=self._where)  # fmt: skip
        if seen == {there.spec.stable.label: 100} and there.spec.canaries and self._own() is None:
            raise ServiceError(Reason.NO_SPLIT, f"{said(wanted)} was set, and KServe's route still sends all to "
                               f"version {there.spec.stable.label}", where=self._where,
                               next_step="KServe splits traffic in Standard mode from 0.21 on: see whether its "
                               "controller runs, and which version it is")  # fmt: skip
        raise TargetError(f"{said(wanted)} was set, and after {self._patience.route_s:g} s the route says "
                          f"{'nothing that the gateway has accepted' if seen is None else said(seen)}",
                          where=f"httproute {self.namespace}/{self.service}",
                          next_step="see whether KServe's controller and the gateway run")  # fmt: skip

    # ---- the route of our own ----

    def _own(self) -> Json | None:
        return self._cluster.get(self._own_path)

    @property
    def _own_path(self) -> str:
        return path_of("httproutes", self.namespace, route_name(self.service))

    def _is_taken_up(self) -> bool | None:
        route = self._own()
        return True if route is not None and accepted(route) else None

    def _copies(self) -> tuple[str, float] | None:
        """The Service that gets copies, and the share of them."""
        for rule in ((self._own() or {}).get("spec") or {}).get("rules") or ():
            for one in rule.get("filters") or ():
                if one.get("type") == "RequestMirror":
                    mirror = one["requestMirror"]
                    return str(mirror["backendRef"]["name"]), float(mirror.get("percent", 100)) / 100
        return None

    def _header(self) -> str | None:
        """What shoppers are known by, as the route has it."""
        return sticky_of(self._own())

    def _put_route(self, token: int, sticky: str | None, copies: tuple[str, float] | None, *,
                   warm: frozenset[str] = frozenset()) -> None:  # fmt: skip
        """The route as the service's spec has the shares; fenced as the service is. ``warm``: versions that are to get
        one next."""
        for _ in range(TRIES):
            there, service = self._there(token, back=True)
            if service.own_route is None:
                return
            shares = self._shares(there.spec, warm)
            body = route_body(self.service, self.namespace, service.own_route, shares, sticky=sticky, copies=copies,
                              token=token)  # fmt: skip
            known = self._own()
            if known is not None:
                fence = (known["metadata"].get("annotations") or {}).get(FENCE_ANNOTATION, "0")
                if fence.isdigit() and int(fence) > token:
                    raise FencedError(f"token {token} is not in force: {fence} is", where=self._own_path)
                body["metadata"]["resourceVersion"] = known["metadata"]["resourceVersion"]
            with contextlib.suppress(ConflictError):
                self._cluster.apply(self._own_path, body)
                return
            self._patience.sleep(0.05)
        raise TargetError("its route is written too often for a change of ours to get through", where=self._own_path)

    def _shares(self, spec: Spec, warm: frozenset[str]) -> Shares:
        names = {spec.stable.label: workload_name(self.service, spec.stable.name)}
        names |= {one.predictor.label: workload_name(self.service, one.predictor.name) for one in spec.canaries}
        percents = spec.percents
        others = [label for label in percents if label != spec.stable.label]

        def role(labels: list[str]) -> tuple[str, int] | None:
            """Who has a share, or is to get one, before who has none."""
            labels = sorted(labels, key=lambda label: (percents[label] == 0, label not in warm))
            return (names[labels[0]], percents[labels[0]]) if labels else None

        return Shares(
            (names[spec.stable.label], percents[spec.stable.label]),
            role([label for label in others if not label.endswith(BASELINE)]),
            role([label for label in others if label.endswith(BASELINE)]),
            frozenset(names[label] for label in warm if label in names),
        )

    def _end_copies(self, name: str, there: There) -> None:
        """What the version answered to copies is not what it answered to shoppers."""
        for canary in there.spec.canaries:
            if workload_name(self.service, canary.predictor.name) == name:
                with contextlib.suppress(EndcapError):
                    counted = self._telemetry.observe(self._service_pods())
                    self._copied[canary.predictor.label] = counted.version(canary.predictor.label)

    def _until_gone(self, gone: Predictor, token: int) -> None:
        """KServe has removed the version's Deployment; then we remove the autoscaler that it leaves behind."""
        name = workload_name(self.service, gone.name)

        def look() -> bool | None:
            self._there(token, back=True)
            return True if self._cluster.get(path_of("deployments", self.namespace, name)) is None else None

        if self._patience.until(look, within_s=self._patience.route_s) is None:
            raise TargetError(f"version {gone.label}'s Deployment is still there",
                              where=f"deployment {self.namespace}/{name}",
                              next_step="see whether KServe's controller runs")  # fmt: skip
        hpa = path_of("horizontalpodautoscalers", self.namespace, name)
        if self._cluster.get(hpa) is not None:
            self._cluster.delete(hpa)

    # ---- what is there, and how it is written ----

    def _read(self) -> Service:
        return read_service(self._cluster.get(self._path), name=self.service, namespace=self.namespace)

    def _route(self) -> Json | None:
        return self._cluster.get(path_of("httproutes", self.namespace, self.service))

    def _now(self) -> tuple[There, Service]:
        service = self._read()
        spec = service.spec
        found = self._cluster.items(path_of("deployments", self.namespace), labels={ISVC_LABEL: self.service}) or []
        by_name = {one["metadata"]["name"]: workload_of(one) for one in found}
        predictors = [spec.stable, *(canary.predictor for canary in spec.canaries)]
        workloads = {
            one.label: by_name[name] for one in predictors
            if (name := workload_name(self.service, one.name)) in by_name
        }  # fmt: skip
        return There(spec, workloads, service.ready, self._record(service.uid).rest), service

    def _pods_of(self, spec: Spec, label: str) -> list[Json]:
        canary = spec.canary(label)
        one = spec.stable if canary is None else canary.predictor
        app = f"isvc.{workload_name(self.service, one.name)}"
        return [pod for pod in self._service_pods() if (pod["metadata"].get("labels") or {}).get("app") == app]

    def _trouble(self, there: There, service: Service, label: str) -> tuple[str, int, int | None]:
        return trouble_of(self._pods_of(there.spec, label))

    def _body(self, service: Service, wish: Spec) -> Json:
        return body_of(service, wish)

    def _apply(self, service: Service, wish: Spec, token: int) -> None:
        try:
            super()._apply(service, wish, token)
        except RefusedError as error:
            if "canary" in error.what and "not declared in schema" in error.what:
                raise ServiceError(Reason.NO_SPLIT, "KServe here knows no canary in Standard mode", where=self._where,
                                   next_step="upgrade KServe to 0.21 or newer") from error  # fmt: skip
            raise

    def _before_taken(self) -> None:
        if not self._policy:
            return
        own = self._read().own_route is not None
        if (why_not := ensure_policy(self._cluster, self.service, self.namespace, own=own)) is not None:
            log.warning("the gateway is not told to try again where a pod was lost: %s", why_not)

    def _taken(self, token: int) -> None:
        self._put_route(token, self._header(), self._copies())  # what an older writer read of it is old too

    def _copies_of(self, there: There, service: Service) -> str | None:
        copies = self._copies() if service.own_route is not None else None
        if copies is None:
            return None
        named = (one.predictor for one in there.spec.canaries)
        return next((one.label for one in named if workload_name(self.service, one.name) == copies[0]), None)


def _no_own_route(what: str, leave_out: str) -> InputError:
    return InputError(f"KServe's routes cannot {what}", next_step=f"{leave_out}; or have endcap make the service's "
                      "route: label it networking.kserve.io/visibility: cluster-local, and annotate it with "
                      "endcap.dev/gateway and endcap.dev/hostnames")  # fmt: skip
