"""A learnt bias of attention by the relative position of two patches of a frame.

Shapes: H heads, N = side * side patches of a frame, after one class token.

Source: Bao et al., BEiT, arXiv 2106.08254, section 2.5 of its code; Liu et al., Swin, arXiv 2103.14030, eq. 4.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omnivl.errors import ModelError


class RelativePositions(nn.Module):
    """One number per head for each (row, column) distance, and three for pairs with the class token."""

    def __init__(self, side: int, num_heads: int) -> None:
        """Starts from zero, that is, without an effect.

        Args:
            side: Patches per side of a training image.
            num_heads: H.
        """
        super().__init__()
        self.bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, num_heads))

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The table."""
        yield self.bias

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes the table to frames of another size."""
        return resize_relative(before, (math.isqrt(len(own) - 3) + 1) // 2)

    def forward(self, num_patches: int) -> Tensor:
        """The bias ``[H, 1 + N, 1 + N]`` (query, key) of a square frame, added to the scores of attention.

        Raises:
            ModelError: The frame is not square.
        """
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ModelError(
                f"frame of {num_patches} patches: model.vision.relative_positions needs square frames without dropped "
                "patches; change the frames or set it to false"
            )
        table = resize_relative(self.bias, side)
        places = torch.arange(num_patches, device=table.device)
        rows, columns = places // side, places % side
        down = rows[:, None] - rows + side - 1
        right = columns[:, None] - columns + side - 1
        index = F.pad(down * (2 * side - 1) + right, (1, 0, 1, 0))
        from_class, to_class, alone = range(len(table) - 3, len(table))
        index[0], index[:, 0], index[0, 0] = from_class, to_class, alone
        return table[index].permute(2, 0, 1)


def resize_relative(table: Tensor, side: int) -> Tensor:
    """Bilinear interpolation of a table ``[(2 s - 1)^2 + 3, H]`` to frames of ``side`` patches per side."""
    old = math.isqrt(len(table) - 3)
    if old == 2 * side - 1:
        return table
    image = table[:-3].t().reshape(1, -1, old, old)
    resized = F.interpolate(image, size=(2 * side - 1, 2 * side - 1), mode="bilinear", align_corners=False)
    return torch.cat([resized.flatten(2)[0].t(), table[-3:]])
