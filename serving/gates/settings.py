"""What a rollout may choose about its gates."""

from __future__ import annotations

from dataclasses import dataclass

from endcap.errors import InputError

__all__ = ["GateSettings"]


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Margins, sizes and the seed.

    ``offline_margin_relative``, ``segment_margin_relative``: how much worse than stable's own NDCG@10 is worse, as a
    part of it. ``segment_min_shoppers``: a segment with fewer is not judged.
    ``max_shoppers``: most recorded shoppers scored offline; ``replayed_requests``: most requests replayed.

    Raises:
        InputError: a number out of range.
    """

    offline_margin_relative: float = 0.05
    segment_margin_relative: float = 0.1
    segment_min_shoppers: int = 100
    max_shoppers: int = 2000
    replayed_requests: int = 200
    seed: int = 7

    def __post_init__(self) -> None:
        for name in ("offline_margin_relative", "segment_margin_relative"):
            if not 0 < getattr(self, name) < 1:
                raise InputError("a margin lies between 0 and 1", where=name)
        for name in ("segment_min_shoppers", "max_shoppers", "replayed_requests"):
            if getattr(self, name) < 1:
                raise InputError("must be at least 1", where=name)
