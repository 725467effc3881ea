"""Language modelling with a visual prefix: a language model continues a picture's queries with the caption.

Shapes: B samples, L token positions of the language model, n positions with a target, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from omnivl.chain.demands import Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext, Writing
from omnivl.chain.positions import IGNORED, chosen_of, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.data.tokenizer import TextReader
from omnivl.errors import UserError
from omnivl.objectives.vocabulary import num_targets, words_loss

STREAM = "language"


@dataclass(frozen=True)
class PrefixLM(Objective):
    """Next-token prediction in the stream ``language``: captions with queries as prefix, texts alone without.

    A row is start token, prompt, caption, end token. The caption and the end are predicted, the rest is given.

    Attributes:
        prompt: Text before every caption, e.g. ``a photo of``.
        end: Text of the one token that ends a caption, e.g. a newline as in BLIP-2 with OPT; null: the tokenizer's end
            token.
        include_labels: Whether class prompts are predicted too.

    Source: Li et al., BLIP-2, arXiv 2301.12597, section 3.3; its released code for OPT.
    Differs: without a prompt its code predicts the start token too, from the last query.
    """

    kind: Literal["prefix_lm"] = "prefix_lm"
    prompt: str = ""
    end: str | None = "\n"
    include_labels: bool = False

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A row of tokens per sample, with the sample's queries as prefix if it has an image or clip."""
        if not has_text(kind) or visual_of(kind) == "set" or (is_label(kind) and not self.include_labels):
            return None
        reads = frozenset[str]() if visual_of(kind) == "none" else frozenset({"queries"})
        return Demands(rows={STREAM: {self.key: batch_size}}, reads=reads)

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A row of tokens per text, with queries as prefix."""
        if visual_of(kind) not in ("image", "clip"):
            return None
        return Demands(rows={STREAM: {self.key: batch_size}}, reads=frozenset({"queries"}))

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Makes ``{key}/token_ids`` and ``{key}/targets``, int64 ``[B, L]``, and ``{key}/mask``, bool ``[B, L]``."""
        reader = context.readers[STREAM]
        texts = [f"{self.prompt} {text}" if self.prompt else text for text in batch.captions]
        ids = reader.encode(texts)
        # The end is searched after the start, which is the same token in some tokenizers.
        ends = 1 + (ids[:, 1:] == reader.tokenizer.special.sep).argmax(1)
        ids[np.arange(len(ids)), ends] = self._end(reader)
        places = np.arange(ids.shape[1])
        targets = np.full_like(ids, IGNORED)
        targets[:, :-1] = ids[:, 1:]
        given = len(self._given(reader))
        targets[(places >= ends[:, None]) | (places < given - 1)] = IGNORED
        return {
            f"{self.key}/token_ids": torch.from_numpy(ids),
            **prepared_targets(self.key, torch.from_numpy(targets)),
            f"{self.key}/mask": torch.from_numpy(places <= ends[:, None]),
        }

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The tokens of captions and their ends."""
        return {self.key: num_targets(state[f"{self.key}/targets"])}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean cross-entropy over the tokens of captions and their ends."""
        targets = state[f"{self.key}/targets"]
        wanted = targets.flatten()[chosen_of(state, self.key)]
        return words_loss(state[f"logits/{self.key}"], wanted, gather, term_weight=state.term_weight(self.key))

    def predict(self, state: State, heads: Heads) -> Tensor:
        """Logits of what follows the last position of each row, fp32 ``[R, V]``."""
        return state[f"logits/{self.key}"]

    def writing(self, own: TextReader, readers: Mapping[str, TextReader]) -> Writing | None:
        """Writes from the start token and the prompt to the end token."""
        if STREAM not in readers:
            return None
        reader = readers[STREAM]
        given = self._given(reader)
        return Writing(reader.tokenizer, given, self._end(reader), reader.length - len(given))

    def _given(self, reader: TextReader) -> tuple[int, ...]:
        """The start token and the tokens of the prompt."""
        return (reader.tokenizer.special.cls, *(reader.words(self.prompt) if self.prompt else ()))

    def _end(self, reader: TextReader) -> int:
        """The token that ends a caption.

        Raises:
            UserError: The tokenizer has no single token for it.
        """
        if self.end is None:
            return reader.tokenizer.special.sep
        words = reader.words(self.end)
        if len(words) != 1:
            raise UserError(
                f"objective {self.key}: end: got {self.end!r}, which is {len(words)} tokens of the language model's "
                "tokenizer; allowed is a text of one token, or null for the tokenizer's own end; change it"
            )
        return words[0]
