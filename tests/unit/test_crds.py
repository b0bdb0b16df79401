"""The CustomResourceDefinitions are those of the models, and say what the models say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.operator.crds import crds, main, rendered
from serving.rollout.spec import RolloutSpecModel

CHART = Path(__file__).parents[2] / "charts" / "endcap" / "crds"


def schema(kind: str) -> dict[str, Any]:
    found = crds()[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert isinstance(found, dict)
    return found


def test_the_chart_has_the_definitions_that_the_models_make() -> None:
    assert {path.name for path in CHART.iterdir()} == set(crds())
    for name, made in crds().items():
        assert (CHART / name).read_text() == rendered(made), "run: make crds"


def test_they_are_written_by_a_command(tmp_path: Path) -> None:
    main([str(tmp_path)])
    assert yaml.safe_load((tmp_path / "rollouts.yaml").read_text()) == crds()["rollouts.yaml"]


@pytest.mark.parametrize("kind", list(crds()))
def test_they_are_structural(kind: str) -> None:
    def check(part: dict[str, Any], path: str) -> None:
        assert "type" in part, path
        assert not {"$ref", "anyOf", "oneOf", "allOf", "title", "const", "exclusiveMin"} & part.keys(), path
        for name in ("exclusiveMinimum", "exclusiveMaximum"):
            assert part.get(name, True) is True, path
        for name, own in part.get("properties", {}).items():
            check(own, f"{path}.{name}")
        for name in ("items", "additionalProperties"):
            if name in part:
                check(part[name], f"{path}[]")

    check(schema(kind), kind)


def test_every_field_of_a_rollout_is_there_and_explained() -> None:
    spec = schema("rollouts.yaml")["properties"]["spec"]["properties"]
    assert set(spec) == {field.alias or name for name, field in RolloutSpecModel.model_fields.items()}
    unexplained = {name for name, own in spec.items() if "description" not in own}
    assert unexplained <= {"inconclusive", "notify"}


def test_people_see_where_a_rollout_stands() -> None:
    version = crds()["rollouts.yaml"]["spec"]["versions"][0]
    shown = [column["name"] for column in version["additionalPrinterColumns"] if not column.get("priority")]
    assert shown == ["Phase", "Step", "Share", "Verdict", "Age"]
    assert version["subresources"] == {"status": {}}
    assert crds()["rollouts.yaml"]["spec"]["names"]["shortNames"] == ["ro"]
