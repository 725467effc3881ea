"""Heads that more than one objective reads.

Shapes: D hidden size, V vocabulary size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.parts.linear import LayerNorm, Linear


class Perceptron(nn.Module):
    """Linear to twice the width, LayerNorm, GELU, linear. Source: the heads of X-VLM's released code."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        """Builds the maps from D to ``outputs``."""
        super().__init__()
        self.hidden = Linear(hidden_size, 2 * hidden_size)
        self.norm = LayerNorm(2 * hidden_size, eps=1e-5)
        self.output = Linear(2 * hidden_size, outputs)

    def forward(self, pooled: Tensor) -> Tensor:
        """fp32 ``[R, outputs]`` from ``[R, D]``."""
        made: Tensor = self.output(F.gelu(self.norm(self.hidden(pooled)))).float()
        return made


class VocabularyHead(nn.Module):
    """Dense, GELU, LayerNorm, and a score for every token of the vocabulary; or the last map alone.

    Source: the MLM head of BERT (Devlin et al., arXiv 1810.04805), eps 1e-12 as in its code.
    Differs: the last map is not tied to the word embedding, which may be on another pipeline stage.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, transforms: bool = True, bias: bool = True) -> None:
        """Builds the maps.

        Args:
            hidden_size: D.
            vocab_size: V.
            transforms: Whether there is anything before the last map.
            bias: Whether the last map has one.
        """
        super().__init__()
        self.transform = Linear(hidden_size, hidden_size) if transforms else None
        self.norm = LayerNorm(hidden_size, eps=1e-12) if transforms else None
        self.decoder = Linear(hidden_size, vocab_size, bias)

    def flops(self) -> float:
        """Operations on one position, forward."""
        transformed = 0 if self.transform is None else self.transform.out_features
        return 2.0 * self.decoder.in_features * (transformed + self.decoder.out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits fp32 ``[..., V]`` of hidden states ``[..., D]``; the products run in the dtype of the input."""
        if self.transform is not None:
            assert self.norm is not None
            hidden = self.norm(F.gelu(self.transform(hidden)))
        logits: Tensor = self.decoder(hidden)
        return logits.float()
