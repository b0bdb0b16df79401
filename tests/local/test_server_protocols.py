"""The model server's protocols as a real process, with the kserve package's own clients over REST and gRPC."""

from __future__ import annotations

import asyncio
import gzip
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc  # type: ignore[import-untyped]
import httpx
import jwt
import numpy as np
import orjson
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from endcap.files import write_atomic
from endcap.processes import free_port
from serving.server import grpc_messages
from tests.packages import ITEMS, make_package
from tests.process import Program, run_to_end, started, wait_until

INFER = "/v2/models/recommender/infer"
ROWS = [[0, 1, 2], [3, 4, 5]]
NEXT = [3, 6]
"""The first item answered to each of ROWS."""


def arguments(folder: Path, port: int, *more: str) -> list[str]:
    return [
        "-m", "serving.server", "--package", str(folder / "package"), "--public-key", str(folder / "keys/signing.pub"),
        "--version", "2", "--zone", "b", "--port", str(port), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    make_package(folder / "package", stalls_on=[ITEMS[20]], stall_loops=300_000)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Program]:
    port = free_port()
    run = ["-X", "importtime", *arguments(folder, port, "--grpc-port", "0", "--timeout-s", "30")]
    with started(run, port, folder / "log") as program:
        program.wait_for("/v2/health/ready")
        yield program


def grpc_address(program: Program) -> str:
    found: list[str] = []

    def said() -> bool:
        found[:] = re.findall(r"grpc: port (\d+)", program.log.read_text())
        return bool(found)

    wait_until(said, "the gRPC port is named in the log")
    return f"127.0.0.1:{found[0]}"


def kserve_client(talk: Callable[[Any, Any], Awaitable[None]]) -> None:
    """Run ``talk`` with the kserve package and its inference_client module."""
    with warnings.catch_warnings():
        # Of its generated code, about the grpc release it was generated for.
        warnings.filterwarnings("ignore", message="The grpc package installed is at version", category=RuntimeWarning)
        import kserve  # type: ignore[import-untyped]
        from kserve import inference_client

    async def run() -> None:
        await talk(kserve, inference_client)

    asyncio.run(run())


def tensor(kserve: Any, *, binary: bool) -> Any:
    if not binary:
        return kserve.InferInput("history", [2, 3], "INT64", data=[value for row in ROWS for value in row])
    found = kserve.InferInput("history", [2, 3], "INT64")
    found.set_data_from_numpy(np.array(ROWS, np.int64), binary_data=True)
    return found


def checked(answer: Any) -> None:
    items, scores = answer.outputs
    assert (answer.id, answer.model_name) == ("q", "recommender")
    assert (items.name, list(items.shape), items.as_numpy()[:, 0].tolist()) == ("items", [2, 20], NEXT)
    assert (scores.datatype, scores.as_numpy().dtype) == ("FP32", np.float32)


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
def test_kserves_rest_client_infers_with_json_and_binary_tensors(
    server: Program, binary_in: bool, binary_out: bool
) -> None:
    async def talk(kserve: Any, clients: Any) -> None:
        async with clients.InferenceRESTClient(clients.RESTConfig(protocol="v2")) as client:
            assert await client.is_server_live(server.url)
            assert await client.is_server_ready(server.url)
            assert await client.is_model_ready(server.url, "recommender")
            assert not await client.is_model_ready(server.url, "other")
            request = kserve.InferRequest(
                "recommender", [tensor(kserve, binary=binary_in)], request_id="q",
                parameters={"binary_data_output": True} if binary_out else None,
            )  # fmt: skip
            seen: dict[str, str] = {}
            answer = await client.infer(server.url, request, model_name="recommender", response_headers=seen)
            checked(answer)
            assert ("inference-header-content-length" in seen) == binary_out

    kserve_client(talk)


def test_kserves_rest_client_speaks_v1(server: Program) -> None:
    async def talk(_: Any, clients: Any) -> None:
        async with clients.InferenceRESTClient(clients.RESTConfig(protocol="v1")) as client:
            assert await client.is_server_live(server.url)
            assert await client.is_model_ready(server.url, "recommender")
            answer = await client.infer(server.url, {"instances": ROWS}, model_name="recommender")
            assert [row["items"][0] for row in answer["predictions"]] == NEXT
            answer = await client.infer(server.url, {"inputs": {"history": ROWS}}, model_name="recommender")
            assert [row[0] for row in answer["outputs"]["items"]] == NEXT
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                await client.infer(server.url, {"instances": ROWS}, model_name="other")

    kserve_client(talk)
    assert httpx.get(server.url + "/v1/models").json() == {"models": ["recommender"]}


@pytest.mark.parametrize("binary", [False, True])
def test_kserves_grpc_client_passes(server: Program, binary: bool) -> None:
    address = grpc_address(server)

    async def talk(kserve: Any, clients: Any) -> None:
        async with clients.InferenceGRPCClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("recommender")
            request = kserve.InferRequest("recommender", [tensor(kserve, binary=binary)], request_id="q")
            checked(await client.infer(request))
            with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
                await client.is_model_ready("other")
            request = kserve.InferRequest("recommender", [kserve.InferInput("history", [1, 1], "INT64", data=[99])])
            with pytest.raises(grpc.RpcError, match=r"history holds an item index outside 0 to 50"):
                await client.infer(request)

    kserve_client(talk)


def test_every_call_of_the_published_proto_is_answered(server: Program) -> None:
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # type: ignore[import-untyped]
    from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as stubs  # type: ignore[import-untyped]

    over_http = httpx.get(f"{server.url}/v2/models/recommender/versions/2", timeout=30.0).json()
    with grpc.insecure_channel(grpc_address(server)) as channel:
        stub = stubs.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30.0).live
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=30.0).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name="recommender", version="2"), timeout=30.0).ready
        about = stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=30.0)
        assert (about.name, about.version) == ("endcap", "2")
        model = stub.ModelMetadata(pb.ModelMetadataRequest(name="recommender"), timeout=30.0)
        for name in ("inputs", "outputs"):
            assert [(one.name, one.datatype, list(one.shape)) for one in getattr(model, name)] == [
                (one["name"], one["datatype"], one["shape"]) for one in over_http[name]
            ]
        assert (list(model.versions), model.platform) == (over_http["versions"], over_http["platform"])
        tensor = pb.ModelInferRequest.InferInputTensor(
            name="history", datatype="INT64", shape=[2, 3],
            contents=pb.InferTensorContents(int64_contents=[item for row in ROWS for item in row]),
        )  # fmt: skip
        found = stub.ModelInfer(pb.ModelInferRequest(model_name="recommender", inputs=[tensor]), timeout=30.0)
        assert found.outputs[0].contents.int64_contents[::20] == NEXT
        for call, request in ((stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest),
                              (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest)):  # fmt: skip
            with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):  # no admin key and no tokens are configured
                call(request(model_name="recommender"), timeout=30.0)
        known = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    assert len(known) == 8


def test_grpc_is_counted_and_brings_nothing_heavy(server: Program) -> None:
    grpc_address(server)
    counted = [line for line in server.get("/metrics").text.splitlines() if line.startswith("endcap_server_attempts")]
    assert any('"grpc"' in line and '"answered"' in line and not line.endswith(" 0.0") for line in counted)
    modules = set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\w+)", server.log.read_text(), re.MULTILINE))
    assert "hpack" in modules
    assert not modules & {"grpc", "torch", "kserve", "mlflow", "pandas", "transformers", "pytest"}


class Raw:
    """One HTTP connection, to see that it lives on after what was refused."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30.0)
        self._file = self._socket.makefile("rb")

    def post(self, body: bytes, *headers: str, path: str = INFER) -> tuple[int, str]:
        head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
        self._socket.sendall("\r\n".join(head).encode() + body)
        status = int(self._file.readline().split()[1])
        length = 0
        while line := self._file.readline().strip().lower():
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return status, self._file.read(length).decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def infer_body(**change: Any) -> bytes:
    return orjson.dumps(
        {"inputs": [{"name": "history", "datatype": "INT64", "shape": [1, 3], "data": [[1, 2, 3]]} | change]}
    )


BAD: list[tuple[bytes, tuple[str, ...], int, str]] = [
    (infer_body(name="x"), (), 400, "inputs.0.name"),
    (infer_body(shape=[3, 1]), (), 400, "inputs.0.data"),
    (infer_body(datatype="FP32"), (), 400, "inputs.0.datatype"),
    (infer_body(data=[[1, 2, 51]]), (), 400, "inputs.history.data"),
    (infer_body(data=[[1, 2, 3.5]]), (), 400, "inputs.0.data"),
    (infer_body(shape=[2, 2], data=[[1, 2], [3]]), (), 400, "inputs.0.data.1"),
    (infer_body(shape=[0, 3], data=[]), (), 400, "inputs.history.shape"),
    (infer_body(shape=[1 << 30, 1 << 30]), (), 400, "inputs.0.data"),
    (infer_body().replace(b"[[1,2,3]]", b"[[1,2,NaN]]"), (), 400, "body"),
    (infer_body().replace(b"[[1,2,3]]", b"[[1,2,Infinity]]"), (), 400, "body"),
    (infer_body().replace(b"history", b"hist\xff\xfe"), (), 400, "body"),
    (b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}", (), 400, "body"),
    (b" " * 10_000_000, (), 413, "body"),
    (gzip.compress(b"0" * 5_000_000), ("Content-Encoding: gzip",), 415, "Content-Encoding"),
    (infer_body(), ("Inference-Header-Content-Length: 999999",), 400, "Inference-Header-Content-Length"),
    (infer_body(), ("Inference-Header-Content-Length: x",), 400, "Inference-Header-Content-Length"),
    (infer_body(data=None, parameters={"binary_data_size": 24}), (), 400, "inputs.0.parameters.binary_data_size"),
]


def test_what_is_refused_names_the_field_and_the_next_request_on_the_connection_works(server: Program) -> None:
    raw = Raw(server.url)
    for body, headers, status, where in BAD:
        found, text = raw.post(body, *headers)
        assert (found, text.split(":")[1].strip(' "')) == (status, where), text
        assert raw.post(infer_body())[0] == 200
    assert raw.post(b"{}", path="/v1/models/recommender:predict")[0] == 400
    assert raw.post(infer_body(), path="/v2/models/recommender/versions/9/infer")[0] == 404
    assert raw.post(infer_body(), path="/v2/models/recommender/versions/2/infer")[0] == 200
    raw.close()


def test_grpc_calls_under_way_are_answered_when_told_to_end(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    run = arguments(folder, port, "--grpc-port", "0", "--timeout-s", "30", "--drain-s", "0.2")
    with started(run, port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        request = grpc_messages.message("ModelInferRequest")(
            model_name="recommender",
            inputs=[{"name": "history", "datatype": "INT64", "shape": [1, 1], "contents": {"int64_contents": [21]}}],
        ).SerializeToString()
        answers: list[bytes] = []
        with grpc.insecure_channel(grpc_address(program)) as channel:
            infer = channel.unary_unary(f"/{grpc_messages.SERVICE}/ModelInfer")
            slow = threading.Thread(target=lambda: answers.append(infer(request, timeout=60.0)))
            slow.start()
            wait_until(lambda: 'in_flight{version="2"} 1.0' in program.get("/metrics").text, "the run is under way")
            program.process.send_signal(signal.SIGTERM)
            slow.join()
        assert len(answers) == 1
        assert program.process.wait(30) == 0


def test_worker_processes_share_the_grpc_port(folder: Path, tmp_path: Path) -> None:
    port, grpc_port = free_port(), free_port()
    run = arguments(folder, port, "--grpc-port", str(grpc_port), "--processes", "2", "--threads", "1")
    with started(run, port, tmp_path / "log") as program:
        wait_until(lambda: program.log.read_text().count(f"grpc: port {grpc_port}") == 2, "both workers listen")
        program.wait_for("/v2/health/ready")
        for _ in range(6):
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", options=options) as channel:
                ready = channel.unary_unary(f"/{grpc_messages.SERVICE}/ServerReady")
                assert ready(b"", timeout=30.0) == b"\x08\x01"
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0


def test_a_package_is_unloaded_and_loaded_over_grpc_with_the_admin_key(folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "admin.key"
    key.write_text("k" * 32)
    key.chmod(0o600)
    port = free_port()
    run = arguments(folder, port, "--grpc-port", "0", "--admin-key", str(key))
    with started(run, port, tmp_path / "log") as program:
        program.wait_for("/v2/health/ready")
        asked = grpc_messages.message("RepositoryModelLoadRequest")(model_name="recommender").SerializeToString()
        with grpc.insecure_channel(grpc_address(program)) as channel:

            def ask(method: str, *metadata: tuple[str, str]) -> str:
                call = channel.unary_unary(f"/{grpc_messages.SERVICE}/RepositoryModel{method}")
                try:
                    call(asked, timeout=60.0, metadata=metadata)
                except grpc.RpcError as error:
                    return str(error.code().name)
                return "OK"

            bearer = ("authorization", "Bearer " + "k" * 32)
            assert [ask("Unload"), ask("Unload", ("authorization", "Bearer x"))] == ["UNAUTHENTICATED"] * 2
            assert ask("Unload", bearer) == "OK"
            assert program.status("/v2/health/ready") == 503
            assert ask("Load", bearer) == "OK"
            assert program.status("/v2/health/ready") == 200


def test_a_token_of_the_issuer_lets_in_and_its_keys_may_change(folder: Path, tmp_path: Path) -> None:
    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    keys = tmp_path / "issuer.pem"

    def publish(key: ec.EllipticCurvePrivateKey) -> None:
        public = key.public_key()
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        write_atomic(keys, public.public_bytes(serialization.Encoding.PEM, form))

    def bearer(key: ec.EllipticCurvePrivateKey, **claims: object) -> dict[str, str]:
        said = {"aud": "endcap", "exp": time.time() + 600, **claims}
        return {"authorization": f"Bearer {jwt.encode(said, key, algorithm='ES256')}"}

    publish(first)
    port = free_port()
    run = arguments(folder, port, "--grpc-port", "0", "--jwt-keys", str(keys), "--jwt-audience", "endcap")
    with started(run, port, tmp_path / "log") as program, httpx.Client(base_url=program.url, timeout=30.0) as client:
        program.wait_for("/v2/health/ready")
        refused = client.get("/metrics", headers=bearer(first, aud="others"))
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert [client.get("/metrics", headers=sent).status_code for sent in ({}, bearer(second), bearer(first))] == [
            401, 401, 200
        ]  # fmt: skip
        path = "/v2/repository/models/recommender/load"
        assert [client.post(path, headers=sent).status_code for sent in ({}, bearer(first))] == [401, 200]
        asked = grpc_messages.message("RepositoryModelUnloadRequest")(model_name="recommender").SerializeToString()
        with grpc.insecure_channel(grpc_address(program)) as channel:
            unload = channel.unary_unary(f"/{grpc_messages.SERVICE}/RepositoryModelUnload")
            with pytest.raises(grpc.RpcError) as error:
                unload(asked, timeout=60.0)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            unload(asked, timeout=60.0, metadata=list(bearer(first).items()))
        publish(second)
        wait_until(lambda: client.get("/metrics", headers=bearer(second)).status_code == 200, "the new key is read")
        assert client.get("/metrics", headers=bearer(first)).status_code == 401
        log = (tmp_path / "log").read_text()
    assert "eyJ" not in log


def test_keys_of_tokens_without_an_audience_are_refused(folder: Path, tmp_path: Path) -> None:
    ended = run_to_end(arguments(folder, 0, "--jwt-keys", str(tmp_path / "keys")))
    assert (ended.returncode, "--jwt-audience" in ended.stderr) == (2, True)


def test_a_grpc_port_in_use_is_said_on_one_line(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run_to_end(arguments(folder, 0, "--grpc-port", str(port)))
    said = [line for line in ended.stderr.splitlines() if "serving.server" not in line]
    assert (ended.returncode, len(said)) == (2, 1), ended.stderr
    assert f"port {port} is in use" in said[0]


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def hostile(number: int) -> tuple[bytes, bytes]:
    """Bytes for the HTTP port and for the gRPC one: random, or nearly right."""
    random = Random(number)
    noise = random.randbytes(random.randrange(1, 400))
    body = bytearray(infer_body())
    for _ in range(random.randrange(4)):
        body[random.randrange(len(body))] = random.randrange(256)
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) + random.randrange(-3, 4)}\r\n".encode()
    http = [
        noise,
        head + b"\r\n" + body,
        head + noise.replace(b"\n", b"") + b"\r\n\r\n" + body,
        head + b"Transfer-Encoding: chunked\r\n\r\n" + noise,
        head.replace(b"recommender", noise[:30]) + b"\r\n" + body,
        b"GET /" + noise + b" HTTP/1.1\r\n\r\n",
    ]
    size = random.randrange(0, 60)
    frame = size.to_bytes(3, "big") + bytes([random.randrange(11), random.randrange(256)]) + random.randbytes(4)
    grpc_bytes = [noise, PREFACE + noise, PREFACE + bytes(9) + (frame + random.randbytes(size)) * 3, PREFACE[:9]]
    return random.choice(http), random.choice(grpc_bytes)


def exchange(address: tuple[str, int], sent: bytes, *, half_close: bool) -> bytes:
    """What comes back; a peer that says no more, or that just goes."""
    with socket.create_connection(address, timeout=30.0) as peer:
        try:
            peer.sendall(sent)
            if not half_close:
                return b""
            peer.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: peer.recv(65536), b""))
        except ConnectionError:
            return b""


def memory_mb(program: Program) -> float:
    status = Path(f"/proc/{program.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def test_hostile_bytes_on_either_port_do_no_harm(server: Program) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    grpc_host, grpc_port = grpc_address(server).split(":")
    before_mb = 0.0
    for number in range(600):
        http_bytes, grpc_bytes = hostile(number)
        answer = exchange((host, int(port)), http_bytes, half_close=number % 3 != 0)
        assert not re.search(rb"HTTP/1.1 5\d\d", answer), (number, http_bytes, answer)
        exchange((grpc_host, int(grpc_port)), grpc_bytes, half_close=number % 3 == 0)
        if number == 200:
            before_mb = memory_mb(server)
    raw = Raw(server.url)
    assert raw.post(infer_body())[0] == 200
    raw.close()
    request = grpc_messages.message("ServerReadyRequest")().SerializeToString()
    with grpc.insecure_channel(f"{grpc_host}:{grpc_port}") as channel:
        assert channel.unary_unary(f"/{grpc_messages.SERVICE}/ServerReady")(request, timeout=30.0) == b"\x08\x01"
    assert memory_mb(server) - before_mb < 10
    assert "Traceback" not in server.log.read_text()
