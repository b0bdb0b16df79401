"""Whatever comes, the server answers: never a 500, never an exception, and a refusal names its field."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serving.server.app import Replica, ServerApp
from serving.server.service import load_service
from tests.asgi_client import Answer, AsgiClient
from tests.packages import make_package

RECOMMEND = "/v1/recommend"
INFER = "/v2/models/recommender/infer"
PREDICT = "/v1/models/recommender:predict"
ROUTES = (RECOMMEND, INFER, PREDICT)
GOOD: dict[str, Any] = {
    RECOMMEND: {
        "shopper": "1", "history": ["104", "105"], "k": 3, "context": {"scene": "home"},
        "filters": {"exclude": ["106"], "candidates": ["107", "108"], "in_stock_only": False},
        "diversity": {}, "explain": True,
    },
    INFER: {
        "id": "q",
        "inputs": [
            {"name": "history", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]], "parameters": {}}
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
        "parameters": {"binary_data_output": False},
    },
    PREDICT: {"instances": [[1, 2], [3, 4]]},
}  # fmt: skip
RAW = np.array([[1, 2], [3, 4]], "<i8").tobytes()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiClient]:
    package = make_package(tmp_path_factory.mktemp("packages") / "good", max_history=10)
    service = load_service(package, package.parent / "keys" / "signing.pub")
    app = ServerApp(Replica("7", "a"), impression_key=None)
    app.open(service)
    with AsgiClient(app) as client:
        yield client
    service.close()


def holds(answer: Answer) -> None:
    if answer.status == 200:
        return
    assert answer.status in (400, 404, 405, 413, 415), answer
    error = answer.json["error"]
    where = error["where"] if isinstance(error, dict) else error.partition(": ")[0]
    assert where is not None, answer


NUMBERS = st.one_of(
    st.integers(-3, 60), st.sampled_from([2**31, 2**63 - 1, -(2**63), 2**63, 2**64 - 1]),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), st.sampled_from(["history", "FP32", "BYTES"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["name", "data", "shape", "parameters", "binary_data_size", "history", "x"]), inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)  # fmt: skip


def places(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON document."""
    found = [here]
    if isinstance(document, dict):
        for name, value in document.items():
            found += places(value, (*here, name))
    elif isinstance(document, list):
        for number, value in enumerate(document):
            found += places(value, (*here, number))
    return found


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid body with up to three of its values replaced, removed or given twice."""
    route = draw(st.sampled_from(ROUTES))
    document = copy.deepcopy(GOOD[route])
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            document = draw(JSON)
            continue
        holder = document
        for step in path[:-1]:
            holder = holder[step]
        match draw(st.integers(0, 2)):
            case 0:
                holder[path[-1]] = draw(JSON)
            case 1:
                del holder[path[-1]]
            case _ if isinstance(holder, list):
                holder.append(copy.deepcopy(holder[path[-1]]))
            case _:
                holder[draw(st.text(max_size=3))] = draw(JSON)
    return route, document


@given(mutated())
@settings(max_examples=300)
def test_a_changed_body_is_answered_or_refused(client: AsgiClient, request: tuple[str, Any]) -> None:
    route, document = request
    try:
        body = orjson.dumps(document)
    except TypeError:  # a number that JSON's writer does not take
        return
    holds(client.post(route, body))


@given(route=st.sampled_from(ROUTES), at=st.integers(0, 200), cut=st.integers(0, 9), more=st.binary(max_size=9))
@example(route=INFER, at=0, cut=0, more=b"\xff\xfe")
@example(route=RECOMMEND, at=200, cut=0, more=b"\x00")
@settings(max_examples=200)
def test_changed_bytes_are_answered_or_refused(client: AsgiClient, route: str, at: int, cut: int, more: bytes) -> None:
    body = orjson.dumps(GOOD[route])
    holds(client.post(route, body[:at] + more + body[at + cut :]))


@given(route=st.sampled_from(ROUTES), body=st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(client: AsgiClient, route: str, body: bytes) -> None:
    holds(client.post(route, body))


HEADERS = st.sampled_from([
    b"inference-header-content-length", b"content-encoding", b"x-endcap-priority", b"x-request-deadline-ms",
    b"x-envoy-expected-rq-timeout-ms", b"x-request-id", b"x-endcap-compare", b"x-endcap-shadow", b"content-type",
])  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from([b"0", b"1", b"-1", b"batch", b"gzip", b"identity", b"9" * 40]), st.binary(max_size=8)
)


@given(route=st.sampled_from(ROUTES), headers=st.lists(st.tuples(HEADERS, TEXTS), max_size=3))
@settings(max_examples=200)
def test_any_headers_are_answered_or_refused(
    client: AsgiClient, route: str, headers: list[tuple[bytes, bytes]]
) -> None:
    answer = client.post(route, GOOD[route], headers=headers)
    if answer.status in (503, 504):  # a deadline of a millisecond may well pass
        assert any(name.endswith(b"-ms") for name, _ in headers)
        return
    holds(answer)


@given(
    size=st.integers(-20, 40), stated=st.integers(0, 40), cut=st.integers(0, 40), shape=st.lists(NUMBERS, max_size=3)
)
@settings(max_examples=200)
def test_raw_tensors_of_any_length_are_answered_or_refused(
    client: AsgiClient, size: int, stated: int, cut: int, shape: list[Any]
) -> None:
    tensor = {"name": "history", "datatype": "INT64", "shape": shape, "parameters": {"binary_data_size": stated}}
    text = orjson.dumps({"inputs": [tensor]})
    length = str(max(0, len(text) + size)).encode()
    holds(client.post(INFER, text + RAW[:cut], headers=[(b"inference-header-content-length", length)]))


@given(
    path=st.text(max_size=20), prefix=st.sampled_from(["/", "/v1/models/", "/v2/models/", "/v2/models/recommender/"])
)
def test_any_path_is_answered(client: AsgiClient, path: str, prefix: str) -> None:
    holds(client.get(prefix + path))
    holds(client.post(f"{prefix}{path}/infer", b"{}"))
    holds(client.post(f"{prefix}{path}:predict", b"{}"))
