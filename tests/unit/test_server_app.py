"""The model server's HTTP face, in this process, over a real graph."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import impressions
from serving.server.app import Replica, ServerApp
from serving.server.service import Limits, Service, load_service
from tests.asgi_client import Answer, AsgiClient, call
from tests.packages import ITEMS, make_package

KEY = bytes(32)
RECOMMEND = "/v1/recommend"
INFER = "/v2/models/recommender/infer"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    package = make_package(
        tmp_path_factory.mktemp("packages") / "good", fails_on=[ITEMS[10]], stalls_on=[ITEMS[20]],
        stall_loops=200_000_000, max_history=10,
    )  # fmt: skip
    return load_service(package, package.parent / "keys" / "signing.pub")


def client_of(service: Service, *, timeout_s: float) -> Iterator[AsgiClient]:
    service = service.limited(Limits(workers=1, timeout_s=timeout_s, max_waiting=3))
    app = ServerApp(Replica("7", "a"), impression_key=KEY, now_s=lambda: 1000.0)
    app.open(service)
    with AsgiClient(app) as client:
        yield client
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[AsgiClient]:
    yield from client_of(service, timeout_s=60.0)


@pytest.fixture(scope="module")
def impatient(service: Service) -> Iterator[AsgiClient]:
    yield from client_of(service, timeout_s=1.0)


def ask(client: AsgiClient, history: list[str], **more: Any) -> Answer:
    return client.post(RECOMMEND, {"shopper": "1", "history": history} | more)


def infer(client: AsgiClient, data: Any, shape: list[int]) -> Answer:
    tensor = {"name": "history", "datatype": "INT64", "shape": shape, "data": data}
    return client.post(INFER, {"id": "q", "inputs": [tensor]})


def test_an_answer_names_its_version_and_carries_an_impression(client: AsgiClient) -> None:
    answer = ask(client, ["100", "104"], k=3)
    assert (answer.status, answer.json["items"]) == (200, ["105", "106", "107"])
    assert (answer.json["version"], answer.json["fallback"]) == ("7", None)
    assert (answer.headers["x-endcap-version"], answer.headers["x-endcap-zone"]) == ("7", "a")
    impression = impressions.read(KEY, answer.json["impression"])
    assert (impression.version, impression.issued_at_s) == ("7", 1000.0)


def test_unknown_items_are_dropped_and_nothing_known_is_the_fallback(client: AsgiClient) -> None:
    assert ask(client, ["nope", "104", "nope"], k=1).json["items"] == ["105"]
    for history in ([], ["nope"]):
        answer = ask(client, history, k=2)
        assert (answer.status, answer.json["items"], answer.json["fallback"]) == (200, ["149", "148"], "popular")


def test_a_long_history_is_cut_to_its_newest_and_still_all_of_it_is_left_out(client: AsgiClient) -> None:
    history = ["131", *(str(number) for number in range(110, 130) if number not in (110, 120)), "130"]
    assert ask(client, history, k=2).json["items"] == ["132", "133"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", {"shopper": 1, "history": []}, {"shopper": "1", "history": [1]}])
def test_a_bad_request_is_told_what_where_and_what_next(client: AsgiClient, body: Any) -> None:
    answer = client.post(RECOMMEND, body)
    assert answer.status == 400
    assert set(answer.json["error"]) == {"what", "where", "next"}
    assert all(answer.json["error"].values())


def test_a_large_body_is_refused_by_its_header_and_by_its_bytes(client: AsgiClient) -> None:
    assert client.post(RECOMMEND, b"{}", headers=[(b"content-length", b"300000")]).status == 413
    assert client.post(RECOMMEND, b" " * 300_000).status == 413
    assert client.post(INFER, b" " * 300_000).status == 413


def test_a_graph_that_fails_is_a_500_and_the_next_request_is_fine(client: AsgiClient) -> None:
    answer = ask(client, [ITEMS[10]])
    assert (answer.status, answer.json["error"]["what"]) == (500, "the graph failed (InvalidArgument)")
    assert infer(client, [11], [1, 1]).status == 500
    assert ask(client, ["100"]).status == 200


def test_a_stalled_graph_is_ended_and_holds_neither_health_nor_metrics(impatient: AsgiClient) -> None:
    async def look_while_stalled() -> tuple[Answer, list[Answer]]:
        stalled = asyncio.create_task(call(impatient.app, "POST", RECOMMEND, {"shopper": "1", "history": [ITEMS[20]]}))
        await asyncio.sleep(0)
        looks = [await call(impatient.app, "GET", path) for path in ("/v2/health/live", "/v2/health/ready", "/metrics")]
        assert not stalled.done()
        return await stalled, looks

    stalled, looks = impatient.run(look_while_stalled())
    assert [look.status for look in looks] == [200, 200, 200]
    assert stalled.status == 504


def test_more_than_can_wait_are_turned_away_at_once(impatient: AsgiClient) -> None:
    async def crowd() -> list[int]:
        calls = [call(impatient.app, "POST", RECOMMEND, {"shopper": "1", "history": [ITEMS[20]]}) for _ in range(5)]
        return [answer.status for answer in await asyncio.gather(*calls)]

    assert sorted(impatient.run(crowd())) == [503, 503, 504, 504, 504]


def test_a_run_that_the_gateway_no_longer_waits_for_is_ended(client: AsgiClient) -> None:
    body = {"shopper": "1", "history": [ITEMS[20]]}
    answer = client.post(RECOMMEND, body, headers=[(b"x-envoy-expected-rq-timeout-ms", b"50")])
    assert (answer.status, answer.json["error"]["what"]) == (504, "no answer from the graph within 0.05 s")
    for said in (b"", b"0", b"-1", b"soon", b"9" * 40):
        headers = [(b"x-envoy-expected-rq-timeout-ms", said)]
        assert client.post(RECOMMEND, {"shopper": "1", "history": ["104"]}, headers=headers).status == 200


def test_batch_jobs_are_told_429_and_all_when_to_come_again(impatient: AsgiClient) -> None:
    async def crowd() -> tuple[list[Answer], Answer]:
        body = {"shopper": "1", "history": [ITEMS[20]]}
        stalled = [asyncio.create_task(call(impatient.app, "POST", RECOMMEND, body)) for _ in range(2)]
        await asyncio.sleep(0)
        batch = await call(impatient.app, "POST", RECOMMEND, body, headers=[(b"x-endcap-priority", b"batch")])
        return await asyncio.gather(*stalled), batch

    shoppers, batch = impatient.run(crowd())
    assert [answer.status for answer in shoppers] == [504, 504]
    assert (batch.status, batch.headers["retry-after"]) == (429, "1")


def test_a_client_may_say_itself_how_long_it_waits(client: AsgiClient) -> None:
    headers = [(b"x-request-deadline-ms", b"40"), (b"x-envoy-expected-rq-timeout-ms", b"60000")]
    answer = client.post(RECOMMEND, {"shopper": "1", "history": [ITEMS[20]]}, headers=headers)
    assert (answer.status, answer.json["error"]["what"]) == (504, "no answer from the graph within 0.04 s")


def test_open_inference_protocol(client: AsgiClient) -> None:
    assert client.get("/v2").json["name"] == "endcap"
    assert client.get("/v2/models/recommender").json["inputs"][0]["datatype"] == "INT64"
    assert client.get("/v2/models/recommender/ready").status == 200
    assert client.get("/v2/models/recommender/versions/7/ready").status == 200
    for path, field in (
        ("/v2/models/recommender/versions/8", "version"),
        ("/v2/models/recommender/versions/8/ready", "version"),
        ("/v2/models/other", "model"),
        ("/v1/models/other", "model"),
    ):
        answer = client.get(path)
        assert (answer.status, answer.json["error"].partition(":")[0]) == (404, field), path
    assert client.get("/v2/models/other").status == 404
    assert client.post("/v2/models/other/infer", b"{}").status == 404
    answer = infer(client, [[0, 1], [2, 3]], [2, 2])
    assert (answer.json["id"], answer.json["model_version"]) == ("q", "7")
    assert answer.json["outputs"][0]["shape"] == [2, 20]
    assert answer.json["outputs"][0]["data"][:2] == [2, 3]


@pytest.mark.parametrize(
    ("data", "shape"),
    [([51], [1, 1]), ([-1], [1, 1]), ([], [0, 5]), ([], [1, 0]), ([1] * 11, [1, 11]), ([1] * 65, [65, 1])],
)
def test_indices_that_the_graph_was_not_made_for_are_refused(client: AsgiClient, data: Any, shape: list[int]) -> None:
    answer = infer(client, data, shape)
    assert answer.status == 400
    assert isinstance(answer.json["error"], str)


def test_other_paths_and_methods(client: AsgiClient) -> None:
    assert client.get("/nope").status == 404
    assert client.get(RECOMMEND).status == 405
    assert client.post("/v2/health/ready", b"").status == 405


def test_what_happened_is_counted_by_version_and_outcome(client: AsgiClient) -> None:
    def count(name: str, **labels: str) -> float:
        value = client.app.metrics.registry.get_sample_value(name, {"version": "7", **labels})
        return float(value)

    def attempts(outcome: str) -> float:
        return count("endcap_server_attempts_total", route="recommend", outcome=outcome)

    before = {outcome: attempts(outcome) for outcome in ("answered", "refused", "failed")}
    fallbacks = count("endcap_server_fallbacks_total", fallback="popular")
    ask(client, ["100"])
    ask(client, [])
    ask(client, ["100"], k=0)
    ask(client, [ITEMS[10]])
    assert {outcome: attempts(outcome) - before[outcome] for outcome in before} == {
        "answered": 2, "refused": 1, "failed": 1,
    }  # fmt: skip
    assert count("endcap_server_fallbacks_total", fallback="popular") == fallbacks + 1
    assert b"endcap_server_latency_seconds_bucket" in client.get("/metrics").body


def test_nothing_is_answered_before_the_package_is_loaded_nor_ready_while_draining(service: Service) -> None:
    app = ServerApp(Replica("7", "a"), impression_key=None)
    with AsgiClient(app) as client:
        assert client.get("/v2/health/live").status == 200
        assert client.get("/v2/health/ready").status == 503
        assert client.get("/v2/models/recommender").status == 503
        assert ask(client, []).status == 503
        app.open(service)
        assert client.get("/v2/health/ready").status == 200
        assert ask(client, []).json["impression"] is None
        app.draining = True
        assert client.get("/v2/health/ready").status == 503
        last = ask(client, ["100"])
        assert (last.status, last.headers["x-envoy-immediate-health-check-fail"]) == (200, "true")


def test_histories_and_shoppers_are_not_logged(client: AsgiClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    client.post(RECOMMEND, {"shopper": "shopper-secret", "history": [ITEMS[10], "item-secret"]})
    client.post(RECOMMEND, {"shopper": "shopper-secret", "history": ["item-secret", 5]})
    assert "secret" not in caplog.text


LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=8),
    st.sampled_from([item for item in ITEMS if item not in (ITEMS[10], ITEMS[20])]),
)  # fmt: skip
JSON = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(
            st.sampled_from(["shopper", "history", "k", "context", "inputs", "name", "datatype", "shape", "data"]),
            inner, max_size=5,
        ),
    ),
    max_leaves=15,
)  # fmt: skip
INDICES = st.integers(-2, 60).filter(lambda index: index not in (11, 21))


@given(body=st.one_of(st.binary(max_size=300), JSON))
def test_no_body_makes_a_server_error(client: AsgiClient, body: Any) -> None:
    for path in (RECOMMEND, INFER):
        answer = client.post(path, body)
        assert answer.status in (200, 400)
        assert "error" in answer.json or answer.status == 200


@given(
    history=st.lists(LEAF, max_size=30),
    k=LEAF,
    shopper=LEAF,
    rows=st.lists(st.lists(INDICES, max_size=12), max_size=3),
    shape=st.lists(st.integers(-1, 12), max_size=3),
)
def test_nor_does_one_that_is_almost_right(
    client: AsgiClient, history: list[Any], k: Any, shopper: Any, rows: list[list[int]], shape: list[int]
) -> None:
    assert client.post(RECOMMEND, {"shopper": shopper, "history": history, "k": k}).status in (200, 400)
    assert client.post(RECOMMEND, {"shopper": "1", "history": [f"x{item}" for item in history]}).status == 200
    assert infer(client, rows, shape or [len(rows), max(map(len, rows), default=0)]).status in (200, 400)


def test_a_package_folder_is_never_written_to(service: Service, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    before = {path.name: path.stat().st_mtime_ns for path in package.iterdir()}
    load_service(package, tmp_path / "keys" / "signing.pub")
    assert {path.name: path.stat().st_mtime_ns for path in package.iterdir()} == before
