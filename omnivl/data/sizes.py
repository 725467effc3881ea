"""The sizes of a model that loading data needs: those of pictures, clips and texts.

Shapes: K pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

Size = int | tuple[int, int]
"""Of a view: the side of a square that shows a part of the picture, or the (width, height) of one that shows all."""

SizeOf = int | Callable[[int, int], tuple[int, int]]
"""Of the views of a model: the side of all, or a function of the picture's own width and height."""


@dataclass(frozen=True)
class PictureSizes:
    """Sizes of images and clips, and of their patches.

    Attributes:
        image_size: Side of an image in pixels.
        video_size: Side of a frame of a clip in pixels.
        num_frames: Frames of a clip.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch of a clip.
        native: Whether a picture or clip keeps its own size and ratio; ``image_size`` and ``video_size`` then say how
            many patches it has at most: as many as a square of that side.
        stretched: Whether a square shows the whole picture, whatever its ratio, and not a part.
    """

    image_size: int
    video_size: int
    num_frames: int
    patch_size: int
    tubelet_size: int
    native: bool = field(default=False, kw_only=True)
    stretched: bool = field(default=False, kw_only=True)

    def side(self, is_video: bool) -> int:
        """Side of an image, or of a frame of a clip, in pixels."""
        return self.video_size if is_video else self.image_size

    def time_positions(self, num_frames: int) -> int:
        """Time positions of a clip of ``num_frames``; an image (one frame) has one."""
        return max(num_frames // self.tubelet_size, 1)

    def grid(self, is_video: bool) -> tuple[int, int]:
        """Patches per side of an image, or of a frame of a clip, (rows, columns)."""
        side = self.side(is_video) // self.patch_size
        return side, side

    def size_of_view(self, is_video: bool) -> SizeOf:
        """The size of what a model sees of a picture, or of a frame of a clip."""
        if self.stretched:
            return stretched_to(self.side(is_video))
        return partial(self.native_size, is_video) if self.native else self.side(is_video)

    def native_size(self, is_video: bool, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the view of a picture that keeps its size; see ``grids``."""
        rows, columns = self.grids(is_video, np.array([[width, height]], dtype=np.int64))[0].tolist()
        return columns * self.patch_size, rows * self.patch_size

    def grids(self, is_video: bool, pictures: NDArray[np.int64]) -> NDArray[np.int64]:
        """Patches of a frame of pictures or clips that keep their sizes, int64 ``[K, 2]``: rows, columns.

        A picture is reduced until its patches are few enough, and never enlarged beyond the next whole patch.

        Args:
            is_video: Whether they are clips.
            pictures: Widths and heights in pixels, int64 ``[K, 2]``; 0 where they are not known: such a picture may
                have the most.

        Source: sizes of their own as in Dehghani et al., NaViT, arXiv 2307.06304; a bound on their patches that keeps
            the ratio as in SigLIP 2's NaFlex, arXiv 2502.14786, section 2.4.
        Differs: NaFlex enlarges small pictures until they have as many patches as allowed.
        """
        rows, columns = self.grid(is_video)
        most = rows * columns
        exact = pictures[:, ::-1] / self.patch_size
        area = np.maximum(exact.prod(axis=1, keepdims=True), 1e-9)
        exact = exact * np.minimum(1.0, np.sqrt(most / area))
        # A side of more than all patches stands beside a side of one: it is cut here, not patch by patch below.
        grids: NDArray[np.int64] = np.clip(np.rint(exact), 1, most).astype(np.int64)
        while (over := np.flatnonzero(grids.prod(axis=1) > most)).size:
            # The side that was rounded up more, as long as it has a patch to give.
            enlarged = np.where(grids[over] > 1, grids[over] / np.maximum(exact[over], 1e-9), 0.0)
            grids[over, enlarged.argmax(axis=1)] -= 1
        grids[(pictures <= 0).any(axis=1)] = rows, columns
        return grids


def stretched_to(side: int) -> SizeOf:
    """The size of a square view of a whole picture, whatever the picture's own is."""
    return partial(_square, side)


def _square(side: int, width: int, height: int) -> tuple[int, int]:
    return side, side


@dataclass(frozen=True)
class InputSizes(PictureSizes):
    """Sizes of what a model reads.

    Attributes:
        text_length: Token positions per text, special tokens included.
        visual_width: Hidden size of the visual stream, by which the work that a picture takes is estimated.
    """

    text_length: int
    visual_width: int = field(default=768, kw_only=True)

    @classmethod
    def of(cls, pictures: PictureSizes, text_length: int, visual_width: int = 768) -> Self:
        """The sizes of pictures with that of texts beside them."""
        own = {size.name: getattr(pictures, size.name) for size in fields(PictureSizes)}
        return cls(text_length=text_length, visual_width=visual_width, **own)
