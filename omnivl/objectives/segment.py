"""Segmentation by a text: the pixels of what it speaks of.

Shapes: B samples, R rows, N patches of an image, p side of a patch, S side of the image in pixels, P inner width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.chain.gather import Gather
from omnivl.chain.objective import Heads, ObjectiveLoss, replica_mean
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.fields import Field
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.objectives.patches import PatchObjective, PatchScores
from omnivl.parts.linear import LayerNorm, Linear


@dataclass(frozen=True)
class Segment(PatchObjective):
    """Which pixels of the image are what the text speaks of?

    Each patch gives a score for each of its pixels, from the product of its features with the fused row as a whole,
    both projected. A sample's field ``mask`` is a file that is black outside. Samples whose mask is empty in the view
    are left out and not counted.

    Attributes:
        field: Field with the mask.
        dice_weight: Factor of 1 - Dice coefficient beside the mean binary cross-entropy of the pixels.

    Source: Milletari et al., V-Net, arXiv 1606.04797, section 3, for the Dice loss; one linear map from a patch to its
        pixels as in Strudel et al., Segmenter, arXiv 2105.05633, section 3.2.
    """

    kind: Literal["segment"] = "segment"
    field: str = "mask"
    dice_weight: float = 1.0

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.dice_weight >= 0.0, "dice_weight", "at least 0")

    @property
    def sample_fields(self) -> Mapping[str, Field]:
        """The mask."""
        return {self.field: Field("mask")}

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Images of their own sizes: a mask is a square."""
        if inputs.native:
            yield Misfit(("kind",), "'segment' with sizes: native", "images of one size", "change model.sizes")

    @property
    def _present(self) -> str:
        return f"field/{self.field}/present"

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Scores of pixels from a pooled fused row and patches."""
        return MaskHead(sizes.pooled, self.patch_width(sizes), self.inner_size, sizes.patch_size)

    def terms(self, state: State, gather: Gather) -> dict[str, Tensor]:
        """The masks that show something."""
        return {self.key: state[self._present].sum()}

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Binary cross-entropy, mean over pixels, and Dice, of each mask; mean over masks that show something.

        Metric: ``iou``, the mean intersection over union of these.
        """
        logits, present = self.predict(state, heads), state[self._present]
        wanted = state[f"field/{self.field}"].to(logits.dtype)
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
        if self.dice_weight > 0.0:
            each = each + self.dice_weight * (1.0 - dice(logits.sigmoid(), wanted))
        count = present.sum()
        loss = replica_mean((each * present).sum(), count, gather, state.term_weight(self.key))
        with torch.no_grad():
            found, inside = logits > 0, wanted > 0
            shared, either = (found & inside).sum((1, 2)), (found | inside).sum((1, 2)).clamp(min=1)
            iou = (shared / either * present).sum() / count.clamp(min=1)
        return ObjectiveLoss(loss, {"iou": iou})

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The score of each pixel, fp32 ``[R, S, S]``: above 0 it belongs to what the text speaks of."""
        assert isinstance(heads.own, MaskHead)
        scores: Tensor = heads.own(state.pooled(self.key), self.patches_of(state))
        return scores


class MaskHead(PatchScores):
    """The product of a projected fused row with projected patches, LayerNorm, and a score for each pixel of a patch."""

    def __init__(self, row_size: int, patch_width: int, inner_size: int, patch_size: int) -> None:
        super().__init__(row_size, patch_width, inner_size)
        self.side = patch_size
        self.norm = LayerNorm(inner_size, eps=1e-5)
        self.pixels = Linear(inner_size, patch_size**2)

    def forward(self, pooled: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]
        """fp32 ``[R, S, S]`` from ``[R, D]`` and ``[R, N, D']``."""
        query, keys = super().forward(pooled, patches)
        scores = self.pixels(self.norm(query[:, None] * keys)).float()
        grid = round(scores.shape[1] ** 0.5)
        tiles = scores.view(-1, grid, grid, self.side, self.side)
        whole: Tensor = tiles.transpose(2, 3).reshape(-1, grid * self.side, grid * self.side)
        return whole


def dice(found: Tensor, wanted: Tensor) -> Tensor:
    """The Dice coefficient of masks ``[R, S, S]`` with values from 0 to 1, ``[R]``; 1 is added to both of its sides."""
    shared = (found * wanted).sum(dim=(1, 2))
    return (2.0 * shared + 1.0) / (found.sum(dim=(1, 2)) + wanted.sum(dim=(1, 2)) + 1.0)
