"""Texts to the tensors of a package of text, by the tokenizer that it carries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from endcap.errors import InputError

__all__ = ["TOKENIZER_FILE", "Tokens", "encoder_inputs", "ranker_inputs"]

TOKENIZER_FILE = "tokenizer.json"
Inputs = dict[str, NDArray[np.int64]]


class Tokens:
    """A tokenizer (Hugging Face's ``tokenizer.json``), with texts cut at ``longest`` tokens."""

    def __init__(self, path: Path, *, longest: int) -> None:
        """Raises: InputError: no tokenizer there."""
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library's errors share no base but this
            raise InputError("no tokenizer there", where=path) from error
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest)

    def of(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and mask, ``int64 [texts, longest of these]``, padded with 0 on the right."""
        found = [one.ids for one in self._tokenizer.encode_batch(list(texts))]
        ids = np.zeros((len(found), max(map(len, found), default=1)), np.int64)
        mask = np.zeros_like(ids)
        for row, one in enumerate(found):
            ids[row, : len(one)], mask[row, : len(one)] = one, 1
        return ids, mask


def encoder_inputs(tokens: Tokens, texts: Sequence[str]) -> Inputs:
    """What an encoder's package takes, a row a text."""
    ids, mask = tokens.of(texts)
    return {"input_ids": ids, "attention_mask": mask}


def ranker_inputs(tokens: Tokens, query: str, candidates: Sequence[str]) -> Inputs:
    """What a ranker's package takes, one row."""
    query_ids, query_mask = tokens.of([query])
    ids, mask = tokens.of(candidates)
    return {"query_ids": query_ids, "query_mask": query_mask, "candidate_ids": ids[None], "candidate_mask": mask[None]}
