"""Visual question answering by generation: a decoder that looks at the question and its image writes the answer.

Shapes: B samples, N answers per sample, R = B * N rows, L token positions of an answer, V vocabulary size.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.demands import VOCABULARY, Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext
from omnivl.chain.positions import IGNORED, chosen_of, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.data.fields import Field
from omnivl.data.sizes import InputSizes
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import Misfit
from omnivl.objectives.answers import ANSWERS, answer_fields, answer_shares
from omnivl.objectives.lm import shift
from omnivl.parts.heads import VocabularyHead


@dataclass(frozen=True)
class Answer(Objective):
    """Writes each answer to the question about the image, weighted by the share of people who gave it.

    A sample's text is the question, about an image, a clip or a set of images. Its field ``answers`` holds people's
    answers: each once with its share in ``weights``, or as often as it was given. The decoder attends to the states of
    the question, which have attended to the image, and not to the image itself.

    Attributes:
        most: Number of answers of a question that are learnt: those with the largest shares.
        length: Token positions of an answer, its start included; longer ones are cut.

    Source: Li et al., ALBEF, arXiv 2107.07651, section 4; loss and weights as in its code: sum over answers of weight
        times the sum over tokens, over the number of questions.
    """

    kind: Literal["answer"] = "answer"
    most: int = 4
    length: int = 8

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.most >= 1, "most", "at least 1")
        self.require(self.length >= 3, "length", "at least 3: the start, a token and the end")

    @property
    def question(self) -> str:
        """Name of the fused rows that the decoder looks at."""
        return f"{self.key}/question"

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Answers with their tokens, and weights."""
        return answer_fields(self.length)

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Answers that are longer than the texts that the model reads."""
        if self.length > inputs.text_length:
            allowed = f"at most {inputs.text_length}, the model's text length"
            yield Misfit(("length",), str(self.length), allowed, "change either")

    @property
    def needs_whole_texts(self) -> bool:
        """The answers are texts of their own."""
        return True

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One fused row per sample, and one generated row for each of its answers."""
        if visual_of(kind) == "none" or not has_text(kind) or is_label(kind):
            return None
        return self._joined(Join(self.key, self.question, "causal", times=self.most, length=self.length))

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused and one generated row per question."""
        return self._joined(Join(self.key, self.question, "causal"))

    def _joined(self, written: Join) -> Demands:
        return Demands(joins={self.question: Join(), self.key: written}, reads=frozenset({VOCABULARY}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/token_ids`` and ``{key}/targets``, int64 ``[R, L]``, and ``{key}/weights``, fp32 ``[R]``.

        A sample with fewer answers has rows without a target and of weight 0.
        """
        token_ids = batch.fields[f"{ANSWERS}/token_ids"]
        assert isinstance(token_ids, Tensor), "as sample_fields asks"
        token_ids = cut_texts(token_ids, self.length, context.tokens)
        chosen = torch.full((batch.size, self.most, self.length), context.tokens.pad, dtype=torch.int64)
        weights = torch.zeros(batch.size, self.most)
        for row, shares in enumerate(answer_shares(batch)):
            ranked = sorted(shares.values(), key=lambda one: (-one[0], one[1]))[: self.most]
            for place, (share, first) in enumerate(ranked):
                chosen[row, place], weights[row, place] = token_ids[row, first], share
        inputs, targets = shift(chosen.flatten(0, 1), context.tokens)
        key = self.key
        return {f"{key}/token_ids": inputs, **prepared_targets(key, targets), f"{key}/weights": weights.flatten()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Weighted cross-entropy, summed over answers and their tokens, over the number of questions.

        Metric ``accuracy`` is the mean weight of a question's answers whose tokens are all the likeliest ones.
        """
        targets, weights = state[f"{self.key}/targets"], state[f"{self.key}/weights"]
        chosen = chosen_of(state, self.key)
        each, right = _at_targets(state.rows("generation", self.key), targets, chosen, heads)
        places = weights[:, None].expand_as(targets).flatten()[chosen]
        batch_size = state.layout.batch_size
        with torch.no_grad():
            missed = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
            missed[chosen] = ~right & (targets.flatten()[chosen] != IGNORED)
            found = ~missed.view_as(targets).any(dim=1)
            metrics = {"accuracy": (found * weights).sum() / batch_size}
        return ObjectiveLoss((each * places).sum() / batch_size, metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Log probability of each text, fp32 ``[R]``, if the state has ``{key}/targets``.

        Else logits of the token after the last position of each row, fp32 ``[R, V]``.
        """
        hidden = state.rows("generation", self.key)
        if f"{self.key}/targets" not in state:
            assert heads.vocabulary is not None
            logits: Tensor = heads.vocabulary(hidden[:, -1])
            return logits
        targets = state[f"{self.key}/targets"]
        chosen = chosen_of(state, self.key)
        each, _ = _at_targets(hidden, targets, chosen, heads)
        return -torch.zeros(targets.numel(), device=each.device).index_copy(0, chosen, each).view_as(targets).sum(1)


def cut_texts(token_ids: Tensor, length: int, tokens: SpecialTokens) -> Tensor:
    """Cuts encoded texts to ``length`` positions as a tokenizer does: the last token of a cut text is the end token.

    Args:
        token_ids: int64 ``[..., L]``, L at least ``length``: another objective may need longer texts.
        length: Positions to keep.
        tokens: Special token ids.
    """
    kept = token_ids[..., :length].clone()
    last = kept[..., -1]
    kept[..., -1] = torch.where((last == tokens.pad) | (last == tokens.sep), last, tokens.sep)
    return kept


def _at_targets(hidden: Tensor, targets: Tensor, chosen: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Cross-entropy at the ``chosen`` positions, and whether the target is the likeliest.

    Args:
        hidden: ``[R, L, D]``.
        targets: int64 ``[R, L]``, ``IGNORED`` where there is none; the cross-entropy is 0 there.
        chosen: int64 ``[n]``, positions counted over all rows.
        heads: Heads with the vocabulary head.
    """
    assert isinstance(heads.vocabulary, VocabularyHead), "the vocabulary head comes from the Losses layer"
    logits, wanted = heads.vocabulary(hidden.flatten(0, 1)[chosen]), targets.flatten()[chosen]
    return F.cross_entropy(logits, wanted, reduction="none", ignore_index=IGNORED), logits.argmax(-1) == wanted
