"""A registry behind MLflow's own server, started as the chart starts it: packages go there and come back whole."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from endcap import storage_initializer
from endcap.errors import RegistryError
from endcap.package import verify_package
from endcap.processes import free_port
from endcap.registry import Registry
from tests.packages import make_package
from tests.process import Program, started

TEMPLATE = Path(__file__).parents[2] / "charts" / "endcap" / "templates" / "mlflow.yaml"
# MLflow's client under pytest's errors from warnings.
pytestmark = pytest.mark.filterwarnings("ignore")


def chart_arguments(data: Path, port: int) -> list[str]:
    """What the chart's Deployment passes to ``mlflow server``, with this test's folder, port and namespace."""
    block = TEMPLATE.read_text().partition("        args:\n")[2].partition("        env:\n")[0]
    arguments = re.findall(r"^        - (--.+)$", block, re.MULTILINE)
    assert len(arguments) >= 7
    replaced = {"/data": str(data), "--port=5000": f"--port={port}", "--host=0.0.0.0": "--host=127.0.0.1",
                "{{ .Release.Namespace }}": "endcap-system"}  # fmt: skip
    for old, new in replaced.items():
        arguments = [argument.replace(old, new) for argument in arguments]
    # Tests ask by the loopback address, which no pod does.
    return [f"{one},127.0.0.1:*" if one.startswith("--allowed-hosts=") else one for one in arguments]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(folder)}
    with started(["-m", "mlflow", "server", *chart_arguments(folder, port)], port, folder / "log",
                 environment=settings) as program:  # fmt: skip
        program.wait_for("/health")
        yield program
        # Its workers are children of their own.
        os.kill(program.process.pid, signal.SIGTERM)
        program.process.wait(30)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_package_comes_back_bit_for_bit_and_verifies(server: Program, tmp_path: Path) -> None:
    package = make_package(tmp_path / "package")
    registry = Registry(server.url)
    made = registry.register(package, name="recommender", metrics={"ndcg_at_10": 0.05}, params={}, tags={})
    found = registry.resolve(f"models:/recommender/{made.version}", destination=tmp_path / "copy")
    assert contents(found.package) == contents(package) and found.package == tmp_path / "copy"
    verify_package(found.package, tmp_path / "keys" / "signing.pub")
    without = registry.resolve(f"models:/recommender/{made.version}")
    assert contents(without.package) == contents(package)
    with pytest.raises(RegistryError):
        registry.resolve("models:/recommender/99", destination=tmp_path / "none")


def test_kserves_initializer_brings_it_to_a_mounted_folder(
    server: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = make_package(tmp_path / "package")
    made = Registry(server.url).register(package, name="delivered", metrics={}, params={}, tags={})
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("TMPDIR", str(models))
    assert storage_initializer.main([f"mlflow://delivered/{made.version}", str(models)]) == 0
    assert contents(models) == contents(package)


def test_a_request_that_names_another_host_is_refused(server: Program) -> None:
    path = f"{server.url}/api/2.0/mlflow/registered-models/search"
    inside = "endcap-mlflow.endcap-system.svc:5000"
    assert httpx.get(path, headers={"host": inside}, timeout=30).status_code == 200
    assert httpx.get(path, headers={"host": "elsewhere.example"}, timeout=30).status_code == 403
