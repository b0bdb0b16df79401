"""Values on the wire to arrays and back, whatever the protocol: checked against the manifest, and sizes first.

Every function here names the field that is wrong in ``InputError.where``. Nothing is allocated before the stated
shape and the bytes or values that came agree. Numbers must be finite: no graph of ours answers NaN with sense.

Raw bytes are those of the Open Inference Protocol's binary tensor extension and of gRPC's ``raw_input_contents``:
little-endian, row-major; of BYTES each element is its length (uint32) and then its bytes, which must be UTF-8, because
ONNX's strings are. An element of a BYTES array is a ``str``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.package import TensorSpec

__all__ = ["NUMPY", "checked_count", "from_raw", "from_typed", "from_values", "to_raw", "to_values"]

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("<i1"), "INT16": np.dtype("<i2"), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"), "UINT16": np.dtype("<u2"), "UINT32": np.dtype("<u4"), "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"), "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}  # fmt: skip
"""numpy's type of an Open Inference Protocol datatype."""

_PYTHON: dict[str, frozenset[type]] = {
    "?": frozenset({bool}), "i": frozenset({int}), "u": frozenset({int}),
    "f": frozenset({int, float}), "O": frozenset({str}), "b": frozenset({bool}),
}  # fmt: skip
"""What JSON values an array's kind is made of. ``True`` is no number, and ``1.0`` is no whole one."""

_MAX_SIZE = 1 << 31
_MAX_DIMENSIONS = 8


def checked_count(shape: object, spec: TensorSpec, where: str) -> int:
    """How many values a tensor of ``shape`` has.

    Raises:
        InputError: not a list of sizes, or not one that ``spec`` allows.
    """
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise InputError("shape must be a list of sizes", where=f"{where}.shape")
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < _MAX_SIZE:
            raise InputError("shape must be a list of sizes", where=f"{where}.shape")
        count *= size
    if len(shape) != len(spec.shape) or any(
        wanted not in (-1, size) for size, wanted in zip(shape, spec.shape, strict=True)
    ):
        raise InputError(f"{spec.name} must have shape {list(spec.shape)} (-1: any size)", where=f"{where}.shape")
    return count


def from_values(data: object, shape: Sequence[int], count: int, spec: TensorSpec, where: str) -> NDArray[Any]:
    """JSON's ``data``, flat or nested by shape, as an array. ``count``: of :func:`checked_count`.

    Raises:
        InputError: too few or too many values, ragged, or a value that the datatype does not hold.
    """
    if type(data) is not list:
        raise InputError("data must be a list of values, flat or nested by shape", where=where)
    flat = _flat(data, shape, where) if data and type(data[0]) is list else data
    if len(flat) != count:
        raise InputError(f"shape says {count} values, data has {len(flat)}", where=where)
    return _array(flat, spec, where).reshape(shape)


def from_typed(values: Sequence[Any], shape: Sequence[int], count: int, spec: TensorSpec, where: str) -> NDArray[Any]:
    """Values whose types a schema already guarantees (protobuf's repeated fields) as an array.

    Raises:
        InputError: as :func:`from_values`.
    """
    if len(values) != count:
        raise InputError(f"shape says {count} values, there are {len(values)}", where=where)
    if spec.datatype == "BYTES":
        try:
            values = [str(value, "utf-8") for value in values]
        except UnicodeDecodeError:
            raise InputError("a value is not UTF-8", where=where) from None
    return _array(list(values), spec, where).reshape(shape)


def _flat(data: list[Any], shape: Sequence[int], where: str) -> list[Any]:
    """Nested lists as one list; each must have the size that the shape says."""
    level = data
    for depth, size in enumerate(shape[1:], 1):
        if depth == 1 and len(level) != shape[0]:
            raise InputError(f"shape says {shape[0]} rows, data has {len(level)}", where=where)
        for place, part in enumerate(level):
            if type(part) is not list or len(part) != size:
                raise InputError(
                    f"data is ragged: every list at depth {depth} must have {size} values",
                    where=f"{where}.{place}" if depth == 1 else where,
                    next_step="send data flat, or nested by shape",
                )
        level = level[0] if len(level) == 1 else list(chain.from_iterable(level))
    if level and type(level[0]) is list:
        raise InputError("data is nested deeper than its shape", where=where, next_step="send data flat")
    return level


def _array(flat: list[Any], spec: TensorSpec, where: str) -> NDArray[Any]:
    dtype = NUMPY[spec.datatype]
    if not _PYTHON[dtype.kind].issuperset(map(type, flat)):
        raise InputError(f"a value is not {spec.datatype}", where=where)
    try:
        if dtype.kind != "f":
            return np.array(flat, dtype)
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype)
    except OverflowError:
        raise InputError(f"a value is not {spec.datatype}", where=where) from None
    if not np.isfinite(array).all():
        raise InputError(f"a value is not a finite {spec.datatype}", where=where)
    return array


def from_raw(raw: memoryview, shape: Sequence[int], count: int, spec: TensorSpec, where: str) -> NDArray[Any]:
    """A tensor's raw bytes as an array; of numbers it is a view of them where their place in memory allows.

    Raises:
        InputError: more or fewer bytes than the shape says, or a value that the datatype does not hold.
    """
    dtype = NUMPY[spec.datatype]
    if dtype.kind == "O":
        return _strings(raw, count, where).reshape(shape)
    if len(raw) != count * dtype.itemsize:
        raise InputError(
            f"shape says {count} values of {dtype.itemsize} bytes, there are {len(raw)} bytes", where=where
        )
    array: NDArray[Any] = np.frombuffer(raw, dtype)
    if dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError(f"a value is not a finite {spec.datatype}", where=where)
    elif dtype.kind == "b" and count and int(array.view(np.uint8).max()) > 1:
        raise InputError("a byte is neither 0 nor 1", where=where)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape)


def _strings(raw: memoryview, count: int, where: str) -> NDArray[Any]:
    if len(raw) < 4 * count:
        raise InputError(f"shape says {count} values, {len(raw)} bytes cannot hold them", where=where)
    values: list[str] = []
    place = 0
    for _ in range(count):
        if len(raw) - place < 4:
            raise InputError("the bytes end inside a value", where=where)
        (size,) = struct.unpack_from("<I", raw, place)
        place += 4
        if size > len(raw) - place:
            raise InputError("a value is longer than the bytes that are left", where=where)
        try:
            values.append(str(raw[place : place + size], "utf-8"))
        except UnicodeDecodeError:
            raise InputError("a value is not UTF-8", where=where) from None
        place += size
    if place != len(raw):
        raise InputError(f"{len(raw) - place} bytes are left over", where=where)
    return np.array(values, object)


def to_raw(array: NDArray[Any], spec: TensorSpec) -> bytes:
    """The inverse of :func:`from_raw`."""
    if spec.datatype == "BYTES":
        parts: list[bytes] = []
        for value in array.ravel().tolist():
            encoded = value if isinstance(value, bytes) else str(value).encode()
            parts += (struct.pack("<I", len(encoded)), encoded)
        return b"".join(parts)
    return np.ascontiguousarray(array, NUMPY[spec.datatype]).tobytes()


def to_values(array: NDArray[Any], spec: TensorSpec) -> Any:
    """What orjson (with ``OPT_SERIALIZE_NUMPY``) writes as the flat ``data``: a number that is not finite as null."""
    if spec.datatype == "BYTES":
        return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
                for value in array.ravel().tolist()]  # fmt: skip
    return np.ascontiguousarray(array.ravel())
