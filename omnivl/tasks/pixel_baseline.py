"""What no learning at all reaches: pictures compared by their pixels, scaled down to thumbnails.

Shapes: N clips, T frames (1 for images), H x W pixels, S side of the thumbnail.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DEFAULT_SIZE = 16
_CHUNK = 256  # clips at a time, to bound the memory of the float copy


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
