"""Which target an InferenceService is: what KServe serves it as says that, and nothing of ours beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

from serving.targets.kserve.cluster import Cluster, path_of
from serving.targets.kserve.delivery import Delivery
from serving.targets.kserve.knative import KNATIVE_MODES, mode_of
from serving.targets.kserve.knative_target import KnativeTarget
from serving.targets.kserve.target import KServeTarget
from serving.targets.kserve.telemetry import Telemetry
from serving.targets.kserve.waits import Patience

__all__ = ["AnyTarget", "target_for"]

AnyTarget: TypeAlias = KServeTarget | KnativeTarget


def target_for(
    cluster: Cluster, service: str, namespace: str, delivery: Delivery, *, telemetry: Telemetry | None = None,
    patience: Patience = Patience(), fallback_runtime: str | None = None, policy: bool = False,  # noqa: B008 - frozen
    clock: Callable[[], float] = time.time,
) -> AnyTarget:  # fmt: skip
    """The target for a service: Knative's where KServe serves it in that mode (its status, or else its annotation
    ``serving.kserve.io/deploymentMode``, which cannot be changed), else the one for Standard mode, whose ``check``
    refuses what is in neither.

    ``fallback_runtime``, ``policy``: see :class:`KServeTarget`. In Knative mode there is neither: Knative places its
    revisions, and has no route of the Gateway API.

    Raises:
        TargetError: the API server does not answer.
    """
    document = cluster.get(path_of("inferenceservices", namespace, service))
    if mode_of(document) in KNATIVE_MODES:
        return KnativeTarget(cluster, service, namespace, delivery, telemetry=telemetry, patience=patience, clock=clock)
    return KServeTarget(cluster, service, namespace, delivery, telemetry=telemetry, patience=patience,
                        fallback_runtime=fallback_runtime, policy=policy, clock=clock)  # fmt: skip
