"""Prefix language modelling: an encoder reads a picture and the beginning of its text, a decoder writes the rest.

Shapes: B samples, L text positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnivl.chain.demands import VOCABULARY, Demands, Join
from omnivl.chain.objective import PrepareContext, Writing
from omnivl.chain.positions import prepared_targets
from omnivl.data.batch import Batch, DataKind, is_label, is_pair
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader
from omnivl.objectives.answer import cut_texts
from omnivl.objectives.lm import WritesWords, shift


@dataclass(frozen=True)
class SplitLM(WritesWords):
    """Next-token prediction of a text's end, whose beginning the encoder reads beside the picture.

    Of a text of n words the encoder gets the first p as a text of their own, and p is drawn evenly from 0 to n. The
    decoder writes the others and the end token.

    Attributes:
        prompt: Text that the encoder reads before every beginning, e.g. ``Generate the alt_text in EN:`` as in PaLI.
        most: Largest share of a text's words that the encoder reads.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.
        include_labels: Whether class prompts are split too.

    Source: Wang et al., SimVLM, arXiv 2108.10904, equation 3 and figure 1; Chen et al., PaLI, arXiv 2209.06794, section
        3.2 (split captions; captions behind a prompt alone are those with ``most`` 0).
    Differs: texts without a picture are not learnt. The beginning ends with an end token.
    """

    kind: Literal["split_lm"] = "split_lm"
    prompt: str = ""
    most: float = 1.0
    label_smoothing: float = 0.0
    include_labels: bool = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 <= self.most <= 1.0, "most", "0 to 1")
        self.require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", "at least 0 and below 1")

    @property
    def needs_whole_texts(self) -> bool:
        """Beginnings behind a prompt are longer than the batch's own texts."""
        return bool(self.prompt)

    @property
    def beginning(self) -> str:
        """Name of the fused rows that the decoder looks at, and of their text."""
        return f"{self.key}/beginning"

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A fused row for the beginning of each text, and a generated row for its end."""
        if not is_pair(kind) or (is_label(kind) and not self.include_labels):
            return None
        return Demands(
            rows={"text": {self.beginning: batch_size}},
            joins={self.beginning: Join(text=self.beginning), self.key: self._written},
            reads=frozenset({VOCABULARY}),
        )

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """A fused row for each text, which is a beginning, and a generated row."""
        return Demands(joins={self.beginning: Join(), self.key: self._written}, reads=frozenset({VOCABULARY}))

    @property
    def _written(self) -> Join:
        return Join(text=self.key, sees=self.beginning, mask="causal")

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/beginning/token_ids``, ``{key}/token_ids`` and ``{key}/targets``, int64 ``[B, L]``."""
        assert batch.token_ids is not None, "acts on kinds with a text"
        drawn = torch.from_numpy(context.uniforms(self.key, batch, 1)[:, 0])
        words = (batch.token_ids != context.tokens.pad).sum(1) - 2
        read = (drawn * ((self.most * words).floor() + 1)).long()
        beginning, rest = split(batch.token_ids, read, context.tokens)
        if self.prompt:
            given = torch.tensor(context.readers["text"].words(self.prompt)).expand(batch.size, -1)
            whole = torch.cat([beginning[:, :1], given, beginning[:, 1:]], dim=1)
            beginning = cut_texts(whole, beginning.shape[1], context.tokens)
        token_ids, targets = shift(rest, context.tokens)
        prepared = prepared_targets(self.key, targets)
        return {f"{self.beginning}/token_ids": beginning, f"{self.key}/token_ids": token_ids, **prepared}

    def writing(self, own: TextReader, readers: Mapping[str, TextReader]) -> Writing:
        """Writes from [DEC] to [SEP], after a beginning of the prompt alone where none is given."""
        special = own.tokenizer.special
        return Writing(own.tokenizer, (special.decode,), special.sep, own.length - 1, beside=self.prompt)


def split(token_ids: Tensor, read: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Divides texts in two.

    Args:
        token_ids: int64 ``[B, L]``: [CLS] t1 .. tn [SEP], padded.
        read: int64 ``[B]``, the number p of words in the first part, 0 to n.
        tokens: Special token ids.

    Returns:
        [CLS] t1 .. tp [SEP] and [CLS] tp+1 .. tn [SEP], padded; both ``[B, L]``.
    """
    places, length = torch.arange(token_ids.shape[1]), token_ids.shape[1]
    first = torch.where(places <= read[:, None], token_ids, tokens.pad)
    first[torch.arange(len(first)), read + 1] = tokens.sep
    moved = places + read[:, None]
    rest = token_ids.gather(1, moved.clamp(max=length - 1)).masked_fill(moved >= length, tokens.pad)
    rest[:, 0] = tokens.cls
    return first, rest
