"""Masked language modelling, grounded in the sample's image or clip.

Shapes: B samples, L text positions.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from omnivl.data.batch import Batch, DataKind, is_label
from omnivl.model.gather import Gather
from omnivl.model.state import State
from omnivl.objectives.base import Demands, Objective, ObjectiveLoss, PrepareContext, SpecialTokens
from omnivl.objectives.vocabulary import IGNORED, token_loss

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class MLM(Objective):
    """Hides tokens; the masked text goes through the text encoder and, seeing the sample, the alignment decoder.

    Attributes:
        probability: Share of ordinary tokens to predict. At least one per text that has any.
        mask_share: Share of these replaced by [MASK].
        random_share: Share of these replaced by a random ordinary token; the rest stays as it is.
        include_labels: Whether class prompts are masked too.

    Source: Devlin et al., BERT, arXiv 1810.04805, section 3.1.
    Differs: a text in which no token was drawn gets one all the same.
    """

    kind: Literal["mlm"] = "mlm"
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    include_labels: bool = False

    uses_vocabulary_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(0.0 < self.probability <= 1.0, "probability", "above 0 and at most 1")
        self.require(0.0 <= self.mask_share <= 1.0, "mask_share", "from 0 to 1")
        most = 1.0 - self.mask_share
        self.require(0.0 <= self.random_share <= most + 1e-9, "random_share", f"from 0 to 1 - mask_share = {most:g}")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """One masked text row and one alignment row per sample."""
        if is_label(kind) and not self.include_labels:
            return None
        return Demands(visual=True, masked_text=batch_size, alignment={self.name: batch_size})

    def prepare(self, batch: Batch, context: PrepareContext) -> dict[str, Tensor]:
        """Draws ``mlm/token_ids`` and ``mlm/targets``, int64 ``[B, L]``."""
        token_ids, targets = batch.token_ids.numpy().copy(), np.full(batch.token_ids.shape, IGNORED, dtype=np.int64)
        for row, position in enumerate(batch.position.tolist()):
            random = context.generator(self.name, position)
            token_ids[row], targets[row] = self.corrupt(random, token_ids[row], context.tokens)
        return {
            f"{self.name}/token_ids": torch.from_numpy(token_ids),
            f"{self.name}/targets": torch.from_numpy(targets),
        }

    def corrupt(self, random: np.random.Generator, token_ids: Ids, tokens: SpecialTokens) -> tuple[Ids, Ids]:
        """Hides tokens of one text.

        The draws of a position do not depend on how long the padding is.

        Args:
            random: The sample's generator.
            token_ids: int64 ``[L]``.
            tokens: Which ids are special, hence never hidden and never put in.

        Returns:
            The corrupted text and the targets, int64 ``[L]`` each.
        """
        positions = np.flatnonzero(ordinary(token_ids, tokens))
        corrupted, targets = token_ids.copy(), np.full(token_ids.shape, IGNORED, dtype=np.int64)
        if positions.size == 0:
            return corrupted, targets
        chosen = positions[random.random(positions.size) < self.probability]
        if chosen.size == 0:
            chosen = positions[[random.integers(positions.size)]]
        targets[chosen] = token_ids[chosen]
        lot, replacement = random.random(chosen.size), random.choice(ordinary_ids(tokens), size=chosen.size)
        masked, replaced = lot < self.mask_share, lot >= 1.0 - self.random_share
        corrupted[chosen[masked]] = tokens.mask
        corrupted[chosen[~masked & replaced]] = replacement[~masked & replaced]
        return corrupted, targets

    def loss(self, state: State, head: nn.Module | None, gather: Gather) -> ObjectiveLoss:
        """Mean cross-entropy over hidden tokens."""
        hidden = state["alignment"][state.layout.alignment[self.name]]
        return token_loss(hidden, state[f"{self.name}/targets"], head, gather)


def ordinary(token_ids: Ids, tokens: SpecialTokens) -> NDArray[np.bool_]:
    """Where a token is neither special nor reserved."""
    special = [tokens.pad, tokens.cls, tokens.sep, tokens.mask, tokens.decode]
    return (token_ids >= tokens.num_reserved) & ~np.isin(token_ids, special)


@lru_cache(maxsize=4)
def ordinary_ids(tokens: SpecialTokens) -> Ids:
    """All ids that may be put in for a hidden token."""
    ids = np.arange(tokens.vocab_size, dtype=np.int64)
    return ids[ordinary(ids, tokens)]
