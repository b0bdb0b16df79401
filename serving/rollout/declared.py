"""What a rollout was begun with, read back from its folder: enough to go on with it where its files are not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from endcap.documents import describe_validation
from endcap.errors import StateError
from endcap.files import read_json
from endcap.objectives import Objectives
from serving.rollout.spec import RolloutSpec

__all__ = ["DECLARED_FILE", "Declared", "read_declared"]

DECLARED_FILE = "declared.json"


@dataclass(frozen=True, slots=True)
class Declared:
    """``objectives`` carry the rollout's margins."""

    spec: RolloutSpec
    objectives: Objectives


_OBJECTIVES = TypeAdapter(Objectives)
_SPEC = TypeAdapter(RolloutSpec)


def read_declared(folder: Path) -> Declared:
    """What :meth:`serving.rollout.store.RolloutStore.declare` kept.

    Raises:
        StateError: the file is missing or damaged; the message names it.
    """
    path = folder / DECLARED_FILE
    document = read_json(path)
    if not isinstance(document, dict):
        raise StateError("damaged, not a declaration", where=path)
    try:
        objectives = _OBJECTIVES.validate_python(document.get("objectives"))
        # The file has the objectives themselves where the document had their name.
        spec = _SPEC.validate_python({**document, "objectives": objectives.name})
    except ValidationError as error:
        raise StateError(f"damaged: {describe_validation(error)}", where=path) from error
    return Declared(spec, objectives)
