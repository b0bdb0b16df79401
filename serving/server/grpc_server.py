"""The Open Inference Protocol over gRPC, on the event loop of the HTTP server and on an HTTP/2 of our own.

Parsing and building messages is ours, so that a body that is no message is the caller's fault (INVALID_ARGUMENT) and
not an internal one, and tensors go between the wire and numpy without Python lists. An answer has the form of its
request: raw contents to raw ones, typed to typed (FP16, which has no typed form, is always raw).

Messages are bounded as HTTP bodies are, and must not be compressed: what a few bytes unfold to could not be bounded.
The caller's deadline goes to the batcher, and work that it has given up is not begun. ``grpc.health.v1.Health/Check``
is answered for Kubernetes' probes; there is no reflection.
"""

from __future__ import annotations

import asyncio
import logging
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
from serving.server import bounds, grpc_messages, http2, oip, tensors
from serving.tracing import CURRENT

if TYPE_CHECKING:
    from serving.spans import Tracing

__all__ = ["Backend", "Call", "GrpcInfer", "GrpcServer", "format_infer", "parse_infer"]

log = logging.getLogger("serving.server")

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
"""The field of ``InferTensorContents`` for a datatype."""

_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 9, 413: 8, 415: 12, 429: 8, 501: 12, 503: 14, 504: 4}
"""gRPC's status for an HTTP one of ours: INVALID_ARGUMENT, UNAUTHENTICATED, PERMISSION_DENIED, NOT_FOUND,
FAILED_PRECONDITION, RESOURCE_EXHAUSTED, UNIMPLEMENTED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, UNAVAILABLE,
DEADLINE_EXCEEDED."""

_SWEEP_S = 5.0
_SLOW_S = 30.0
"""A request that has not come whole by then, or an answer that has not been read, is given up at the next sweep."""
_INFER = f"/{grpc_messages.SERVICE}/ModelInfer"
_RPC = {"rpc.system": "grpc", "rpc.service": grpc_messages.SERVICE, "rpc.method": "ModelInfer", "endcap.route": "grpc"}
_FAULTS = (4, 13, 14)
"""Of the statuses, those that are the server's doing: DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE."""
_HEALTH = "/grpc.health.v1.Health/Check"
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

    def count(self, headers: Headers, status: int, outcome: str, took_s: float, answer_bytes: int = 0) -> None:
        """One call for a run of the graph ended. ``status``: HTTP's."""
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


Handler = Callable[[bytes, Headers], Awaitable[bytes]]


class GrpcServer:
    """One gRPC port. Start and stop it on the event loop that the backend's work runs on.

    Args:
        port: 0: any free one.
        max_bytes: of a message.
        reuse_port: several processes share the port.
        tracing: what traces calls for a run of the graph; None: nothing does.
    """

    def __init__(self, backend: Backend, *, host: str, port: int, max_bytes: int = MAX_BODY_BYTES,
                 reuse_port: bool = False, tracing: Tracing | None = None) -> None:  # fmt: skip
        self.port = port
        self._backend = backend
        self._host = host
        self._limits = http2.Limits(message_bytes=max_bytes, connections=bounds.connections("grpc"))
        self._reuse_port = reuse_port
        self._tracing = tracing
        self._methods = self._handlers()
        self._connections: set[http2.Connection] = set()
        self._server: asyncio.Server | None = None
        self._sweeping: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen; :attr:`port` is the port from then on.

        Raises:
            InputError: the port is in use, or not ours to open.
        """
        try:
            self._server = await asyncio.get_running_loop().create_server(
                lambda: http2.Connection(self._call, self._limits, self._connections),
                self._host, self.port, reuse_port=self._reuse_port, backlog=2048,
            )  # fmt: skip
        except (OSError, OverflowError) as error:
            raise InputError(f"port {self.port} is in use, or may not be opened", where=self._host,
                             next_step="choose another --grpc-port (0: any)") from error  # fmt: skip
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweep()

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls; those under way have ``grace_s`` to end."""
        if self._server is None or self._sweeping is None:
            return
        self._server.close()
        self._sweeping.cancel()
        self._server = None
        for connection in list(self._connections):
            connection.drain()
        until_s = time.monotonic() + grace_s
        while self._connections and time.monotonic() < until_s:
            await asyncio.sleep(0.01)
        for connection in list(self._connections):
            connection.abort()

    def _sweep(self) -> None:
        for connection in list(self._connections):
            connection.sweep(time.monotonic() - _SLOW_S)
        self._sweeping = asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    async def _call(self, request: http2.Request) -> bytes:
        """Any call.

        Raises:
            http2.Refused: it ends with a status other than OK.
        """
        if request.path == _INFER:
            return await (self._infer(request) if self._tracing is None else self._traced(self._tracing, request))
        handler = self._methods.get(request.path)
        if handler is None:
            raise http2.Refused(http2.UNIMPLEMENTED, "no such method")
        try:
            return await handler(request.message, request.headers)
        except DecodeError:
            raise self._refused(InputError("not the message of this method", where="body"), 400) from None
        except EndcapError as error:
            raise self._refused(error, self._backend.status_of(error)[0]) from None

    async def _traced(self, tracing: Tracing, request: http2.Request) -> bytes:
        """:meth:`_infer` in a span of its own."""
        with tracing.request(_INFER[1:], request.headers, _RPC) as trace:
            try:
                answer = await self._infer(request)
            except http2.Refused as refused:
                ours = str(refused.code) if refused.code in _FAULTS else None
                trace.ended({"rpc.grpc.status_code": refused.code}, fault=ours)
                raise
            trace.ended({"rpc.grpc.status_code": 0})
            return answer

    async def _infer(self, request: http2.Request) -> bytes:
        begun_s = time.perf_counter()
        backend = self._backend
        try:
            call = backend.admit(request.headers, within_s=max(0.0, request.until_s - time.monotonic()))
            if self._tracing is not None and (trace := CURRENT.get()) is not None:
                trace.add("admission", begun_s, time.perf_counter())
            asked = parse_infer(request.message, call.manifest, version=backend.version)
            outputs = await call.infer(asked.inputs)
            answer = format_infer(asked, outputs, call.manifest, version=backend.version)
        except EndcapError as error:
            status, outcome = backend.status_of(error)
            backend.count(request.headers, status, outcome, time.perf_counter() - begun_s)
            raise self._refused(error, status) from None
        except Exception as error:  # noqa: BLE001 - a fault of ours must not end the server, nor log a history
            log.error("grpc failed by a fault of the server: %s", type(error).__name__)
            backend.count(request.headers, 500, "failed", time.perf_counter() - begun_s)
            raise self._refused(EndcapError("a fault of the server", where="server"), 500) from None
        backend.count(request.headers, 200, "answered", time.perf_counter() - begun_s, len(answer))
        return answer

    @staticmethod
    def _refused(error: EndcapError, status: int) -> http2.Refused:
        text = " ".join(str(error).replace("\n  next:", "; next:").split())
        retry_after_s = getattr(error, "retry_after_s", None)
        more = () if retry_after_s is None else (("grpc-retry-pushback-ms", str(int(retry_after_s * 1000))),)
        return http2.Refused(_CODES.get(status, http2.INTERNAL), text, more)

    def _handlers(self) -> dict[str, Handler]:
        backend = self._backend

        def request(name: str, body: bytes, /) -> Any:
            return grpc_messages.message(f"{name}Request").FromString(body)

        def response(name: str, /, **fields: Any) -> bytes:
            found: bytes = grpc_messages.message(f"{name}Response")(**fields).SerializeToString()
            return found

        async def server_live(body: bytes, _: Headers) -> bytes:
            request("ServerLive", body)
            return response("ServerLive", live=True)

        async def server_ready(body: bytes, _: Headers) -> bytes:
            request("ServerReady", body)
            return response("ServerReady", ready=backend.ready)

        async def model_ready(body: bytes, _: Headers) -> bytes:
            asked = request("ModelReady", body)
            oip.check_model(asked.name, asked.version, backend.manifest(), backend.version)
            return response("ModelReady", ready=backend.ready)

        async def server_metadata(body: bytes, _: Headers) -> bytes:
            request("ServerMetadata", body)
            return response("ServerMetadata", name="endcap", version=backend.version, extensions=oip.EXTENSIONS)

        async def model_metadata(body: bytes, _: Headers) -> bytes:
            asked = request("ModelMetadata", body)
            manifest = backend.manifest()
            oip.check_model(asked.name, asked.version, manifest, backend.version)
            inputs, outputs = (
                [{"name": spec.name, "datatype": spec.datatype, "shape": spec.shape} for spec in specs]
                for specs in (manifest.inputs, manifest.outputs)
            )
            return response("ModelMetadata", name=manifest.name, versions=[backend.version],
                            platform="onnx_onnxruntime", inputs=inputs, outputs=outputs)  # fmt: skip

        async def load(body: bytes, headers: Headers) -> bytes:
            name = request("RepositoryModelLoad", body).model_name
            await backend.load(name, headers)
            return response("RepositoryModelLoad", model_name=name, isLoaded=True)

        async def unload(body: bytes, headers: Headers) -> bytes:
            name = request("RepositoryModelUnload", body).model_name
            await backend.unload(name, headers)
            return response("RepositoryModelUnload", model_name=name, isUnloaded=True)

        methods: dict[str, Handler] = {
            "ServerLive": server_live, "ServerReady": server_ready, "ModelReady": model_ready,
            "ServerMetadata": server_metadata, "ModelMetadata": model_metadata,
            "RepositoryModelLoad": load, "RepositoryModelUnload": unload,
        }  # fmt: skip
        return {f"/{grpc_messages.SERVICE}/{name}": method for name, method in methods.items()} | {
            _HEALTH: self._health
        }

    async def _health(self, body: bytes, _: Headers) -> bytes:
        """grpc.health.v1.Health/Check, of the server or of the inference service."""
        if body not in _ASKED_OF_HEALTH:
            raise oip.UnknownModelError("no such service", where="service",
                                   next_step=f"ask for {grpc_messages.SERVICE}")  # fmt: skip
        return _SERVING if self._backend.ready else _NOT_SERVING
