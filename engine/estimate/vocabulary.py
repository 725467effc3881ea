"""A tokenizer of which only the size counts, where a plan is looked at and no text is read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.plan.plan import Plan
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RESERVED = 5


@dataclass(frozen=True)
class Vocabulary:
    """Stands in for a tokenizer that is not there: a text has as many tokens as words between blanks, one at least.

    Attributes:
        special: Ids of the special tokens, the first of the vocabulary, and its size.
    """

    special: SpecialTokens

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 ``[B, length]``: a start, the last word of the vocabulary for each word that fits, an end, padding."""
        ids = np.full((len(texts), length), self.special.pad, dtype=np.int64)
        for row, text in zip(ids, texts, strict=True):
            end = 1 + min(max(1, len(text.split())), length - 2)
            row[0], row[1:end], row[end] = self.special.cls, self.special.vocab_size - 1, self.special.sep
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Refused: there are no words.

        Raises:
            DataError: Always.
        """
        raise DataError("tokenizer: only the size of its vocabulary is known; name one that is there")

    def word_bounds(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Each token is a word."""
        everywhere = np.ones(self.special.vocab_size, dtype=np.bool_)
        return everywhere, everywhere

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """Refused, as ``decode`` is.

        Raises:
            DataError: Always.
        """
        raise DataError("tokenizer: only the size of its vocabulary is known; name one that is there")


def tokenizer_or_size(plan: Plan) -> Tokenizer:
    """The plan's tokenizer; where it is not there, one of the size that the plan's model gives.

    Raises:
        DataError: It is there and cannot be used, or it is not and the model does not say how many words it has.
    """
    model: Any = plan.model
    return tokenizer_or_words(plan.tokenizer, int(reduce(getattr, plan.model.vocabulary, model)))


def tokenizer_or_words(name: str, size: int) -> Tokenizer:
    """A tokenizer; where it is not there, one of so many words.

    Raises:
        DataError: It is there and cannot be used, or the size is not known.
    """
    try:
        return load_tokenizer(name)
    except DataError:
        if size <= _RESERVED or os.path.lexists(name):
            raise
    return Vocabulary(SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=size, num_reserved=_RESERVED))
