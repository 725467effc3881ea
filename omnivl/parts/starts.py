"""Texts that start with one token, whether they are read or written.

Shapes: R rows, L text positions, D hidden size.
"""

import torch
from torch import Tensor

from omnivl.data.special_tokens import SpecialTokens
from omnivl.parts.embed import TextEmbedding
from omnivl.parts.sizes import Transformer, Words


class OneStartEmbedding(TextEmbedding):
    """Word plus position; the start of generation is read as the start of a text."""

    def __init__(self, words: Words, text: Transformer, tokens: SpecialTokens) -> None:
        super().__init__(words, text)
        self.starts = tokens.decode, tokens.cls

    def forward(self, token_ids: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """See ``TextEmbedding``."""
        own, shared = self.starts
        return super().forward(token_ids.masked_fill(token_ids == own, shared), dtype, start)
