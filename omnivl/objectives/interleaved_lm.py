"""Language modelling of documents: each word from the words before it and from pictures at their places in the text.

Shapes: B samples, R rows, L token positions of the language model, n positions with a target, V words and marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from omnivl.chain.demands import Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, Objective, ObjectiveLoss, PrepareContext
from omnivl.chain.positions import IGNORED, chosen_of, prepared_targets
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind, has_text, is_label, visual_of
from omnivl.data.documents import END, END_TOKEN, PICTURE, Document, read_document
from omnivl.data.tokenizer import TextReader
from omnivl.errors import DataError
from omnivl.objectives.prefix_lm import STREAM
from omnivl.objectives.vocabulary import num_targets, words_loss


@dataclass(frozen=True)
class InterleavedLM(Objective):
    """Next-token prediction of texts with pictures at their places, in the stream ``interleaved``.

    A text has a mark ``<image>`` for each of its pictures, in their order, and ``<EOC>`` where what is said of a
    picture ends. A text of one picture or clip that has no ``<image>`` gets one in front and ``<EOC>`` behind. The
    words from a picture's mark to its ``<EOC>``, and ``<EOC>`` itself, are predicted; all other words are given. Of
    texts without pictures (kind ``text``) all words and a final ``<EOC>`` are predicted. A row that is longer than
    ``model.language.length`` is cut.

    For weights by data set, give each entry an objective of its own with ``on``, ``name`` and ``weight``. Flamingo's
    are 1 for interleaved pages, 0.2 for each of two sets of pairs and 0.03 for clips.

    Attributes:
        include_labels: Whether class prompts are predicted too.

    Source: Alayrac et al., Flamingo, arXiv 2204.14198, sections 3.1.3 and 3.3; OpenFlamingo's code for what is
        predicted.
    Differs: a mark always looks at its own picture; the paper looks at the next one in a random half of its pages.
    """

    picture_mark: ClassVar[str] = PICTURE

    kind: Literal["interleaved_lm"] = "interleaved_lm"
    include_labels: bool = False

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A row of tokens per sample, which looks at the sample's pictures if it has any."""
        if not has_text(kind) or (is_label(kind) and not self.include_labels):
            return None
        return self._rows(batch_size, visual_of(kind) != "none")

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """A row of tokens per text, which looks at pictures; see ``rows``."""
        return None if visual_of(kind) == "none" else self._rows(batch_size, looks=True)

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """See ``rows``, of the batch's texts.

        Raises:
            DataError: A text has another number of marks than its sample has pictures.
        """
        reader, alone = context.readers[STREAM], batch.visual == "none"
        wanted = {"none": 0, "set": batch.num_frames}.get(batch.visual, 1)
        documents = []
        for row, text in enumerate(batch.captions):
            if alone:
                text = f"{text}{END}"
            elif wanted == 1 and PICTURE not in text:
                text = f"{PICTURE}{text}{END}"
            if (found := text.count(PICTURE)) != wanted:
                raise DataError(
                    f"objective {self.key}: entry {batch.entry!r}, sample {int(batch.position[row])}: got a text with "
                    f"{found} {PICTURE} marks and {wanted} pictures; allowed is a mark for each picture, in their "
                    "order; name another field as text, or other pictures"
                )
            documents.append(read_document(text, reader))
        return self.rows(documents, reader, [1] * len(documents) if alone else None)

    def rows(
        self, documents: Sequence[Document], reader: TextReader, given: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Inputs of rows by name.

        ``{key}/token_ids``, ``{key}/targets`` and ``{key}/pictures`` int64 ``[R, L]``, ``{key}/mask`` bool ``[R, L]``,
        and ``{key}/chosen`` int64 ``[n]``.

        Args:
            documents: R documents.
            reader: Of the language model.
            given: How many tokens at the beginning of each document are given, while all behind them are predicted;
                None: those are predicted that are ``said`` of pictures.
        """
        shape, special = (len(documents), reader.length), reader.tokenizer.special
        ids, pictures = torch.full(shape, special.pad), torch.zeros(shape, dtype=torch.int64)
        mask, wanted = torch.zeros(shape, dtype=torch.bool), torch.full(shape, IGNORED)
        for row, document in enumerate(documents):
            own = torch.from_numpy(document.ids[: reader.length])
            if given is None:
                chosen = torch.from_numpy(document.said[: len(own)])
            else:
                chosen = torch.arange(len(own)) >= given[row]
            ids[row, : len(own)], mask[row, : len(own)] = own, True
            pictures[row, : len(own)] = torch.from_numpy(document.pictures[: len(own)])
            wanted[row, : len(own) - 1] = torch.where(chosen, own, IGNORED)[1:]
        made = {f"{self.key}/token_ids": ids, f"{self.key}/pictures": pictures, f"{self.key}/mask": mask}
        return made | prepared_targets(self.key, wanted)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The tokens that are predicted."""
        return {self.key: num_targets(state[f"{self.key}/targets"])}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean cross-entropy over the tokens that are predicted."""
        logits = state[f"logits/{self.key}"]
        return words_loss(logits, self._wanted(state), gather, term_weight=state.term_weight(self.key))

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The logarithm of the probability of all targets of a row, the sum over them, fp32 ``[R]``."""
        wanted, length = self._wanted(state), state[f"{self.key}/targets"].shape[1]
        each = state[f"logits/{self.key}"].log_softmax(-1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        each = each.masked_fill(wanted == IGNORED, 0.0)
        total = each.new_zeros(len(state[f"{self.key}/targets"]))
        return total.index_add(0, chosen_of(state, self.key) // length, each)

    def _rows(self, count: int, looks: bool) -> Demands:
        reads = frozenset({"interleaved"}) if looks else frozenset[str]()
        return Demands(rows={STREAM: {self.key: count}}, reads=reads)

    def _wanted(self, state: State) -> Tensor:
        """The targets at ``chosen_of`` these, int64 ``[n]``, as columns of the logits."""
        wanted = state[f"{self.key}/targets"].flatten()[chosen_of(state, self.key)]
        columns = state[f"logits/{self.key}"].shape[-1]
        return torch.where(wanted == END_TOKEN, columns + END_TOKEN, wanted)
