"""Codes of patches: targets of masked visual objectives that are classes, from a fixed codebook.

A codebook turns what a patch is, its pixels or a twin's features, into the number of a code. A new kind of codebook is
a configuration with ``num_codes`` and ``build``.

Shapes: K patches, C values of a patch, V codes, W width of a code.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.parts.heads import VocabularyHead
from omnivl.parts.padding import selected


@dataclass(frozen=True)
class RandomCodebook:
    """The nearest of random vectors to a random projection of a patch. Nothing of it is trained.

    Attributes:
        num_codes: Number V of codes.
        width: Width W of the projection and of codes.
        seed: Of both. Objectives with equal codebooks have equal codes.

    Source: Chiu et al., BEST-RQ, arXiv 2202.01855, section 3.1: the projection is Xavier's, codes are normal.
    Differs: lengths are not normalised, so that light patches and dark ones have different codes; codes have the
        deviation of projected values of unit variance.
    """

    kind: Literal["random"] = "random"
    num_codes: Annotated[int, Range(2)] = 8192
    width: Annotated[int, Range(1)] = 16
    seed: int = 0

    def build(self, values: int) -> nn.Module:
        """The codebook of patches of C values."""
        return RandomCodes(self, values)


class RandomCodes(nn.Module):
    """Maps patches to codes; buffers only."""

    projection: Tensor
    codes: Tensor

    def __init__(self, config: RandomCodebook, values: int) -> None:
        super().__init__()
        random = torch.Generator(device="cpu").manual_seed(config.seed)
        bound = (6.0 / (values + config.width)) ** 0.5
        projection = torch.rand(values, config.width, generator=random, device="cpu") * (2 * bound) - bound
        codes = torch.randn(config.num_codes, config.width, generator=random, device="cpu")
        codes *= (2.0 * values / (values + config.width)) ** 0.5
        # Of the device in which the head is built: none of it, in an outline.
        device = torch.empty(0).device
        self.register_buffer("projection", projection.to(device))
        self.register_buffer("codes", codes.to(device))

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """The codes, int64 ``[K]``, of ``patches [K, C]``: |p - c|^2 is smallest where p . c - |c|^2 / 2 is largest."""
        codes = self.codes.float()
        scores = patches.float() @ self.projection.float() @ codes.t() - codes.square().sum(1) / 2
        return scores.argmax(1)


class CodeHead(nn.Module):
    """Scores of codes at masked patches, and the codebook that says which are right."""

    def __init__(self, hidden_size: int, codebook: RandomCodebook, values: int) -> None:
        """Builds the head.

        Args:
            hidden_size: Width of the stream.
            codebook: Of the targets.
            values: C.
        """
        super().__init__()
        self.scores = VocabularyHead(hidden_size, codebook.num_codes)
        self.codebook = codebook.build(values)

    def distances(self, features: Tensor, chosen: Tensor, patches: Tensor) -> Tensor:
        """The cross-entropy at each masked patch, fp32 ``[K]``.

        Args:
            features: ``[M, N, D]`` of all patches.
            chosen: int64 ``[K]``, the masked ones, counted over all rows.
            patches: What they are, ``[K, C]``.
        """
        return F.cross_entropy(self.scores(selected(features, chosen)), self.codebook(patches), reduction="none")
