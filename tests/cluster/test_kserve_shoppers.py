"""Shoppers who keep their version, and copies of requests: a service whose route is endcap's, through Envoy Gateway."""

from __future__ import annotations

import contextlib
import itertools

import httpx

from tests.cluster.kserve_load import Answer
from tests.cluster.shop import GOOD, PATIENCE_S, Shop
from tests.process import wait_until

BUCKET = "x-bucket"
PERCENTS = (20, 60, 100)
SETTLES_S = 3.0
"""Envoy's threads take a route up one after the other."""


def test_shoppers_keep_their_version_and_see_no_answer_of_a_shadow(shop: Shop) -> None:
    stable, label = GOOD[:2]
    counter = shop.serve("counter", hostname="counter.example.com")
    wait_until(lambda: _is_up(counter), "version 1 is up", deadline_s=PATIENCE_S)
    name = counter.start(
        label, sticky={"header": BUCKET}, shadow={"share": 0.5, "minRequests": 500, "maxSeconds": 180},
        steps=[{"share": percent / 100, "minRequests": 100, "minSeconds": 5, "maxSeconds": 180}
               for percent in PERCENTS],
    )  # fmt: skip
    counter.until(name, lambda seen: seen.get("phase") == "shadowing", "copies are sent", deadline_s=PATIENCE_S)
    wait_until(lambda: _status(counter) == 200, "the route is there", deadline_s=60)
    with counter.load(buckets=BUCKET) as shoppers:
        wait_until(lambda: _answered(counter, label) > 100, "copies reach the candidate", deadline_s=60)
        copies, seen_by_shoppers = _answered(counter, label), dict(shoppers.versions)
        phase = counter.status(name)["phase"]
        ended = counter.until(name, lambda seen: seen["phase"] == "done", "ended")
        asked = shoppers.asked
        wait_until(lambda: shoppers.asked > asked + 300, "shoppers go on", deadline_s=60)
    assert phase == "shadowing", "counted before any share"
    assert set(seen_by_shoppers) == {stable}, "no shopper saw an answer of the shadow's"
    assert ended["outcome"] == "promoted", ended["reason"]
    assert shoppers.failed == 0, (shoppers.statuses, shoppers.failures[:5])
    assert counter.serves() == label
    print("copies", copies, "of", seen_by_shoppers, "as shoppers saw it", shoppers.versions)  # noqa: T201
    _moved_once(shoppers.answers, label)


def _is_up(shop: Shop) -> bool:
    conditions = [one for pod in shop.pods() for one in pod["status"].get("conditions") or ()]
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def _status(shop: Shop) -> int:
    """What the gateway answers; 0 where it does not yet."""
    asked = {"shopper": "s", "history": [], "k": 1}
    with contextlib.suppress(httpx.HTTPError):
        return httpx.post(
            f"{shop.url}/v1/recommend", json=asked, headers={"host": shop.host}, trust_env=False
        ).status_code
    return 0


def _answered(shop: Shop, label: str) -> int:
    """Requests that the servers of a version answered, by their own counts."""
    total = 0.0
    for pod in shop.pods():
        if pod["metadata"]["labels"].get("endcap.dev/version") == label and pod["status"].get("podIP"):
            try:
                text = httpx.get(f"http://{pod['status']['podIP']}:8080/metrics", trust_env=False).text
            except httpx.HTTPError:  # it starts, or has gone
                continue
            mine = [line for line in text.splitlines() if line.startswith("endcap_server_attempts_total{")]
            total += sum(float(line.rpartition(" ")[2]) for line in mine if 'outcome="answered"' in line)
    return int(total)


def _moved_once(answers: list[Answer], label: str) -> None:
    """Each bucket has stable until it has canary, for good; a step moves its own buckets, after those of the last."""
    moved: dict[int, Answer] = {}
    back = []
    for answer in sorted(answers):
        if answer.version == label:
            moved.setdefault(answer.bucket, answer)
        elif answer.bucket in moved and answer.asked_s > moved[answer.bucket].answered_s + SETTLES_S:
            back.append((answer, moved[answer.bucket]))
    assert back == [], "shoppers who had canary asked again, and got stable"
    assert set(moved) == set(range(100)), "all had canary in the end"
    steps = [[moved[one].answered_s for one in range(*ends)] for ends in itertools.pairwise((0, *PERCENTS))]
    for before, after in itertools.pairwise(steps):
        assert max(before) < min(after), "a step moved a bucket that was not its own"
