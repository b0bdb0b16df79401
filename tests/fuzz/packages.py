"""A tiny real signed package of each task, and good requests for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from endcap.package import Attributes, ItemAttributes, Manifest, Task, read_manifest
from endcap.package.attributes import Scene
from serving.server import grpc_messages, tensors
from tests.packages import ITEMS, make_package
from tests.task_packages import make_task_package

__all__ = ["VERSION", "Subject", "make_subject"]

VERSION = "7"
_ROWS, _LENGTH = 2, 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A package to serve. ``good``: documents that are answered with 200, by path; ``message``: a ModelInferRequest."""

    task: Task
    manifest: Manifest
    package: Path
    public_key: Path
    good: dict[str, Any]
    message: bytes

    @property
    def infer_path(self) -> str:
        return f"/v2/models/{self.manifest.name}/infer"


def make_subject(folder: Path, task: Task) -> Subject:
    """The package of ``task`` in ``folder``, made where it is not there yet."""
    package = folder / task.value / "package"
    if not package.exists():
        if task is Task.SESSION_RECOMMENDER:
            scenes = frozenset({Scene.HOME, Scene.CART})
            items = {
                item: ItemAttributes(category=f"c{number % 5}", scenes=scenes, in_stock=number % 7 > 0)
                for number, item in enumerate(ITEMS)
            }
            make_package(package, attributes=Attributes(items=items))
        else:
            make_task_package(package, task, ranges=True)
    manifest = read_manifest(package)
    arrays = {
        spec.name: np.ones(
            [size if size > 0 else (_LENGTH if axis else _ROWS) for axis, size in enumerate(spec.shape)],
            tensors.NUMPY[spec.datatype],
        )
        for spec in manifest.inputs
    }
    name = manifest.name
    described = [
        {"name": spec.name, "datatype": spec.datatype, "shape": list(arrays[spec.name].shape)}
        for spec in manifest.inputs
    ]
    infer = {
        "id": "q",
        "inputs": [one | {"data": arrays[str(one["name"])].tolist(), "parameters": {}} for one in described],
        "outputs": [{"name": manifest.outputs[0].name, "parameters": {"binary_data": False}}],
        "parameters": {"binary_data_output": False},
    }
    rows = [{key: array[row].tolist() for key, array in arrays.items()} for row in range(_ROWS)]
    good: dict[str, Any] = {
        f"/v2/models/{name}/infer": infer,
        f"/v2/models/{name}/versions/{VERSION}/infer": infer,
        f"/v1/models/{name}:predict": {"instances": rows},
    }
    if task is Task.SESSION_RECOMMENDER:
        good["/v1/recommend"] = {
            "shopper": "1", "history": ["104", "105"], "k": 3, "context": {"scene": "home"},
            "filters": {"exclude": ["106"], "candidates": ["107", "108"], "in_stock_only": True},
            "diversity": {"max_per_category": 2}, "explain": True,
        }  # fmt: skip
    message = grpc_messages.message("ModelInferRequest")(
        model_name=name, id="q", inputs=described,
        raw_input_contents=[tensors.to_raw(arrays[spec.name], spec) for spec in manifest.inputs],
    ).SerializeToString()  # fmt: skip
    return Subject(task, manifest, package, package.parent / "keys" / "signing.pub", good, message)
