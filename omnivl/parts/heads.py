"""Heads that more than one objective reads.

Shapes: D hidden size, V vocabulary size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.parts.linear import LayerNorm, Linear


class VocabularyHead(nn.Module):
    """Dense, GELU, LayerNorm, and a score for every token of the vocabulary.

    Source: the MLM head of BERT (Devlin et al., arXiv 1810.04805), eps 1e-12 as in its code.
    Differs: the last map is not tied to the word embedding, which may be on another pipeline stage.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = Linear(hidden_size, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=1e-12)
        self.decoder = Linear(hidden_size, vocab_size)

    def flops(self) -> float:
        """Operations on one position, forward."""
        return 2.0 * self.decoder.in_features * (self.transform.out_features + self.decoder.out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits fp32 ``[..., V]`` of hidden states ``[..., D]``; the products run in the dtype of the input."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.transform(hidden))))
        return logits.float()
