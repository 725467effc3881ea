"""What MLM and LM share: the vocabulary head and the token cross-entropy.

Shapes: R rows, L text positions, D hidden size, V vocabulary size, K positions with a target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import ObjectiveLoss, replica_mean
from omnivl.parts.linear import LayerNorm, Linear
from omnivl.parts.padding import chosen_positions

IGNORED = -100
"""Target of a position without a loss."""


class VocabularyHead(nn.Module):
    """Dense, GELU, LayerNorm, and a score for every token of the vocabulary.

    Source: the MLM head of BERT (Devlin et al., arXiv 1810.04805), eps 1e-12 as in its code.
    Differs: the last map is not tied to the word embedding, which may live on another pipeline stage.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.transform = Linear(hidden_size, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=1e-12)
        self.decoder = Linear(hidden_size, vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits fp32 ``[..., V]`` of hidden states ``[..., D]``; the products run in the dtype of the input."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.transform(hidden))))
        return logits.float()


def token_loss(
    hidden: Tensor, targets: Tensor, head: nn.Module | None, gather: Gather, label_smoothing: float = 0.0
) -> ObjectiveLoss:
    """Cross-entropy at the positions that have a target; only these and a few more go through the vocabulary head.

    Args:
        hidden: ``[R, L, D]``.
        targets: int64 ``[R, L]``, ``IGNORED`` where there is no loss.
        head: The vocabulary head.
        gather: Counts targets over replicas.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.

    Returns:
        The mean over all targets of the joined batch; metric ``accuracy``.
    """
    assert isinstance(head, VocabularyHead), "the vocabulary head comes from the Losses layer"
    has_target = targets != IGNORED
    chosen = chosen_positions(has_target)
    logits, wanted = head(hidden.flatten(0, 1)[chosen]), targets.flatten()[chosen]
    total = F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    count = has_target.sum()
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == wanted).sum() / count.clamp(min=1)
    return ObjectiveLoss(replica_mean(total, count, gather), {"accuracy": accuracy.float()})
