"""The second target: InferenceServices of KServe's behind the Gateway API."""

from serving.targets.kserve.cluster import Cluster, open_cluster
from serving.targets.kserve.delivery import Delivery, FixedDelivery, MLflowDelivery, Storage
from serving.targets.kserve.errors import Reason, ServiceError
from serving.targets.kserve.gateway import EnvoyGatewayCounts
from serving.targets.kserve.knative_target import KnativeTarget
from serving.targets.kserve.modes import target_for
from serving.targets.kserve.plan import Sizing
from serving.targets.kserve.target import KServeTarget
from serving.targets.kserve.telemetry import Feedback, PodScrapes, ServerTelemetry, Telemetry
from serving.targets.kserve.through_prometheus import PrometheusScrapes
from serving.targets.kserve.waits import Patience

__all__ = [
    "Cluster", "Delivery", "EnvoyGatewayCounts", "Feedback", "FixedDelivery", "KServeTarget", "KnativeTarget",
    "MLflowDelivery", "Patience", "PodScrapes", "PrometheusScrapes", "Reason", "ServerTelemetry", "ServiceError",
    "Sizing", "Storage", "Telemetry", "open_cluster", "target_for",
]  # fmt: skip
