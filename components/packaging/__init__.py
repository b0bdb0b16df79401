"""The package folder that is registered and served; and, for demonstrations, packages with a known defect."""

from components.packaging.build import PackageParts, build_package
from components.packaging.card import model_card

__all__ = ["PackageParts", "build_package", "model_card"]
