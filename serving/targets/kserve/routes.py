"""An HTTPRoute of endcap's own, for what KServe's cannot do: shoppers who keep their version, and copies of requests.

KServe rewrites its routes at each change of weight, whatever others put in them, so such a service is made with the
label ``networking.kserve.io/visibility: cluster-local`` (KServe then makes it no route) and the annotations
``endcap.dev/gateway: NAMESPACE/NAME`` and ``endcap.dev/hostnames: shop.example.com``.

What the Gateway API cannot do, and so is not done:

- it hashes nothing: shoppers keep their version by a *bucket*, 0 to 99, that the shop's edge puts into a header (a hash
  of the shopper, modulo 100). ``sessionPersistence`` pins a shopper to a pod instead, and a growing share never
  reaches those who have one; a consistent hash moves shoppers whenever pods come or go;
- it gives nobody's share to another: a version without a pod fails its requests here, where KServe's route returns
  them to stable;
- it marks no copy and compares no answers: a shadow's answers are counted, their items are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from endcap.errors import InputError
from serving.targets.base import StickyKey
from serving.targets.kserve.cluster import Json
from serving.targets.kserve.names import FENCE_ANNOTATION

__all__ = ["OwnRoute", "buckets", "checked_sticky", "route_body", "route_name"]

_BUCKETS = 100


@dataclass(frozen=True, slots=True)
class OwnRoute:
    """Where a service's own route hangs. ``gateway``: NAMESPACE/NAME."""

    gateway: str
    hostnames: tuple[str, ...]


def route_name(service: str) -> str:
    return f"endcap-{service}"


def checked_sticky(sticky: StickyKey | None) -> str | None:
    """The header that holds a shopper's bucket.

    Raises:
        InputError: shoppers are known by something that no route can hash.
    """
    if sticky is None:
        return None
    if sticky.header is None:
        raise InputError("the Gateway API cannot keep the shoppers of a cookie to a version", where="sticky",
                         next_step="have the shop's edge send a bucket, 0 to 99, in a header")  # fmt: skip
    return sticky.header


def buckets(percents: Mapping[str, int]) -> dict[str, range]:
    """Each version's buckets, in the order given: with canary first and a baseline last, a growing share only moves
    shoppers from stable to canary."""
    found, begin = {}, 0
    for name, percent in percents.items():
        found[name] = range(begin, begin + percent)
        begin += percent
    return found


def route_body(
    service: str, namespace: str, own: OwnRoute, percents: Mapping[str, int], *, sticky: str | None = None,
    copies: tuple[str, float] | None = None, token: int,
) -> Json:  # fmt: skip
    """``percents`` by the names of the versions' Services, in order. ``copies``: a Service, and its share of copies.

    Services without a share are left out: one that is deleted must not be named.
    """
    given = {name: percent for name, percent in percents.items() if percent > 0}
    filters: list[Json] = []
    if copies is not None:
        mirror = {"backendRef": _ref(copies[0]), "percent": max(1, round(copies[1] * 100))}
        filters = [{"type": "RequestMirror", "requestMirror": mirror}]

    def rule(refs: list[Json], matches: list[Json]) -> Json:
        made: Json = {"matches": matches, "backendRefs": refs, "timeouts": {"request": "60s"}}
        return {**made, "filters": filters} if filters else made

    everything: Json = {"path": {"type": "PathPrefix", "value": "/"}}
    rules = []
    if sticky is not None and len(given) > 1:
        for name, mine in buckets(given).items():
            value = f"^({'|'.join(map(str, mine))})$"
            header = {"type": "RegularExpression", "name": sticky, "value": value}
            rules.append(rule([_ref(name)], [{**everything, "headers": [header]}]))
    rules.append(rule([{**_ref(name), "weight": percent} for name, percent in given.items()], [everything]))
    gateway_namespace, _, gateway = own.gateway.partition("/")
    return {
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
        "metadata": {
            "name": route_name(service), "namespace": namespace,
            "labels": {"app.kubernetes.io/part-of": "endcap", "endcap.dev/service": service},
            "annotations": {FENCE_ANNOTATION: str(token)},
        },
        "spec": {
            "hostnames": list(own.hostnames),
            "parentRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": gateway_namespace,
                            "name": gateway}],
            "rules": rules,
        },
    }  # fmt: skip


def _ref(name: str) -> Json:
    return {"group": "", "kind": "Service", "name": name, "port": 80}
