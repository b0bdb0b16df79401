"""The graph: verified bytes into an ONNX Runtime session, and runs that can be ended.

Nothing here knows HTTP or recommendations. onnxruntime is imported late, so that a package is refused before even
the library is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from endcap.errors import EndcapError, InputError, PackageError, VerificationError
from endcap.files import sha256_file
from endcap.package import Manifest, TensorSpec, verify_package
from endcap.package.contract import MANIFEST_FILE

__all__ = [
    "DTYPES", "Engine", "GraphError", "GraphTimeoutError", "Tensors", "Ticket", "Verified",
    "cores", "load_engine", "on_gpu", "verify", "warm_up",
]  # fmt: skip

Tensors = Mapping[str, NDArray[Any]]

DTYPES: dict[str, str] = {
    "BOOL": "bool", "INT8": "int8", "INT32": "int32", "INT64": "int64",
    "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
"""numpy's name of an Open Inference Protocol datatype."""

_ORT_TYPES = {
    "BOOL": "tensor(bool)", "INT8": "tensor(int8)", "INT32": "tensor(int32)", "INT64": "tensor(int64)",
    "FP16": "tensor(float16)", "FP32": "tensor(float)", "FP64": "tensor(double)", "BYTES": "tensor(string)",
}  # fmt: skip


class GraphError(EndcapError):
    """The graph failed on an input that keeps to the package's schema."""


class GraphTimeoutError(GraphError):
    """The graph took longer than it may."""


@dataclass(frozen=True, slots=True)
class Verified:
    """A package whose signature and digests hold. Its files are read through it: what is used is what was signed."""

    folder: Path
    manifest: Manifest
    seconds: float

    def read(self, name: str) -> bytes:
        """The bytes of one file, checked again as read: the folder may have changed since it was verified."""
        try:
            raw = (self.folder / name).read_bytes()
        except OSError as error:
            raise VerificationError(f"{name} cannot be read any more", where=self.folder) from error
        if hashlib.sha256(raw).hexdigest() != self.manifest.digests.get(name):
            raise VerificationError(f"{name} changed after it was verified", where=self.folder)
        return raw


def verify(folder: Path, public_key: Path, *, sha256: str | None = None) -> Verified:
    """Verify a package.

    Args:
        sha256: of its manifest, which holds the digests of all else: another package, signed as well, is refused.

    Raises:
        PackageError: it is not a package, or (VerificationError) not what its maker signed, or not the one meant.
    """
    begun_s = time.monotonic()
    manifest = verify_package(folder, public_key)
    if sha256 is not None and (found := sha256_file(folder / MANIFEST_FILE)) != sha256:
        raise VerificationError(f"another package than the one meant: its manifest's SHA-256 is {found[:12]}..., and "
                                f"{sha256[:12]}... was registered", where=folder,
                                next_step="see what the storage URI leads to")  # fmt: skip
    return Verified(folder, manifest, time.monotonic() - begun_s)


class _RunOptions(Protocol):
    terminate: bool
    log_severity_level: int


class _Session(Protocol):
    """What we use of onnxruntime's session (the library carries no types)."""

    def run(self, outputs: list[str], inputs: dict[str, NDArray[Any]], options: Any) -> list[NDArray[Any]]: ...


class Ticket:
    """One run of the graph, so that it can be ended from another thread."""

    __slots__ = ("_options", "revoked")

    def __init__(self, options: _RunOptions) -> None:
        self._options = options
        self.revoked = False

    def revoke(self) -> None:
        """End the run at the graph's next node, or before it begins."""
        self.revoked = True
        self._options.terminate = True


class Engine:
    """A loaded graph. :meth:`run` blocks, and may be called from several threads at once."""

    def __init__(self, session: _Session, outputs: list[str], make_options: Callable[[], _RunOptions], *,
                 on_cpu: bool = True) -> None:  # fmt: skip
        self.on_cpu = on_cpu
        self._session = session
        self._outputs = outputs
        self._make_options = make_options

    def ticket(self) -> Ticket:
        """A ticket for one run."""
        options = self._make_options()
        options.log_severity_level = 4
        return Ticket(options)

    def run(self, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            GraphTimeoutError: ``ticket`` was revoked meanwhile.
            GraphError: the graph failed.
        """
        if ticket.revoked:
            raise GraphTimeoutError("the graph did not get to run in time")
        try:
            values = self._session.run(self._outputs, dict(inputs), ticket._options)
        except Exception as error:
            if ticket.revoked:
                raise GraphTimeoutError("the graph took too long and was ended") from error
            raise GraphError(f"the graph failed ({type(error).__name__})") from error
        return dict(zip(self._outputs, values, strict=True))


def load_engine(package: Verified, *, variant: str = "float32", threads: int = 1, provider: str = "auto") -> Engine:
    """Load a verified package's graph.

    Args:
        threads: that one run uses; they do not spin while they wait, because replicas share a machine.
        provider: ``cpu``, ``cuda`` (onnxruntime must offer it), or ``auto``: CUDA where it is offered.

    Raises:
        PackageError: no such variant, or the graph cannot be loaded or does not keep to the manifest.
        InputError: no such provider here.
    """
    manifest = package.manifest
    chosen = manifest.variants.get(variant)
    if chosen is None:
        known = ", ".join(sorted(manifest.variants))
        raise InputError(f"the package has no variant {variant}", where=package.folder,
                         next_step=f"choose one of: {known} (--variant)")  # fmt: skip
    graph = package.read(chosen.file)

    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what goes wrong is an exception; its log lines would hold parts of histories
    where = package.folder / chosen.file
    providers = _providers(onnxruntime, provider)
    if "CUDAExecutionProvider" in providers:
        onnxruntime.preload_dlls()  # CUDA's libraries come as packages of their own, where the loader does not look
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=providers)
    except Exception as error:
        raise PackageError(f"onnxruntime cannot load the graph ({type(error).__name__})", where=where) from error
    on_cpu = "CUDAExecutionProvider" not in session.get_providers()
    if on_cpu and provider == "cuda":  # onnxruntime goes on without a GPU that it cannot use
        raise InputError("onnxruntime cannot use CUDA here", where="--provider",
                         next_step="look for the driver and CUDA's libraries, or use --provider cpu")  # fmt: skip
    _check("input", manifest.inputs, session.get_inputs(), where, complete=True)
    _check("output", manifest.outputs, session.get_outputs(), where, complete=False)
    return Engine(session, [spec.name for spec in manifest.outputs], onnxruntime.RunOptions,
                  on_cpu=on_cpu)  # fmt: skip


def cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processor cores that this process was given: its affinity, and its cgroup's quota (v2, v1) rounded up."""
    given = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, IndexError):
        quota, period = (cgroup / "cpu.max").read_text().split()[:2]
        return max(1, min(given, math.ceil(int(quota) / int(period))))
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
        if quota_us > 0:
            return max(1, min(given, math.ceil(quota_us / period_us)))
    return given


def on_gpu(provider: str) -> bool:
    """Whether :func:`load_engine` would use a GPU for ``provider``."""
    if provider == "cpu":
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _providers(onnxruntime: Any, wanted: str) -> list[str]:
    offered = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if wanted == "cuda" and not offered:
        raise InputError("onnxruntime offers no CUDA here", where="--provider",
                         next_step="use --provider cpu, or the image with onnxruntime-gpu")  # fmt: skip
    return (
        ["CUDAExecutionProvider", "CPUExecutionProvider"] if offered and wanted != "cpu" else ["CPUExecutionProvider"]
    )


def warm_up(engine: Engine, inputs: Tensors, where: Path) -> None:
    """Run once; a graph that fails here is refused.

    Raises:
        PackageError: the graph failed.
    """
    try:
        engine.run(inputs, engine.ticket())
    except GraphError as error:
        raise PackageError(f"the graph fails on its first run: {error.what}", where=where) from error


def _check(kind: str, specs: tuple[TensorSpec, ...], found: list[Any], where: Path, *, complete: bool) -> None:
    """Compare the manifest's tensors with the graph's: names and types, and sizes where both state one."""
    tensors = {tensor.name: tensor for tensor in found}
    for spec in specs:
        tensor = tensors.pop(spec.name, None)
        if tensor is None:
            raise PackageError(f"the graph has no {kind} {spec.name}", where=where)
        if tensor.type != _ORT_TYPES[spec.datatype]:
            raise PackageError(f"{kind} {spec.name} is {tensor.type}, the manifest says {spec.datatype}", where=where)
        sizes = list(tensor.shape)
        agree = len(sizes) == len(spec.shape) and all(
            not isinstance(size, int) or wanted in (-1, size)
            for size, wanted in zip(sizes, spec.shape, strict=True)
        )  # fmt: skip
        if not agree:
            raise PackageError(
                f"{kind} {spec.name} has shape {sizes}, the manifest says {list(spec.shape)}", where=where
            )
    if complete and tensors:
        raise PackageError(f"the manifest does not name {kind} {', '.join(sorted(tensors))}", where=where)
