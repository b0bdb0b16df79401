"""What things of a service are called on a cluster: by us, and by KServe after us."""

from __future__ import annotations

import re
from collections.abc import Mapping

from endcap.errors import InputError

__all__ = [
    "BASELINE",
    "FENCE_ANNOTATION",
    "FIELD_MANAGER",
    "ISVC_LABEL",
    "REST_ANNOTATION",
    "SHA256_ANNOTATION",
    "VERSION_LABEL",
    "label_of",
    "lease_name",
    "predictor_name",
    "workload_name",
]  # fmt: skip

FIELD_MANAGER = "endcap"
VERSION_LABEL = "endcap.dev/version"
"""On the predictor, and so on its pods: whose they are, and what their servers call themselves."""
SHA256_ANNOTATION = "endcap.dev/package-sha256"
"""On a predictor, and so on its pods: the digest of the package that its servers may serve, or "none"."""
ISVC_LABEL = "serving.kserve.io/inferenceservice"
"""KServe's, on all that it makes of an InferenceService."""
FENCE_ANNOTATION = "endcap.dev/fencing-token"
"""Among the *status'* annotations: KServe copies an InferenceService's own ones into its pods, and restarts them."""
REST_ANNOTATION = "endcap.dev/rest"
BASELINE = "-baseline"
"""The engine's name of a fresh copy of stable is stable's label with this."""

_NAME = re.compile(r"[a-z](?:[-a-z0-9]*[a-z0-9])?")
_LONGEST = 63 - len("-predictor")


def predictor_name(service: str, label: str) -> str:
    """KServe's ``predictor.name`` of a version: "v7" of "7".

    Raises:
        InputError: no Service can be called after it.
    """
    name = label.lower() if label[:1].isalpha() else f"v{label}"
    name = name.replace(".", "-").replace("_", "-")
    if label != label.lower() or _NAME.fullmatch(name) is None or len(f"{service}-{name}") > _LONGEST:
        raise InputError(f"no Service can be called after version {label!r} of {service}",
                         next_step="label versions by small letters, digits and dashes, shortly")  # fmt: skip
    return name


def label_of(name: str, labels: Mapping[str, str]) -> str:
    """The version of a predictor: what its label says, or else its name."""
    said = labels.get(VERSION_LABEL)
    return said or (name[1:] if re.fullmatch(r"v\d+(-baseline)?", name) else name)


def workload_name(service: str, predictor: str) -> str:
    """Of the Deployment, the Service and the HPA that KServe makes of a predictor."""
    return f"{service}-{predictor}-predictor" if predictor else f"{service}-predictor"


def lease_name(service: str) -> str:
    return f"endcap-{service}"
