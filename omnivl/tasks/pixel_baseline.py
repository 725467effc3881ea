"""The baseline without learning: pictures compared by the pixels of thumbnails.

Shapes: N clips, T frames (1 for images), H x W pixels, S side of the thumbnail.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.ranges import Range
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import Media, PictureSet, Reads

DEFAULT_SIZE = 16
MOST_REFERENCES = 16_384
"""Default of ``BaselineReference.max_samples``."""
_CHUNK = 256  # clips at a time, to bound the memory of the float copy


@dataclass(frozen=True)
class BaselineReference:
    """The pictures that the 16x16-pixel baseline compares against.

    Attributes:
        source: Data source of the reference pictures.
        media: ``image`` or ``video``.
        where: Filter of the samples by metadata, e.g. ``{style: [fluent]}``.
        max_samples: Upper bound on the number of samples; a larger source is thinned evenly, which makes the baseline
            weaker.
    """

    source: str = "emoji"
    media: Media = "image"
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    max_samples: Annotated[int, Range(1)] = MOST_REFERENCES

    def picture_set(self, encoder: Encoder, reads: Reads) -> PictureSet:
        """The reference pictures, which have what the task's own have."""
        return PictureSet(self.source, self.media, self.where, encoder.model.inputs, self.max_samples, reads)


def pixel_features(frames: Tensor, size: int = DEFAULT_SIZE) -> Tensor:
    """Thumbnails as vectors, to be compared by Euclidean distance.

    Args:
        frames: uint8 ``[N, T, 3, H, W]``, N at least 1; transparency is white already.
        size: S. Each thumbnail pixel is the mean of the area that it covers.

    Returns:
        fp32 ``[N, T*3*S*S]``, in [0, 1].
    """
    num_frames = frames.shape[1]
    chunks = [
        F.adaptive_avg_pool2d(part.flatten(0, 1).float(), size).reshape(-1, num_frames * 3 * size * size)
        for part in torch.split(frames, _CHUNK)
    ]
    return torch.cat(chunks) / 255


def pixels_of(encoder: Encoder, pictures: PictureSet, *, over_time: bool = False) -> Tensor:
    """``pixel_features`` of a whole set, fp32 ``[N, values]`` on the CPU, computed in shares by all replicas.

    Args:
        encoder: Shares the work over replicas.
        pictures: Pictures or clips.
        over_time: Whether clips are averaged over time, so that they can be compared with images.
    """

    def of_share(share: list[int]) -> Tensor:
        frames = encoder.squares(pictures, share)
        if over_time:
            frames = frames.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        return pixel_features(frames).to(encoder.device)

    return encoder.in_shares(len(pictures), encoder.batch_size, of_share)
