"""The local target with the real model server and the real feedback collector."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from endcap.errors import VerificationError
from serving.targets import LocalTarget, ModelVersion, StableVersion, SupervisorConfig, start_local_target
from tests.kserve_client import ask
from tests.local.load import eventually
from tests.packages import make_package


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def target(folder: Path) -> Iterator[LocalTarget]:
    package = make_package(folder / "1")
    config = SupervisorConfig(
        folder=folder / "target", records=folder / "records", public_key=folder / "keys" / "signing.pub",
        stable=StableVersion(label="1", package=package), thresholds_ms=(37, 100), window_s=3.0, replicas_full=1,
    )  # fmt: skip
    with start_local_target(config) as started:
        yield started


def test_the_objectives_thresholds_are_edges_of_the_servers_histograms(target: LocalTarget) -> None:
    port = target.replicas()[0].port
    metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert 'endcap_server_latency_seconds_bucket{le="0.037",route="recommend",version="1"}' in metrics


def recommend(target: LocalTarget) -> str:
    response = httpx.post(target.url + "/v1/recommend", json={"shopper": "7", "history": ["103"], "k": 3})
    assert response.status_code == 200
    assert response.json()["version"] == response.headers["x-endcap-version"] == "1"
    return str(response.json()["impression"])


def tell(target: LocalTarget, impression: str, kind: str) -> None:
    event = {"impression": impression, "type": kind}
    response = httpx.post(target.url + "/v1/feedback", json={"events": [event]})
    assert response.status_code == 200
    taken = response.json()
    assert taken["accepted"] + taken["late"] == 1


def test_clicks_are_counted_for_the_version_that_was_shown(target: LocalTarget) -> None:
    shown, clicked = recommend(target), recommend(target)
    tell(target, shown, "shown")
    tell(target, clicked, "clicked")
    eventually(lambda: target.observe().versions["1"].impressions.total == 2, what="both windows are closed")
    seen = target.observe().versions["1"]
    assert (seen.impressions.good, seen.impressions_open) == (1, 0)


def test_the_kserve_client_passes_through_the_gateway(target: LocalTarget) -> None:
    found = ask(target.url)
    assert (found.live, found.ready, found.model_ready, found.other_ready) == (True, True, True, False)
    assert (found.answer.id, found.answer.model_name) == ("q", "recommender")
    assert found.answer.outputs[0].as_numpy()[:, 0].tolist() == [3, 6]


def test_the_collector_s_death_loses_no_feedback(target: LocalTarget) -> None:
    before = target.state().feedback_pid
    closed = target.observe().versions["1"].impressions.total
    impression, later = recommend(target), recommend(target)
    assert before is not None
    tell(target, impression, "shown")
    os.kill(before, signal.SIGKILL)

    def told() -> bool:
        """The gateway tries until the collector is back; where that takes longer than a request may, a client does."""
        event = {"impression": later, "type": "clicked"}
        try:
            return httpx.post(target.url + "/v1/feedback", json={"events": [event]}).status_code == 200
        except httpx.HTTPError:
            return False

    eventually(told, what="the collector takes feedback again")
    eventually(lambda: target.observe().versions["1"].impressions.total >= closed + 1)
    assert target.state().feedback_pid not in (None, before)


def test_a_shopper_counts_once_since_the_asked_time(target: LocalTarget) -> None:
    assert target.observe().versions["1"].shoppers.total == 0
    begin = target.observe().at_s
    for _ in range(3):
        tell(target, recommend(target), "clicked")
    eventually(lambda: target.observe(shoppers_since_s=begin).versions["1"].shoppers.total == 1, what="a window closed")
    seen = target.observe(shoppers_since_s=begin)
    assert (seen.versions["1"].shoppers.good, seen.window_s) == (1, 3.0)


def test_a_shadow_s_answers_are_compared_with_those_that_shoppers_got(target: LocalTarget, folder: Path) -> None:
    shadow, token = ModelVersion("3", make_package(folder / "3")), target.acquire("test")
    target.ensure_capacity({shadow: 0.05}, token=token)
    assert target.observe().shadow is None
    open_impressions = target.observe().versions["1"].impressions_open
    target.set_shadow(shadow, share=1.0, token=token)
    for _ in range(20):
        recommend(target)

    def compared() -> bool:
        seen = target.observe().shadow
        return seen is not None and seen.pairs == 20

    eventually(compared, what="both answers of each request are found")
    seen = target.observe()
    assert seen.shadow is not None
    assert (seen.shadow.version, seen.shadow.answered.good, seen.shadow.answered.total) == ("3", 20, 20)
    assert (seen.shadow.overlap, seen.shadow.score_drift) == (1.0, 0.0), "the same package answers the same"
    assert seen.shadow.within_ms[100].total == 20
    assert seen.versions["3"].attempts.total == seen.versions["3"].impressions_open == 0
    assert seen.versions["1"].impressions_open <= open_impressions + 20
    target.set_shadow(None, token=token)
    assert target.observe().shadow is None
    target.retire("3", token=token)


def test_one_byte_changed_in_a_package_keeps_it_from_serving(target: LocalTarget, folder: Path) -> None:
    tampered = make_package(folder / "tampered")
    graph = next(tampered.glob("*.onnx"))
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 1
    graph.write_bytes(raw)
    token = target.acquire("test")
    stable = ModelVersion("1", folder / "1")
    with pytest.raises(VerificationError) as refused:
        target.ensure_capacity({ModelVersion("2", tampered): 0.05, stable: 0.95}, token=token)
    assert refused.value.what == f"the signature does not verify: {graph.name} changed after signing"
    assert refused.value.where == str(tampered)
    assert refused.value.next_step == "get the package again from the registry; do not load this one"
    assert dict(target.observe().shares) == {"1": 1.0}
