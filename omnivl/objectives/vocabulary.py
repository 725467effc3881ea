"""The cross-entropy of tokens that objectives on words share.

Shapes: R rows, L text positions, D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import ObjectiveLoss, replica_mean
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.padding import chosen_positions

IGNORED = -100
"""Target of a position without a loss."""


@dataclass(frozen=True)
class Teacher:
    """The momentum model, whose softmax is a share of the targets.

    Attributes:
        hidden: ``[R, L, D]``, what it makes of the same rows.
        head: Its vocabulary head.
        alpha: The share, fp32 scalar.
    """

    hidden: Tensor
    head: nn.Module | None
    alpha: Tensor


def token_loss(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Module | None,
    gather: Gather,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
) -> ObjectiveLoss:
    """Cross-entropy at the positions that have a target; only these and a few more go through the vocabulary head.

    Args:
        hidden: ``[R, L, D]``.
        targets: int64 ``[R, L]``, ``IGNORED`` where there is no loss.
        head: The vocabulary head.
        gather: Counts targets over replicas.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.
        teacher: ``(1 - alpha)`` of the loss is that of the targets, ``alpha`` the cross-entropy with the teacher's
            softmax at the same positions. None: there is none.

    Returns:
        The mean over all targets of the joined batch; metrics ``accuracy`` and, with a teacher, ``distillation``, its
        share of the loss before ``alpha``.

    Source: of the teacher, Li et al., ALBEF, arXiv 2107.07651, eq. 7.
    """
    assert isinstance(head, VocabularyHead), "the vocabulary head comes from the Losses layer"
    has_target = targets != IGNORED
    chosen = chosen_positions(has_target)
    logits, wanted = head(hidden.flatten(0, 1)[chosen]), targets.flatten()[chosen]
    total = F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    count, metrics = has_target.sum(), dict[str, Tensor]()
    with torch.no_grad():
        metrics["accuracy"] = ((logits.argmax(-1) == wanted).sum() / count.clamp(min=1)).float()
    if teacher is not None:
        assert isinstance(teacher.head, VocabularyHead), "its head's twin comes from the Losses layer"
        with torch.no_grad():
            soft = teacher.head(teacher.hidden.flatten(0, 1)[chosen]).softmax(-1)
        distances = -(soft * logits.log_softmax(-1)).sum(-1)
        distilled = torch.where(wanted != IGNORED, distances, 0.0).sum()
        metrics["distillation"] = distilled.detach() / count.clamp(min=1)
        total = (1.0 - teacher.alpha) * total + teacher.alpha * distilled
    return ObjectiveLoss(replica_mean(total, count, gather), metrics)
