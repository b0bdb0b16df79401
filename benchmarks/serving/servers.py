"""endcap's server, KServe's and MLServer, each one process on one core with the same ONNX file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.serving.packages import Made
from endcap.errors import OutcomeError
from endcap.files import write_json
from endcap.processes import free_port, last_line, spawn, stop

__all__ = ["ENDCAP", "KSERVE", "MLSERVER", "Running", "cpu_s", "memory_mb", "serve"]

ENDCAP, KSERVE, MLSERVER = "endcap", "kserve", "mlserver"
_PEERS = Path(__file__).parent / "peers"
_START_S = 90.0
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Running:
    """A server that is ready. ``ready_s``: from its start until it said so."""

    name: str
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    infer_path: str
    ready_s: float
    log: Path

    def check_alive(self) -> None:
        """Raises: OutcomeError: it has ended."""
        if self.process.poll() is not None:
            raise OutcomeError(f"{self.name} ended: {last_line(self.log)}", where=self.log)


@contextlib.contextmanager
def serve(name: str, made: Made, folder: Path, *, core: str, mlserver_python: Path | None = None,
          more: tuple[str, ...] = ()) -> Iterator[Running]:  # fmt: skip
    """Run the server ``name`` with the package's graph on ``core``; it is ended when the block is left.

    Raises:
        OutcomeError: it ended or was not ready in time.
    """
    port, grpc_port = free_port(), free_port()
    log = folder / f"{name}-{made.name}.log"
    env, cwd = dict(_ONE_THREAD), None
    if name == ENDCAP:
        argv = [sys.executable, "-m", "serving.server", "--package", str(made.folder), "--public-key",
                str(made.public_key), "--version", "1", "--zone", "a", "--port", str(port),
                "--grpc-port", str(grpc_port), "--drain-s", "0", *more]  # fmt: skip
    elif name == KSERVE:
        argv = [sys.executable, str(_PEERS / "kserve_server.py"), "--name", made.name, "--graph", str(made.graph),
                "--port", str(port), "--grpc-port", str(grpc_port)]  # fmt: skip
    else:
        if mlserver_python is None:
            raise ValueError("MLServer needs its interpreter")
        cwd = folder / f"mlserver-{made.name}"
        _mlserver_settings(cwd, made, port, grpc_port)
        argv = [str(mlserver_python.parent / "mlserver"), "start", str(cwd.absolute())]
        env["PYTHONPATH"] = str(_PEERS.absolute())
    begun_s = time.monotonic()
    process = spawn(["taskset", "-c", core, *argv], log=log, env=env, cwd=cwd, leash=True)
    try:
        running = Running(name, process, f"127.0.0.1:{port}", f"127.0.0.1:{grpc_port}",
                          f"/v2/models/{made.name}/infer", 0.0, log)  # fmt: skip
        ready_s = _wait_until_ready(running, made.name, begun_s)
        yield Running(name, process, running.http, running.grpc, running.infer_path, ready_s, log)
    finally:
        stop(process)


def _mlserver_settings(folder: Path, made: Made, port: int, grpc_port: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # No worker processes: one process is what is compared; and no metrics or access log, which ours has.
    write_json(folder / "settings.json", {
        "host": "127.0.0.1", "http_port": port, "grpc_port": grpc_port, "metrics_endpoint": None,
        "parallel_workers": 0, "debug": False, "logging_settings": None, "cache_enabled": False,
    })  # fmt: skip
    write_json(folder / "model-settings.json", {
        "name": made.name, "implementation": "mlserver_runtime.OnnxModel",
        "parameters": {"uri": str(made.graph.absolute())},
    })  # fmt: skip


def _wait_until_ready(running: Running, model: str, begun_s: float) -> float:
    with httpx.Client(timeout=2.0, trust_env=False) as client:
        while time.monotonic() - begun_s < _START_S:
            running.check_alive()
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"http://{running.http}/v2/models/{model}/ready").status_code == 200:
                    return time.monotonic() - begun_s
            time.sleep(0.01)
    raise OutcomeError(f"{running.name} was not ready after {_START_S:.0f} s", where=running.log)


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """Resident memory of the process, in 10^6 bytes."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """Processor time that the process has had, user's and system's: what others on the machine leave it or not."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
