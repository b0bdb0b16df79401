"""Training sequences in batches of about equal length, in a random order that the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["epoch_batches"]


def epoch_batches(lengths: NDArray[np.int64], tokens: int, random: np.random.Generator) -> Sequence[NDArray[np.int64]]:
    """Split sequences into batches of at most ``tokens`` predictions, padding included.

    Args:
        lengths: of the sequences, as far as they are used; those shorter than 2 predict nothing and are left out.
        tokens: the most ``rows * (longest - 1)`` of a batch; a longer single sequence is a batch of its own.
        random: decides which of the sequences of about equal length go together, and the order of the batches.

    Returns:
        Index arrays that cover every usable sequence once.
    """
    usable = np.flatnonzero(lengths >= 2)
    # A little noise on the length, so that batches are made up anew in every epoch.
    order = usable[np.argsort(lengths[usable] + random.random(len(usable)) * 1.5, kind="stable")]
    batches: list[NDArray[np.int64]] = []
    start, longest = 0, 0
    for position, index in enumerate(order):
        widest = max(longest, int(lengths[index]) - 1)
        if position > start and (position - start + 1) * widest > tokens:
            batches.append(order[start:position].astype(np.int64))
            start, widest = position, int(lengths[index]) - 1
        longest = widest
    if start < len(order):
        batches.append(order[start:].astype(np.int64))
    return [batches[number] for number in random.permutation(len(batches))]
