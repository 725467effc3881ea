"""The cross-entropy of tokens, shared by objectives on words.

Shapes: R rows, L text positions, n of them chosen, D hidden size, V words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import ObjectiveLoss, replica_mean
from omnivl.chain.positions import IGNORED, chosen_positions
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.padding import selected


@dataclass(frozen=True)
class Teacher:
    """The momentum model, whose softmax is a share of the targets.

    Attributes:
        hidden: ``[R, L, D]``, its states of the same rows.
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
    term_weight: Tensor | None = None,
    chosen: Tensor | None = None,
) -> ObjectiveLoss:
    """Cross-entropy at the positions that have a target; only these and a few more go through the vocabulary head.

    Args:
        hidden: ``[R, L, D]``.
        targets: int64 ``[R, L]``, ``IGNORED`` where there is no loss.
        head: The vocabulary head.
        gather: Counts targets over replicas.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.
        teacher: The loss is ``(1 - alpha)`` times that of the targets plus ``alpha`` times the cross-entropy with the
            teacher's softmax at the same positions. None: no teacher.
        term_weight: See ``replica_mean``.
        chosen: int64 ``[n]``, the positions to compute, counted over all rows; from ``targets`` where it is not given.

    Returns:
        The mean over all targets of the joined batch; metrics ``accuracy`` and, with a teacher, ``distillation``, its
        share of the loss before ``alpha``.

    Source: for the teacher, Li et al., ALBEF, arXiv 2107.07651, eq. 7.
    """
    assert isinstance(head, VocabularyHead), "the vocabulary head comes from the Losses layer"
    chosen = chosen_positions(targets != IGNORED) if chosen is None else chosen
    logits, wanted = head(selected(hidden, chosen)), targets.flatten()[chosen]
    if teacher is None:
        return words_loss(logits, wanted, gather, label_smoothing, term_weight=term_weight)
    assert isinstance(teacher.head, VocabularyHead), "its head's twin comes from the Losses layer"
    with torch.no_grad():
        soft = teacher.head(teacher.hidden.flatten(0, 1)[chosen]).softmax(-1)
    taught = {"soft": soft, "alpha": teacher.alpha}
    return words_loss(logits, wanted, gather, label_smoothing, **taught, term_weight=term_weight)


def words_loss(
    logits: Tensor,
    wanted: Tensor,
    gather: Gather,
    label_smoothing: float = 0.0,
    *,
    soft: Tensor | None = None,
    alpha: Tensor | float = 0.0,
    term_weight: Tensor | None = None,
) -> ObjectiveLoss:
    """Cross-entropy of words at chosen positions; see ``token_loss``.

    Args:
        logits: fp32 ``[n, V]``.
        wanted: int64 ``[n]``, ``IGNORED`` where there is no loss.
        gather: Counts targets over replicas.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.
        soft: A teacher's softmax, ``[n, V]``.
        alpha: The teacher's share of the loss.
        term_weight: See ``replica_mean``.
    """
    total = F.cross_entropy(logits, wanted, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    count, metrics = num_targets(wanted), dict[str, Tensor]()
    with torch.no_grad():
        metrics["accuracy"] = ((logits.argmax(-1) == wanted).sum() / count.clamp(min=1)).float()
    if soft is not None:
        distances = -(soft * logits.log_softmax(-1)).sum(-1)
        distilled = torch.where(wanted != IGNORED, distances, 0.0).sum()
        metrics["distillation"] = distilled.detach() / count.clamp(min=1)
        total = (1.0 - alpha) * total + alpha * distilled
    return ObjectiveLoss(replica_mean(total, count, gather, term_weight), metrics)


def num_targets(targets: Tensor) -> Tensor:
    """How many positions have a target, int64 scalar: the terms of ``token_loss``."""
    return (targets != IGNORED).sum()
