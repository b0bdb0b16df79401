"""What a rollout was begun with, read back from its folder: enough to go on with it where its files are not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from endcap.documents import describe_validation
from endcap.errors import StateError
from endcap.files import read_json
from endcap.objectives import Objectives
from serving.rollout.spec import RolloutSpec

__all__ = ["DECLARED_FILE", "Declared", "read_declaration", "read_declared"]

DECLARED_FILE = "declared.json"


@dataclass(frozen=True, slots=True)
class Declared:
    """``objectives`` carry the rollout's margins."""

    spec: RolloutSpec
    objectives: Objectives


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
        objectives = _OBJECTIVES.validate_python(document.get("objectives"))
        # The file has the objectives themselves where the document had their name.
        spec = _SPEC.validate_python({**document, "objectives": objectives.name})
    except ValidationError as error:
        raise StateError(f"damaged: {describe_validation(error)}", where=path, next_step=_RESTORE) from error
    return Declared(spec, objectives)
