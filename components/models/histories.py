"""Histories of different lengths as one left-padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["batches_by_length", "pad_left"]


def pad_left(sequences: Sequence[NDArray[np.integer]], length: int | None = None) -> NDArray[np.int64]:
    """``sequences`` as ``int64 [len(sequences), length]``: newest item last, zeros before the oldest.

    Sequences longer than ``length`` keep their newest items; without one it is that of the longest (at least 1).
    """
    width = length if length is not None else max([1, *(len(sequence) for sequence in sequences)])
    batch = np.zeros((len(sequences), width), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        newest = sequence[-width:]
        if len(newest):
            batch[row, width - len(newest) :] = newest
    return batch


def batches_by_length(
    histories: Sequence[NDArray[np.integer]], rows: int, *, longest: int | None = None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """``(index [b], history [b, length])`` pairs that cover all ``histories``, similar lengths together.

    Most histories are short, so batches by length save most of the work of padding everything to the longest.

    Args:
        histories: the sequences.
        rows: the largest ``b``.
        longest: newest items kept of each history; None keeps all.
    """
    lengths = np.array([len(history) for history in histories], dtype=np.int64)
    if longest is not None:
        lengths = np.minimum(lengths, longest)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), rows):
        index = order[start : start + rows]
        width = max(1, int(lengths[index].max()))
        yield index, pad_left([histories[row] for row in index], width)
