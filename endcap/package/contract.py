"""What a package holds, so that the server, the gates and the reports need not know the model.

A package is a folder::

    package.json      this manifest: task type, input/output schema, variants, lineage, a digest of every other file
    model.onnx        the float32 graph (top-k inside); model.int8.onnx the quantised one
    items.json        the item table: a JSON list of external item ids; the graph's item i is entry i - 1, 0 is padding
    popular.json      item ids to fall back to, most popular first
    attributes.json   (optional) categories, scenes and stock of items, for the recommender's steps; see attributes.py
    MODEL_CARD.md     for people
    model.sig         OpenSSF model-signing bundle over all of the above

Axis 0 of every tensor is rows: one query, text or shopper each. What a task's graph takes and gives:

- ``session-recommender``: ``history`` int64 [rows, length], left-padded with 0, newest item last; ``items`` int64
  [rows, top_k] (best first) and ``scores`` float32 [rows, top_k]. The shopper's history is masked inside the graph.
- ``ranker``: a query and its candidates in any inputs; ``scores`` float [rows, candidates].
- ``encoder``: any inputs (token ids and mask); ``embedding`` float [rows, size].
- ``classifier``: any inputs; ``logits`` or ``probabilities`` float [rows, classes].
- ``generator``: any tensors; one step of the graph is one run.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from endcap.documents import Name, describe_validation
from endcap.errors import PackageError, VerificationError
from endcap.files import sha256_file, write_json
from endcap.package.attributes import ATTRIBUTES_FILE, parse_attributes

__all__ = [
    "ITEMS_FILE", "MANIFEST_FILE", "MODEL_CARD_FILE", "POPULAR_FILE", "SIGNATURE_FILE",
    "Manifest", "Task", "TensorSpec", "Variant",
    "read_items", "read_manifest", "read_popular", "seal", "verify_digests",
]  # fmt: skip

MANIFEST_FILE = "package.json"
ITEMS_FILE = "items.json"
POPULAR_FILE = "popular.json"
MODEL_CARD_FILE = "MODEL_CARD.md"
SIGNATURE_FILE = "model.sig"
MAX_MANIFEST_BYTES = 1 << 20

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
"""A plain file name: packages are flat, so no path can lead out of them."""


class Task(StrEnum):
    SESSION_RECOMMENDER = "session-recommender"
    RANKER = "ranker"
    ENCODER = "encoder"
    CLASSIFIER = "classifier"
    GENERATOR = "generator"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorSpec(_Model):
    """One tensor of the graph. ``datatype`` is the Open Inference Protocol's name (INT64, ...); -1 is any size."""

    name: str
    datatype: Literal["BOOL", "INT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"]
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()
    """Names of the axes, axis 0 first. Axes of one name have one size in a run; an output's axis of any size that is
    named as a padded input's is cut back to each row's own size. None: nothing is known of them."""
    padding: Literal["none", "left", "right"] = "none"
    """Where an input may be filled up, along its axes of any size, to go in one batch with longer ones."""
    pad_value: int = 0
    minimum: int | None = None
    """Of an input's values, as is ``maximum``: token ids, say. Others are refused before the graph sees them."""
    maximum: int | None = None
    longest: int | None = Field(default=None, ge=1)
    """The most that an input's axes of any size may have, rows apart."""


class Variant(_Model):
    """One graph that can serve the package. ``quality`` holds its measured offline metrics, by name."""

    file: FileName
    quality: dict[str, float] = Field(default_factory=dict)


class Manifest(_Model):
    api_version: Literal["endcap.dev/v1alpha1"] = "endcap.dev/v1alpha1"
    kind: Literal["ModelPackage"] = "ModelPackage"
    name: Name
    task: Task
    model: str
    """What kind of model it is, for people: ``item-knn``, ``transformer``, ``transformer+item-knn``."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: dict[str, Variant]
    """By name: ``float32`` always, ``int8`` where it was made."""
    top_k: int = Field(default=1, ge=1, le=1000)
    """Of a session recommender, as is ``max_history``; other tasks leave them out."""
    max_history: int = Field(default=1, ge=1, le=4096)
    created_at: str
    """UTC, ISO 8601."""
    lineage: dict[str, str] = Field(default_factory=dict)
    """data_sha256, git_commit, pipeline_run, seed, synthetic ("true"/"false"), ..."""
    digests: dict[FileName, str] = Field(default_factory=dict)
    """SHA-256 of every file but this manifest and the signature. Set by :func:`seal`."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.task is Task.SESSION_RECOMMENDER and not {"top_k", "max_history"} <= self.model_fields_set:
            raise ValueError("a session recommender states top_k and max_history")
        for spec in (*self.inputs, *self.outputs):
            if spec.axes and len(spec.axes) != len(spec.shape):
                raise ValueError(f"{spec.name} has {len(spec.shape)} axes and {len(spec.axes)} names of them")
        return self


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``manifest`` into ``folder`` with the digests of all its files. Sign after this.

    Raises:
        PackageError: a file that the manifest names is missing, or the item attributes are of another form.
    """
    if (folder / ATTRIBUTES_FILE).is_file():
        parse_attributes((folder / ATTRIBUTES_FILE).read_bytes(), where=folder / ATTRIBUTES_FILE)
    digests = {path.name: sha256_file(path) for path in _content(folder)}
    sealed = manifest.model_copy(update={"digests": digests})
    for name in _named_files(sealed):
        if name not in digests:
            raise PackageError(f"the package has no {name}", where=folder)
    write_json(folder / MANIFEST_FILE, sealed.model_dump(mode="json"))
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a package, validated. Says nothing yet about whether the package is what its maker signed.

    Raises:
        PackageError: no manifest, not JSON, or not of the contract's form.
    """
    path = folder / MANIFEST_FILE
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise PackageError("the manifest is too large", where=path)
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PackageError("not a model package: no readable package.json", where=folder) from error
    except ValidationError as error:
        raise PackageError(describe_validation(error), where=path) from error


def verify_digests(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        VerificationError: a byte differs, or a file is missing, extra, or no plain file.
    """
    present = {path.name for path in _content(folder)}
    for name in sorted(present ^ set(manifest.digests)):
        problem = "is not in the manifest" if name in present else "is missing"
        raise VerificationError(f"{name} {problem}", where=folder)
    for name in _named_files(manifest):
        if name not in manifest.digests:
            raise VerificationError(f"{name} is missing", where=folder)
    for name, digest in manifest.digests.items():
        if sha256_file(folder / name) != digest:
            raise VerificationError(f"{name} is not what was packaged (its SHA-256 differs)", where=folder)


def _named_files(manifest: Manifest) -> set[str]:
    files = {variant.file for variant in manifest.variants.values()} | {MODEL_CARD_FILE}
    if manifest.task is Task.SESSION_RECOMMENDER:
        files |= {ITEMS_FILE, POPULAR_FILE}
    return files


def _content(folder: Path) -> list[Path]:
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise VerificationError(f"{path.name} is not a plain file", where=folder)
    return [path for path in paths if path.name not in (MANIFEST_FILE, SIGNATURE_FILE)]


def read_items(folder: Path) -> list[str]:
    """The item table: entry ``i`` is the external id of the graph's item ``i + 1``."""
    return _read_ids(folder / ITEMS_FILE)


def read_popular(folder: Path) -> list[str]:
    """External item ids to fall back to, most popular first."""
    return _read_ids(folder / POPULAR_FILE)


def _read_ids(path: Path) -> list[str]:
    try:
        ids: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PackageError("not a readable JSON list of item ids", where=path) from error
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise PackageError("not a JSON list of item ids", where=path)
    return ids
