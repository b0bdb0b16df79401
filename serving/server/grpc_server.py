"""The Open Inference Protocol over gRPC, on the event loop of the HTTP server.

``grpc.aio`` with handlers of raw bytes: parsing and building messages is ours, so that a body that is no message is
the caller's fault (INVALID_ARGUMENT) and not an internal one, and tensors go between the wire and numpy without
Python lists. An answer has the form of its request: raw contents to raw ones, typed to typed (FP16, which has no typed
form, is always raw).

Messages are bounded as HTTP bodies are, and must not be compressed: what a few bytes unfold to could not be bounded.
The caller's deadline goes to the batcher, and work that it has given up is not begun.

grpc is imported by :meth:`GrpcServer.start` and not before: workers are forked first, and a server without a gRPC port
pays nothing for it. ``grpc.health.v1.Health/Check`` is answered for Kubernetes' probes; there is no reflection.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError
from endcap.package import Manifest
from serving.asgi import MAX_BODY_BYTES, Headers
from serving.server import grpc_messages, oip, tensors

if TYPE_CHECKING:
    import grpc  # type: ignore[import-untyped]
    import grpc.aio  # type: ignore[import-untyped]

__all__ = ["Backend", "Call", "GrpcInfer", "GrpcServer", "format_infer", "parse_infer"]

log = logging.getLogger("serving.server")

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""The field of ``InferTensorContents`` for a datatype."""

_CODES = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED", 429: "RESOURCE_EXHAUSTED", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip
"""gRPC's status for an HTTP one of ours; INTERNAL for others."""

_MAX_RPCS = 4096
_MAX_STREAMS = 1024
_HEALTH = "grpc.health.v1.Health"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
_ASKED_OF_HEALTH = (b"", b"\x0a\x00", b"\x0a" + bytes([len(grpc_messages.SERVICE)]) + grpc_messages.SERVICE.encode())

_InferRequest = grpc_messages.message("ModelInferRequest")
_InferResponse = grpc_messages.message("ModelInferResponse")


class Call(Protocol):
    """One call for a run of the graph that was let in."""

    @property
    def manifest(self) -> Manifest: ...

    async def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """All outputs by name; raises EndcapErrors, among them those of inputs that the graph was not made for."""
        ...


class Backend(Protocol):
    """What the gRPC face asks of the server. All is called on the event loop; all may raise EndcapErrors."""

    @property
    def version(self) -> str: ...

    @property
    def ready(self) -> bool: ...

    def manifest(self) -> Manifest:
        """The loaded package's; an error while there is none."""
        ...

    def admit(self, headers: Headers, *, within_s: float) -> Call:
        """Let a call in, or refuse it before its message is even parsed. ``within_s``: how long its sender waits."""
        ...

    async def load(self, name: str, headers: Headers) -> None: ...

    async def unload(self, name: str, headers: Headers) -> None: ...

    def status_of(self, error: EndcapError) -> tuple[int, str]:
        """HTTP status and outcome of an error."""
        ...

    def count(self, outcome: str, took_s: float) -> None:
        """One call for a run of the graph ended."""
        ...


@dataclass(frozen=True, slots=True)
class GrpcInfer:
    """``outputs``: names asked for, or None for all. ``raw``: answered as raw contents."""

    id: str
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...] | None
    raw: bool


def parse_infer(body: bytes, manifest: Manifest, *, version: str) -> GrpcInfer:
    """A ``ModelInferRequest`` against the manifest's schema.

    Raises:
        UnknownModelError: another model, or another version of it.
        InputError: no such message, or not what the schema takes.
    """
    try:
        request = _InferRequest.FromString(body)
    except DecodeError as error:
        raise InputError("the message is not a ModelInferRequest", where="body",
                         next_step="send inference.ModelInferRequest") from error  # fmt: skip
    oip.check_model(request.model_name, request.model_version, manifest, version)
    if len(request.id) > oip.MAX_ID_CHARS:
        raise InputError(f"id must be a string of at most {oip.MAX_ID_CHARS} characters", where="id")
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise InputError(f"there are {len(raws)} raw contents for {len(request.inputs)} inputs",
                         where="raw_input_contents", next_step="send one for each input, in order")  # fmt: skip
    specs = manifest.inputs
    inputs: dict[str, NDArray[Any]] = {}
    for place, tensor in enumerate(request.inputs):
        where = f"inputs.{place}"
        name = tensor.name
        spec = next((spec for spec in specs if spec.name == name), None)
        if spec is None:
            raise InputError("no such input", where=f"{where}.name", next_step=oip.send_names(specs))
        if name in inputs:
            raise InputError(f"{name} is given twice", where=where)
        if tensor.datatype != spec.datatype:
            raise InputError(f"{name} must have datatype {spec.datatype}", where=f"{where}.datatype")
        shape = list(tensor.shape)
        count = tensors.checked_count(shape, spec, where)
        if raws:
            if tensor.HasField("contents"):
                raise InputError("has contents beside raw_input_contents", where=f"{where}.contents")
            inputs[name] = tensors.from_raw(memoryview(raws[place]), shape, count, spec, f"raw_input_contents.{place}")
            continue
        field = _CONTENTS.get(spec.datatype)
        if field is None:
            raise InputError(f"{spec.datatype} has no typed contents", where=f"{where}.contents",
                             next_step="send it in raw_input_contents")  # fmt: skip
        values = getattr(tensor.contents, field)
        inputs[name] = tensors.from_typed(values, shape, count, spec, f"{where}.contents.{field}")
    if len(inputs) != len(specs):
        missing = next(spec.name for spec in specs if spec.name not in inputs)
        raise InputError(f"input {missing} is missing", where="inputs", next_step=oip.send_names(specs))
    return GrpcInfer(request.id, inputs, _wanted(request, manifest), bool(raws))


def _wanted(request: Any, manifest: Manifest) -> tuple[str, ...] | None:
    if not request.outputs:
        return None
    known = [spec.name for spec in manifest.outputs]
    for place, output in enumerate(request.outputs):
        if output.name not in known:
            raise InputError("no such output", where=f"outputs.{place}.name",
                             next_step=f"ask for: {', '.join(known)}")  # fmt: skip
    return tuple(output.name for output in request.outputs)


def format_infer(request: GrpcInfer, outputs: Mapping[str, NDArray[Any]], manifest: Manifest, *, version: str) -> bytes:
    """The ``ModelInferResponse`` to ``request``."""
    answer = _InferResponse(model_name=manifest.name, model_version=version, id=request.id)
    chosen = [spec for spec in manifest.outputs if request.outputs is None or spec.name in request.outputs]
    raw = request.raw or any(spec.datatype not in _CONTENTS for spec in chosen)
    for spec in chosen:
        array = outputs[spec.name]
        described = answer.outputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
        if raw:
            answer.raw_output_contents.append(tensors.to_raw(array, spec))
        else:
            values = np.asarray(array).ravel().tolist()
            if spec.datatype == "BYTES":
                values = [value if isinstance(value, bytes) else str(value).encode() for value in values]
            getattr(described.contents, _CONTENTS[spec.datatype]).extend(values)
    found: bytes = answer.SerializeToString()
    return found


class GrpcServer:
    """One gRPC port. Start and stop it on the event loop that the backend's work runs on.

    Args:
        port: 0: any free one.
        max_bytes: of a message.
        reuse_port: several processes share the port.
    """

    def __init__(self, backend: Backend, *, host: str, port: int, max_bytes: int = MAX_BODY_BYTES,
                 reuse_port: bool = False) -> None:  # fmt: skip
        self.port = port
        self._backend = backend
        self._host = host
        self._max_bytes = max_bytes
        self._reuse_port = reuse_port
        self._server: grpc.aio.Server | None = None
        self._codes: dict[int, grpc.StatusCode] = {}

    async def start(self) -> None:
        """Listen; :attr:`port` is the port from then on.

        Raises:
            InputError: the port is in use, or not ours to open.
        """
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its complaints about peers are for its developers
        import grpc
        import grpc.aio

        self._codes = {status: grpc.StatusCode[name] for status, name in _CODES.items()}
        server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(self._reuse_port)),
                ("grpc.max_receive_message_length", self._max_bytes),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.compression_enabled_algorithms_bitset", 1),  # none but identity
                ("grpc.keepalive_time_ms", 60_000),
            ],
            maximum_concurrent_rpcs=_MAX_RPCS,
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(handler))
            for name, handler in self._methods().items()
        }
        server.add_generic_rpc_handlers((
            grpc.method_handlers_generic_handler(
                grpc_messages.SERVICE, handlers | {"ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer)}
            ),
            grpc.method_handlers_generic_handler(
                _HEALTH, {"Check": grpc.unary_unary_rpc_method_handler(self._guarded(self._health))}
            ),
        ))  # fmt: skip
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self.port = server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError:
            raise InputError(f"port {self.port} is in use, or may not be opened", where=self._host,
                             next_step="choose another --grpc-port (0: any)") from None  # fmt: skip
        await server.start()
        self._server = server

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls; those under way have ``grace_s`` to end."""
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    async def _infer(self, body: bytes, context: Any) -> bytes:
        begun_s = time.perf_counter()
        backend = self._backend
        try:
            remaining_s = context.time_remaining()
            call = backend.admit(_headers(context), within_s=math.inf if remaining_s is None else remaining_s)
            request = parse_infer(body, call.manifest, version=backend.version)
            outputs = await call.infer(request.inputs)
            answer = format_infer(request, outputs, call.manifest, version=backend.version)
        except EndcapError as error:
            status, outcome = self._status_of(error)
            backend.count(outcome, time.perf_counter() - begun_s)
            await self._abort(context, status, error)
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the server, nor log a history
            log.error("grpc failed by a fault of the server: %s", type(error).__name__)
            backend.count("failed", time.perf_counter() - begun_s)
            await self._abort(context, 500, EndcapError("a fault of the server", where="server"))
        backend.count("answered", time.perf_counter() - begun_s)
        return answer

    def _guarded(self, handler: Callable[[bytes, Any], Awaitable[bytes]]) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def guarded(body: bytes, context: Any) -> bytes:
            try:
                return await handler(body, context)
            except DecodeError:
                error: EndcapError = InputError("not the message of this method", where="body")
                status = 400
            except EndcapError as caught:
                error, status = caught, self._status_of(caught)[0]
            return await self._abort(context, status, error)

        return guarded

    def _status_of(self, error: EndcapError) -> tuple[int, str]:
        return self._backend.status_of(error)

    async def _abort(self, context: Any, status: int, error: EndcapError) -> bytes:
        import grpc

        text = " ".join(str(error).replace("\n  next:", "; next:").split())
        retry_after_s = getattr(error, "retry_after_s", None)
        more = () if retry_after_s is None else (("grpc-retry-pushback-ms", str(int(retry_after_s * 1000))),)
        await context.abort(self._codes.get(status, grpc.StatusCode.INTERNAL), text, more)
        raise AssertionError  # abort raises

    def _methods(self) -> dict[str, Callable[[bytes, Any], Awaitable[bytes]]]:
        backend = self._backend

        def request(name: str, body: bytes, /) -> Any:
            return grpc_messages.message(f"{name}Request").FromString(body)

        def response(name: str, /, **fields: Any) -> bytes:
            found: bytes = grpc_messages.message(f"{name}Response")(**fields).SerializeToString()
            return found

        async def server_live(body: bytes, _: Any) -> bytes:
            request("ServerLive", body)
            return response("ServerLive", live=True)

        async def server_ready(body: bytes, _: Any) -> bytes:
            request("ServerReady", body)
            return response("ServerReady", ready=backend.ready)

        async def model_ready(body: bytes, _: Any) -> bytes:
            asked = request("ModelReady", body)
            oip.check_model(asked.name, asked.version, backend.manifest(), backend.version)
            return response("ModelReady", ready=backend.ready)

        async def server_metadata(body: bytes, _: Any) -> bytes:
            request("ServerMetadata", body)
            return response("ServerMetadata", name="endcap", version=backend.version, extensions=oip.EXTENSIONS)

        async def model_metadata(body: bytes, _: Any) -> bytes:
            asked = request("ModelMetadata", body)
            manifest = backend.manifest()
            oip.check_model(asked.name, asked.version, manifest, backend.version)
            inputs, outputs = (
                [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
                for specs in (manifest.inputs, manifest.outputs)
            )
            return response("ModelMetadata", name=manifest.name, versions=[backend.version],
                            platform="onnx_onnxruntime", inputs=inputs, outputs=outputs)  # fmt: skip

        async def load(body: bytes, context: Any) -> bytes:
            name = request("RepositoryModelLoad", body).model_name
            await backend.load(name, _headers(context))
            return response("RepositoryModelLoad", model_name=name, isLoaded=True)

        async def unload(body: bytes, context: Any) -> bytes:
            name = request("RepositoryModelUnload", body).model_name
            await backend.unload(name, _headers(context))
            return response("RepositoryModelUnload", model_name=name, isUnloaded=True)

        return {
            "ServerLive": server_live, "ServerReady": server_ready, "ModelReady": model_ready,
            "ServerMetadata": server_metadata, "ModelMetadata": model_metadata,
            "RepositoryModelLoad": load, "RepositoryModelUnload": unload,
        }  # fmt: skip

    async def _health(self, body: bytes, _: Any) -> bytes:
        """grpc.health.v1.Health/Check, of the server or of the inference service."""
        if body not in _ASKED_OF_HEALTH:
            raise oip.UnknownModelError("no such service", where="service",
                                   next_step=f"ask for {grpc_messages.SERVICE}")  # fmt: skip
        return _SERVING if self._backend.ready else _NOT_SERVING


def _headers(context: Any) -> Headers:
    """The caller's metadata as HTTP would have it."""
    return [
        (name.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else bytes(value))
        for name, value in context.invocation_metadata() or ()
    ]
