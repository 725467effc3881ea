"""Masked frame modelling: whole frames of a clip are masked and restored from the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from omnivl.objectives.masked_visual import MaskedVisual
from omnivl.objectives.masking import Mask, frame_mask, over_patches


@dataclass(frozen=True)
class MFM(MaskedVisual):
    """Masked frames, on videos. Each frame (or tubelet) is masked with ``probability``, at least one, never all."""

    kind: Literal["mfm"] = "mfm"

    on_videos: ClassVar[bool] = True
    masks_times: ClassVar[bool] = True

    def mask(self, random: np.random.Generator, times: int, grid: tuple[int, int]) -> Mask:
        """Whole frames, bool ``[T, N]``.

        Raises:
            UserError: The clip has a single temporal position.
        """
        self.require_times(times)
        return over_patches(frame_mask(random, times, self.probability), grid)
