"""Steps of the compiled pipeline in the image ``pipeline``, as nobody, on a read-only root file system.

By name only (``python -m pytest tests/cluster/pipeline_image.py``): the image carries torch with CUDA, takes long to
build and some 30 GB of disk while it is built. What Kubeflow's launcher does round a step is done here by hand: it
fills in the executor's input, and its object store's folder (``/minio``) is a volume that outlives the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.compile import compiled_recommender
from pipelines.settings import load_settings
from tests.cluster import pods
from tests.cluster.access import Access

Json = dict[str, Any]
SETTINGS = """
apiVersion: endcap.dev/v1alpha1
kind: PipelineSettings
metadata: {{name: recommender}}
spec: {{image: "{image}"}}
"""
STEPS: Mapping[str, Json] = {
    "ingest-data": {"file": "", "sha256": "", "dataset": "synthetic", "shoppers": 400, "items": 60, "seed": 7},
    "split-data": {},
    "train-candidates": {
        "candidate": "transformer",
        "seed": 7,
        "epochs": 1,
        "training_seconds": 60.0,
        "checkpoint": "",
    },
}
"""In order, with their parameters."""
LOOK = """
import json, pathlib
print(*pathlib.Path("/minio").rglob("*"))
print(json.dumps(json.loads(pathlib.Path("/minio/run/training").read_text())))
"""


def executor_input(component: Json, parameters: Json) -> str:
    """What a launcher fills in for ``{{$}}``. All artifacts of the run have places of their own by their names."""

    def artifacts(of: str) -> Json:
        names = component.get(of, {}).get("artifacts", {})
        return {name: {"artifacts": [{"name": name, "uri": f"minio://run/{name}", "metadata": {},
                                      "type": names[name]["artifactType"]}]} for name in names}  # fmt: skip

    return json.dumps({
        "inputs": {"parameterValues": parameters, "artifacts": artifacts("inputDefinitions")},
        "outputs": {"artifacts": artifacts("outputDefinitions"), "outputFile": "/tmp/outputs.json"},
    })  # fmt: skip


def container(spec: Json, step: str, parameters: Json) -> Json:
    component = spec["components"][f"comp-{step}"]
    made = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
    given = executor_input(component, parameters)
    return {
        "name": step, "image": made["image"], "imagePullPolicy": "IfNotPresent", "command": made["command"],
        "args": [given if argument == "{{$}}" else argument for argument in made["args"]],
        "securityContext": dict(pods.RESTRICTED),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "store", "mountPath": "/minio"}],
    }  # fmt: skip


def test_steps_run_as_nobody_and_write_only_what_they_make(
    full_cluster: Access, pod_namespace: str, tmp_path: Path
) -> None:
    access = full_cluster
    (tmp_path / "settings.yaml").write_text(SETTINGS.format(image=access.image("pipeline")))
    compiled = compiled_recommender(load_settings(tmp_path / "settings.yaml"))
    spec = compiled.get("pipeline_spec", compiled)
    steps = [container(spec, step, parameters) for step, parameters in STEPS.items()]
    look = {**steps[-1], "name": "look", "command": ["python", "-c", LOOK], "args": []}
    access.kubectl("label", "namespace", pod_namespace, "pod-security.kubernetes.io/enforce=restricted")
    access.apply({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "steps"},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "securityContext": {"fsGroup": 65532},
            "initContainers": steps, "containers": [look],
            "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "store", "emptyDir": {}}],
        },
    }, namespace=pod_namespace)  # fmt: skip
    access.wait("pod/steps", "jsonpath={.status.phase}=Succeeded", pod_namespace, deadline_s=540)
    said = access.kubectl("logs", "steps", "--container=look", f"--namespace={pod_namespace}")
    made, training = said.splitlines()
    assert {f"/minio/run/{name}" for name in ("facts", "models", "training")} <= set(made.split())
    assert json.loads(training)["epochs"] == 1, training
