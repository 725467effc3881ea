"""The sizes of a model that loading data needs: those of pictures, clips and texts."""

from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class PictureSizes:
    """Sizes of images and clips, and of their patches.

    Attributes:
        image_size: Side of an image in pixels.
        video_size: Side of a frame of a clip in pixels.
        num_frames: Frames of a clip.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per 3D patch of a clip.
    """

    image_size: int
    video_size: int
    num_frames: int
    patch_size: int
    tubelet_size: int

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


@dataclass(frozen=True)
class InputSizes(PictureSizes):
    """Sizes of what a model reads.

    Attributes:
        text_length: Token positions per text, special tokens included.
    """

    text_length: int

    @classmethod
    def of(cls, pictures: PictureSizes, text_length: int) -> Self:
        """The sizes of pictures with that of texts beside them."""
        return cls(
            text_length=text_length, **{size.name: getattr(pictures, size.name) for size in fields(PictureSizes)}
        )
