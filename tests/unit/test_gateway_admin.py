"""Reading Envoy's admin interface."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.gateway.admin import parse_hosts, parse_prometheus, parse_routes

HOSTS = {
    "cluster_statuses": [
        {"name": "feedback"},
        {
            "name": "version-2",
            "host_statuses": [
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 1}},
                    "health_status": {"eds_health_status": "HEALTHY"},
                    "locality": {"zone": "a"},
                },
                {
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": 2}},
                    "health_status": {"eds_health_status": "HEALTHY", "failed_active_health_check": True},
                    "locality": {"zone": "b"},
                },
            ],
        },
    ]
}


def test_a_replica_is_healthy_when_envoy_says_nothing_against_it() -> None:
    well, ill = parse_hosts(HOSTS)
    assert (well.cluster, well.port, well.zone, well.healthy) == ("version-2", 1, "a", True)
    assert (ill.healthy, ill.reasons) == (False, ("failed_active_health_check",))


def test_the_routes_in_force_and_why_newer_ones_were_refused() -> None:
    status = parse_routes({"configs": [{"version_info": "7", "error_state": {"details": "no such thing"}}]})
    assert (status.version, status.refused) == ("7", "no such thing")
    assert parse_routes({}).version is None


def test_prometheus_samples_by_label() -> None:
    text = (
        "# TYPE envoy_cluster_upstream_rq_total counter\n"
        'envoy_cluster_upstream_rq_total{envoy_cluster_name="version-1"} 41\n'
        'envoy_cluster_upstream_rq_total{envoy_cluster_name="version-2"} 7 1795324521\n'
        'envoy_cluster_upstream_rq_total_other{envoy_cluster_name="version-1"} 1\n'
        "envoy_server_live 1\n"
    )
    name = "envoy_cluster_upstream_rq_total"
    assert parse_prometheus(text, name, label="envoy_cluster_name") == {"version-1": 41, "version-2": 7}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["cluster_statuses", "host_statuses", "address", "health_status", "configs", "name"]),
        inner, max_size=3,
    ),
    max_leaves=12,
)  # fmt: skip


@given(anything)
def test_an_answer_of_another_form_is_nothing_and_never_an_error(document: object) -> None:
    assert isinstance(parse_hosts(document), list)
    parse_routes(document)
