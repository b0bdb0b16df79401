"""Bad input over the wire: a refusal that names the field, and the next request on the connection is answered.

HTTP (v2, v1 and the recommender's own route) and gRPC, at real processes with a recommender and a classifier.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from endcap.package import Task
from serving.server import grpc_messages, http2
from serving.server.http2 import frame, literal
from tests.fuzz.campaign import Server, served
from tests.fuzz.packages import Subject, make_subject
from tests.fuzz.wire import Answer, GrpcClient, HttpClient, exchange, http_request

TOP_K = 20
V1, V2, RECOMMEND = "/v1/models/recommender:predict", "/v2/models/recommender/infer", "/v1/recommend"
GRPC_INFER = f"/{grpc_messages.SERVICE}/ModelInfer"
BOMB = gzip.compress(bytes(10_000_000))
SLOW_S = 120.0
"""Slow senders are told after 30 s and a sweep; on a busy machine that may be late."""


@dataclass
class Slow:
    """Connections that send a part, from the begin of the tests on."""

    head: socket.socket
    body: socket.socket
    grpc_message: socket.socket
    grpc_frame: socket.socket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad-input")


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return make_subject(folder, Task.SESSION_RECOMMENDER)


@pytest.fixture(scope="module")
def server(folder: Path, subject: Subject) -> Iterator[Server]:
    with served(subject, folder) as server:
        yield server


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Iterator[tuple[Subject, Server]]:
    subject = make_subject(folder, Task.CLASSIFIER)
    with served(subject, folder) as server:
        yield subject, server


@pytest.fixture
def client(server: Server) -> Iterator[HttpClient]:
    client = HttpClient(server.http)
    yield client
    client.close()


@pytest.fixture
def caller(server: Server) -> Iterator[GrpcClient]:
    caller = GrpcClient(server.grpc)
    yield caller
    caller.close()


@pytest.fixture(scope="module", autouse=True)
def slow(server: Server, subject: Subject) -> Iterator[Slow]:
    whole = http_request(V2, orjson.dumps(subject.good[V2]))
    begin = http2.PREFACE + frame(http2.SETTINGS, 0, 0, b"")
    parts = [
        (server.http, whole[:30]), (server.http, whole[:-1]),
        (server.grpc, begin + grpc_head(1) + frame(http2.DATA, 0, 1, message_of(subject.message)[:-1])),
        (server.grpc, begin + frame(http2.PING, 0, 0, bytes(8)) + b"\x00\x00\x08"),
    ]  # fmt: skip
    sockets = []
    for address, part in parts:
        one = socket.create_connection(address, timeout=SLOW_S)
        one.sendall(part)
        sockets.append(one)
    yield Slow(*sockets)
    for one in sockets:
        one.close()


def grpc_head(stream: int) -> bytes:
    fields = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", GRPC_INFER.encode()),
              (b"content-type", b"application/grpc"))  # fmt: skip
    return frame(http2.HEADERS, http2.END_HEADERS, stream, b"".join(literal(*one) for one in fields))


def message_of(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4, "big") + message


def field_of(answer: Answer) -> str:
    """What the refusal names."""
    if answer.grpc is not None:
        return answer.headers["grpc-message"].partition(": ")[0]
    error = orjson.loads(answer.body)["error"]
    return str(error["where"]) if isinstance(error, dict) else str(error).partition(": ")[0]


def v2(**change: Any) -> bytes:
    tensor = {"name": "history", "datatype": "INT64", "shape": [2, 2], "data": [[1, 2], [3, 4]]} | change
    return json.dumps({"inputs": [{name: value for name, value in tensor.items() if value is not ...}]}).encode()


def v1(instances: Any) -> bytes:
    return json.dumps({"instances": instances}).encode()


def recommend(**change: Any) -> bytes:
    return json.dumps({"shopper": "1", "history": ["104"]} | change).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
NESTED: Any = [[[[[1]]]]]
LARGE = b'{"inputs":[' + b"1," * 5_000_000 + b"1]}"
GZIP = (("Content-Encoding", "gzip"),)
NOTHING: tuple[tuple[str, str], ...] = ()

HTTP: dict[str, tuple[str, bytes, tuple[tuple[str, str], ...], int, str]] = {
    "v2 wrong name": (V2, v2(name="x"), NOTHING, 400, "inputs.0.name"),
    "v2 no name": (V2, v2(name=...), NOTHING, 400, "inputs.0.name"),
    "v2 another output": (V2, v2()[:-1] + b',"outputs":[{"name":"x"}]}', NOTHING, 400, "outputs.0"),
    "v2 shape of fewer axes": (V2, v2(shape=[4]), NOTHING, 400, "inputs.0.shape"),
    "v2 negative shape": (V2, v2(shape=[-2, -2]), NOTHING, 400, "inputs.0.shape"),
    "v2 shape of floats": (V2, v2(shape=[2.0, 2.0]), NOTHING, 400, "inputs.0.shape"),
    "v2 huge shape": (V2, v2(shape=[1 << 30, 1 << 30]), NOTHING, 400, "inputs.0.data"),
    "v2 shape of other data": (V2, v2(shape=[2, 3]), NOTHING, 400, "inputs.0.data.0"),
    "v2 datatype": (V2, v2(datatype="FP32"), NOTHING, 400, "inputs.0.datatype"),
    "v2 unknown datatype": (V2, v2(datatype="INT65"), NOTHING, 400, "inputs.0.datatype"),
    "v2 text for a number": (V2, v2(data=[[1, 2], [3, "4"]]), NOTHING, 400, "inputs.0.data"),
    "v2 truth for a number": (V2, v2(data=[[1, 2], [3, True]]), NOTHING, 400, "inputs.0.data"),
    "v2 null for a number": (V2, v2(data=[[1, 2], [3, None]]), NOTHING, 400, "inputs.0.data"),
    "v2 fraction": (V2, v2(data=[[1, 2], [3, 4.5]]), NOTHING, 400, "inputs.0.data"),
    "v2 number beyond 64 bits": (V2, v2(data=[[1, 2], [3, 2**63]]), NOTHING, 400, "inputs.0.data"),
    "v2 NaN": (V2, v2(data=[[1, 2], [3, float("nan")]]), NOTHING, 400, "body"),
    "v2 infinity": (V2, v2(data=[[1, 2], [3, float("inf")]]), NOTHING, 400, "body"),
    "v2 beyond the item table": (V2, v2(data=[[1, 2], [3, 51]]), NOTHING, 400, "inputs.history.data"),
    "v2 below the item table": (V2, v2(data=[[1, 2], [3, -1]]), NOTHING, 400, "inputs.history.data"),
    "v2 input twice": (V2, v2()[:-2] + b"," + v2()[12:], NOTHING, 400, "inputs.1"),
    "v2 empty batch": (V2, v2(shape=[0, 2], data=[]), NOTHING, 400, "inputs.history.shape"),
    "v2 no inputs": (V2, b'{"inputs":[]}', NOTHING, 400, "inputs"),
    "v2 many rows": (V2, v2(shape=[65, 1], data=[[1]] * 65), NOTHING, 400, "inputs.history.shape"),
    "v2 long rows": (V2, v2(shape=[1, 51], data=[[1] * 51]), NOTHING, 400, "inputs.history.shape"),
    "v2 ragged": (V2, v2(data=[[1, 2], [3]]), NOTHING, 400, "inputs.0.data.1"),
    "v2 nested deeper": (V2, v2(shape=[1, 1], data=NESTED), NOTHING, 400, "inputs.0.data"),
    "v2 deep nesting": (V2, b'{"inputs":' + DEEP + b"}", NOTHING, 400, "body"),
    "v2 invalid UTF-8": (V2, v2().replace(b"history", b"hist\xff\xfe"), NOTHING, 400, "body"),
    "v2 half of a pair": (V2, v2(name="\ud800"), NOTHING, 400, "body"),
    "v2 10 MB": (V2, LARGE, NOTHING, 413, "body"),
    "v2 gzip bomb": (V2, BOMB, GZIP, 415, "Content-Encoding"),
    "v2 gzip bomb that is not said": (V2, BOMB, NOTHING, 400, "body"),
    "v2 JSON longer than the body": (V2, v2(), (("Inference-Header-Content-Length", "999"),), 400,
                                     "Inference-Header-Content-Length"),
    "v2 raw bytes that are short": (V2, v2(data=..., parameters={"binary_data_size": 24}), NOTHING, 400,
                                    "inputs.0.parameters.binary_data_size"),
    "v2 unknown version": ("/v2/models/recommender/versions/99/infer", v2(), NOTHING, 404, "version"),
    "v2 unknown model": ("/v2/models/other/infer", v2(), NOTHING, 404, "model"),
    "v1 wrong name": (V1, v1([{"x": [1, 2]}]), NOTHING, 400, "instances.0"),
    "v1 no name": (V1, b"{}", NOTHING, 400, "instances"),
    "v1 both forms": (V1, b'{"instances":[[1]],"inputs":[[1]]}', NOTHING, 400, "instances"),
    "v1 shape": (V1, v1([1, 2]), NOTHING, 400, "instances"),
    "v1 text for a number": (V1, v1([["1"]]), NOTHING, 400, "instances"),
    "v1 NaN": (V1, v1([[float("nan")]]), NOTHING, 400, "body"),
    "v1 beyond the item table": (V1, v1([[51]]), NOTHING, 400, "inputs.history.data"),
    "v1 empty batch": (V1, v1([]), NOTHING, 400, "instances"),
    "v1 empty rows": (V1, v1([[], []]), NOTHING, 400, "inputs.history.shape"),
    "v1 ragged": (V1, v1([[1, 2], [3]]), NOTHING, 400, "instances.1"),
    "v1 nested deeper": (V1, v1(NESTED), NOTHING, 400, "instances"),
    "v1 deep nesting": (V1, b'{"instances":' + DEEP + b"}", NOTHING, 400, "body"),
    "v1 invalid UTF-8": (V1, b'{"instances":[["\xc0\x80"]]}', NOTHING, 400, "body"),
    "v1 10 MB": (V1, LARGE, NOTHING, 413, "body"),
    "v1 gzip bomb": (V1, BOMB, GZIP, 415, "Content-Encoding"),
    "v1 unknown model": ("/v1/models/other:predict", v1([[1]]), NOTHING, 404, "model"),
    "recommend wrong name": (RECOMMEND, recommend(hystory=[]), NOTHING, 400, "hystory"),
    "recommend name of nothing": (RECOMMEND, recommend(**{"": 1}), NOTHING, 400, '""'),
    "recommend no shopper": (RECOMMEND, b'{"history":[]}', NOTHING, 400, "shopper"),
    "recommend long shopper": (RECOMMEND, recommend(shopper="x" * 257), NOTHING, 400, "shopper"),
    "recommend history of numbers": (RECOMMEND, recommend(history=["104", 105]), NOTHING, 400, "history.1"),
    "recommend long history": (RECOMMEND, recommend(history=["104"] * 1001), NOTHING, 400, "history"),
    "recommend k as text": (RECOMMEND, recommend(k="3"), NOTHING, 400, "k"),
    "recommend k as a fraction": (RECOMMEND, recommend(k=1.0), NOTHING, 400, "k"),
    "recommend k as truth": (RECOMMEND, recommend(k=True), NOTHING, 400, "k"),
    "recommend k of 0": (RECOMMEND, recommend(k=0), NOTHING, 400, "k"),
    "recommend k beyond the graph's": (RECOMMEND, recommend(k=TOP_K + 1), NOTHING, 400, "k"),
    "recommend NaN": (RECOMMEND, recommend(k=float("nan")), NOTHING, 400, "body"),
    "recommend infinity": (RECOMMEND, recommend(k=float("-inf")), NOTHING, 400, "body"),
    "recommend unknown scene": (RECOMMEND, recommend(context={"scene": "x"}), NOTHING, 400, "context.scene"),
    "recommend unknown filter": (RECOMMEND, recommend(filters={"x": 1}), NOTHING, 400, "filters.x"),
    "recommend duplicate candidates": (RECOMMEND, recommend(filters={"candidates": ["104", "104"]}), NOTHING, 400,
                                       "filters.candidates"),
    "recommend no candidates": (RECOMMEND, recommend(filters={"candidates": []}), NOTHING, 400, "filters.candidates"),
    "recommend ragged": (RECOMMEND, recommend(history=[["104"], "105"]), NOTHING, 400, "history.0"),
    "recommend deep nesting": (RECOMMEND, b'{"history":' + DEEP + b"}", NOTHING, 400, "body"),
    "recommend invalid UTF-8": (RECOMMEND, recommend().replace(b"104", b"\xff\xfe"), NOTHING, 400, "body"),
    "recommend 10 MB": (RECOMMEND, LARGE, NOTHING, 413, "body"),
    "recommend gzip bomb": (RECOMMEND, BOMB, GZIP, 415, "Content-Encoding"),
    "recommend no JSON": (RECOMMEND, b"", NOTHING, 400, "body"),
}  # fmt: skip


def test_over_http_what_is_refused_is_named_and_the_connection_goes_on(client: HttpClient, subject: Subject) -> None:
    good = [http_request(path, orjson.dumps(body)) for path, body in subject.good.items()]
    wrong = []
    for number, (name, (path, body, headers, status, field)) in enumerate(HTTP.items()):
        answer = client.ask(http_request(path, body, *headers))
        if (answer.status, field_of(answer)) != (status, field):
            wrong.append((name, answer.status, answer.text))
        again = client.ask(good[number % len(good)])
        if again.status != 200:
            wrong.append((f"after {name}", again.status, again.text))
    assert wrong == []
    assert client.connections == 1


def test_a_body_in_chunks_is_refused_alike(client: HttpClient, subject: Subject) -> None:
    head = f"POST {V2} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    body = v2(name="x")
    answer = client.ask(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert (answer.status, field_of(answer)) == (400, "inputs.0.name")
    large = b"".join(b"%x\r\n%s\r\n" % (60_000, b" " * 60_000) for _ in range(20))
    answer = client.ask(head + large + b"0\r\n\r\n")
    assert (answer.status, field_of(answer)) == (413, "body")
    assert client.ask(http_request(V2, orjson.dumps(subject.good[V2]))).status == 200
    assert client.connections == 1


def test_what_json_has_no_number_for_is_refused_of_floats(classifier: tuple[Subject, Server]) -> None:
    subject, server = classifier
    http, grpc = HttpClient(server.http), GrpcClient(server.grpc)
    good = http_request(subject.infer_path, orjson.dumps(subject.good[subject.infer_path]))
    for value in ("NaN", "Infinity", "-Infinity", "1e39", "1e999"):
        text = json.dumps({"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 7]}]})
        answer = http.ask(http_request(subject.infer_path, text.replace("7", value).encode()))
        assert (answer.status, field_of(answer)) == (400, "inputs.0.data" if value == "1e39" else "body"), value
        assert http.ask(good).status == 200
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": 12}}
    text = json.dumps({"inputs": [tensor]})
    for odd in (float("nan"), float("inf"), float("-inf")):
        raw = struct.pack("<3f", 1.0, odd, 2.0)
        header = ("Inference-Header-Content-Length", str(len(text)))
        answer = http.ask(http_request(subject.infer_path, text.encode() + raw, header))
        assert (answer.status, field_of(answer)) == (400, "inputs.0.parameters.binary_data_size")
        assert http.ask(good).status == 200
        tensors: list[dict[str, Any]] = [{"name": "features", "datatype": "FP32", "shape": [1, 3]}]
        answered = grpc.call(GRPC_INFER, message_of(infer(tensors, [raw], model="classifier")))
        assert (answered.grpc, field_of(answered)) == (3, "raw_input_contents.0")
        tensors[0]["contents"] = {"fp32_contents": [1.0, odd, 2.0]}
        answered = grpc.call(GRPC_INFER, message_of(infer(tensors, model="classifier")))
        assert (answered.grpc, field_of(answered)) == (3, "inputs.0.contents.fp32_contents")
        assert grpc.call(GRPC_INFER, message_of(subject.message)).grpc == 0
    assert (http.connections, grpc.connections) == (1, 1)
    http.close()
    grpc.close()


def infer(inputs: list[dict[str, Any]], raw: list[bytes] | None = None, *, model: str = "recommender",
          **more: Any) -> bytes:  # fmt: skip
    request = grpc_messages.message("ModelInferRequest")
    found: bytes = request(model_name=model, inputs=inputs, raw_input_contents=raw or [], **more).SerializeToString()
    return found


def history(shape: list[int], values: list[int], **change: Any) -> dict[str, Any]:
    contents = {"int64_contents": values}
    return {"name": "history", "datatype": "INT64", "shape": shape, "contents": contents} | change


GOOD_HISTORY = history([1, 2], [1, 2])
BARE = {"name": "history", "datatype": "INT64", "shape": [1, 2]}
GRPC: dict[str, tuple[bytes, int, str]] = {
    "wrong name": (message_of(infer([history([1, 2], [1, 2], name="x")])), 3, "inputs.0.name"),
    "another output": (message_of(infer([GOOD_HISTORY], outputs=[{"name": "x"}])), 3, "outputs.0.name"),
    "shape": (message_of(infer([history([2], [1, 2])])), 3, "inputs.0.shape"),
    "negative shape": (message_of(infer([history([-1, -2], [1, 2])])), 3, "inputs.0.shape"),
    "huge shape": (message_of(infer([history([1 << 30, 1 << 30], [1])])), 3, "inputs.0.contents.int64_contents"),
    "datatype": (message_of(infer([history([1, 2], [1, 2], datatype="FP32")])), 3, "inputs.0.datatype"),
    "contents of another type": (
        message_of(infer([history([1, 2], [], contents={"fp32_contents": [1.0, 2.0]})])), 3,
        "inputs.0.contents.int64_contents",
    ),
    "beyond the item table": (message_of(infer([history([1, 2], [1, 51])])), 3, "inputs.history.data"),
    "below the item table": (message_of(infer([history([1, 2], [1, -1])])), 3, "inputs.history.data"),
    "input twice": (message_of(infer([GOOD_HISTORY, GOOD_HISTORY])), 3, "inputs.1"),
    "empty batch": (message_of(infer([history([0, 2], [])])), 3, "inputs.history.shape"),
    "no inputs": (message_of(infer([])), 3, "inputs"),
    "ragged": (message_of(infer([history([2, 2], [1, 2, 3])])), 3, "inputs.0.contents.int64_contents"),
    "raw and typed": (message_of(infer([GOOD_HISTORY], [bytes(16)])), 3, "inputs.0.contents"),
    "raw that is short": (message_of(infer([BARE], [bytes(15)])), 3, "raw_input_contents.0"),
    "more raw than inputs": (message_of(infer([GOOD_HISTORY], [b"", b""])), 3, "raw_input_contents"),
    "10 MB": (message_of(infer([GOOD_HISTORY], [bytes(10_000_000)])), 8, "body"),
    "invalid UTF-8": (message_of(b"\x0a\x02\xff\xfe"), 3, "body"),
    "deep nesting": (message_of(b"\x0b" * 5000), 3, "body"),
    "no protobuf": (message_of(b"\xff" * 50), 3, "body"),
    "no whole message": (message_of(infer([GOOD_HISTORY]))[:-1], 3, "body"),
    "nothing": (b"", 3, "body"),
    "gzip bomb": (b"\x01" + len(BOMB).to_bytes(4, "big") + BOMB, 12, "body"),
    "unknown version": (message_of(infer([GOOD_HISTORY], model_version="99")), 5, "version"),
    "unknown model": (message_of(infer([GOOD_HISTORY], model="other")), 5, "model"),
}  # fmt: skip


def test_over_grpc_what_is_refused_is_named_and_the_connection_goes_on(caller: GrpcClient, subject: Subject) -> None:
    wrong = []
    for name, (body, status, field) in GRPC.items():
        answer = caller.call(GRPC_INFER, body)
        if answer.grpc is None or (answer.grpc, field_of(answer)) != (status, field):
            wrong.append((name, answer))
        again = caller.call(GRPC_INFER, message_of(subject.message))
        if again.grpc != 0:
            wrong.append((f"after {name}", again))
    assert wrong == []
    assert caller.connections == 1


def test_duplicate_items_of_a_history_are_no_fault(client: HttpClient) -> None:
    answer = client.ask(http_request(RECOMMEND, recommend(history=["104", "104", "no such item"])))
    assert answer.status == 200
    assert "104" not in orjson.loads(answer.body)["items"]


def test_half_closed_connections_are_answered_and_ended(server: Server, subject: Subject) -> None:
    whole = http_request(V2, orjson.dumps(subject.good[V2]))
    assert exchange(server.http, [whole], ending="half").startswith(b"HTTP/1.1 200 ")
    assert exchange(server.http, [whole * 2], ending="half").count(b"HTTP/1.1 200 ") == 2
    part = exchange(server.http, [whole[:-1]], ending="half")
    assert part.startswith(b"HTTP/1.1 400 ")
    assert b"request: " in part
    begin = http2.PREFACE + frame(http2.SETTINGS, 0, 0, b"") + grpc_head(1)
    body = message_of(subject.message)
    answer = exchange(server.grpc, [begin + frame(http2.DATA, http2.END_STREAM, 1, body)], ending="half")
    assert literal(b"grpc-status", b"0") in answer
    assert exchange(server.grpc, [begin + frame(http2.DATA, 0, 1, body[:-1])], ending="half").startswith(b"\0\0")


def test_a_client_that_would_rather_speak_http_2_is_answered(client: HttpClient, subject: Subject) -> None:
    wish = (("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk"))
    for _ in range(3):
        assert client.ask(http_request(V2, orjson.dumps(subject.good[V2]), *wish)).status == 200
    assert client.connections == 1


def received(peer: socket.socket) -> bytes:
    more = peer.recv(65_536)
    assert more, "the connection has ended"
    return more


def test_slow_senders_are_told_and_nothing_waits_for_them(server: Server, subject: Subject, slow: Slow) -> None:
    """They began before all other tests here, which are answered all the while. It is the last for that reason."""
    for one in (slow.head, slow.body):
        answer = b"".join(iter(lambda one=one: one.recv(65_536), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"body: " in answer
    until_s = time.monotonic() + SLOW_S
    answer = b""
    while literal(b"grpc-status", b"4") not in answer:
        assert time.monotonic() < until_s
        answer += received(slow.grpc_message)
    assert b"body: the message took too long to arrive" in answer
    slow.grpc_message.sendall(grpc_head(3) + frame(http2.DATA, http2.END_STREAM, 3, message_of(subject.message)))
    while literal(b"grpc-status", b"0") not in answer:
        answer += received(slow.grpc_message)
    ended = b"".join(iter(lambda: slow.grpc_frame.recv(65_536), b""))
    assert b"too long to arrive" in ended
