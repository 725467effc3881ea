"""A transformer that removes noise from a picture's parts, beside what it is told about the picture.

Shapes: B samples, N parts of a picture, W width of a part, C positions of the condition, E their width, D hidden size.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.dense import DenseFeedForward
from moe.ranges import Range
from omnivl.parts.attention import SelfAttention
from omnivl.parts.linear import LayerNorm, Linear, draw_normal

_EPS = 1e-5
_SLOWEST = 10000.0


@dataclass(frozen=True)
class DenoiserSizes:
    """Sizes of a denoiser.

    Attributes:
        hidden_size: D.
        num_heads: Attention heads.
        layers: Blocks. The first half of them, without the one in the middle, is joined with the last half, the first
            with the last.
        mlp_ratio: Inner size of the feed-forward layer over D.
    """

    hidden_size: Annotated[int, Range(2)] = 512
    num_heads: Annotated[int, Range(1)] = 8
    layers: Annotated[int, Range(1)] = 13
    mlp_ratio: Annotated[float, Range(above=0)] = 4.0


class Denoiser(nn.Module):
    """Reads the time, the condition and the noisy parts as one sequence, and gives a vector for each part.

    A learnt vector stands in place of a condition that is left out. Positions of the condition have what positions its
    encoder gave them.

    Source: Bao et al., U-ViT, arXiv 2209.12152, sections 3.1 and 3.2: everything is a token, and long connections join
        the first blocks with the last ones by a linear map of both.
    Differs: no convolution behind the last block.
    """

    def __init__(self, sizes: DenoiserSizes, parts: int, part_size: int, condition_size: int) -> None:
        """Builds the layers.

        Args:
            sizes: Of the transformer.
            parts: N.
            part_size: W.
            condition_size: E.
        """
        super().__init__()
        width = sizes.hidden_size
        self.inner, self.condition = Linear(part_size, width), Linear(condition_size, width)
        self.time = nn.ModuleList([Linear(width, width), Linear(width, width)])
        self.positions = nn.Parameter(torch.empty(parts, width))
        self.nothing = nn.Parameter(torch.empty(width))
        for table in (self.positions, self.nothing):
            draw_normal(table, std=0.02)
        self.blocks = nn.ModuleList(DenoiserBlock(sizes) for _ in range(sizes.layers))
        self.joins = nn.ModuleList(Linear(2 * width, width) for _ in range(sizes.layers // 2))
        self.norm, self.outer = LayerNorm(width, _EPS), Linear(width, part_size)
        nn.init.zeros_(self.outer.weight)

    def flops(self, positions: float) -> float:
        """Operations on one picture, forward, beside a condition of that many positions."""
        width, parts = len(self.nothing), float(len(self.positions))
        whole = 1.0 + positions + parts
        ends = 2.0 * parts * width * (self.inner.in_features + self.outer.out_features)
        told = 2.0 * width * (positions * self.condition.in_features + 2.0 * width)
        blocks = sum(block.flops(whole) for block in self.blocks if isinstance(block, DenoiserBlock))
        return ends + told + blocks + len(self.joins) * whole * 4.0 * width**2

    def flops_of_noise(self) -> float:
        """Those of ``flops`` whose inputs are drawn, noisy parts and times, and get no gradient."""
        return 2.0 * len(self.nothing) * (len(self.positions) * self.inner.in_features + len(self.nothing))

    def forward(self, noisy: Tensor, times: Tensor, condition: Tensor, mask: Tensor, left_out: Tensor) -> Tensor:
        """Vectors of the parts, ``[B, N, W]`` in the dtype of ``noisy``.

        Args:
            noisy: Parts, ``[B, N, W]``.
            times: fp32 ``[B]``, 0 where they are noise alone, 1 where they are the picture.
            condition: ``[B, C, E]``.
            mask: bool ``[B, C]``, which positions of it there are; the first of each sample is.
            left_out: bool ``[B]``, whose condition is left out.
        """
        told = torch.where(left_out[:, None, None], self.nothing.to(noisy.dtype), self.condition(condition))
        seen = mask & ~left_out[:, None]
        seen[:, 0] = True
        count, positions = seen.shape
        when = self.time[1](F.silu(self.time[0](waves(times, len(self.nothing)).to(noisy.dtype))))
        parts = self.inner(noisy) + self.positions.to(noisy.dtype)
        x = torch.cat([when[:, None], told, parts], dim=1)
        everything = torch.cat([seen.new_ones(count, 1), seen, seen.new_ones(count, parts.shape[1])], dim=1)
        before: list[Tensor] = []
        for place, block in enumerate(self.blocks):
            if place >= len(self.blocks) - len(self.joins):
                x = self.joins[len(before) - 1](torch.cat([x, before.pop()], dim=-1))
            x = block(x, everything)
            if place < len(self.joins):
                before.append(x)
        found: Tensor = self.outer(self.norm(x[:, 1 + positions :]))
        return found


class DenoiserBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, sizes: DenoiserSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.norm1, self.attention = LayerNorm(width, _EPS), SelfAttention(width, sizes.num_heads)
        self.norm2, self.ffn = LayerNorm(width, _EPS), DenseFeedForward(width, round(width * sizes.mlp_ratio))

    def flops(self, positions: float) -> float:
        """Operations on one row of ``positions`` positions, forward."""
        dense = 4.0 * positions * self.ffn.fc1.in_features * self.ffn.fc1.out_features
        return self.attention.flops(positions, positions) + dense

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Advances ``x [B, S, D]``; ``mask``, bool ``[B, S]``, says which positions are attended to."""
        x = x + self.attention(self.norm1(x), mask)
        advanced: Tensor = x + self.ffn(self.norm2(x)).y
        return advanced


def waves(times: Tensor, width: int) -> Tensor:
    """Cosines and sines of times, fp32 ``[B]`` from 0 to 1, at many frequencies, fp32 ``[B, width]``.

    Source: Vaswani et al., arXiv 1706.03762, section 3.5, with times in thousandths as positions.
    """
    half = (width + 1) // 2
    scale = torch.arange(half, device=times.device, dtype=torch.float32) / half
    angles = 1000.0 * times[:, None] * _SLOWEST**-scale
    return torch.cat([angles.cos(), angles.sin()], dim=1)[:, :width]
