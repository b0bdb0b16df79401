"""What a package would have shown recorded shoppers: its graph, run in this process as the model server runs it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from endcap.shoppers import Shopper
from serving.server.engine import GraphTimeoutError
from serving.server.recommend import RecommendRequest
from serving.server.service import Limits, Service

__all__ = ["CUTOFF", "MOST_TIMEOUTS", "RUN_S", "Scored", "score"]

log = logging.getLogger("serving.gates")

CUTOFF = 10
RUN_S = 2.0
"""The server's own limit of one run of the graph."""
MOST_TIMEOUTS = 20
"""After so many runs over the limit the rest is not run: a package that hangs must not hold the gates for hours."""
_PROGRESS_EVERY = 500


@dataclass(frozen=True, slots=True)
class Scored:
    """Per shopper, in their order: ``ndcg`` is ``1 / log2(1 + place)`` of the next item in the first ten and ``hits``
    is 1 there, 0 elsewhere.

    ``failed``: shoppers whom the server would have answered with an error (0 in both); ``timed_out`` of them because
    the graph took too long. ``complete`` is False where scoring was given up, see :data:`MOST_TIMEOUTS`.
    """

    ndcg: NDArray[np.float64]
    hits: NDArray[np.float64]
    failed: int = 0
    timed_out: int = 0
    fallbacks: int = 0
    complete: bool = True


def score(service: Service, shoppers: Sequence[Shopper], *, who: str) -> Scored:
    """Ask for the first ten items for every shopper, one at a time; ``who`` is named in the log. Blocks."""
    return asyncio.run(_score(service, shoppers, who))


async def _score(service: Service, shoppers: Sequence[Shopper], who: str) -> Scored:
    ndcg, hits = np.zeros(len(shoppers)), np.zeros(len(shoppers))
    failed = timed_out = fallbacks = 0
    k = min(CUTOFF, service.manifest.top_k)
    service = service.limited(Limits(workers=1, timeout_s=RUN_S, max_waiting=1))
    try:
        for place, shopper in enumerate(shoppers):
            if place % _PROGRESS_EVERY == 0:
                log.info("offline: %s, %d of %d shoppers", who, place, len(shoppers))
            try:
                answer = await service.recommend(RecommendRequest(shopper.shopper, shopper.history, k))
            except GraphTimeoutError:
                failed, timed_out = failed + 1, timed_out + 1
                if timed_out >= MOST_TIMEOUTS:
                    return Scored(ndcg, hits, failed, timed_out, fallbacks, complete=False)
                continue
            except Exception:  # noqa: BLE001 - whatever a graph's answer leads to is a 500 at the server
                failed += 1
                continue
            fallbacks += answer.fallback is not None
            if shopper.next_item in answer.items:
                ndcg[place] = 1.0 / math.log2(answer.items.index(shopper.next_item) + 2)
                hits[place] = 1.0
    finally:
        service.close()
    return Scored(ndcg, hits, failed, timed_out, fallbacks)
