"""Put a package together: graph, item table, fallback, model card, manifest, signature."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from endcap.errors import from_os_error
from endcap.files import replaced_folder, write_atomic, write_json
from endcap.package import (
    ATTRIBUTES_FILE,
    ITEMS_FILE,
    MODEL_CARD_FILE,
    POPULAR_FILE,
    Attributes,
    Manifest,
    Task,
    TensorSpec,
    Variant,
    seal,
    sign_package,
)

__all__ = ["FLOAT32_FILE", "INT8_FILE", "PackageParts", "build_package"]

FLOAT32_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"


@dataclass(frozen=True)
class PackageParts:
    """What a session recommender's package is made of.

    Attributes:
        model: what kind of model, for people.
        float32: the graph, float32; ``int8`` its quantised copy, where there is one.
        items: external ids; the graph's item ``i`` is entry ``i - 1``.
        popular: external ids to fall back to, most popular first.
        card: the model card, Markdown.
        quality: measured offline metrics by variant.
        lineage: where it comes from, by name.
        created_at: UTC, ISO 8601.
        attributes: what is known of items beside their ids; None: nothing, and the package has no such file.
    """

    name: str
    model: str
    float32: Path
    int8: Path | None
    items: Sequence[str]
    popular: Sequence[str]
    card: str
    top_k: int
    max_history: int
    created_at: str
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)
    attributes: Attributes | None = None


def build_package(folder: Path, parts: PackageParts, private_key: Path) -> Manifest:
    """Write the package to ``folder`` (replaced), sealed and signed; it is there whole or not at all.

    Raises:
        StorageError: no space, or not allowed.
        PackageError: the key cannot be used.
    """
    graphs = {"float32": (FLOAT32_FILE, parts.float32)}
    if parts.int8 is not None:
        graphs["int8"] = (INT8_FILE, parts.int8)
    try:
        with replaced_folder(folder) as scratch:
            scratch.mkdir()
            for file, source in graphs.values():
                shutil.copyfile(source, scratch / file)
            write_json(scratch / ITEMS_FILE, list(parts.items))
            write_json(scratch / POPULAR_FILE, list(parts.popular))
            if parts.attributes is not None:
                said = parts.attributes.model_dump(mode="json", exclude_none=True)
                write_atomic(scratch / ATTRIBUTES_FILE, json.dumps(said, separators=(",", ":")))
            write_atomic(scratch / MODEL_CARD_FILE, parts.card)
            manifest = seal(
                scratch,
                Manifest(
                    name=parts.name,
                    task=Task.SESSION_RECOMMENDER,
                    model=parts.model,
                    inputs=(TensorSpec(name="history", datatype="INT64", shape=(-1, -1)),),
                    outputs=(
                        TensorSpec(name="items", datatype="INT64", shape=(-1, parts.top_k)),
                        TensorSpec(name="scores", datatype="FP32", shape=(-1, parts.top_k)),
                    ),
                    variants={
                        variant: Variant(file=file, quality=dict(parts.quality.get(variant, {})))
                        for variant, (file, _) in graphs.items()
                    },
                    top_k=parts.top_k,
                    max_history=parts.max_history,
                    created_at=parts.created_at,
                    lineage=dict(parts.lineage),
                ),
            )
            sign_package(scratch, private_key)
    except OSError as error:
        raise from_os_error(error, doing=f"writing the package {folder}") from error
    return manifest
