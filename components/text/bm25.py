"""BM25, what a text model must beat (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bm25"]

_WORD = re.compile(r"\w+")
_K1, _B = 1.2, 0.75


class Bm25:
    """Document frequencies and the mean length of a collection."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [_words(text) for text in texts]
        self._documents = len(words)
        self._mean_length = max(sum(map(len, words)) / max(len(words), 1), 1e-9)
        self._with = Counter(word for one in words for word in set(one))

    def scores(self, query: str, texts: Sequence[str]) -> NDArray[np.float64]:
        """A score for each of ``texts``."""
        asked = _words(query)
        return np.array([self._score(asked, Counter(words), len(words)) for words in map(_words, texts)])

    def _score(self, asked: Sequence[str], counts: Counter[str], length: int) -> float:
        norm = _K1 * (1 - _B + _B * length / self._mean_length)
        return sum(self._weight(word) * counts[word] * (_K1 + 1) / (counts[word] + norm) for word in asked)

    def _weight(self, word: str) -> float:
        found = self._with[word]
        return math.log(1 + (self._documents - found + 0.5) / (found + 0.5))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
