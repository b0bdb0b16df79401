"""What an image's program imports is in it: its lock's packages, and the rooms that its stage copies."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import images

ROOT = Path(__file__).parents[2]

PROGRAMS = {
    "server": (
        "serving.server.__main__",
        "serving.server.app",
        "serving.server.grpc_server",
        "serving.feedback.__main__",
    ),
    "controller": ("serving.operator.kserve", "serving.operator.run", "endcap.storage_initializer"),
    "load": ("loadtests.run", "loadtests.generator", "loadtests.locustfile"),
    "drills": ("chaos.pods",),
    "pipeline": ("kfp.dsl.executor_main", "components.steps.learning", "components.training", "components.packaging"),
    "mlflow": ("mlflow.server.fastapi_app", "mlflow.store.db.utils"),
}

ONLY_WHAT_IS_THERE = """
import importlib, importlib.metadata, re, sys

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

there, rooms, modules = (set(argument.split(",")) for argument in sys.argv[1:])
owners = importlib.metadata.packages_distributions()
ours = {"endcap", "serving", "loadtests", "components", "pipelines", "chaos", "benchmarks", "tests"}

class NothingElse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        missing = top not in rooms if top in ours else (
            top in owners and not {plain(owner) for owner in owners[top]} & there
        )
        if missing:
            raise ModuleNotFoundError(f"{top} is not in the image", name=name)

sys.meta_path.insert(0, NothingElse())
for module in sorted(modules):
    importlib.import_module(module)
"""


@pytest.mark.parametrize("role", PROGRAMS)
def test_an_image_has_what_its_programs_import(role: str) -> None:
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "locks" / f"{role}.txt").read_text(), re.MULTILINE)
    there = {re.sub(r"[-_.]+", "-", name).lower() for name in locked}
    rooms = set(re.findall(r"^COPY (\w+) /app/", images.recipe(role), re.MULTILINE))
    assert rooms or role == "mlflow"
    ended = subprocess.run(
        [sys.executable, "-c", ONLY_WHAT_IS_THERE, ",".join(there), ",".join(rooms), ",".join(PROGRAMS[role])],
        cwd=ROOT,
        # As the compiled pipeline's steps have it: kfp then does without what speaks to Kubeflow's API.
        env={**os.environ, "_KFP_RUNTIME": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_every_image_is_looked_at() -> None:
    stages = re.findall(r"^FROM .* AS (\w+)$", (ROOT / "images" / "Containerfile").read_text(), re.MULTILINE)
    assert {*stages} - {"packages", "role"} == set(PROGRAMS) == set(images.ROLES)


def test_an_image_is_made_of_its_own_stage_and_what_all_share() -> None:
    recipe = images.recipe("controller")
    assert "serving.operator" in recipe and "pip install" in recipe
    assert "loadtests" not in recipe and "serving.server" not in recipe
