"""How a pipeline's steps run on a cluster: image, resources, GPU, placement, secrets and volumes.

    apiVersion: endcap.dev/v1alpha1
    kind: PipelineSettings
    metadata: {name: recommender}
    spec:
      image: registry.example/endcap/pipeline:0.1.0
      secrets:
      - {name: endcap-signing, path: /keys, steps: [compare, package, register]}
      - {name: mlflow, env: {MLFLOW_TRACKING_TOKEN: token}}
      volumes: [{claim: training, path: /checkpoints, steps: [train]}]
      gpu: {steps: [train], tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]}

Everything is kfp's and kfp-kubernetes' own setting of a task (https://kfp-kubernetes.readthedocs.io), never a patch of
the compiled YAML.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from endcap.documents import Document, Name, SpecModel, load_documents
from endcap.errors import InputError
from pipelines.run import STEPS

__all__ = ["PipelineSettings", "PipelineSettingsDocument", "arrange", "load_settings"]

Step = Literal["ingest", "split", "train", "evaluate", "compare", "export", "compress", "package", "register"]
Quantity = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$", max_length=32)]
Folder = Annotated[str, StringConstraints(pattern=r"^/[^:]*$", max_length=512)]
LabelKey = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=128)]
_ALL: tuple[Step, ...] = ()


class Toleration(SpecModel):
    """Kubernetes' own; https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/."""

    key: LabelKey | None = None
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoExecute", "NoSchedule", "PreferNoSchedule"] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("operator: Exists takes no value")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator: Equal needs a key")
        return self


class Gpu(SpecModel):
    """What the steps of ``steps`` ask for beside their other resources, and where such nodes are."""

    count: int = Field(default=1, ge=1, le=16)
    resource: LabelKey = "nvidia.com/gpu"
    steps: tuple[Step, ...] = Field(default=("train",), min_length=1)
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=16)
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=16)


class Resources(SpecModel):
    """Requests and limits at once: a step gets what it asks for, and no more."""

    cpu: Quantity | None = None
    memory: Quantity | None = None


class Secret(SpecModel):
    """A Secret of the namespace, as files in ``path`` or as variables ``env: {VARIABLE: key}``; in ``steps`` (all)."""

    name: Name
    path: Folder | None = None
    env: dict[Variable, str] = Field(default_factory=dict, max_length=32)
    steps: tuple[Step, ...] = _ALL

    @model_validator(mode="after")
    def _fits(self) -> Secret:
        if (self.path is None) == (not self.env):
            raise ValueError("a secret needs one of path and env")
        return self


class Volume(SpecModel):
    """A PersistentVolumeClaim that is there already, mounted at ``path`` in ``steps`` (all)."""

    claim: Name
    path: Folder
    sub_path: str = Field(default="", max_length=512)
    steps: tuple[Step, ...] = _ALL


class PipelineSettings(SpecModel):
    """Of one pipeline on one cluster."""

    image: str | None = Field(default=None, min_length=1, max_length=512)
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: tuple[Name, ...] = Field(default=(), max_length=8)
    resources: dict[Step, Resources] = Field(default_factory=dict)
    node_selector: dict[LabelKey, LabelValue] = Field(default_factory=dict, max_length=16)
    tolerations: tuple[Toleration, ...] = Field(default=(), max_length=16)
    gpu: Gpu | None = None
    secrets: tuple[Secret, ...] = Field(default=(), max_length=16)
    volumes: tuple[Volume, ...] = Field(default=(), max_length=16)
    timeout_seconds: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _places_differ(self) -> PipelineSettings:
        for step in STEPS:
            paths = [secret.path for secret in self.secrets if secret.path and step in (secret.steps or STEPS)]
            paths += [volume.path for volume in self.volumes if step in (volume.steps or STEPS)]
            if len(set(paths)) != len(paths):
                raise ValueError(f"two mounts have the same path in the step {step}")
        return self


class PipelineSettingsDocument(Document):
    kind: Literal["PipelineSettings"] = "PipelineSettings"
    spec: PipelineSettings


def load_settings(path: Path) -> PipelineSettings:
    """The single ``PipelineSettings`` document of a file.

    Raises:
        InputError: missing, damaged, or more than one.
    """
    documents = load_documents(path, [PipelineSettingsDocument])
    if len(documents) != 1:
        raise InputError("more than one PipelineSettings document", where=path)
    return documents[0].spec


def arrange(tasks: Mapping[str, Any], settings: PipelineSettings) -> None:
    """Apply the settings to kfp's tasks, by step."""
    from kfp import kubernetes

    for step, task in tasks.items():
        if settings.image is not None:
            task.set_container_image(settings.image)
        if settings.image_pull_policy is not None:
            kubernetes.set_image_pull_policy(task, settings.image_pull_policy)
        if settings.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(settings.image_pull_secrets))
        if settings.timeout_seconds is not None:
            kubernetes.set_timeout(task, settings.timeout_seconds)
        kubernetes.set_security_context(task, run_as_non_root=True)
        asked = settings.resources.get(step)  # type: ignore[call-overload]
        if asked is not None and asked.cpu is not None:
            task.set_cpu_request(asked.cpu).set_cpu_limit(asked.cpu)
        if asked is not None and asked.memory is not None:
            task.set_memory_request(asked.memory).set_memory_limit(asked.memory)
        selector, tolerations = dict(settings.node_selector), list(settings.tolerations)
        gpu = settings.gpu
        if gpu is not None and step in gpu.steps:
            task.set_accelerator_type(gpu.resource).set_accelerator_limit(gpu.count)
            selector.update(gpu.node_selector)
            tolerations += gpu.tolerations
        for key, value in selector.items():
            kubernetes.add_node_selector(task, key, value)
        for one in tolerations:
            kubernetes.add_toleration(task, one.key, one.operator, one.value, one.effect)
        _mount(kubernetes, task, step, settings)


def _mount(kubernetes: Any, task: Any, step: str, settings: PipelineSettings) -> None:
    for secret in settings.secrets:
        if step not in (secret.steps or STEPS):
            continue
        if secret.path is not None:
            kubernetes.use_secret_as_volume(task, secret.name, secret.path)
        # kfp-kubernetes maps a key to one variable; two variables of one key are two entries.
        for variable, key in secret.env.items():
            kubernetes.use_secret_as_env(task, secret.name, {key: variable})
    for volume in settings.volumes:
        if step in (volume.steps or STEPS):
            kubernetes.mount_pvc(task, volume.claim, volume.path, volume.sub_path)
