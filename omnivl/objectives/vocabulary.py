"""The cross-entropy of tokens that objectives on words share.

Shapes: R rows, L text positions, D hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import ObjectiveLoss, replica_mean
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.padding import chosen_positions

IGNORED = -100
"""Target of a position without a loss."""


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
