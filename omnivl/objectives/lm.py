"""Language modelling: the generation decoder predicts the sample's caption.

Shapes: B samples, L text positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnivl.chain.demands import VOCABULARY, Demands, Join
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, Writing
from omnivl.chain.positions import IGNORED, chosen_of, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, is_label, is_pair
from omnivl.data.special_tokens import SpecialTokens
from omnivl.data.tokenizer import TextReader
from omnivl.objectives.vocabulary import num_targets, token_loss


class WritesWords(Objective):
    """What objectives share whose rows of the generation stream predict a text word by word.

    ``prepare`` makes ``{key}/targets``, int64 ``[B, L]``; the rows are those of segment ``key``.
    """

    label_smoothing: float

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The tokens to predict."""
        return {self.key: num_targets(state[f"{self.key}/targets"])}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean cross-entropy over all tokens to predict, [SEP] included."""
        hidden, targets = state.rows("generation", self.key), state[f"{self.key}/targets"]
        weight, chosen = state.term_weight(self.key), chosen_of(state, self.key)
        return token_loss(
            hidden, targets, heads.vocabulary, gather, self.label_smoothing, term_weight=weight, chosen=chosen
        )

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Logits of the token after the last position of each row, fp32 ``[R, V]``."""
        assert heads.vocabulary is not None
        logits: Tensor = heads.vocabulary(state.rows("generation", self.key)[:, -1])
        return logits


@dataclass(frozen=True)
class LM(WritesWords):
    """Next-token prediction: from [DEC] t1 .. tn to t1 .. tn [SEP].

    Attributes:
        prompt: Text before every caption, e.g. ``a picture of``, which is given and not predicted.
        label_smoothing: Share of the target's probability that is spread over the whole vocabulary.
        include_labels: Whether class prompts are generated too.

    Source: Li et al., BLIP, arXiv 2201.12086, section 3.2 (its label smoothing is 0.1), and its code for the prompt.
    """

    kind: Literal["lm"] = "lm"
    prompt: str = ""
    label_smoothing: float = 0.1
    include_labels: bool = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 <= self.label_smoothing < 1.0, "label_smoothing", "at least 0 and below 1")

    @property
    def needs_whole_texts(self) -> bool:
        """Texts behind a prompt are longer than the batch's own."""
        return bool(self.prompt)

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One generated row per sample, over the clean visual rows."""
        if not is_pair(kind) or (is_label(kind) and not self.include_labels):
            return None
        written = Join(text=self.key, mask="causal", continues=not self.prompt)
        return Demands(joins={self.key: written}, reads=frozenset({VOCABULARY}))

    def asks(self, kind: DataKind, batch_size: int) -> Demands:
        """One generated row per text."""
        return Demands(joins={self.key: Join(text=self.key, mask="causal")}, reads=frozenset({VOCABULARY}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/token_ids`` and ``{key}/targets``, int64 ``[B, L]``."""
        assert batch.token_ids is not None, "acts on kinds with a text"
        ids, given = batch.token_ids, 0
        if self.prompt:
            reader = context.readers["text"]
            ids = torch.from_numpy(reader.encode([f"{self.prompt} {one}" for one in batch.captions]))
            given = len(reader.words(self.prompt))
        token_ids, targets = shift(ids, context.tokens)
        targets[:, :given] = IGNORED
        return {f"{self.key}/token_ids": token_ids, **prepared_targets(self.key, targets)}

    def writing(self, own: TextReader, readers: Mapping[str, TextReader]) -> Writing:
        """Writes from [DEC] and the prompt to [SEP]."""
        special = own.tokenizer.special
        given = (special.decode, *(own.words(self.prompt) if self.prompt else ()))
        return Writing(own.tokenizer, given, special.sep, own.length - len(given))


def shift(token_ids: Tensor, tokens: SpecialTokens) -> tuple[Tensor, Tensor]:
    """Inputs and targets of next-token prediction.

    Args:
        token_ids: int64 ``[B, L]``: [CLS] t1 .. tn [SEP], padded.
        tokens: Special token ids.

    Returns:
        [DEC] t1 .. tn padded, and t1 .. tn [SEP] followed by ``IGNORED``; both ``[B, L]``.
    """
    inputs = torch.where(token_ids == tokens.sep, tokens.pad, token_ids)
    inputs[:, 0] = tokens.decode
    following = token_ids.roll(-1, dims=1)
    following[:, -1] = tokens.pad
    return inputs, torch.where(following == tokens.pad, IGNORED, following)
