"""Model packages: the signed folder that is served. Contract, signing, verification."""

from endcap.package.attributes import ATTRIBUTES_FILE, Attributes, ItemAttributes, Scene, parse_attributes
from endcap.package.contract import (
    ITEMS_FILE,
    MANIFEST_FILE,
    MODEL_CARD_FILE,
    POPULAR_FILE,
    SIGNATURE_FILE,
    Manifest,
    Task,
    TensorSpec,
    Variant,
    read_items,
    read_manifest,
    read_popular,
    seal,
)
from endcap.package.signing import ensure_signing_key, sign_package, verify_package

__all__ = [
    "ATTRIBUTES_FILE", "ITEMS_FILE", "MANIFEST_FILE", "MODEL_CARD_FILE", "POPULAR_FILE", "SIGNATURE_FILE",
    "Attributes", "ItemAttributes", "Manifest", "Scene", "Task", "TensorSpec", "Variant",
    "ensure_signing_key", "parse_attributes", "read_items", "read_manifest", "read_popular", "seal", "sign_package",
    "verify_package",
]  # fmt: skip
