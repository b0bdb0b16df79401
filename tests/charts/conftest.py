"""helm and kubeconform, built from the Go modules that tests/cluster pins.

Building them takes minutes once. Where that has not been done these tests are skipped, and ``make test-charts`` does
it; in CI (``CI=true``) they are built here, so that nothing is skipped.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import schemas
from tests.cluster import programs

CHART = Path(__file__).parents[2] / "charts" / "endcap"
VALUES = ("default", *sorted(path.stem for path in (CHART / "ci").glob("*.yaml")))
KUBERNETES = "1.34.4"
_TOOLS = ("helm", "kubeconform")


@dataclass(frozen=True, slots=True)
class Helm:
    program: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(self.program), *arguments], capture_output=True, text=True, check=False)

    def template(self, *arguments: str, values: str = "default") -> list[dict[str, Any]]:
        """The documents that the chart becomes with a values file of ``ci/``."""
        ran = self.run("template", "endcap", str(CHART), "--namespace=endcap-system", f"--kube-version={KUBERNETES}",
                       "--include-crds", *values_of(values), *arguments)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        return [one for one in yaml.safe_load_all(ran.stdout) if one is not None]


def values_of(name: str) -> list[str]:
    return [] if name == "default" else ["--values", str(CHART / "ci" / f"{name}.yaml")]


@pytest.fixture(scope="session")
def tools() -> None:
    asked = os.environ.get("ENDCAP_BUILD_TOOLS") or os.environ.get("CI", "").lower() in {"1", "true", "yes"}
    if programs.built(_TOOLS):
        return
    reason = programs.why_not(_TOOLS)
    if not asked:
        pytest.skip(reason or "helm and kubeconform are not built: make test-charts builds them, once")
    if reason is not None:
        pytest.fail(f"this must run: {reason}", pytrace=False)


@pytest.fixture(scope="session")
def helm(tools: None) -> Helm:
    return Helm(programs.ensure("helm"))


@pytest.fixture(scope="session")
def kubeconform(tools: None) -> Path:
    return programs.ensure("kubeconform")


@pytest.fixture(scope="session")
def known_schemas() -> Path:
    return schemas.folder()
