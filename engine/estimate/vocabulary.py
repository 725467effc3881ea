"""A tokenizer of which only the size counts, where a plan is looked at and no text is read."""

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
    """Stands in for a tokenizer that is not there: every text is as long as fits.

    Attributes:
        special: Ids of the special tokens, the first of the vocabulary, and its size.
    """

    special: SpecialTokens

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 ``[B, length]``: a start, the last word of the vocabulary over and over, an end."""
        ids = np.full((len(texts), length), self.special.vocab_size - 1, dtype=np.int64)
        ids[:, 0], ids[:, -1] = self.special.cls, self.special.sep
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Refused: there are no words.

        Raises:
            DataError: Always.
        """
        raise DataError("tokenizer: only the size of its vocabulary is known; name one that is there")

    def as_transformers(self, length: int) -> "PreTrainedTokenizerBase":
        """Refused, as ``decode`` is.

        Raises:
            DataError: Always.
        """
        raise DataError("tokenizer: only the size of its vocabulary is known; name one that is there")


def tokenizer_or_size(plan: Plan) -> Tokenizer:
    """The plan's tokenizer; where it is not there, one of the size that the plan's model gives.

    Raises:
        DataError: It is not there and the model does not say how many words it has.
    """
    try:
        return load_tokenizer(plan.tokenizer)
    except DataError:
        model: Any = plan.model
        size = int(reduce(getattr, plan.model.vocabulary, model))
        if size <= _RESERVED:
            raise
    return Vocabulary(SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=size, num_reserved=_RESERVED))
