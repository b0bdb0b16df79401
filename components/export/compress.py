"""An int8 copy of a graph, and what it costs in quality."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.evaluation.evaluation import Ranked, estimate_difference
from endcap.errors import PackageError, from_os_error
from endcap.evidence.bootstrap import Estimate
from endcap.files import write_atomic

__all__ = ["Compression", "compress_graph", "measure_compression"]


@dataclass(frozen=True)
class Compression:
    """The int8 graph beside the float32 one, for the same shoppers."""

    shoppers: int
    float32_bytes: int
    int8_bytes: int
    float32_ndcg_at_10: float
    int8_ndcg_at_10: float
    difference: Estimate
    """int8 less float32 in NDCG@10, by the paired bootstrap."""


def compress_graph(path: Path, destination: Path) -> None:
    """Write an int8 copy of ``path``: weights of matrix products a channel, looked-up rows (item vectors) as a whole;
    activations are quantised as they come (ONNX Runtime's dynamic quantisation).

    Raises:
        PackageError: the graph cannot be quantised.
        StorageError: no space.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-untyped]

    try:
        with _quiet_root(), tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "int8.onnx"
            quantize_dynamic(path, made, op_types_to_quantize=["MatMul", "Gather"], per_channel=True,
                             weight_type=QuantType.QInt8)  # fmt: skip
            write_atomic(destination, made.read_bytes())
    except OSError as error:
        raise from_os_error(error, doing="compressing the graph") from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise PackageError(f"the graph cannot be quantised ({str(error).splitlines()[0]})", where=path) from error


@contextmanager
def _quiet_root() -> Iterator[None]:
    """ONNX Runtime's quantiser warns on the root logger of what it is asked for here on purpose."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(max(before, logging.ERROR))
    try:
        yield
    finally:
        root.setLevel(before)


def measure_compression(float32: Ranked, int8: Ranked, *, float32_file: Path, int8_file: Path, seed: int
                        ) -> Compression:  # fmt: skip
    """Compare what both graphs show the same shoppers."""
    small, full, difference = estimate_difference(int8, float32, metric="ndcg_at_10", seed=seed)
    return Compression(
        shoppers=len(float32.ranks),
        float32_bytes=float32_file.stat().st_size,
        int8_bytes=int8_file.stat().st_size,
        float32_ndcg_at_10=full,
        int8_ndcg_at_10=small,
        difference=difference,
    )
