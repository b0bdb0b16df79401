"""A pipeline's parameters: what people give as text, checked against what the compiled pipeline declares. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from endcap.errors import InputError

__all__ = ["parse_assignments", "typed_parameters"]

_BOOLEANS = {"true": True, "false": False}


def parse_assignments(texts: Sequence[str]) -> dict[str, str]:
    """``name=value`` texts.

    Raises:
        InputError: one has no ``=``, or a name stands twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(
                f"not a parameter: {text!r}", where="--parameter", next_step="write --parameter NAME=VALUE"
            )
        if name in found:
            raise InputError(f"{name!r} is given twice", where="--parameter")
        found[name] = value
    return found


def typed_parameters(compiled: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str | int | float | bool]:
    """The given values as the types that ``compiled`` (:func:`pipelines.compile.compiled_recommender`) declares.

    Raises:
        InputError: an unknown name, a value of the wrong type, or a required one that is missing.
    """
    spec = compiled.get("pipeline_spec", compiled)
    declared: Mapping[str, Mapping[str, Any]] = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise InputError(f"the pipeline has no parameter {unknown[0]!r}", where="--parameter",
                         next_step=f"known: {', '.join(sorted(declared))}")  # fmt: skip
    missing = [name for name, one in declared.items() if not one.get("isOptional") and name not in given]
    if missing:
        raise InputError(f"the pipeline needs {missing[0]!r}", where="--parameter",
                         next_step=f"give --parameter {missing[0]}=VALUE")  # fmt: skip
    return {name: _typed(name, value, str(declared[name]["parameterType"])) for name, value in given.items()}


def _typed(name: str, value: str, kind: str) -> str | int | float | bool:
    try:
        match kind:
            case "NUMBER_INTEGER":
                return int(value)
            case "NUMBER_DOUBLE":
                number = float(value)
                if math.isfinite(number):
                    return number
                raise ValueError
            case "BOOLEAN":
                return _BOOLEANS[value.lower()]
            case _:
                return value
    except (ValueError, KeyError):
        what = {"NUMBER_INTEGER": "a whole number", "NUMBER_DOUBLE": "a number", "BOOLEAN": "true or false"}[kind]
        raise InputError(f"{value!r} is not {what}", where=f"--parameter {name}") from None
