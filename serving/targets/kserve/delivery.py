"""Where a version's package lies, for whatever a cluster fetches it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from endcap.errors import InputError
from endcap.registry import Registry

__all__ = ["Delivery", "FixedDelivery", "MLflowDelivery", "Storage"]

_SCHEMES = ("s3://", "gs://", "pvc://", "oci://", "oci+native://", "oci+fetch://", "hf://", "https://",
            "http://", "mlflow://", "abfs://", "wasbs://")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Storage:
    """``uri`` is KServe's ``storageUri``. ``digest``: SHA-256 of the package's manifest, which holds all the others.

    ``runtime``: the ServingRuntime for it; None: stable's.
    """

    uri: str
    digest: str | None = None
    runtime: str | None = None

    def __post_init__(self) -> None:
        if not self.uri.startswith(_SCHEMES):
            raise InputError("a cluster cannot fetch a package from there", where=self.uri,
                             next_step=f"put it where one can: {', '.join(_SCHEMES)}")  # fmt: skip


class Delivery(Protocol):
    def storage(self, label: str) -> Storage:
        """Where version ``label`` lies. Raises InputError or RegistryError when that is not known."""


@dataclass(frozen=True, slots=True)
class FixedDelivery:
    """Packages whose places are told."""

    known: Mapping[str, Storage]

    def storage(self, label: str) -> Storage:
        if label not in self.known:
            raise InputError(f"where version {label} lies is not known")
        return self.known[label]


@dataclass(frozen=True, slots=True)
class MLflowDelivery:
    """``models:/name/label`` in a registry, as ``mlflow://name/label``, or where the version's artifacts really lie.

    ``template``: the storage URI with ``{name}`` and ``{version}``, such as ``pvc://models/{name}/{version}`` where
    packages are copied to a volume; None takes the artifacts' own place if a cluster can read it, else ``mlflow://``,
    which the chart's ClusterStorageContainer fetches. ``runtime``: the ServingRuntime of new versions; None: stable's.
    """

    registry: Registry
    name: str
    template: str | None = None
    runtime: str | None = None

    def storage(self, label: str) -> Storage:
        found = self.registry.version(self.name, label)
        if self.template is not None:
            return Storage(self.template.format(name=self.name, version=found.version), found.digest,
                           self.runtime)  # fmt: skip
        return Storage(f"mlflow://{self.name}/{found.version}", found.digest, self.runtime)
