"""What a rollout was begun with, read back from its folder: enough to go on with it where its files are not at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from endcap.documents import describe_validation
from endcap.errors import StateError
from endcap.files import read_json
from endcap.objectives import Objectives
from serving.rollout.spec import RolloutSpec

__all__ = [
    "DECLARED_FILE", "Declared", "declared_from", "declared_json", "differing", "read_declaration", "read_declared",
]  # fmt: skip

DECLARED_FILE = "declared.json"


@dataclass(frozen=True, slots=True)
class Declared:
    """``objectives`` carry the rollout's margins."""

    spec: RolloutSpec
    objectives: Objectives


_MAY_CHANGE = frozenset({"freeze", "webhook_from", "prometheus_url"})
"""What no evidence stands on: a freeze may be declared while a rollout runs."""
_RESTORE = "restore the file from a backup; endcap serve restore VERSION returns the traffic without it"
_OBJECTIVES = TypeAdapter(Objectives)
_SPEC = TypeAdapter(RolloutSpec)


def read_declaration(folder: Path) -> dict[str, Any]:
    """The file as it is. Raises StateError where it is missing, or no JSON object."""
    path = folder / DECLARED_FILE
    try:
        document = read_json(path)
    except StateError as error:
        raise StateError(error.what, where=path, next_step=_RESTORE) from error
    if not isinstance(document, dict):
        raise StateError("damaged, not a declaration", where=path, next_step=_RESTORE)
    return document


def read_declared(folder: Path) -> Declared:
    """What :meth:`serving.rollout.store.RolloutStore.declare` kept.

    Raises:
        StateError: the file is missing or damaged; the message names it.
    """
    document, path = read_declaration(folder), folder / DECLARED_FILE
    try:
        return declared_from(document)
    except ValidationError as error:
        raise StateError(f"damaged: {describe_validation(error)}", where=path, next_step=_RESTORE) from error


def declared_json(spec: RolloutSpec, objectives: Objectives) -> dict[str, Any]:
    """A declaration as it is kept: the objectives themselves stand where the document has their name."""
    return {**asdict(spec), "objectives": asdict(objectives, dict_factory=_plain)}


def declared_from(document: Mapping[str, Any]) -> Declared:
    """The inverse of :func:`declared_json`. Raises pydantic's ValidationError on anything else."""
    objectives = _OBJECTIVES.validate_python(document.get("objectives"))
    return Declared(_SPEC.validate_python({**document, "objectives": objectives.name}), objectives)


def differing(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two declarations, as they are kept, differ in: names of fields that evidence stands on."""
    before, now = (json.loads(json.dumps(one)) for one in (kept, asked))
    return [name for name, value in now.items() if before.get(name) != value and name not in _MAY_CHANGE]


def _plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON has no sets; one written in whatever order would differ from itself the next time."""
    return {
        name: [asdict(member) for member in sorted(value)] if isinstance(value, frozenset) else value
        for name, value in fields
    }
