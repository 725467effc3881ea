"""Masked clip modelling: runs of consecutive frames are masked and restored from the frames before and after."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from omnivl.objectives.masked_visual import MaskedVisual
from omnivl.objectives.masking import Mask, clip_mask, over_patches


@dataclass(frozen=True)
class MCM(MaskedVisual):
    """Masked clips, on videos: time is cut into short clips, each masked with ``probability``; at least one, never all.

    Attributes:
        clip_length: Consecutive frames (or tubelets) per clip; at most half of the video is one clip.
    """

    kind: Literal["mcm"] = "mcm"
    clip_length: int = 2

    on_videos: ClassVar[bool] = True
    masks_times: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            UserError: An option is out of its range.
        """
        super().__post_init__()
        self.require(self.clip_length >= 1, "clip_length", "at least 1")

    def mask(self, random: np.random.Generator, times: int, grid: tuple[int, int]) -> Mask:
        """Whole clips of consecutive frames, bool ``[T, N]``.

        Raises:
            UserError: The clip has a single temporal position.
        """
        self.require_times(times)
        return over_patches(clip_mask(random, times, self.probability, self.clip_length), grid)
