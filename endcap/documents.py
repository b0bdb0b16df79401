"""Files that people write. They have Kubernetes' shape from the first day: apiVersion, kind, metadata, spec."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from endcap import API_VERSION
from endcap.errors import InputError

__all__ = ["MAX_DOCUMENT_BYTES", "Document", "Metadata", "Name", "SpecModel", "describe_validation", "load_documents"]

MAX_DOCUMENT_BYTES = 1 << 20
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
"""A DNS label (RFC 1123), as Kubernetes asks of names."""


def _camel(name: str) -> str:
    head, *tail = name.split("_")
    return head + "".join(part.title() for part in tail)


class SpecModel(BaseModel):
    """Base of everything read from a person's file: unknown fields are refused, names are camelCase in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=_camel, populate_by_name=True)


class Metadata(SpecModel):
    name: Name
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class Document(SpecModel):
    """The envelope; a kind of document subclasses it with ``kind`` as a ``Literal`` and a typed ``spec``."""

    api_version: str = API_VERSION
    kind: str
    metadata: Metadata


D = TypeVar("D", bound=Document)


def describe_validation(error: ValidationError) -> str:
    """A pydantic error as ``spec.steps.0.share: what is wrong``, a fault after the other."""
    faults = error.errors(include_url=False)
    places = [fault["loc"] for fault in faults]
    lines = []
    for fault in faults:
        place = fault["loc"]
        if fault["type"] == "too_short" and any(other[: len(place)] == place != other for other in places):
            continue  # a list is too short for pydantic when a member of it is wrong, which is said already
        what = "unknown field" if fault["type"] == "extra_forbidden" else fault["msg"].removeprefix("Value error, ")
        lines.append(f"{'.'.join(str(part) for part in place) or 'document'}: {what}")
    return "; ".join(lines)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``on``, ``no`` and ``n`` as booleans; here only ``true`` and ``false`` are.

    A key that stands twice is an error, as the specification has it: the first of two values would be lost unsaid.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_documents(path: Path, kinds: Sequence[type[D]]) -> list[D]:
    """All documents of the given ``kinds`` in a YAML file; any other kind is an error.

    Raises:
        InputError: missing, too large, not YAML, an unknown kind or version, or a field that does not validate.
    """
    by_kind = {str(model.model_fields["kind"].annotation.__args__[0]): model for model in kinds}  # type: ignore[union-attr]
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            raise InputError(f"larger than {MAX_DOCUMENT_BYTES} bytes", where=path)
        text = path.read_text()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError("no such file", where=path) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=path) from error
    try:
        # _Loader is a SafeLoader.
        raw: list[Any] = [document for document in yaml.load_all(text, Loader=_Loader) if document is not None]
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}", where=path) from error
    found: list[D] = []
    for index, document in enumerate(raw):
        where = f"{path}, document {index + 1}"
        if not isinstance(document, dict):
            raise InputError("a mapping with apiVersion, kind, metadata and spec is needed", where=where)
        if document.get("apiVersion") != API_VERSION:
            raise InputError(f"apiVersion is {document.get('apiVersion')!r}", where=where,
                             next_step=f"write apiVersion: {API_VERSION}")  # fmt: skip
        model = by_kind.get(str(document.get("kind")))
        if model is None:
            raise InputError(f"kind is {document.get('kind')!r}", where=where,
                             next_step=f"known here: {', '.join(sorted(by_kind))}")  # fmt: skip
        try:
            found.append(model.model_validate(document))
        except ValidationError as error:
            raise InputError(describe_validation(error), where=where) from error
    if not found:
        raise InputError("no document in the file", where=path)
    return found
