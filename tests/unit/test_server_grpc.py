"""The Open Inference Protocol over gRPC: messages, tensors, and a real server on this test's own loop."""

from __future__ import annotations

import asyncio
import math
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from google.protobuf import descriptor_pb2  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError
from endcap.package import Manifest, Task, TensorSpec, Variant
from serving.asgi import Headers
from serving.server import grpc_messages, tensors
from serving.server.grpc_server import GrpcInfer, GrpcServer, format_infer, parse_infer
from serving.server.oip import UnknownModelError

Request = grpc_messages.message("ModelInferRequest")
Response = grpc_messages.message("ModelInferResponse")


def manifest(datatype: str = "INT64") -> Manifest:
    """Also of datatypes that no package has yet."""
    spec = TensorSpec.model_construct(name="x", datatype=datatype, shape=(-1, -1))
    return Manifest(
        name="echo", task=Task.RANKER, model="any", inputs=(), outputs=(), variants={"float32": Variant(file="m.onnx")},
        top_k=2, max_history=50, created_at="2026-11-22T00:00:00Z",
    ).model_copy(update={"inputs": (spec,), "outputs": (spec,)})  # fmt: skip


def tensor(**change: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "INT64", "shape": [1, 2], "contents": {"int64_contents": [1, 2]}} | change


def body(*inputs: Any, **more: Any) -> bytes:
    found: bytes = Request(**({"model_name": "echo", "inputs": inputs} | more)).SerializeToString()
    return found


def parse(*inputs: Any, datatype: str = "INT64", **more: Any) -> GrpcInfer:
    return parse_infer(body(*inputs, **more), manifest(datatype), version="7")


def test_the_messages_are_the_published_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kserve's generated code warns of its own age
        from kserve.protocol.grpc import grpc_predict_v2_pb2  # type: ignore[import-untyped]

    published = descriptor_pb2.FileDescriptorProto()
    grpc_predict_v2_pb2.DESCRIPTOR.CopyToProto(published)

    def flat(file: Any) -> list[str]:
        found: list[str] = []

        def walk(message: Any, path: str) -> None:
            found.append(f"{path} {[o.name for o in message.oneof_decl]} {message.options.map_entry}")
            found.extend(
                f"{path}.{field.name} {field.number} {field.type} {field.label} {field.type_name} "
                f"{field.HasField('oneof_index')}"
                for field in message.field
            )
            for inner in message.nested_type:
                walk(inner, f"{path}.{inner.name}")

        for message in file.message_type:
            walk(message, message.name)
        for service in file.service:
            found += [f"{service.name} {m.name} {m.input_type} {m.output_type}" for m in service.method]
        return [file.package, file.syntax, *sorted(found)]

    assert flat(grpc_messages.FILE) == flat(published)


TYPED = {
    "BOOL": ("bool_contents", st.booleans()),
    "INT8": ("int_contents", st.integers(-128, 127)),
    "INT32": ("int_contents", st.integers(-(2**31), 2**31 - 1)),
    "INT64": ("int64_contents", st.integers(-(2**63), 2**63 - 1)),
    "UINT16": ("uint_contents", st.integers(0, 2**16 - 1)),
    "UINT64": ("uint64_contents", st.integers(0, 2**64 - 1)),
    "FP32": ("fp32_contents", st.floats(width=32, allow_nan=False, allow_infinity=False)),
    "FP64": ("fp64_contents", st.floats(allow_nan=False, allow_infinity=False)),
    "BYTES": ("bytes_contents", st.text(max_size=3).map(str.encode)),
}


@given(st.data())
def test_tensors_come_and_go_exactly_typed_and_raw(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(sorted(TYPED)))
    field, values = TYPED[datatype]
    drawn = data.draw(st.lists(values, min_size=1, max_size=4))
    described = tensor(datatype=datatype, shape=[1, len(drawn)], contents={field: drawn})
    typed = parse(described, datatype=datatype)
    answer = Response.FromString(format_infer(typed, typed.inputs, manifest(datatype), version="7"))
    assert list(getattr(answer.outputs[0].contents, field)) == drawn
    assert (answer.model_name, answer.model_version, list(answer.outputs[0].shape)) == ("echo", "7", [1, len(drawn)])

    raw = tensors.to_raw(typed.inputs["x"], manifest(datatype).inputs[0])
    described.pop("contents")
    again = parse(described, datatype=datatype, raw_input_contents=[raw], id="q")
    assert again.inputs["x"].tolist() == typed.inputs["x"].tolist()
    answer = Response.FromString(format_infer(again, again.inputs, manifest(datatype), version="7"))
    assert (list(answer.raw_output_contents), answer.id) == ([raw], "q")
    assert not answer.outputs[0].HasField("contents")


def test_fp16_is_raw_whatever_the_request_was() -> None:
    raw = np.array([[1.5, 2.0]], "<f2").tobytes()
    described = tensor(datatype="FP16")
    described.pop("contents")
    asked = parse(described, datatype="FP16", raw_input_contents=[raw])
    typed = GrpcInfer(asked.id, asked.inputs, None, raw=False)
    answer = Response.FromString(format_infer(typed, asked.inputs, manifest("FP16"), version="7"))
    assert list(answer.raw_output_contents) == [raw]
    with pytest.raises(InputError, match="no typed contents"):
        parse(tensor(datatype="FP16"), datatype="FP16")


@pytest.mark.parametrize(
    ("change", "more", "where"),
    [
        ({"name": "y"}, {}, "inputs.0.name"),
        ({"datatype": "FP32"}, {}, "inputs.0.datatype"),
        ({"shape": [2]}, {}, "inputs.0.shape"),
        ({"shape": [-1, 2]}, {}, "inputs.0.shape"),
        ({"shape": [2**62, 2**62]}, {}, "inputs.0.shape"),
        ({"shape": [2**30, 2**30]}, {}, "inputs.0.contents.int64_contents"),
        ({"contents": {"fp32_contents": [1, 2]}}, {}, "inputs.0.contents.int64_contents"),
        ({}, {"outputs": [{"name": "y"}]}, "outputs.0.name"),
        ({}, {"raw_input_contents": [b"", b""]}, "raw_input_contents"),
        ({}, {"raw_input_contents": [b""]}, "inputs.0.contents"),
        ({"contents": None}, {"raw_input_contents": [b"1"]}, "raw_input_contents.0"),
        ({}, {"id": "i" * 300}, "id"),
        ({}, {"model_name": "other"}, "model"),
        ({}, {"model_version": "8"}, "version"),
        ({}, {"inputs": []}, "inputs"),
        ({}, {"inputs": [tensor(), tensor()]}, "inputs.1"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], more: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_infer(body(**({"inputs": [tensor(**change)]} | more)), manifest(), version="7")
    assert caught.value.where == where


GOOD = body(tensor())


@given(st.one_of(
    st.binary(max_size=60),
    st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=6), st.integers(0, 6)).map(
        lambda edit: GOOD[: edit[0]] + edit[1] + GOOD[edit[0] + edit[2] :]
    ),
))  # fmt: skip
def test_any_bytes_are_a_request_or_refused(raw: bytes) -> None:
    try:
        request = parse_infer(raw, manifest(), version="7")
    except InputError as error:
        assert error.where
        return
    assert request.inputs["x"].ndim == 2


MANIFEST = manifest()


@dataclass
class Admitted:
    """The model gives its input back, but for some first values."""

    backend: Echo
    manifest: Manifest = MANIFEST

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        first = int(inputs["x"].flat[0])
        if first < 0:
            raise InputError("below 0", where="inputs.x.data")
        if first == 503:
            error = EndcapError("busy\nindeed", where="server")
            error.retry_after_s = 2  # type: ignore[attr-defined]
            raise error
        if first == 500:
            raise ValueError("a fault")
        if first == 1000:
            self.backend.under_way.set()
            await self.backend.finish.wait()
        return inputs


class Echo:
    """A backend that counts."""

    version = "7"

    def __init__(self) -> None:
        self.ready = True
        self.counted: list[str] = []
        self.within_s: list[float] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.under_way = asyncio.Event()
        self.finish = asyncio.Event()

    def manifest(self) -> Manifest:
        return MANIFEST

    def admit(self, headers: Headers, *, within_s: float) -> Admitted:
        self.within_s.append(within_s)
        self.headers.append(dict(headers))
        return Admitted(self)

    async def load(self, name: str, headers: Headers) -> None:
        if dict(headers).get(b"authorization") != b"Bearer k":
            raise EndcapError("no", where="authorization")

    async def unload(self, name: str, headers: Headers) -> None:
        raise InputError("never", where="model_name")

    def status_of(self, error: EndcapError) -> tuple[int, str]:
        if isinstance(error, UnknownModelError):
            return 404, "refused"
        if isinstance(error, InputError):
            return 400, "refused"
        return (401, "refused") if error.where == "authorization" else (503, "shed")

    def count(self, headers: object, status: int, outcome: str, took_s: float, answer_bytes: int = 0) -> None:
        assert took_s >= 0
        self.counted.append(outcome)


Call = Callable[..., Awaitable[Any]]


def serve(scenario: Callable[[Echo, GrpcServer, Call], Awaitable[None]]) -> None:
    """Run ``scenario`` against a server; ``call(method, body, **options)`` gives the answer's bytes."""

    async def run() -> None:
        backend = Echo()
        server = GrpcServer(backend, host="127.0.0.1", port=0, max_bytes=4096)
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:

                async def call(method: str, raw: bytes, service: str = grpc_messages.SERVICE, **options: Any) -> Any:
                    return await channel.unary_unary(f"/{service}/{method}")(raw, **({"timeout": 20.0} | options))

                await scenario(backend, server, call)
        finally:
            await server.stop(grace_s=0)

    asyncio.run(run())


def ask(first: int) -> bytes:
    return body(tensor(contents={"int64_contents": [first, 2]}))


async def refused(answer: Awaitable[Any]) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer
    return caught.value.code().name, caught.value.details()


def test_a_server_answers_every_method() -> None:
    async def scenario(backend: Echo, _: GrpcServer, call: Call) -> None:
        def read(name: str, raw: bytes) -> Any:
            return grpc_messages.message(name).FromString(raw)

        of_model = grpc_messages.message("ModelReadyRequest")(name="echo").SerializeToString()
        of_other = grpc_messages.message("ModelReadyRequest")(name="other").SerializeToString()
        assert read("ServerLiveResponse", await call("ServerLive", b"")).live
        assert read("ModelReadyResponse", await call("ModelReady", of_model)).ready
        assert await refused(call("ModelReady", of_other)) == (
            "NOT_FOUND", "model: no such model or version; next: ask for echo, version 7 or none",
        )  # fmt: skip
        server = read("ServerMetadataResponse", await call("ServerMetadata", b""))
        assert (server.name, server.version, list(server.extensions)) == ("endcap", "7", ["binary_tensor_data"])
        model = read("ModelMetadataResponse", await call("ModelMetadata", of_model))
        assert (model.name, list(model.versions), model.inputs[0].name) == ("echo", ["7"], "x")
        assert list(model.outputs[0].shape) == [-1, -1]
        answer = Response.FromString(await call("ModelInfer", ask(1), metadata=(("x-secret", "s"),)))
        assert list(answer.outputs[0].contents.int64_contents) == [1, 2]
        assert backend.headers[-1][b"x-secret"] == b"s"
        load = grpc_messages.message("RepositoryModelLoadRequest")(model_name="echo").SerializeToString()
        assert (await refused(call("RepositoryModelLoad", load)))[0] == "UNAUTHENTICATED"
        loaded = await call("RepositoryModelLoad", load, metadata=(("authorization", "Bearer k"),))
        assert read("RepositoryModelLoadResponse", loaded).isLoaded
        assert (await refused(call("RepositoryModelUnload", load)))[0] == "INVALID_ARGUMENT"
        assert (await refused(call("Nothing", b"")))[0] == "UNIMPLEMENTED"

        health = "grpc.health.v1.Health"
        asked = b"\x0a\x1e" + grpc_messages.SERVICE.encode()
        assert [await call("Check", raw, health) for raw in (b"", asked)] == [b"\x08\x01"] * 2
        assert (await refused(call("Check", b"\x0a\x01x", health)))[0] == "NOT_FOUND"
        backend.ready = False
        assert await call("Check", b"", health) == b"\x08\x02"
        assert not read("ServerReadyResponse", await call("ServerReady", b"")).ready

    serve(scenario)


def test_errors_have_their_status_and_the_next_call_works() -> None:
    async def scenario(backend: Echo, _: GrpcServer, call: Call) -> None:
        assert await refused(call("ModelInfer", ask(-1))) == ("INVALID_ARGUMENT", "inputs.x.data: below 0")
        assert (await refused(call("ModelInfer", b"\xff\xff")))[0] == "INVALID_ARGUMENT"
        assert (await refused(call("ServerReady", b"\xff\xff")))[0] == "INVALID_ARGUMENT"
        assert (await refused(call("ModelInfer", body(tensor(), model_name="x"))))[0] == "NOT_FOUND"
        assert await refused(call("ModelInfer", ask(500))) == ("INTERNAL", "server: a fault of the server")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call("ModelInfer", ask(503))
        assert (caught.value.code().name, caught.value.details()) == ("UNAVAILABLE", "server: busy indeed")
        assert ("grpc-retry-pushback-ms", "2000") in tuple(caught.value.trailing_metadata())
        # More than a message may hold, as it is and unfolded.
        large = ask(1) + b"\0" * 5000
        assert (await refused(call("ModelInfer", large)))[0] == "RESOURCE_EXHAUSTED"
        compressed = call("ModelInfer", body(tensor(), id="a" * 200), compression=grpc.Compression.Gzip)
        assert (await refused(compressed))[0] == "UNIMPLEMENTED"
        assert await call("ModelInfer", ask(1))
        assert backend.counted == ["refused", "refused", "refused", "failed", "shed", "answered"]

    serve(scenario)


def test_the_deadline_is_carried() -> None:
    async def scenario(backend: Echo, _: GrpcServer, call: Call) -> None:
        await call("ModelInfer", ask(1), timeout=9.0)
        await call("ModelInfer", ask(1), timeout=None)
        assert 0 < backend.within_s[0] < 9.5  # the wire rounds it
        assert backend.within_s[1] == math.inf

    serve(scenario)


def test_stopping_lets_calls_under_way_finish() -> None:
    async def scenario(backend: Echo, server: GrpcServer, call: Call) -> None:
        slow = asyncio.ensure_future(call("ModelInfer", ask(1000)))
        await backend.under_way.wait()
        stopping = asyncio.create_task(server.stop(grace_s=20))
        await asyncio.sleep(0)
        assert not stopping.done()
        backend.finish.set()
        assert Response.FromString(await slow).outputs[0].name == "x"
        await stopping

    serve(scenario)


def test_a_port_in_use_is_said() -> None:
    async def scenario(backend: Echo, server: GrpcServer, _: Call) -> None:
        with pytest.raises(InputError, match=f"port {server.port} is in use"):
            await GrpcServer(backend, host="127.0.0.1", port=server.port).start()

    serve(scenario)


def test_another_model_is_an_error_of_its_own() -> None:
    with pytest.raises(UnknownModelError):
        parse(tensor(), model_name="other")
