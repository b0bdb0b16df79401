"""``attributes.json``: what a package may say of its items beside their ids, for the recommender's steps.

Optional, signed with the package. Form::

    {"items": {"<id>": {"category"?: str, "scenes"?: [scene, ...], "in_stock"?: bool}, ...},
     "popular"?: {"<scene>": ["<id>", ...], ...}}

An item may be left out, and so may each of its fields: an item without a category is no part of any; one without
scenes is shown on home, in search and in the cart, never among new items or coupons; one without ``in_stock`` is in
stock. ``popular`` is what is popular in a scene, most popular first; without it ``popular.json`` is, as far as its
items belong to the scene. Ids outside the item table are allowed: they may be popular and not in the graph.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_serializer

from endcap.documents import describe_validation
from endcap.errors import PackageError

__all__ = ["ATTRIBUTES_FILE", "EVERYDAY_SCENES", "Attributes", "ItemAttributes", "Scene", "parse_attributes"]

ATTRIBUTES_FILE = "attributes.json"
MAX_ATTRIBUTES_BYTES = 256 << 20


class Scene(StrEnum):
    """Where in the shop an answer is shown."""

    HOME = "home"
    SEARCH = "search"
    CART = "cart"
    NEW_ITEMS = "new-items"
    COUPON = "coupon"


EVERYDAY_SCENES = frozenset({Scene.HOME, Scene.SEARCH, Scene.CART})
"""Where an item belongs that says nothing of scenes."""


class ItemAttributes(BaseModel):
    """What is said of one item; None where nothing is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    category: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    scenes: frozenset[Scene] | None = None
    in_stock: bool | None = None

    @field_serializer("scenes")
    def _in_order(self, scenes: frozenset[Scene] | None) -> list[str] | None:
        """Equal attributes are equal bytes."""
        return None if scenes is None else sorted(scenes)


class Attributes(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    items: dict[str, ItemAttributes]
    popular: dict[Scene, tuple[str, ...]] = Field(default_factory=dict)


def parse_attributes(raw: bytes, *, where: Path) -> Attributes:
    """The attributes in the bytes of ``where``.

    Raises:
        PackageError: they are not of the contract's form.
    """
    if len(raw) > MAX_ATTRIBUTES_BYTES:
        raise PackageError("the item attributes are too large", where=where)
    try:
        return Attributes.model_validate_json(raw)
    except ValidationError as error:
        raise PackageError(describe_validation(error), where=where) from error
