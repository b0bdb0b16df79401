"""Targets: what a rollout, a load test or a drill may ask of the thing that serves, and its local adapter."""

from serving.targets.base import (
    Counts,
    ModelVersion,
    Observation,
    ShadowObservation,
    StickyKey,
    Target,
    VersionObservation,
)
from serving.targets.config import StableVersion, SupervisorConfig
from serving.targets.local import TARGET_VARIABLE, LocalTarget, Replica, open_target, start_local_target

__all__ = [
    "TARGET_VARIABLE", "Counts", "LocalTarget", "ModelVersion", "Observation", "Replica", "ShadowObservation",
    "StableVersion", "StickyKey", "SupervisorConfig", "Target", "VersionObservation", "open_target",
    "start_local_target",
]  # fmt: skip
