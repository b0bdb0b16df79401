"""Rollouts on a real Kubernetes under open-loop load through Envoy Gateway: what shoppers see of them.

The operator is the chart's, in its pod, with the chart's rights; pods run the server's image; clients never try again.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from serving.targets import ModelVersion
from serving.targets.kserve import EnvoyGatewayCounts, FixedDelivery, KServeTarget, PodScrapes, ServerTelemetry, Storage
from serving.targets.kserve.cluster import path_of
from serving.targets.kserve.gateway import ensure_policy, policy_of
from serving.targets.kserve.telemetry import compared
from tests.cluster.shop import GOOD, UNSIGNED, WRONG, Shop, processes_of
from tests.kserve_world import SERVICE
from tests.process import wait_until


def test_a_good_version_is_promoted_and_no_request_of_five_thousand_fails(shop: Shop) -> None:
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 100, "shoppers ask", deadline_s=60)
        ended = shop.roll_out(GOOD[1])
        wait_until(lambda: shoppers.asked > 5_200, "five thousand asked", deadline_s=900)
    assert ended["outcome"] == "promoted", ended["reason"]
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert shoppers.asked >= 5_000
    judged = next(one["canary"] for one in ended["objectives"] if one["name"] == "availability")
    counted = int(judged.rpartition(" of ")[2].replace(",", ""))
    assert 100 <= counted <= shoppers.versions[GOOD[1]], "by its servers until it ended, and by shoppers"
    assert shop.serves() == GOOD[1]
    assert shop.spec()["predictor"]["name"] == f"v{GOOD[1]}"
    assert not shop.spec().get("canary")


def test_a_version_that_ends_at_its_start_is_given_up_and_stable_is_untouched(shop: Shop) -> None:
    before, stable = {pod["metadata"]["uid"] for pod in shop.pods()}, shop.serves()
    with shop.load(rate=50) as shoppers:
        ended = shop.roll_out(UNSIGNED)
    assert ended["outcome"] == "refused"
    assert "code 3" in ended["reason"]
    assert "sign" in ended["reason"]
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert set(shoppers.versions) == {stable}
    assert before <= {pod["metadata"]["uid"] for pod in shop.pods()}
    assert not shop.spec().get("canary")


def test_a_fast_healthy_and_wrong_version_is_rolled_back_by_what_shoppers_click(shop: Shop) -> None:
    stable = shop.spec()["predictor"]
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 100, "shoppers ask", deadline_s=60)
        ended = shop.roll_out(WRONG)
    assert ended["outcome"] == "rolled_back", ended["reason"]
    assert "click-through" in ended["reason"]
    assert shoppers.versions[WRONG] > 0
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert shop.spec()["predictor"] == stable
    assert not shop.spec().get("canary")


def test_an_operator_that_is_killed_at_each_step_and_upgraded_resumes(shop: Shop) -> None:
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 100, "shoppers ask", deadline_s=60)
        name = shop.start(GOOD[2])
        shop.until(name, lambda seen: seen.get("phase") == "growing", "its canary is made")
        shop.kill_operator()
        for step in ("1/3", "2/3"):
            shop.until(name, lambda seen, step=step: (seen["phase"], seen["step"]) == ("observing", step), step)
            shop.kill_operator()
        shop.until(name, lambda seen: seen["step"] == "3/3", "all of the traffic")
        shop.upgrade("operator.logLevel=DEBUG")
        ended = shop.until(name, lambda seen: seen["phase"] == "done", "ended")
    assert ended["outcome"] == "promoted", ended["reason"]
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert shop.serves() == GOOD[2]
    assert [line["seq"] for line in ended["history"]] == list(range(1, len(ended["history"]) + 1)), "none twice"
    lease = shop.access.get("lease", "endcap-operator", f"--namespace={shop.system}")
    assert lease["spec"]["leaseTransitions"] >= 4, "three were killed, and one was replaced"


def test_a_server_that_is_killed_costs_no_shopper_a_request(shop: Shop) -> None:
    with shop.load() as shoppers:
        wait_until(lambda: shoppers.asked > 300, "shoppers ask", deadline_s=60)
        victim = shop.pods()[0]
        for number in processes_of(victim["metadata"]["name"]):
            os.kill(number, signal.SIGKILL)
        asked = shoppers.asked
        wait_until(lambda: shoppers.asked > asked + 1_500, "shoppers go on", deadline_s=120)

    def restarted() -> bool:
        now = next(pod for pod in shop.pods() if pod["metadata"]["uid"] == victim["metadata"]["uid"])
        return bool(now["status"]["containerStatuses"][0]["restartCount"] > 0)

    wait_until(restarted, "the container was started again", deadline_s=120)
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])


def test_the_gateway_and_the_servers_count_the_same_where_each_version_has_a_cluster(shop: Shop) -> None:
    """The one thing that the operator does not ask for, and a team may: see :mod:`serving.targets.kserve.gateway`."""
    gateway = EnvoyGatewayCounts(shop.cluster, SERVICE, shop.namespace, direct=True)
    telemetry = ServerTelemetry(PodScrapes(), gateway=gateway)
    serves = shop.serves()
    stable, other = (ModelVersion(label, Path()) for label in (serves, next(one for one in GOOD if one != serves)))
    delivery = FixedDelivery({other.label: Storage(f"pvc://models/{other.label}")})
    target = KServeTarget(shop.cluster, SERVICE, shop.namespace, delivery, telemetry=telemetry)
    policies = path_of("backendtrafficpolicies", shop.namespace)
    with contextlib.closing(telemetry), shop.load() as shoppers:
        apart = policy_of(SERVICE, shop.namespace, apart=True)
        shop.cluster.apply(f"{policies}/{apart['metadata']['name']}", apart)
        token = target.acquire("a test")
        try:
            half = {other: 0.5, stable: 0.5}
            target.ensure_capacity(half, token=token)
            target.set_shares(half, token=token)
            target.observe()
            asked = shoppers.asked
            wait_until(lambda: shoppers.asked > asked + 600, "shoppers ask both", deadline_s=120)
            shoppers.stop()
            counted: dict[str, float] = {}

            def agree() -> bool:
                target.observe()
                counted.update(compared(telemetry.servers(), gateway.versions()))
                totals = [found[0].total for found in gateway.versions().values()]
                return len(totals) == 2 and min(totals) > 100 and all(abs(off) < 0.05 for off in counted.values())

            wait_until(agree, "both count the same", deadline_s=60)
        finally:
            target.ensure_capacity({stable: 1.0}, token=token)
            target.set_shares({stable: 1.0}, token=token)
            target.retire(other.label, token=token)
            ensure_policy(shop.cluster, SERVICE, shop.namespace)
