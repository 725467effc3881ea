"""Questions answered, and statements judged, by a choice from a list of answers.

Shapes: B samples, A answers, D width of a pooled fused row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.demands import Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.data.fields import Field
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.objectives.answers import SoftScores, answer_fields, answer_shares, soft_score
from omnivl.objectives.text_lists import length_misfits, list_or_path, read_list, stand_ins
from omnivl.parts.linear import LayerNorm, Linear


@dataclass(frozen=True)
class VQA(Objective):
    """Which answers of a list answer the question about an image, a clip or a set of images?

    A sample's text is the question, or a statement that answers judge (``[contradiction, neutral, entailment]``). Its
    field ``answers`` holds people's answers: each once with its share in ``weights``, or as often as it was given. A
    question without an answer in the list is left out and not counted.

    Attributes:
        answers: The list, or the path of a text file with an answer on each line. The plan that a run keeps holds the
            list itself. ``omnivl data values`` writes such files.
        num_answers: Expected length of the list, as a check; null allows any. Where the file is not there, it stands
            for the list in checks and estimates.
        soft_scores: Score of an answer that n of ten people gave: ``official`` is 0, 0.3, 0.6, 0.9 and 1 for n of
            0, 1, 2, 3 and more, ``metric`` is min(n / 3, 1).
        loss_kind: ``binary`` classifies each answer separately, since several may be right; ``softmax`` chooses one,
            with the people's shares as targets.

    Source: Kim et al., ViLT, arXiv 2102.03334, section 4.2 and its code: head, soft scores, and a loss that is the mean
        over answers times their number.
    """

    kind: Literal["vqa"] = "vqa"
    answers: str | tuple[str, ...] = ()
    num_answers: int | None = None
    soft_scores: SoftScores = "official"
    loss_kind: Literal["binary", "softmax"] = "binary"

    def __post_init__(self) -> None:
        """Checks the options and reads the list.

        Raises:
            UserError: An option is out of its range, or the list cannot be read.
        """
        super().__post_init__()
        kept = list_or_path(self.answers, f"objective {self.key}", "answers", self.num_answers)
        object.__setattr__(self, "answers", kept)

    @property
    def choices(self) -> tuple[str, ...]:
        """The list of answers.

        Raises:
            UserError: Its file is not there.
        """
        if isinstance(self.answers, tuple):
            return self.answers
        return read_list(self.answers, f"objective {self.key}", "answers")

    @property
    def num_choices(self) -> int:
        """The length of the list."""
        return (self.num_answers or 0) if isinstance(self.answers, str) else len(self.answers)

    @property
    def absent_lists(self) -> Mapping[str, str]:
        """See ``Objective``."""
        return {"answers": self.answers} if isinstance(self.answers, str) else {}

    def with_stand_ins(self) -> Self:
        """See ``Objective``."""
        return replace(self, answers=stand_ins(self.num_choices)) if self.absent_lists else self

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Answers and weights."""
        return answer_fields()

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """A list without answers, or of another length than ``num_answers``."""
        if self.num_choices == 0:
            yield Misfit(("answers",), "no answer", "one or more", "give a list, or the path of a file that holds it")
        yield from length_misfits(self.answers, self.num_answers, "answers", "num_answers")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample."""
        if visual_of(kind) == "none" or not has_text(kind) or is_label(kind):
            return None
        return self.asks(kind, batch_size)

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per question."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/targets`` fp32 ``[B, A]``: the score, or the share, of each answer of the list."""
        places = {answer: place for place, answer in enumerate(self.choices)}
        targets = torch.zeros(batch.size, len(places))
        for row, shares in enumerate(answer_shares(batch)):
            for answer, (share, _) in shares.items():
                if answer in places:
                    soft = soft_score(share, self.soft_scores) if self.loss_kind == "binary" else share
                    targets[row, places[answer]] = soft
        return {f"{self.key}/targets": targets}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """A score for each answer, from a pooled fused row."""
        return AnswerHead(sizes.pooled, self.num_choices)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The questions that have an answer in the list."""
        return {self.key: _answered(state[f"{self.key}/targets"]).sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Cross-entropy, binary ones summed over answers; mean over the questions that have an answer in the list.

        Metrics: ``score``, the mean target of the best answer; ``answered``, the share of those questions.
        """
        assert isinstance(heads.own, AnswerHead)
        logits, targets = heads.own(state.pooled(self.key)), state[f"{self.key}/targets"]
        answered = _answered(targets)
        if self.loss_kind == "binary":
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)
        else:
            shares = targets / targets.sum(dim=1, keepdim=True).clamp(min=torch.finfo(targets.dtype).tiny)
            each = F.cross_entropy(logits, shares, reduction="none")
        count = answered.sum()
        with torch.no_grad():
            scores = targets.gather(1, logits.argmax(dim=1, keepdim=True))
            metrics = {"score": scores.mean(), "answered": answered.float().mean()}
        weight = state.term_weight(self.key)
        return ObjectiveLoss(replica_mean((each * answered).sum(), count, gather, weight), metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """A score for each answer of the list, fp32 ``[R, A]``."""
        assert isinstance(heads.own, AnswerHead)
        logits: Tensor = heads.own(state.pooled(self.key))
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """How likely each answer is, by its score ``[R, A]``: judged separately, or one of all."""
        return logits.sigmoid() if self.loss_kind == "binary" else logits.softmax(dim=1)


def _answered(targets: Tensor) -> Tensor:
    """Which questions have an answer in the list, bool ``[B]``, from ``targets [B, A]``."""
    return targets.amax(dim=1) > 0


class AnswerHead(nn.Module):
    """Linear to twice the width, LayerNorm, GELU, and a score for each answer, as in ViLT."""

    def __init__(self, hidden_size: int, num_answers: int) -> None:
        super().__init__()
        self.hidden = Linear(hidden_size, 2 * hidden_size)
        self.norm = LayerNorm(2 * hidden_size, eps=1e-5)
        self.output = Linear(2 * hidden_size, num_answers)

    def forward(self, pooled: Tensor) -> Tensor:
        """fp32 ``[R, A]`` from ``[R, D]``."""
        logits: Tensor = self.output(F.gelu(self.norm(self.hidden(pooled)))).float()
        return logits
