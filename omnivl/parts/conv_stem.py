"""Images to tokens by the first stages of a residual network.

Shapes: M images, C channels, H x W pixels, N = (H / 16) * (W / 16) positions, D hidden size.

Source: He et al., ResNet, arXiv 1512.03385, table 1 and figure 5 (the stem and the stages up to a stride of 16, with
    bottlenecks); as image tokens: Wang et al., SimVLM, arXiv 2108.10904, section 3.2.
Differs: groups of channels are normalised (Wu and He, arXiv 1803.08494) instead of the batch, so that a sample does not
    depend on others and a forward pass changes nothing. The last norm of a block starts from zero.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.working import working
from omnivl.errors import ModelError
from omnivl.parts.embed import resize_positions
from omnivl.parts.linear import Linear, draw_normal

STRIDE = 16
EXPANSION = 4
"""Channels of a stage over those of its 3 x 3 convolutions."""
_GROUPS, _EPS = 32, 1e-5


class Convolution(nn.Module):
    """A convolution without a bias, in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, size, size))
        self.stride, self.padding = stride, size // 2
        draw_normal(self.weight, std=(2 / (outputs * size**2)) ** 0.5)  # variance 1 of what goes back through ReLU
        self.values = inputs * outputs * size**2

    def flops(self, side: float) -> float:
        """Operations on one image of ``side`` x ``side`` positions before the convolution, forward."""
        return 2.0 * self.values * (side / self.stride) ** 2

    def forward(self, x: Tensor) -> Tensor:
        """``[M, C, H, W]`` to ``[M, C', H / stride, W / stride]``."""
        return F.conv2d(x, working(self.weight, x.dtype), None, self.stride, self.padding)


class GroupNorm(nn.Module):
    """Normalises groups of channels of each image, in the dtype of its input."""

    def __init__(self, channels: int, scale: float = 1.0, groups: int = _GROUPS) -> None:
        super().__init__()
        self.groups = math.gcd(groups, channels)
        self.weight = nn.Parameter(torch.full((channels,), scale))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[M, C, H, W]``."""
        return F.group_norm(x, self.groups, working(self.weight, x.dtype), working(self.bias, x.dtype), _EPS)


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 beside a shortcut, which is a map where shapes differ."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1, self.norm1 = Convolution(inputs, width, 1), GroupNorm(width)
        self.conv2, self.norm2 = Convolution(width, width, 3, stride), GroupNorm(width)
        self.conv3, self.norm3 = Convolution(width, outputs, 1), GroupNorm(outputs, scale=0.0)
        differs = inputs != outputs or stride != 1
        self.shortcut = Convolution(inputs, outputs, 1, stride) if differs else None
        self.norm_shortcut = GroupNorm(outputs) if differs else None

    def flops(self, side: float) -> float:
        """Operations on one image, forward."""
        inner = self.conv1.flops(side) + self.conv2.flops(side) + self.conv3.flops(side / self.conv2.stride)
        return inner + (0.0 if self.shortcut is None else self.shortcut.flops(side))

    def forward(self, x: Tensor) -> Tensor:
        """``[M, C, H, W]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.shortcut is not None:
            assert self.norm_shortcut is not None
            x = self.norm_shortcut(self.shortcut(x))
        return F.relu(x + y)


class ConvEmbedding(nn.Module):
    """Stem, stages, a map to the hidden size, and positions."""

    def __init__(self, width: int, depths: Sequence[int], grid: tuple[int, int], hidden_size: int) -> None:
        """Builds the embedding.

        Args:
            width: Channels of the stem, and of the first stage's 3 x 3 convolutions; each stage doubles them.
            depths: Blocks of the stages; the first keeps the stem's stride of 4, each other one doubles it.
            grid: Rows and columns of positions.
            hidden_size: D.
        """
        super().__init__()
        self.stem, self.norm = Convolution(3, width, 7, stride=2), GroupNorm(width)
        blocks, inputs = list[Bottleneck](), width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            for place in range(depth):
                blocks.append(Bottleneck(inputs, inner, 2 if stage > 0 and place == 0 else 1))
                inputs = EXPANSION * inner
        self.blocks = nn.ModuleList(blocks)
        self.linear = Linear(inputs, hidden_size)
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], hidden_size))
        nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The positions."""
        yield self.positions

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes positions to another grid."""
        side = round(own.shape[0] ** 0.5)
        return resize_positions(before, (side, side)) if name == "positions" else None

    def flops(self, side: int) -> float:
        """Operations on one image of ``side`` pixels, forward."""
        total, here = self.stem.flops(side), side / 4
        for block in self.blocks:
            assert isinstance(block, Bottleneck)
            total += block.flops(here)
            here /= block.conv2.stride
        return total + here**2 * 2.0 * self.linear.in_features * self.linear.out_features

    def forward(self, frames: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeds uint8 ``frames [M, 1, 3, H, W]`` to ``[M, N, D]`` of ``dtype``.

        Raises:
            ModelError: There are several frames or pictures in a sample, or their size is no multiple of 16.
        """
        if frames.shape[1] != 1:
            raise ModelError(
                f"images by convolutions: got samples of {frames.shape[1]} frames or pictures; allowed is one image; "
                "change the kind of the data entry to 'image_text', or model.kind"
            )
        height, width = frames.shape[-2:]
        if height % STRIDE or width % STRIDE:
            raise ModelError(f"images of {height} x {width} pixels: not a multiple of {STRIDE}; change the size")
        x = frames[:, 0].to(torch.float32).div(127.5).sub(1.0).to(dtype)
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        where = resize_positions(self.positions, (height // STRIDE, width // STRIDE))
        embedded: Tensor = self.linear(x.flatten(2).transpose(1, 2)) + where.to(dtype)
        return embedded
