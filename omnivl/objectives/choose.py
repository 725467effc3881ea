"""Choosing the right one of several options: answers to a question, reasons for an answer, turns of a dialogue.

Shapes: B samples, K options that a step scores, L text positions, D width of a pooled fused row.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
from omnivl.data.tokenizer import TextReader
from omnivl.parts.linear import LayerNorm, Linear

_RELEVANCE = "relevance"
_NO_SCORE = -1e4
"""Score of an option that a sample lacks: far below any other, and finite."""
_PIECE = re.compile(r"\s*(?:[^\s\u2e80-\U0010ffff]+|\S)")
"""What is left out as a whole, with the blanks before it: words; single characters of scripts that have no blanks."""


@dataclass(frozen=True)
class Choose(Objective):
    """Which of several options goes with the text and the picture? Each is scored in a fused row of its own.

    The text of a row is the ``context``, the sample's text, what is ``given``, and the option, one behind the other; if
    that is longer than the model's texts, its first words are left out, never the option's. A sample's field
    ``options`` holds its options, ``option`` the index of the right one.

    Attributes:
        options: K, the options of a sample that a step scores: the right one, and others drawn anew in each step where
            a sample has more.
        most_options: Largest number of options that a sample may have.
        field: Field with the options.
        index: Field with the index of the right one.
        context: Fields whose texts stand before the sample's text, such as ``[image_caption, history]``.
        given: Fields whose texts stand between the sample's text and the option, such as the ``answer`` to the question
            where options are reasons for it: the whole question is left out before its first word is.
        loss_kind: ``softmax`` chooses one; ``binary`` judges each option separately; ``relevance`` chooses with the
            softmax of the field ``relevance`` as targets, as dense fine-tuning on VisDial does.

    Source: Chen et al., UNITER, arXiv 1909.11740, section 4 and its code for VCR (four binary judgements, and the head:
        linear, ReLU, LayerNorm, linear). Murahari et al., VisDial-BERT, arXiv 1912.02379, section 3 for ``relevance``.
    Differs: words of question and option have no types that tell them apart.
    """

    kind: Literal["choose"] = "choose"
    options: int = 4
    most_options: int = 4
    field: str = "options"
    index: str = "option"
    context: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    loss_kind: Literal["softmax", "binary", "relevance"] = "softmax"

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.options >= 2, "options", "at least 2")
        self.require(self.most_options >= self.options, "most_options", f"at least options, {self.options}")

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the text segments, and of the fused rows, of the K options."""
        return tuple(f"{self.key}/{number}" for number in range(self.options))

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """Options, the index of the right one, and what stands beside the text."""
        fields = {self.field: Field("text", most=self.most_options), self.index: Field("number")}
        if self.loss_kind == "relevance":
            fields[_RELEVANCE] = Field("number", most=self.most_options, as_many_as=self.field)
        return fields | {name: Field("raw") for name in self.beside}

    @property
    def beside(self) -> tuple[str, ...]:
        """The fields whose texts stand beside the sample's text."""
        return (*self.context, *self.given)

    @property
    def needs_whole_texts(self) -> bool:
        """The options are texts of their own."""
        return True

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A text row and a fused row for each of the K options of each sample."""
        if visual_of(kind) == "none" or not has_text(kind) or is_label(kind):
            return None
        joins = {name: Join(text=name) for name in self.segments}
        return Demands(rows={"text": dict.fromkeys(joins, batch_size)}, joins=joins, reads=frozenset({"pooled"}))

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One fused row per text; see ``texts``."""
        return Demands(joins={self.key: Join()}, reads=frozenset({"pooled"}))

    def texts(
        self, text: str, options: Sequence[str], reader: TextReader, fields: Mapping[str, object] | None = None
    ) -> list[str]:
        """What the model reads for each option of a sample.

        An option is whole in its text, behind as many of the last words of what stands before it as fit. Only one that
        is longer by itself than the model's texts is left to be cut at its end, as any text.

        Args:
            text: The sample's text.
            options: Its options.
            reader: What the texts are for.
            fields: Its other fields, of which ``context`` and ``given`` are read where they are there.
        """
        before, behind = ([(fields or {}).get(name) for name in names] for names in (self.context, self.given))
        begin = " ".join([*_words(before), text, *_words(behind)])
        texts = [f"{begin} {option}" for option in options]
        long = [place for place, one in enumerate(texts) if not reader.fits(one)]
        for place, one in zip(long, _shortened(begin, [options[place] for place in long], reader), strict=True):
            texts[place] = one
        return texts

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes for each option ``{key}/{number}/token_ids`` int64 ``[B, L]``.

        Also ``{key}/targets``, fp32 ``[B, K]``, and ``{key}/present``, bool ``[B, K]``.
        """
        shares, present = torch.zeros(batch.size, self.options), torch.zeros(batch.size, self.options, dtype=torch.bool)
        order = np.argsort(context.uniforms(self.key, batch, self.most_options), axis=1)
        listed, rights = batch.fields[self.field], batch.fields[self.index]
        assert isinstance(rights, Tensor), "numbers are collated"
        reader, texts = context.readers["text"], list[list[str]]()
        for row in range(batch.size):
            options, right = listed[row], int(rights[row])
            assert isinstance(options, tuple), "options are a field with more than one value"
            others = [int(place) for place in order[row] if place < len(options) and place != right]
            chosen = sorted([right, *others[: self.options - 1]])  # in the sample's order, which tells nothing
            beside = {name: batch.fields[name][row] for name in self.beside}
            own = self.texts(batch.captions[row], [str(options[place]) for place in chosen], reader, beside)
            texts.append(own + [""] * (self.options - len(own)))
            present[row, : len(own)] = True
            if self.loss_kind == "relevance":
                relevance = batch.fields[_RELEVANCE][row]
                assert isinstance(relevance, Tensor), "numbers are collated"
                shares[row, : len(own)] = relevance[chosen].softmax(dim=0)
            else:
                shares[row, chosen.index(right)] = 1.0
        ids = [torch.from_numpy(reader.encode([own[number] for own in texts])) for number in range(self.options)]
        made = {f"{name}/token_ids": one for name, one in zip(self.segments, ids, strict=True)}
        return {**made, f"{self.key}/targets": shares, f"{self.key}/present": present}

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """A score from a pooled fused row."""
        return ChoiceHead(sizes.pooled)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The options that are judged, where each is judged separately."""
        return {self.key: state[f"{self.key}/present"].sum()} if self.loss_kind == "binary" else {}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Cross-entropy over the options of a sample, mean over samples; or over each option, mean over options.

        Metric: ``accuracy``, the share of samples whose right option has the highest score.
        """
        assert isinstance(heads.own, ChoiceHead)
        scores = torch.stack([heads.own(state.pooled(name)) for name in self.segments], dim=1)
        targets, present = state[f"{self.key}/targets"], state[f"{self.key}/present"]
        scores = scores.masked_fill(~present, _NO_SCORE)
        if self.loss_kind == "binary":
            each = F.binary_cross_entropy_with_logits(scores, targets, reduction="none")
            loss = replica_mean((each * present).sum(), present.sum(), gather, state.term_weight(self.key))
        else:
            loss = F.cross_entropy(scores, targets)
        with torch.no_grad():
            metrics = {"accuracy": (scores.argmax(1) == targets.argmax(1)).float().mean()}
        return ObjectiveLoss(loss, metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """A score for each text, fp32 ``[R]``: the highest one of a sample's is the chosen option."""
        assert isinstance(heads.own, ChoiceHead)
        scores: Tensor = heads.own(state.pooled(self.key))
        return scores

    def probabilities(self, scores: Tensor) -> Tensor:
        """How likely each option of a sample is, by its scores ``[B, K]``: judged separately, or one of all."""
        return scores.sigmoid() if self.loss_kind == "binary" else scores.softmax(dim=1)


class ChoiceHead(nn.Module):
    """Linear, ReLU, LayerNorm, and a score, as in UNITER's head for VCR."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden = Linear(hidden_size, 2 * hidden_size)
        self.norm = LayerNorm(2 * hidden_size, eps=1e-12)
        self.output = Linear(2 * hidden_size, 1)

    def forward(self, pooled: Tensor) -> Tensor:
        """fp32 ``[R]`` from ``[R, D]``."""
        scores: Tensor = self.output(self.norm(F.relu(self.hidden(pooled)))).float().squeeze(-1)
        return scores


def _shortened(begin: str, options: Sequence[str], reader: TextReader) -> Iterator[str]:
    """Options behind as many of the last words of ``begin`` as fit.

    Each of them is as if it were alone: which others are drawn beside it does not change its text.
    """
    pieces = _PIECE.findall(begin) if options else []
    tokens = np.cumsum([0, *(len(reader.words(piece)) for piece in reversed(pieces))])  # of the last 0, 1, ...

    def behind(kept: int, option: str) -> str:
        return f"{''.join(pieces[len(pieces) - kept :])} {option}".lstrip()

    for option in options:
        room = reader.length - 2 - len(reader.words(option))
        kept = max(0, int(np.searchsorted(tokens, room, side="right")) - 1)
        # Where tokens reach over pieces, a text has not quite the sum of their tokens.
        while kept > 0 and not reader.fits(behind(kept, option)):
            kept -= 1
        while kept < len(pieces) and reader.fits(behind(kept + 1, option)):
            kept += 1
        yield behind(kept, option)


def _words(values: Sequence[object]) -> Iterator[str]:
    """The texts of values, those of lists one behind the other."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _words(value)
        elif value is not None:
            yield str(value)
