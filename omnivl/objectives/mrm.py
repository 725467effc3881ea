"""Masked region modelling: rectangles of patches of an image are masked and restored."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from omnivl.objectives.masked_visual import MaskedVisual
from omnivl.objectives.masking import Mask, block_mask


@dataclass(frozen=True)
class MRM(MaskedVisual):
    """Masked regions, on images.

    Attributes:
        min_block: Smallest area that is drawn for a masked rectangle, in patches. The last ones of a picture are
            smaller where fewer patches are left to mask; see ``block_mask``.

    Source: Bao et al., BEiT, arXiv 2106.08254 (block-wise masking); He et al., MAE, arXiv 2111.06377 (pixel targets).
    """

    kind: Literal["mrm"] = "mrm"
    min_block: int = 4

    on_videos: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.min_block >= 1, "min_block", "at least 1")

    def mask(self, random: np.random.Generator, times: int, grid: tuple[int, int]) -> Mask:
        """Rectangles over one image, bool ``[1, N]``."""
        assert times == 1, "an image has one temporal position"
        return block_mask(random, grid, self.probability, self.min_block).reshape(1, -1)
