"""The client, which is in Go so that it is not the limit: building it, bodies for it, one load with it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError, OutcomeError
from endcap.files import write_json

__all__ = ["GRPC_METHOD", "Client", "build_client", "cores", "grpc_body", "http_body", "write_bodies"]

GRPC_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_SOURCE = Path(__file__).parent / "client"
Arrays = Mapping[str, NDArray[np.int64]]


def cores() -> tuple[str, str]:
    """The core of the servers and those of the client, as taskset(1) wants them.

    Raises:
        InputError: there is only one.
    """
    free = sorted(os.sched_getaffinity(0))
    if len(free) < 2 or shutil.which("taskset") is None:
        raise InputError("taskset and two cores are needed: one for the server, the others for the client")
    return str(free[0]), ",".join(str(core) for core in free[1:])


def build_client(folder: Path) -> Path:
    """The client's program in ``folder``, built where its source is newer.

    Raises:
        InputError: Go is not installed. EndcapError: it cannot be built (no network for its modules, say).
    """
    program = folder / "client"
    newest = max(path.stat().st_mtime for path in _SOURCE.iterdir())
    if program.exists() and program.stat().st_mtime > newest:
        return program
    go = shutil.which("go")
    if go is None:
        raise InputError("Go is not installed, and the benchmark's client is in Go", where="PATH",
                         next_step="install Go 1.26 or newer (https://go.dev/dl)")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([go, "build", "-o", str(program.absolute()), "."], cwd=_SOURCE, capture_output=True,
                          text=True, check=False)  # fmt: skip
    if done.returncode:
        raise EndcapError(f"the client cannot be built: {done.stderr.strip()[-400:]}", where=_SOURCE)
    return program


def http_body(inputs: Arrays) -> bytes:
    """One request of the Open Inference Protocol as JSON. KServe's server fails on one without an id."""
    tensors = [
        {"name": name, "shape": list(value.shape), "datatype": "INT64", "data": value.ravel().tolist()}
        for name, value in inputs.items()
    ]
    return json.dumps({"id": "1", "inputs": tensors}).encode()


def grpc_body(model: str, inputs: Arrays) -> bytes:
    """The same as a message, made by the kserve package's own protocol."""
    from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # type: ignore[import-untyped]

    tensors = [
        pb.ModelInferRequest.InferInputTensor(name=name, datatype="INT64", shape=value.shape,
                                              contents=pb.InferTensorContents(int64_contents=value.ravel().tolist()))
        for name, value in inputs.items()
    ]  # fmt: skip
    message: bytes = pb.ModelInferRequest(model_name=model, id="1", inputs=tensors).SerializeToString()
    return message


def write_bodies(path: Path, bodies: Sequence[bytes]) -> Path:
    """The file of bodies that the client sends in turn."""
    write_json(path, [base64.b64encode(body).decode() for body in bodies])
    return path


@dataclass(frozen=True, slots=True)
class Client:
    """The built program, on its own cores."""

    program: Path
    cores: str

    def load(self, address: str, path: str, bodies: Path, *, connections: int, seconds: float, warm: float = 0.5,
             rate: float = 0.0, protocol: str = "http", in_time_ms: float | None = None) -> dict[str, Any]:  # fmt: skip
        """One load and what came of it (the client's JSON). ``rate`` 0: a closed loop.

        ``in_time_ms``: answers that come later are no good ones; requests say so, as Envoy's do.

        Raises:
            OutcomeError: the client ended with an error.
        """
        argv = ["taskset", "-c", self.cores, str(self.program.absolute()), "-address", address, "-path", path,
                "-bodies", str(bodies), "-connections", str(connections), "-seconds", str(seconds),
                "-warm", str(warm), "-rate", str(rate), "-protocol", protocol]  # fmt: skip
        if in_time_ms is not None:
            argv += ["-in-time-ms", str(in_time_ms),
                     "-headers", f"x-envoy-expected-rq-timeout-ms: {in_time_ms:.0f}\r\n"]  # fmt: skip
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds + warm + 60)
        if done.returncode:
            raise OutcomeError(f"the client failed: {done.stderr.strip()[-300:]}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found
