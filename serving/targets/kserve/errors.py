"""What a cluster refuses, by kinds that an operator shows as a condition's reason."""

from __future__ import annotations

from enum import StrEnum

from endcap.errors import InputError, TargetError

__all__ = ["ConflictError", "Reason", "RefusedError", "ServiceError"]


class Reason(StrEnum):
    """Why a service cannot be rolled out on. Fits ``status.conditions[].reason``."""

    NOT_FOUND = "ServiceNotFound"
    NOT_STANDARD = "NotStandardMode"
    NO_MODEL = "PredictorWithoutModel"
    NO_GATEWAY_API = "NoGatewayAPI"
    GATEWAY_API_OFF = "GatewayAPIDisabled"
    NO_SPLIT = "KServeDoesNotSplit"
    EDITED = "EditedByHand"
    NO_KSERVE = "NoKServe"
    NO_KNATIVE = "NoKnative"
    SPLIT = "AlreadySplit"


class ServiceError(InputError):
    """The InferenceService, or what serves it, is not as a rollout needs it. Nothing was changed."""

    def __init__(self, reason: Reason, what: str, *, where: object = None, next_step: str | None = None) -> None:
        super().__init__(what, where=where, next_step=next_step)
        self.reason = reason


class ConflictError(TargetError):
    """Somebody wrote the object since it was read; read it again."""


class RefusedError(TargetError):
    """The API server, or a webhook, says that an object is wrong, or that we may not."""
