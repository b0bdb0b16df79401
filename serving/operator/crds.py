"""The CustomResourceDefinitions, made from the very models that read the files that people write.

What a JSON schema can say comes from pydantic's. What it cannot (shares grow, one of two fields) is said again as CEL
rules, so that the API server refuses it before anybody stores it; the operator validates with the models in any case.

``python -m serving.operator.crds FOLDER`` writes one file a kind; a test holds the chart's files equal.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from endcap.files import write_atomic
from endcap.objectives import ObjectivesDocument
from serving.rollout.spec import RolloutDocument

__all__ = ["GROUP", "HISTORY", "VERSION", "crds", "main"]

GROUP, VERSION = "endcap.dev", "v1alpha1"
HISTORY = 32
"""Decisions that a Rollout's status tells at most."""
_STRING = 1024
"""A bound for texts that have none of their own: CEL's cost is estimated from the greatest length."""

Schema = dict[str, Any]


def _rule(rule: str, message: str, *, field: str | None = None) -> dict[str, str]:
    found = {"rule": rule, "message": message}
    return found if field is None else {**found, "fieldPath": field}


_ONE_WAY = "give absolute or relative, one of them"
_RULES: Mapping[str, list[dict[str, str]]] = {
    "RolloutSpecModel": [
        _rule("self.service == oldSelf.service", "a rollout keeps its service: make another Rollout for another one",
              field=".service"),
        _rule("!has(self.primary) || (has(self.mode) && self.mode == 'ab')", "primary goes with mode: ab",
              field=".primary"),
        _rule("!has(self.mode) || self.mode != 'ab' || has(self.primary)",
              "mode: ab needs primary, the objective that has to be better", field=".mode"),
        _rule("!has(self.mode) || self.mode != 'ab' || !has(self.steps) || self.steps.size() == 2",
              "mode: ab has one split and then all: two steps", field=".steps"),
        _rule("!has(self.mode) || self.mode != 'ab' || !has(self.baseline) || !self.baseline",
              "baseline goes with mode: canary", field=".baseline"),
        _rule("!has(self.mode) || self.mode != 'ab' || !has(self.sticky) || has(self.sticky.header) || "
              "has(self.sticky.cookie)", "mode: ab needs sticky: shoppers have to keep their version", field=".sticky"),
    ],
    "steps": [
        _rule("self.size() >= 2", "a share below 1 is needed first, or there is nothing to compare with"),
        _rule("self[self.size() - 1].share == 1.0", "the last share must be 1"),
        _rule("self.map(step, step.share).isSorted() && "
              "self.all(step, self.exists_one(other, other.share == step.share))",
              "each share must be greater than the one before"),
    ],
    "StepModel": [
        _rule("(has(self.maxSeconds) ? double(self.maxSeconds) : 3600.0) >= "
              "(has(self.minSeconds) ? double(self.minSeconds) : 30.0)", "maxSeconds is below minSeconds"),
    ],
    "MarginModel": [_rule("has(self.absolute) != has(self.relative)", _ONE_WAY)],
    "StickyModel": [_rule("!has(self.header) || !has(self.cookie)", "give header or cookie, one of them")],
    "margins": [
        _rule("self.all(name, name.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$'))", "an objective's name is the key"),
    ],
    "freeze[]": [
        _rule(
            "has(self.days) ? self.from.matches('^([01]?[0-9]|2[0-3]):[0-5][0-9]$') && "
            "self.until.matches('^([01]?[0-9]|2[0-3]):[0-5][0-9]$') : "
            "self.from.matches('^[0-9]{4}-.+(Z|[+-][0-9]{2}:[0-9]{2})$') && "
            "self.until.matches('^[0-9]{4}-.+(Z|[+-][0-9]{2}:[0-9]{2})$')",
            "with days, from and until are times such as \"18:00\"; without, dates with their zone",
        ),
        _rule("has(self.days) || !has(self.timezone)", "timezone goes with days"),
    ],
    "ObjectivesSpec": [
        _rule("self.service == oldSelf.service", "objectives keep their service", field=".service"),
    ],
    "ObjectiveModel": [
        _rule("self.good != 'clicked' || has(self.windowSeconds)", "good: clicked needs windowSeconds"),
        _rule("self.good == 'answered' || !has(self.withinMs)", "withinMs goes with good: answered"),
        _rule("self.good == 'clicked' || !has(self.windowSeconds)", "windowSeconds goes with good: clicked"),
        _rule("!has(self.margin) || !has(self.marginRelative)", "margin or marginRelative, not both"),
        _rule(
            "(self.good == 'counted' ? 1 : 0) == (has(self.prometheus) ? 1 : 0) + (has(self.metrics) ? 1 : 0) + "
            "(has(self.envoy) ? 1 : 0)",
            "good: counted needs one of prometheus, metrics and envoy; they go with nothing else",
        ),
    ],
    "objectives": [
        _rule(
            "self.filter(one, has(one.windowSeconds)).all(one, self.filter(other, has(other.windowSeconds))"
            ".all(other, other.windowSeconds == one.windowSeconds))",
            "windowSeconds differ: a service's feedback collector has one window",
        ),
    ],
}  # fmt: skip
_NAME_RULE = _rule("self.metadata.name.size() <= 63", "a name has 63 characters at most")


def crds() -> dict[str, Schema]:
    """By file name, the definitions."""
    rollout = _crd(
        "Rollout", "rollouts", ["ro"], RolloutDocument, status=_rollout_status(),
        columns=[
            ("Phase", "string", ".status.phase", 0), ("Step", "string", ".status.step", 0),
            ("Share", "string", ".status.share", 0), ("Verdict", "string", ".status.verdict", 0),
            ("Age", "date", ".metadata.creationTimestamp", 0),
            ("Candidate", "string", ".spec.candidate", 1), ("Message", "string", ".status.message", 1),
        ],
    )  # fmt: skip
    objectives = _crd(
        "Objectives", "objectives", [], ObjectivesDocument, status=None,
        columns=[
            ("Service", "string", ".spec.service", 0), ("Age", "date", ".metadata.creationTimestamp", 0),
            ("Objectives", "string", ".spec.objectives[*].name", 1),
        ],
    )  # fmt: skip
    return {"rollouts.yaml": rollout, "objectives.yaml": objectives}


def _crd(
    kind: str, plural: str, short: list[str], document: type[BaseModel], *, status: Schema | None,
    columns: list[tuple[str, str, str, int]],
) -> Schema:  # fmt: skip
    spec_model = document.model_fields["spec"].annotation
    assert isinstance(spec_model, type) and issubclass(spec_model, BaseModel)  # noqa: S101 - of our own models
    schema: Schema = {
        "type": "object",
        "description": _first_line(document) or f"{kind} of a service.",
        "required": ["spec"],
        "x-kubernetes-validations": [_NAME_RULE],
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
            "spec": _structural(spec_model),
        },
    }  # fmt: skip
    if status is not None:
        schema["properties"]["status"] = status
    names: Schema = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower(),
                     "categories": ["endcap"]}  # fmt: skip
    if kind.lower() == plural:
        names["singular"] = plural
    if short:
        names["shortNames"] = short
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "endcap"},
            "annotations": {"helm.sh/resource-policy": "keep"},
        },
        "spec": {
            "group": GROUP, "scope": "Namespaced", "names": names,
            "versions": [{
                "name": VERSION, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema},
                **({} if status is None else {"subresources": {"status": {}}}),
                "additionalPrinterColumns": [
                    {"name": name, "type": of, "jsonPath": path, **({"priority": priority} if priority else {})}
                    for name, of, path, priority in columns
                ],
            }],
        },
    }  # fmt: skip


# ---- from pydantic's schema to a structural one ------------------------------------------------------


def _structural(model: type[BaseModel]) -> Schema:
    document = model.model_json_schema(by_alias=True)
    models = {found.__name__: found for found in _models(model, {})}
    return _Structural(document.get("$defs", {}), models).of({**document, "title": model.__name__}, None)


class _Structural:
    """Without references, alternatives and defaults, as apiextensions asks of a schema."""

    def __init__(self, parts: Mapping[str, Schema], models: Mapping[str, type[BaseModel]]) -> None:
        self._parts, self._models = parts, models

    def of(self, raw: Schema, field: str | None) -> Schema:
        if "$ref" in raw:
            return self.of(self._parts[raw["$ref"].rsplit("/", 1)[-1]], field)
        if "anyOf" in raw:
            (real,) = [one for one in raw["anyOf"] if one.get("type") != "null"]
            found = self.of(real, field)
            # Elsewhere null is dropped, as if it were not there; here it says, as {} does, that nothing is sticky.
            return {**found, "nullable": True} if field == "sticky" else found
        if "oneOf" in raw:
            return self._merged([self.of(one, field) for one in raw["oneOf"]], field)
        match raw.get("type"):
            case "object" if "properties" in raw:
                return self._object(raw, field)
            case "object":
                (values,) = raw.get("patternProperties", {"": raw.get("additionalProperties")}).values()
                found = {"type": "object", "additionalProperties": self.of(values, None)}
                return self._ruled({**found, **_limits(raw, "maxProperties", "minProperties")}, field)
            case "array":
                found = {"type": "array", "items": self.of(raw["items"], f"{field}[]")}
                found |= _limits(raw, "maxItems", "minItems")
                if field == "objectives":
                    found |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
                elif field == "days":
                    found["maxItems"] = 7
                return self._ruled(found, field)
            case _:
                return _scalar(raw)

    def _object(self, raw: Schema, field: str | None) -> Schema:
        name = str(raw.get("title", ""))
        told = _told(self._models[name]) if name in self._models else {}
        properties = {}
        for key, value in raw["properties"].items():
            properties[key] = self.of(value, key)
            if key in told:
                properties[key] = {"description": told[key], **properties[key]}
        found: Schema = {"type": "object", "properties": properties}
        if raw.get("required"):
            found["required"] = sorted(raw["required"])
        return self._ruled(found, name)

    def _merged(self, kinds: list[Schema], field: str | None) -> Schema:
        """One object that has the fields of all kinds; rules tell the kinds apart."""
        properties: Schema = {}
        for kind in kinds:
            for key, value in kind["properties"].items():
                known = properties.get(key)
                properties[key] = value if known in (None, value) else {"type": "string", "maxLength": 64}
        required = set.intersection(*(set(kind.get("required", ())) for kind in kinds))
        found: Schema = {"type": "object", "properties": properties, "required": sorted(required)}
        return self._ruled(found, field)

    def _ruled(self, found: Schema, name: str | None) -> Schema:
        rules = _RULES.get(name or "")
        return found if rules is None else {**found, "x-kubernetes-validations": rules}


def _scalar(raw: Schema) -> Schema:
    found: Schema = {"type": raw["type"]}
    if "const" in raw:
        found["enum"] = [raw["const"]]
    for name in ("enum", "pattern", "format", "minLength", "maxLength", "minimum", "maximum"):
        if name in raw:
            found[name] = raw[name]
    for name in ("minimum", "maximum"):
        exclusive = f"exclusive{name.title()}"
        if exclusive in raw:  # a number in JSON schema, a flag beside the limit in OpenAPI 3.0
            found |= {name: raw[exclusive], exclusive: True}
    if found["type"] == "string" and "enum" not in found:
        found.setdefault("maxLength", 63 if found.get("pattern", "").startswith("^[a-z0-9]([-a-z0-9]") else _STRING)
    if found["type"] == "number" and found.get("minimum", 0) % 1:
        # The API server compares a whole number with the whole part of a limit: 0 would pass for 0.1.
        least = found["minimum"]
        found["x-kubernetes-validations"] = [_rule(f"self >= {least}", f"at least {least}")]
    if found["type"] == "integer":
        found["format"] = "int64"
    return found


def _limits(raw: Schema, *names: str) -> Schema:
    return {name: raw[name] for name in names if name in raw}


def _models(model: type[BaseModel], found: dict[type[BaseModel], None]) -> dict[type[BaseModel], None]:
    """``model`` and all models of the module that it is in: those that its fields are made of among them."""
    found.setdefault(model)
    for other in vars(sys.modules[model.__module__]).values():
        if isinstance(other, type) and issubclass(other, BaseModel):
            found.setdefault(other)
    return found


def _told(model: type[BaseModel]) -> dict[str, str]:
    """By name in the file, what the text under a field says of it: ``kubectl explain`` shows it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(tree, ast.ClassDef)  # noqa: S101 - it is the source of a class
    told: dict[str, str] = {}
    name: str | None = None
    for statement in tree.body:
        match statement:
            case ast.AnnAssign(target=ast.Name() as target):
                name = target.id
            case ast.Expr(value=ast.Constant(value=str(text))) if name is not None:
                told[model.model_fields[name].alias or name] = " ".join(text.split())
                name = None
            case _:
                name = None
    return told


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


# ---- what the operator says --------------------------------------------------------------------------


def _rollout_status() -> Schema:
    text: Schema = {"type": "string"}
    when: Schema = {"type": "string", "format": "date-time"}
    counted: Schema = {"type": "integer", "format": "int64"}
    condition = {
        "type": "object",
        "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        "properties": {
            "type": text, "status": {"type": "string", "enum": ["True", "False", "Unknown"]}, "reason": text,
            "message": text, "lastTransitionTime": when, "observedGeneration": counted,
        },
    }  # fmt: skip
    objective = {
        "type": "object",
        "required": ["name"],
        "properties": {"name": text, "verdict": text, "canary": text, "control": text, "difference": text,
                       "margin": text},
    }  # fmt: skip
    decision = {
        "type": "object",
        "required": ["seq", "at", "action"],
        "properties": {"seq": counted, "at": when, "action": text, "step": counted, "share": text, "verdict": text,
                       "reason": text, "by": text},
    }  # fmt: skip
    return {
        "type": "object",
        "description": "Where the rollout stands. The operator derives it from its checkpoint; it decides nothing.",
        "properties": {
            "observedGeneration": counted,
            "message": {"type": "string", "description": "Where it stands, in one sentence."},
            "next": {"type": "string", "description": "What a person may do now; empty where there is nothing to do."},
            "phase": text, "step": text, "share": text,
            "verdict": {"type": "string", "description": "pass, fail or inconclusive; once decided, the outcome."},
            "approval": {**counted, "description": "The step that waits for a person's approval."},
            "outcome": text, "reason": text, "waiting": text, "stable": text, "canary": text,
            "startedAt": when, "endedAt": when,
            "lastLookAt": {**when, "description": "Of the last look when this was written, which is not at each look."},
            "looks": counted,
            "checkpoint": {"type": "string", "description": "The ConfigMap that holds the rollout's truth."},
            "seq": {**counted, "description": "The decision that this tells of."},
            "objectives": {"type": "array", "items": objective, "x-kubernetes-list-type": "map",
                           "x-kubernetes-list-map-keys": ["name"]},
            "conditions": {"type": "array", "items": condition, "x-kubernetes-list-type": "map",
                           "x-kubernetes-list-map-keys": ["type"]},
            "history": {"type": "array", "items": decision, "maxItems": HISTORY, "x-kubernetes-list-type": "atomic"},
        },
    }  # fmt: skip


# ---- written -----------------------------------------------------------------------------------------

_HEAD = "# Made from the models in endcap/objectives.py and serving/rollout/spec.py by: make crds\n"


def rendered(crd: Schema) -> str:
    return _HEAD + yaml.dump(crd, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


class _Plain(yaml.SafeDumper):
    """The same rule in two places is written out twice: an anchor would be read as a reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0] if arguments else "charts/endcap/crds")
    for name, crd in crds().items():
        write_atomic(folder / name, rendered(crd))


if __name__ == "__main__":
    main(sys.argv[1:])
