"""The gateway's configuration as values: what each share, replica and zone becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endcap.errors import InputError
from serving.gateway import Copies, Endpoint, GatewaySettings, Routing, VersionEndpoints, cluster_name, weights, xds
from serving.gateway.settings import TOTAL_WEIGHT, label_of

SETTINGS = GatewaySettings(Path("/run/xds"), Path("/run/records"))


def resource(document: Any) -> Any:
    [only] = json.loads(json.dumps(document))["resources"]
    return only


@given(st.dictionaries(st.text("abc123", min_size=1, max_size=4), st.floats(0, 1), min_size=1, max_size=6))
def test_weights_are_exact_to_a_ten_thousandth_in_the_callers_order(raw: dict[str, float]) -> None:
    total = sum(raw.values())
    if total <= 1e-9:
        return
    shares = {label: value / total for label, value in raw.items()}
    given_weights = weights(shares)
    assert sum(given_weights.values()) == TOTAL_WEIGHT
    assert list(given_weights) == [label for label, share in shares.items() if share > 0]
    for label, weight in given_weights.items():
        assert weight >= 1
        # Versions lifted to the minimum of 1 are paid for by the largest.
        assert abs(weight - shares[label] * TOTAL_WEIGHT) <= len(shares)


def test_the_steps_of_a_rollout_are_exact() -> None:
    for share in (0.05, 0.25, 0.5):
        assert weights({"2": share, "1": 1 - share}) == {"2": round(share * 10_000), "1": round((1 - share) * 10_000)}
    assert weights({"2": 1.0, "1": 0.0}) == {"2": 10_000}


@pytest.mark.parametrize("shares", [{}, {"1": 0.5}, {"1": 1.2, "2": -0.2}, {"1": 0.6, "2": 0.6}, {"1": float("nan")}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(InputError):
        weights(shares)


def test_a_cluster_names_its_version_and_no_other_cluster_does() -> None:
    assert label_of(cluster_name("7")) == "7"
    assert label_of("feedback") is None
    assert label_of(None) is None


def test_routes_send_recommendations_to_versions_and_feedback_to_the_collector() -> None:
    table = resource(xds.routes(SETTINGS, Routing({"2": 500, "1": 9500}), version="3"))
    routes = {route["name"]: route for route in table["virtual_hosts"][0]["routes"]}
    for name in ("recommend", "infer"):
        split = routes[name]["route"]["weighted_clusters"]["clusters"]
        assert [(part["name"], part["weight"]) for part in split] == [("version-2", 500), ("version-1", 9500)]
    assert routes["feedback"]["route"]["cluster"] == "feedback"
    assert routes["healthz"]["direct_response"]["status"] == 200


@pytest.mark.parametrize(
    ("routing", "policy"),
    [
        (Routing({"1": 10_000}, sticky_header="x-shopper"), {"header": {"header_name": "x-shopper"}}),
        (Routing({"1": 10_000}, sticky_cookie="shopper"), {"cookie": {"name": "shopper"}}),
    ],
)
def test_a_sticky_key_is_hashed_on_every_route_to_a_version(routing: Routing, policy: object) -> None:
    table = resource(xds.routes(SETTINGS, routing, version="1"))
    actions = [
        route["route"] for route in table["virtual_hosts"][0]["routes"] if route["name"] in ("recommend", "infer")
    ]
    assert len(actions) == 3
    for action in actions:
        assert action["weighted_clusters"]["use_hash_policy"] is True
        assert action["hash_policy"] == [policy]


def test_copies_have_a_route_of_their_own_before_the_other_and_a_small_cluster() -> None:
    routing = Routing({"1": 10_000}, sticky_header="x-shopper", copies=Copies("2", 0.25))
    first, second = resource(xds.routes(SETTINGS, routing, version="1"))["virtual_hosts"][0]["routes"][:2]
    assert first["match"]["runtime_fraction"]["default_value"] == {"numerator": 250_000, "denominator": "MILLION"}
    [mirror] = first["route"]["request_mirror_policies"]
    assert mirror["cluster"] == "shadow-2"
    # Copied or not, a request's version is decided by the same rule.
    assert {k: v for k, v in first["route"].items() if k != "request_mirror_policies"} == second["route"]
    document = json.loads(json.dumps(xds.clusters(SETTINGS, ["1", "2"], None, shadow="2", version="1")))
    shadow = document["resources"][-1]
    assert shadow["eds_cluster_config"]["service_name"] == "version-2"
    [limits] = shadow["circuit_breakers"]["thresholds"]
    assert max(limits.values()) <= 8
    assert "outlier_detection" not in shadow
    assert label_of(shadow["name"]) is None


def test_routes_of_another_version_always_differ() -> None:
    # Envoy passes over routes equal to those in force and would never report the new version.
    one, two = (resource(xds.routes(SETTINGS, Routing({"1": 10_000}), version=version)) for version in ("1", "2"))
    assert one != two


def test_without_versions_shoppers_get_503_and_not_a_hung_connection() -> None:
    table = resource(xds.routes(SETTINGS, Routing(), version="1"))
    assert table["virtual_hosts"][0]["routes"][0]["direct_response"]["status"] == 503


def test_a_request_whose_first_two_attempts_hang_still_has_time_for_the_third() -> None:
    assert SETTINGS.retries >= 2
    assert SETTINGS.retries * SETTINGS.try_timeout_s + 1 <= SETTINGS.request_timeout_s


def test_a_slow_objective_gets_tries_long_enough_to_judge_it() -> None:
    assert SETTINGS.patient_for([100, 250]) == SETTINGS
    slow = SETTINGS.patient_for([100, 2000])
    assert slow.try_timeout_s > 2
    assert slow.retries * slow.try_timeout_s + 1 <= slow.request_timeout_s


def test_each_zone_is_a_locality_of_equal_weight_and_an_empty_one_is_left_out() -> None:
    replicas = VersionEndpoints("7", (Endpoint("b", 3), Endpoint("a", 2), Endpoint("a", 1)))
    assignment = resource(xds.endpoints(SETTINGS, replicas, version="1"))
    assert assignment["cluster_name"] == "version-7"
    zones = {part["locality"]["zone"]: part for part in assignment["endpoints"]}
    assert {zone: len(part["lb_endpoints"]) for zone, part in zones.items()} == {"a": 2, "b": 1}
    assert {part["load_balancing_weight"] for part in zones.values()} == {1}
    lost = resource(xds.endpoints(SETTINGS, VersionEndpoints("7", (Endpoint("a", 1),)), version="2"))
    assert [part["locality"]["zone"] for part in lost["endpoints"]] == ["a"]


def test_a_bad_version_is_never_taken_out_as_a_whole() -> None:
    document = json.loads(json.dumps(xds.clusters(SETTINGS, ["7"], Endpoint("", 9), version="1")))
    version, feedback = document["resources"]
    assert version["outlier_detection"]["max_ejection_percent"] <= 50
    assert 0 < version["common_lb_config"]["healthy_panic_threshold"]["value"] < 25
    assert feedback["load_assignment"]["endpoints"][0]["lb_endpoints"]


def test_the_gateway_and_its_admin_interface_listen_on_loopback_alone() -> None:
    text = json.dumps(xds.bootstrap(SETTINGS))
    document = json.loads(text)
    addresses = {
        document["admin"]["address"]["socket_address"]["address"],
        document["static_resources"]["listeners"][0]["address"]["socket_address"]["address"],
    }
    assert addresses == {"127.0.0.1"}
