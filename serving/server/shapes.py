"""Several requests' tensors as one batch and back, purely.

Rows are joined along axis 0. An input with a padding in the manifest is filled up, on that side, to the longest of
*its own batch*; any other requests' sizes must agree. An output's axis that follows a padded input's is cut back.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError
from endcap.package import Manifest, Task, TensorSpec

__all__ = ["BatchShape", "Extent"]

Arrays = Mapping[str, NDArray[Any]]
Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a batch a request takes: ``rows`` of at most ``length`` tokens each.

    ``key``: only requests of one key go together. ``sizes``: per padded name of an axis, this request's size.
    """

    rows: int
    length: int
    key: Hashable
    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Padded:
    axes: tuple[tuple[int, str], ...]
    side: Side
    value: int


class BatchShape:
    """What a manifest says of joining requests.

    ``joinable`` is False where rows cannot be joined at all: a tensor whose axis 0 has a fixed size, or none.
    """

    def __init__(self, manifest: Manifest) -> None:
        tensors = (*manifest.inputs, *manifest.outputs)
        self.joinable = all(spec.shape and spec.shape[0] == -1 for spec in tensors)
        self._inputs = manifest.inputs
        self._padded: dict[str, _Padded] = {}
        sides: dict[str, Side] = {}
        for spec in manifest.inputs:
            side = _side(spec, manifest.task)
            free = [axis for axis, size in enumerate(spec.shape) if axis and size == -1]
            if side is not None and free and self.joinable:
                names = tuple((axis, _axis_name(spec, axis)) for axis in free)
                self._padded[spec.name] = _Padded(names, side, spec.pad_value)
                sides.update(dict.fromkeys((name for _, name in names), side))
        self._cut: dict[str, tuple[tuple[int, str, Side], ...]] = {}
        for spec in manifest.outputs:
            free = [axis for axis, size in enumerate(spec.shape) if axis and size == -1]
            named = [(axis, _axis_name(spec, axis)) for axis in free]
            if any(name not in sides for _, name in named):
                self._padded = {}  # what would have to be cut back is not known: only equal sizes go together
                self._cut = {}
                break
            if named:
                self._cut[spec.name] = tuple((axis, name, sides[name]) for axis, name in named)

    def measure(self, inputs: Arrays) -> Extent:
        """The extent of one request.

        Raises:
            InputError: inputs that differ in rows, or of none; or axes of one name that differ in size.
        """
        rows = -1
        length = 1
        key: list[object] = []
        sizes: dict[str, int] = {}
        named: dict[str, int] = {}
        for spec in self._inputs:
            shape = inputs[spec.name].shape
            if self.joinable:
                if rows not in (-1, shape[0]):
                    raise InputError(f"{spec.name} has {shape[0]} rows, others have {rows}",
                                     where=f"inputs.{spec.name}.shape",
                                     next_step="send the same number of rows in every input")  # fmt: skip
                rows = shape[0]
            for axis, name in enumerate(spec.axes):
                if named.setdefault(name, shape[axis]) != shape[axis]:
                    raise InputError(f"axis {axis} ({name}) of {spec.name} has size {shape[axis]}, not {named[name]}",
                                     where=f"inputs.{spec.name}.shape",
                                     next_step=f"send one size of {name} in all inputs")  # fmt: skip
            padded = self._padded.get(spec.name)
            if padded is None:
                key.append(shape[1:] if self.joinable else shape)
            else:
                for axis, name in padded.axes:
                    sizes[name] = shape[axis]
            length = max(length, math.prod(size for wanted, size in zip(spec.shape[1:], shape[1:], strict=True)
                                           if wanted == -1))  # fmt: skip
        if rows == 0:
            raise InputError("the batch has no rows", where="inputs", next_step="send at least one row")
        return Extent(max(rows, 1), length, tuple(key), sizes)

    def join(self, requests: Sequence[Arrays]) -> dict[str, NDArray[Any]]:
        """One batch of requests of one key."""
        if len(requests) == 1:
            return dict(requests[0])
        batch: dict[str, NDArray[Any]] = {}
        for spec in self._inputs:
            parts = [request[spec.name] for request in requests]
            padded = self._padded.get(spec.name)
            if padded is None or all(part.shape[1:] == parts[0].shape[1:] for part in parts):
                batch[spec.name] = np.concatenate(parts)
                continue
            sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
            whole = np.full((sum(len(part) for part in parts), *sizes), padded.value, parts[0].dtype)
            start = 0
            for part in parts:
                end = start + len(part)
                whole[(slice(start, end), *(_own(size, padded.side) for size in part.shape[1:]))] = part
                start = end
            batch[spec.name] = whole
        return batch

    def split(self, outputs: Arrays, extents: Sequence[Extent]) -> list[dict[str, NDArray[Any]]]:
        """Each request's part of a batch's outputs."""
        if len(extents) == 1:
            return [dict(outputs)]
        parts: list[dict[str, NDArray[Any]]] = []
        start = 0
        for extent in extents:
            end = start + extent.rows
            part: dict[str, NDArray[Any]] = {}
            for name, values in outputs.items():
                cut: list[slice] = [slice(None)] * (values.ndim - 1)
                for axis, axis_name, side in self._cut.get(name, ()):
                    cut[axis - 1] = _own(extent.sizes[axis_name], side)
                part[name] = values[(slice(start, end), *cut)]
            parts.append(part)
            start = end
        return parts


def _side(spec: TensorSpec, task: Task) -> Side | None:
    if spec.padding != "none":
        return spec.padding
    return "left" if task is Task.SESSION_RECOMMENDER and spec.name == "history" else None


def _axis_name(spec: TensorSpec, axis: int) -> str:
    """A name of its own for an axis without one, so that no other is taken for the same."""
    return spec.axes[axis] if spec.axes else f"{spec.name}.{axis}"


def _own(size: int, side: Side) -> slice:
    """The part of a padded axis that is a request's own."""
    return slice(0, size) if side == "right" else slice(-size, None) if size else slice(0, 0)
