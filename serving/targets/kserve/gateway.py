"""What Envoy Gateway is told, and what its proxies count, of a service that KServe routes to.

A BackendTrafficPolicy has the gateway try a request again when it found no connection or lost it, and leaves a pod out
that refuses connections: one that dies costs its version attempts, and shoppers nothing.

Envoy Gateway makes one cluster of all backends of a route: its counts then do not tell versions apart. A zone-aware
load balancer makes it one cluster a backend (``NeedsClusterPerSetting`` in its source; with 0 % of the requests for
that it changes nothing else), but then each version that gets its first share, and each promotion, is a new cluster,
and a route was seen to name one before Envoy had it: one request of 5,240 failed at a promotion (500,
``cluster_not_found``). So that is asked for only where counting at the gateway is worth it (``apart``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from endcap.errors import SourceError, TargetError
from endcap.evidence import Counts
from serving.sources.exposition import TextSample, parse_exposition
from serving.sources.folding import Series, SeriesFolder, digest
from serving.targets.kserve.cluster import Cluster, Json, path_of
from serving.targets.kserve.errors import RefusedError
from serving.targets.kserve.names import VERSION_LABEL, workload_name
from serving.targets.kserve.routes import route_name
from serving.targets.kserve.telemetry import PodScrapes

__all__ = ["EnvoyGatewayCounts", "ensure_policy", "policy_of"]

log = logging.getLogger("endcap.target")

_BY_CODE = "envoy_cluster_upstream_rq"
_RETRY = "envoy_cluster_upstream_rq_retry"
_MENDED = "envoy_cluster_upstream_rq_retry_success"
_NAMES = frozenset({_BY_CODE, _RETRY, _MENDED})
_PROXIES = {"app.kubernetes.io/component": "proxy", "app.kubernetes.io/managed-by": "envoy-gateway"}
_PORT = 19001
_MAX_SERIES = 50_000


def policy_of(service: str, namespace: str, *, own: bool = False, apart: bool = False) -> Json:
    """The BackendTrafficPolicy of both routes that KServe makes of a service, or of endcap's ``own``. ``apart``: a
    cluster a version."""
    names = (route_name(service),) if own else (service, workload_name(service, ""))
    routes = [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "name": name} for name in names]
    return {
        "apiVersion": "gateway.envoyproxy.io/v1alpha1", "kind": "BackendTrafficPolicy",
        "metadata": {"name": f"endcap-{service}", "namespace": namespace,
                     "labels": {"app.kubernetes.io/part-of": "endcap", "endcap.dev/service": service}},
        "spec": {
            "targetRefs": routes,
            "loadBalancer": {"type": "LeastRequest",
                             **({"zoneAware": {"preferLocal": {"percentageEnabled": 0}}} if apart else {})},
            "retry": {
                "numRetries": 2,
                "retryOn": {"triggers": ["connect-failure", "refused-stream", "reset", "retriable-status-codes"],
                            "httpStatusCodes": [503]},
            },
            # A pod that died has the fewest requests open, so a retry would find it again: it is left out at once.
            "healthCheck": {"passive": {
                "splitExternalLocalOriginErrors": True, "consecutiveLocalOriginFailures": 1, "interval": "1s",
                "baseEjectionTime": "2s", "maxEjectionPercent": 50,
            }},
        },
    }  # fmt: skip


def ensure_policy(cluster: Cluster, service: str, namespace: str, *, own: bool = False) -> str | None:
    """Apply it. Returns why not, where the cluster has another gateway or the route has a policy of somebody else's."""
    path = path_of("backendtrafficpolicies", namespace)
    try:
        found = cluster.items(path)
    except RefusedError as error:
        return error.what
    if found is None:
        return "the gateway is not Envoy Gateway"
    wanted = policy_of(service, namespace, own=own)
    route = wanted["spec"]["targetRefs"][0]["name"]
    name = wanted["metadata"]["name"]
    for one in found:
        spec = one.get("spec") or {}
        refs = [*(spec.get("targetRefs") or ()), *([spec["targetRef"]] if spec.get("targetRef") else [])]
        if one["metadata"]["name"] != name and any(ref.get("name") == route for ref in refs):
            return f"the route has the BackendTrafficPolicy {one['metadata']['name']} already"
    cluster.apply(f"{path}/{name}", wanted)
    return None


class EnvoyGatewayCounts:
    """Attempts, first attempts and requests by version, from all proxies. See :class:`.telemetry.GatewayCounts`.

    A retried attempt's code is in no counter but the retries': attempts are all codes and all retries. First attempts
    that failed are the requests that a retry mended, and those that failed in the end.
    """

    def __init__(self, cluster: Cluster, service: str, namespace: str, *, direct: bool = False,
                 proxies: Mapping[str, str] | None = None, proxy_namespace: str | None = None) -> None:  # fmt: skip
        """``direct``: proxies' pods are reached by their addresses; else through the API server."""
        self._cluster, self._service, self._namespace = cluster, service, namespace
        self._proxies = dict(proxies or _PROXIES)
        self._proxy_namespace = proxy_namespace or "envoy-gateway-system"
        self._scrapes = PodScrapes(None if direct else cluster, port=_PORT, path="/stats/prometheus")
        self._codes = SeriesFolder(needs_good=True, max_series=_MAX_SERIES)
        self._retries = SeriesFolder(needs_good=False, max_series=_MAX_SERIES)
        self._mapped: dict[str, tuple[str, int]] = {}
        """By cluster, the Service that it was last and how many it was before."""
        self._known: dict[str, set[str]] = {}
        """By proxy, the clusters seen."""
        self._most: dict[str, tuple[Counts, Counts, Counts]] = {}
        self._began_s: float | None = None
        self._labels: dict[str, str] = {}

    def read(self, pods: Sequence[Json], at_s: float) -> None:
        """See :class:`.telemetry.GatewayCounts`. The servers' pods tell whose Service is whose."""
        for pod in pods:
            labels = pod["metadata"].get("labels") or {}
            if VERSION_LABEL in labels:
                self._labels[str(labels.get("app", "")).removeprefix("isvc.")] = str(labels[VERSION_LABEL])
        path = path_of("pods", self._proxy_namespace)
        try:
            found = self._cluster.items(path, labels=self._proxies) or ()
            backends = self._backends()
        except TargetError as error:  # no data: the servers' counts are there
            log.warning("the gateway's counts cannot be read: %s", error.what)
            return
        proxies = [pod for pod in found if (pod.get("status") or {}).get("podIP")]
        if not proxies or not backends:
            return
        self._began_s = at_s if self._began_s is None else self._began_s
        codes: list[Series] = []
        retries: list[Series] = []
        for pod in proxies:
            where = f"pod {pod['metadata']['name']}"
            try:
                samples = parse_exposition(self._scrapes.text(pod), names=_NAMES, max_series=_MAX_SERIES, where=where)
            except (SourceError, TargetError):
                continue  # no data of this one
            self._take(str(pod["metadata"]["uid"]), samples, backends, at_s, codes, retries)
        self._codes.fold(codes, began_s=self._began_s)
        self._retries.fold(retries, began_s=self._began_s)

    def close(self) -> None:
        self._scrapes.close()

    def _backends(self) -> dict[str, str]:
        """By cluster, the name of the Service that it is now."""
        found = {}
        for name in (self._service, workload_name(self._service, "")):
            route = self._cluster.get(path_of("httproutes", self._namespace, name)) or {}
            for rule, one in enumerate((route.get("spec") or {}).get("rules") or ()):
                for backend, ref in enumerate(one.get("backendRefs") or ()):
                    found[f"httproute/{self._namespace}/{name}/rule/{rule}/backend/{backend}"] = str(ref["name"])
        return found

    def _take(self, proxy: str, samples: list[TextSample], backends: Mapping[str, str], at_s: float,
              codes: list[Series], retries: list[Series]) -> None:  # fmt: skip
        by_cluster: dict[str, list[TextSample]] = {}
        for sample in samples:
            cluster = sample.labels.get("envoy_cluster_name", "")
            if cluster in backends:
                by_cluster.setdefault(cluster, []).append(sample)
        seen = self._known.get(proxy)
        for cluster, mine in by_cluster.items():
            service = backends[cluster]
            version = self._labels.get(service)
            if version is None:
                continue
            before, times = self._mapped.get(cluster, (service, 0))
            if before != service:
                times += 1  # the same name is another's now: what it counted before is not this one's
            self._mapped[cluster] = service, times
            process = digest(proxy, cluster, service, str(times))
            fresh = seen is not None and cluster not in seen
            answered = [one for one in mine if one.name == _BY_CODE]
            # A cluster that was never asked has no code yet: these zeros are where its counting begins.
            zeros = ((at_s - 1e-3, 0.0),) if fresh else ()
            total = sum(one.value for one in answered)
            good = sum(one.value for one in answered if _is_good(one.labels.get("envoy_response_code", "")))
            tried = sum(one.value for one in mine if one.name == _RETRY)
            mended = sum(one.value for one in mine if one.name == _MENDED)
            now = ((at_s, total),)
            codes.append(Series(version, process, "total", False, True, (*zeros, *now)))
            codes.append(Series(version, process, "good", True, False, (*zeros, (at_s, good))))
            retries.append(Series(version, process, "retry", False, True, (*zeros, (at_s, tried))))
            retries.append(Series(version, process, "mended", True, False, (*zeros, (at_s, mended))))
        self._known[proxy] = (seen or set()) | set(by_cluster)

    def versions(self) -> Mapping[str, tuple[Counts, Counts, Counts]]:
        """See :class:`.telemetry.GatewayCounts`. Counts never go back: a retry is counted before what becomes of it."""
        ever = float("-inf")
        codes, retries = self._codes.counts(since_s=ever), self._retries.counts(since_s=ever)
        for label, answered in codes.items():
            again = retries.get(label, Counts())
            failed = answered.total - answered.good
            first_failed = again.good + failed
            new = (
                _counts(answered.good, failed + again.total),
                _counts(max(0, answered.total - first_failed), first_failed),
                _counts(answered.good, failed),
            )
            old = self._most.get(label, (Counts(), Counts(), Counts()))
            self._most[label] = _grown(old[0], new[0]), _grown(old[1], new[1]), _grown(old[2], new[2])
        return dict(self._most)


def _is_good(code: str) -> bool:
    return code < "500" and code != "429"


def _counts(good: int, bad: int) -> Counts:
    return Counts(good, good + bad)


def _grown(old: Counts, new: Counts) -> Counts:
    good = max(old.good, new.good)
    return Counts(good, good + max(old.total - old.good, new.total - new.good))
