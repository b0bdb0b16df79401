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

__all__ = ["OwnRoute", "Shares", "buckets", "checked_sticky", "route_body", "route_name", "sticky_of"]

_NO_HEADER = "x-endcap-bucket"
"""Of rules without buckets, where shoppers are known by nothing."""
_NOTHING = "a^"
"""Matches no text."""


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


@dataclass(frozen=True, slots=True)
class Shares:
    """Percents by the names of the versions' Services: the roles are the route's rules, each always the same one.

    ``canary`` and ``baseline``: None where there is none. ``warm``: Services that are to get a share soon.
    """

    stable: tuple[str, int]
    canary: tuple[str, int] | None = None
    baseline: tuple[str, int] | None = None
    warm: frozenset[str] = frozenset()

    @property
    def given(self) -> dict[str, int]:
        """Canary's buckets first, baseline's last."""
        return {one[0]: one[1] for one in (self.canary, self.stable, self.baseline) if one is not None and one[1] > 0}


def route_body(
    service: str, namespace: str, own: OwnRoute, shares: Shares, *, sticky: str | None = None,
    copies: tuple[str, float] | None = None, token: int,
) -> Json:  # fmt: skip
    """``copies``: a Service, and its share of copies.

    A gateway calls the clusters of a route by its rules' places (Envoy Gateway does), and takes up what is in a
    cluster before it takes up what is sent there. So a rule keeps its place and its version: stable's buckets,
    canary's, baseline's, and last what has no bucket. One whose version has no share is there too, and matches
    nothing: when it gets one, only the match changes. It names the version that is to come, or else one that serves:
    a Service that is deleted must not be named.
    """
    given = shares.given
    serving = max(given, key=lambda name: given[name])
    filters: list[Json] = []
    if copies is not None:
        mirror = {"backendRef": _ref(copies[0]), "percent": max(1, round(copies[1] * 100))}
        filters = [{"type": "RequestMirror", "requestMirror": mirror}]

    def rule(refs: list[Json], headers: list[Json], *, copied: bool) -> Json:
        match: Json = {"path": {"type": "PathPrefix", "value": "/"}, **({"headers": headers} if headers else {})}
        made: Json = {"matches": [match], "backendRefs": refs, "timeouts": {"request": "60s"}}
        return {**made, "filters": filters} if filters and copied else made

    mine = buckets(given)
    rules = []
    for role in (shares.stable, shares.canary, shares.baseline):
        name = role[0] if role is not None and (role[1] > 0 or role[0] in shares.warm) else serving
        own_buckets = mine.get(name, range(0)) if role is not None and role[1] > 0 and sticky is not None else ()
        value = f"^({'|'.join(map(str, own_buckets))})$" if own_buckets else _NOTHING
        header = {"type": "RegularExpression", "name": sticky or _NO_HEADER, "value": value}
        rules.append(rule([_ref(name)], [header], copied=bool(own_buckets)))
    rules.append(rule([{**_ref(name), "weight": percent} for name, percent in given.items()], [], copied=True))
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


def sticky_of(route: Json | None) -> str | None:
    """The header that a route of ours knows shoppers by."""
    for rule in ((route or {}).get("spec") or {}).get("rules") or ():
        for match in rule.get("matches") or ():
            for header in match.get("headers") or ():
                if header["name"] != _NO_HEADER:
                    return str(header["name"])
    return None


def _ref(name: str) -> Json:
    return {"group": "", "kind": "Service", "name": name, "port": 80}
