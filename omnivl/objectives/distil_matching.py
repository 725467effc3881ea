"""Distillation of matching: a student's matching head learns a finished teacher's probabilities of the same pairs.

Shapes: B samples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import Drawn, Heads, Objective, ObjectiveLoss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.sizes import InputSizes
from omnivl.objectives.distil import divergence
from omnivl.objectives.itm import ITM
from omnivl.objectives.teacher import Taught, TaughtHead, TeacherFacts
from omnivl.objectives.vlm import MatchHead


@dataclass(frozen=True)
class DistilMatching(ITM, Taught):
    """Image-text matching whose targets are the probabilities of a teacher's matching head.

    Pairs are those of ``itm``. The loss is ``hard`` times the cross-entropy with what is true of a pair, plus
    ``1 - hard`` times the divergence KL(teacher || student) of "match" and "no match".

    Attributes:
        negatives: ``local``: the teacher has the frames of this replica's samples only.
        alignment_weight: 0: the teacher says nothing of words and patches.
        hard: Share of the true targets in the loss.

    Source: Hinton et al., arXiv 1503.02531, section 2.
    """

    kind: Literal["distil_matching"] = "distil_matching"  # type: ignore[assignment]  # another kind than its base
    alignment_weight: float = 0.0
    hard: float = 0.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.negatives == "local", "negatives", "'local', as the teacher reads this replica's samples")
        self.require(self.alignment_weight == 0.0, "alignment_weight", "0")
        self.require(0.0 <= self.hard < 1.0, "hard", "at least 0 and below 1")

    def after_training(self) -> Objective:
        """Its head as that of ``itm``, which needs no teacher."""
        own = {one.name: getattr(self, one.name) for one in fields(ITM) if one.name not in ("kind", "name")}
        return ITM(**own, name=self.key).apart()

    def draw(self, state: State, gather: Gather) -> Drawn:
        """As ``itm``; adds ``{key}/seen`` int64 ``[B]``, the sample whose picture goes with each text."""
        drawn = super().draw(state, gather)
        return replace(drawn, leaves={**drawn.leaves, f"{self.key}/seen": drawn.rows[self.key]})

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Two scores, and the teacher's place."""
        return TaughtMatchHead(sizes.pooled)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean over the pairs."""
        head = heads.own
        assert isinstance(head, TaughtMatchHead)
        logits = head(state.pooled(self.key)).float()
        matches = state[f"{self.key}/matches"]
        odds = head.taught_by.odds(state, state[f"{self.key}/seen"])
        soft = self.soften**2 * matching_divergence(logits, odds, self.soften).mean()
        loss = (1.0 - self.hard) * soft
        if self.hard > 0.0:
            loss = loss + self.hard * F.cross_entropy(logits, matches.long())
        with torch.no_grad():
            right, theirs = (logits.argmax(-1) == matches).float(), ((odds > 0) == matches).float()
        metrics = {"accuracy": right.mean(), "teacher_accuracy": theirs.mean(), "divergence": soft.detach()}
        return ObjectiveLoss(loss, metrics)

    def unfit(self, facts: TeacherFacts, own: InputSizes, shown: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        """Also a teacher without a matching head."""
        yield from super().unfit(facts, own, shown)
        if facts.matching is None:
            yield "without a matching head", "one that was trained with 'itm' or 'vlm'", "take another teacher"


class TaughtMatchHead(MatchHead, TaughtHead):
    """Scores of "no match" and "match", and the teacher's place."""


def matching_divergence(logits: Tensor, odds: Tensor, soften: float = 1.0) -> Tensor:
    """KL(teacher || student) of "no match" and "match" for each pair, fp32 ``[B]``.

    Args:
        logits: The student's, ``[B, 2]``.
        odds: The teacher's log odds of a match, ``[B]``.
        soften: Divides both.
    """
    wanted = torch.stack([torch.zeros_like(odds), odds], dim=1) / soften
    return divergence(F.log_softmax(wanted, dim=1), F.log_softmax(logits / soften, dim=1))
