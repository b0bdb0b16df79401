"""Envoy's configuration as pure functions from typed values to xDS documents (Envoy's v3 API, as JSON).

The listener is static (it never changes, and a static one fails loudly when its port is taken); routes, clusters
and endpoints come from files that Envoy watches (``path_config_source`` with ``watched_directory``), each replaced
by an atomic rename.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from serving.gateway.settings import (
    Copies,
    Endpoint,
    GatewaySettings,
    Routing,
    Traces,
    VersionEndpoints,
    cluster_name,
    shadow_name,
)

__all__ = ["JsonObject", "JsonValue", "bootstrap", "clusters", "endpoints", "endpoints_file", "routes"]

JsonValue: TypeAlias = "dict[str, JsonValue] | list[JsonValue] | str | int | float | bool | None"
JsonObject: TypeAlias = dict[str, JsonValue]

ROUTES = "gateway"
FEEDBACK = "feedback"
TRACES = "traces"
_API = "type.googleapis.com/envoy"
_RETRY_ON = "5xx,reset,connect-failure,refused-stream"


def _seconds(value_s: float) -> str:
    return f"{value_s:.3f}s"


def _watched(path: Path) -> JsonObject:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
    }


def routes_file(settings: GatewaySettings) -> Path:
    return settings.folder / "rds" / "routes.json"


def clusters_file(settings: GatewaySettings) -> Path:
    return settings.folder / "cds" / "clusters.json"


def endpoints_file(settings: GatewaySettings, label: str) -> Path:
    """One file and folder a version: Envoy reads exactly one cluster's endpoints from a file."""
    return settings.folder / "eds" / cluster_name(label) / "endpoints.json"


def _file_log(path: Path, fields: Mapping[str, str]) -> JsonObject:
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": f"{_API}.extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {
                "json_format": dict(fields),
            },
        },
    }


_ATTEMPT_FIELDS = {
    "at_s": "%START_TIME(%s.%6f)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "route": "%ROUTE_NAME%",
    "cluster": "%UPSTREAM_CLUSTER%",
    "host": "%UPSTREAM_HOST%",
    "code": "%RESPONSE_CODE%",
    "flags": "%RESPONSE_FLAGS%",
    "duration_ms": "%DURATION%",
    "details": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
}
_OUTCOME_FIELDS = {
    **_ATTEMPT_FIELDS,
    "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
    "details": "%RESPONSE_CODE_DETAILS%",
}


def bootstrap(settings: GatewaySettings, *, admin_port: int = 0) -> JsonObject:
    """Envoy's static part: the admin interface and the listener, both on loopback, and where the rest comes from."""
    address: JsonObject = {"socket_address": {"address": settings.host, "port_value": settings.port}}
    router: JsonObject = {
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": f"{_API}.extensions.filters.http.router.v3.Router",
            "suppress_envoy_headers": True,
            # One line an attempt: a retry hides a failure from the shopper, never from this file.
            "upstream_log": [_file_log(settings.attempts_log, _ATTEMPT_FIELDS)],
        },
    }
    manager: JsonObject = {
        "@type": f"{_API}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "rds": {"route_config_name": ROUTES, "config_source": _watched(routes_file(settings))},
        "http_filters": [router],
        "access_log": [_file_log(settings.access_log, _OUTCOME_FIELDS)],
        "server_header_transformation": "PASS_THROUGH",
        # Clients are strangers: their x-envoy-* headers are dropped; their x-request-id is kept for the records.
        "use_remote_address": True,
        "preserve_external_request_id": True,
        "always_set_request_id_in_response": True,
        "request_id_extension": {
            "typed_config": {
                "@type": f"{_API}.extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
            }
        },
        "normalize_path": True,
        "merge_slashes": True,
        "request_headers_timeout": "5s",
        "stream_idle_timeout": "30s",
        "common_http_protocol_options": {"idle_timeout": "300s"},
    }
    collectors: list[JsonValue] = []
    if settings.traces is not None:
        manager["tracing"] = _tracing(settings.traces)
        collectors.append(_trace_collector(settings.traces))
    return {
        "node": {"id": "endcap-gateway", "cluster": "endcap"},
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}},
        "static_resources": {
            "clusters": collectors,
            "listeners": [
                {
                    "name": "gateway",
                    "address": address,
                    "enable_reuse_port": False,
                    "per_connection_buffer_limit_bytes": 1 << 20,
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
        },
        "dynamic_resources": {"cds_config": _watched(clusters_file(settings))},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{_API}.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",  # noqa: E501
                        "max_active_downstream_connections": 10_000,
                    },
                }
            ]
        },
    }


def _tracing(traces: Traces) -> JsonObject:
    """A span for the request and one for each attempt, which is the parent of the model server's."""
    url = f"http://{_in_url(traces.host)}:{traces.port}{traces.path}"
    return {
        "random_sampling": {"value": 100 * traces.share},
        "spawn_upstream_span": True,
        "provider": {
            "name": "envoy.tracers.opentelemetry",
            "typed_config": {
                "@type": f"{_API}.config.trace.v3.OpenTelemetryConfig",
                "service_name": traces.service,
                "http_service": {"http_uri": {"uri": url, "cluster": TRACES, "timeout": "1s"}},
            },
        },
    }


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _trace_collector(traces: Traces) -> JsonObject:
    address: JsonObject = {"socket_address": {"address": traces.host, "port_value": traces.port}}
    return {
        "name": TRACES,
        "type": "STRICT_DNS",
        "connect_timeout": "0.250s",
        "load_assignment": {
            "cluster_name": TRACES,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def _response(name: str, resources: Sequence[JsonObject], version: str) -> JsonObject:
    typed: list[JsonValue] = [{"@type": f"{_API}.config.{name}", **resource} for resource in resources]
    return {"version_info": version, "resources": typed}


def _retry_policy(retries: int, try_timeout_s: float, *, other_host: bool, base_s: float) -> JsonObject:
    policy: JsonObject = {
        "retry_on": _RETRY_ON,
        "num_retries": retries,
        "per_try_timeout": _seconds(try_timeout_s),
        "retry_back_off": {"base_interval": _seconds(base_s), "max_interval": _seconds(20 * base_s)},
    }
    if other_host:
        policy["retry_host_predicate"] = [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {"@type": f"{_API}.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
            }
        ]
        policy["host_selection_retry_max_attempts"] = 10
    return policy


def _set_header(name: str, value: str) -> JsonObject:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _split(settings: GatewaySettings, routing: Routing) -> JsonObject:
    """The route action that gives each version its share."""
    clusters: list[JsonValue] = [
        {
            "name": cluster_name(label),
            "weight": weight,
            # Said by the gateway too, so that an error that Envoy itself answers names its version.
            "response_headers_to_add": [_set_header(settings.version_header, label)],
        }
        for label, weight in routing.weights.items()
    ]
    weighted: JsonObject = {"clusters": clusters}
    action: JsonObject = {
        "weighted_clusters": weighted,
        "timeout": _seconds(settings.request_timeout_s),
        "retry_policy": _retry_policy(settings.retries, settings.try_timeout_s, other_host=True, base_s=0.005),
    }
    if routing.sticky_header is not None:
        weighted["use_hash_policy"] = True
        action["hash_policy"] = [{"header": {"header_name": routing.sticky_header}}]
    elif routing.sticky_cookie is not None:
        weighted["use_hash_policy"] = True
        action["hash_policy"] = [{"cookie": {"name": routing.sticky_cookie}}]
    return action


def _copied(settings: GatewaySettings, split: JsonObject, copies: Copies) -> JsonObject:
    """The route for the requests that a shadow gets a copy of; it stands before the one for all the others.

    Envoy compares one random number with this fraction and with the weights. In millionths a whole percent is a
    multiple of the weights' sum, so which version answers a copied request stays by chance.
    """
    fraction: JsonObject = {"numerator": round(copies.share * 1_000_000), "denominator": "MILLION"}
    mirror: JsonObject = {
        "cluster": shadow_name(copies.label),
        "request_headers_mutations": [{"append": _set_header(settings.shadow_header, "1")}],
        "disable_shadow_host_suffix_append": True,
    }
    return {
        "name": "recommend",
        "match": {"path": "/v1/recommend", "runtime_fraction": {"default_value": fraction}},
        "route": {**split, "request_mirror_policies": [mirror]},
        "request_headers_to_add": [_set_header(settings.compare_header, "1")],
    }


def routes(settings: GatewaySettings, routing: Routing, *, version: str) -> JsonObject:
    """The routes that ``routing`` asks for; 503 when no version has a weight."""
    served: list[JsonValue] = []
    action: JsonObject
    if routing.weights:
        split = _split(settings, routing)
        action = {"route": split}
        if routing.copies is not None:
            served.append(_copied(settings, split, routing.copies))
    else:
        action = {"direct_response": {"status": 503, "body": {"inline_string": "no version has a share\n"}}}
    served += [
        {"name": "recommend", "match": {"path": "/v1/recommend"}, **action},
        {"name": "infer", "match": {"path": "/v2"}, **action},
        {"name": "infer", "match": {"prefix": "/v2/"}, **action},
        {
            "name": "feedback",
            "match": {"path": "/v1/feedback"},
            "route": {
                "cluster": FEEDBACK,
                "timeout": _seconds(settings.request_timeout_s),
                # The collector counts an event once, so sending a batch again is safe.
                "retry_policy": _retry_policy(
                    settings.feedback_retries, settings.feedback_try_timeout_s, other_host=False, base_s=0.05
                ),
            },
        },
        {"name": "healthz", "match": {"path": "/healthz"}, "direct_response": {"status": 200}},
    ]
    shop: JsonObject = {
        "name": "shop",
        "domains": ["*"],
        "routes": served,
        # Only the gateway says what is a copy: else a client could have its answers unminted, or logs filled.
        "request_headers_to_remove": [settings.compare_header, settings.shadow_header],
    }
    table: JsonObject = {
        "name": ROUTES,
        "virtual_hosts": [shop],
        # The host's rule first, then the route's: what a client sent is gone before the gateway adds its own.
        "most_specific_header_mutations_wins": True,
        # Envoy passes over routes that equal those it has, and with them their version, which set_routes waits for.
        "metadata": {"filter_metadata": {"endcap": {"version": version}}},
    }
    return _response("route.v3.RouteConfiguration", [table], version)


def _common_cluster(settings: GatewaySettings, name: str) -> JsonObject:
    return {
        "name": name,
        "connect_timeout": "0.250s",
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": 1024,
                    "max_pending_requests": 1024,
                    "max_requests": 2048,
                    "retry_budget": {
                        "budget_percent": {"value": settings.retry_budget_percent},
                        "min_retry_concurrency": settings.retry_concurrency,
                    },
                }
            ]
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_API}.extensions.upstreams.http.v3.HttpProtocolOptions",
                "common_http_protocol_options": {"idle_timeout": _seconds(settings.upstream_idle_s)},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _version_cluster(settings: GatewaySettings, label: str) -> JsonObject:
    interval = _seconds(settings.health_interval_s)
    return {
        **_common_cluster(settings, cluster_name(label)),
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _watched(endpoints_file(settings, label))},
        # Inside a zone the replica with the fewest open requests: one that hangs gets few more.
        "lb_policy": "LEAST_REQUEST",
        "common_lb_config": {
            "locality_weighted_lb_config": {},
            # A change of health is told to the workers at once; Envoy's own default holds it back for a second.
            "update_merge_window": "0s",
            "healthy_panic_threshold": {"value": settings.panic_percent},
            "ignore_new_hosts_until_first_hc": True,
        },
        # The supervisor takes a replica out of the file before it stops it; do not keep it for its health's sake.
        "ignore_health_on_host_removal": True,
        # Requests that wait on a replica found ill are sent elsewhere at once, not after their try's timeout.
        "close_connections_on_host_health_failure": True,
        "health_checks": [
            {
                "timeout": _seconds(settings.health_timeout_s),
                "interval": interval,
                "no_traffic_interval": interval,
                "no_traffic_healthy_interval": interval,
                "unhealthy_interval": interval,
                "unhealthy_threshold": settings.unhealthy_after,
                "healthy_threshold": 1,
                "http_health_check": {"path": settings.health_path, "host": "endcap-gateway"},
            }
        ],
        "outlier_detection": {
            "interval": "0.500s",
            "base_ejection_time": _seconds(settings.ejection_s),
            "max_ejection_time": _seconds(settings.max_ejection_s),
            "max_ejection_percent": settings.max_ejection_percent,
            "consecutive_5xx": 5,
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 3,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "enforcing_consecutive_gateway_failure": 0,
            # A replica that passes health checks and fails requests stays out for its time.
            "successful_active_health_check_uneject_host": False,
        },
    }


def _shadow_cluster(settings: GatewaySettings, label: str) -> JsonObject:
    """The version's replicas once more, for copies: few at a time, never twice, and no replica is put out for them."""
    cluster = _version_cluster(settings, label)
    del cluster["outlier_detection"]
    at_most = settings.shadow_concurrency
    limits: JsonObject = {
        "max_connections": at_most, "max_pending_requests": at_most, "max_requests": at_most, "max_retries": 0,
    }  # fmt: skip
    return {
        **cluster,
        "name": shadow_name(label),
        "eds_cluster_config": {
            "eds_config": _watched(endpoints_file(settings, label)), "service_name": cluster_name(label),
        },
        "circuit_breakers": {"thresholds": [limits]},
    }  # fmt: skip


def clusters(
    settings: GatewaySettings, labels: Sequence[str], feedback: Endpoint | None, *, shadow: str | None = None,
    version: str,
) -> JsonObject:  # fmt: skip
    """A cluster for each version in ``labels``, one for copies to ``shadow``, one for the feedback collector."""
    found = [_version_cluster(settings, label) for label in labels]
    if shadow is not None:
        found.append(_shadow_cluster(settings, shadow))
    if feedback is not None:
        # No health checks: there is one collector, and trying it is the check.
        found.append(
            {
                **_common_cluster(settings, FEEDBACK),
                "type": "STATIC",
                "load_assignment": {
                    "cluster_name": FEEDBACK,
                    "endpoints": [{"lb_endpoints": [_lb_endpoint(feedback)]}],
                },
            }
        )
    return _response("cluster.v3.Cluster", found, version)


def _lb_endpoint(endpoint: Endpoint) -> JsonObject:
    address: JsonObject = {"address": endpoint.host, "port_value": endpoint.port}
    return {"endpoint": {"address": {"socket_address": address}}}


def endpoints(settings: GatewaySettings, replicas: VersionEndpoints, *, version: str) -> JsonObject:
    """A version's replicas, each zone a locality of equal weight: a lost zone's requests go to the others."""
    localities: list[JsonValue] = []
    for zone in settings.zones:
        here: list[JsonValue] = [_lb_endpoint(e) for e in sorted(replicas.endpoints) if e.zone == zone]
        if here:
            localities.append(
                {"locality": {"zone": zone}, "load_balancing_weight": 1, "lb_endpoints": here}
            )  # fmt: skip
    assignment: JsonObject = {"cluster_name": cluster_name(replicas.label), "endpoints": localities}
    return _response("endpoint.v3.ClusterLoadAssignment", [assignment], version)
