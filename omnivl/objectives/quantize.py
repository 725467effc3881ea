"""Quantizing: pictures become codes of a learnt codebook, one per patch, from which they are restored.

Shapes: B images, N = h * w patches of an image, D hidden size, W width of a code, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import Backward
from omnivl.chain.demands import CLEAN, Demands
from omnivl.chain.gather import Gather
from omnivl.chain.objective import Head, Heads, Objective, ObjectiveLoss
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DataKind, visual_of
from omnivl.data.sizes import InputSizes
from omnivl.errors import Misfit
from omnivl.parts.conv_stem import Convolution, GroupNorm
from omnivl.parts.linear import Linear
from omnivl.parts.quantize import QuantizerConfig, VectorQuantizer, code_counts, perplexity


@dataclass(frozen=True)
class Quantize(Objective):
    """A picture tokenizer: the visual encoder, a quantizer of its patches, and convolutions that restore the pixels.

    The visual encoder may be that of any architecture. ``predict`` gives the codes of images.

    Attributes:
        quantizer: Of the patches.
        width: Channels C behind the last convolution but one; each doubling of the grid halves the channels, from at
            most eight times as many.
        learns: Whether it is trained. Otherwise it is kept as an earlier stage left it, for objectives that read it.

    Source: van den Oord et al., VQ-VAE, arXiv 1711.00937, equation 3; with a transformer as the encoder: Yu et al.,
        ViT-VQGAN, arXiv 2110.04627, section 3.
    Differs: pixels are restored by their squared distance alone, without a perceptual or an adversarial loss.
    """

    kind: Literal["quantize"] = "quantize"
    quantizer: QuantizerConfig = field(default_factory=VectorQuantizer)
    width: Annotated[int, Range(1)] = 64
    learns: bool = True

    def misfits(self, inputs: InputSizes, batch_size: int) -> Iterator[Misfit]:
        """Pictures of sizes of their own; patches whose side is no power of 2, to which doublings do not lead."""
        if inputs.native:
            yield Misfit(("kind",), f"{self.key!r} with sizes 'native'", "'fixed' or 'stretched'", "set model.sizes")
        side = inputs.patch_size
        if side & (side - 1):
            got, allowed = f"{self.key!r} with patches of {side} pixels", "a power of 2"
            yield Misfit(("kind",), got, allowed, "change model.patch_size")

    def demands(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The patches of images; nothing where it does not learn."""
        return self.asks(kind, batch_size) if self.learns else None

    def asks(self, kind: DataKind, batch_size: int) -> Demands | None:
        """The patches of images."""
        return Demands(reads=frozenset({"visual"})) if visual_of(kind) == "image" else None

    def build_head(self, sizes: HeadSizes) -> nn.Module:
        """Quantizer and decoder."""
        return QuantizeHead(self, sizes)

    def loss(self, state: State, heads: Heads, gather: Gather) -> ObjectiveLoss:
        """Mean squared error of pixels from -1 to 1, and the quantizer's own loss.

        Metrics, of this replica's images: ``reconstruction``, the error; ``perplexity`` of their codes; ``used``, the
        share of codes that occur.
        """
        head = heads.own
        assert isinstance(head, QuantizeHead)
        frames = state["frames"][:, 0].float() / 127.5 - 1.0
        restored, codes, own = head(state.rows("visual", CLEAN)[:, 1:], frames.shape[-2:], gather)
        error = F.mse_loss(restored.float(), frames)
        with torch.no_grad():
            counted = head.quantizer.num_codes
            used = (code_counts(codes, counted) > 0).float().mean()
            metrics = {"reconstruction": error, "perplexity": perplexity(codes, counted), "used": used}
        return ObjectiveLoss(error + own, metrics)

    def predict(self, state: State, heads: Heads) -> Tensor:
        """The codes of the images' patches, row by row, int64 ``[B, N]``."""
        head = heads.own
        assert isinstance(head, QuantizeHead)
        patches = state.rows("visual", CLEAN)[:, 1:]
        codes: Tensor = head.codes(patches).reshape(patches.shape[:2])
        return codes


class QuantizeHead(Head):
    """Maps patches to vectors, quantizes these and restores pixels from them."""

    def __init__(self, config: Quantize, sizes: HeadSizes) -> None:
        super().__init__()
        self.patch_size, self.side = sizes.patch_size, sizes.image_size // sizes.patch_size
        self.inner = Linear(sizes.widths["visual"], config.quantizer.size)
        self.quantizer = config.quantizer.build()
        doublings = sizes.patch_size.bit_length() - 1
        channels = [config.width * 2 ** min(3, doublings - i) for i in range(doublings + 1)]
        self.outer = Linear(config.quantizer.size, channels[0])
        self.blocks = nn.ModuleList(Doubling(*pair) for pair in pairwise(channels))
        self.norm = GroupNorm(channels[-1], groups=1)
        self.pixels = Convolution(channels[-1], 3, 3)

    def flops(self, layout: StepLayout, backward: Backward) -> float:
        """Of the maps of patches, of the search for codes, and of the convolutions."""
        patches, here = self.side**2, float(self.side)
        total = 2.0 * patches * (self.inner.in_features + self.outer.out_features) * self.inner.out_features
        for block in self.blocks:
            assert isinstance(block, Doubling)
            here *= 2
            total += block.flops(here)
        total += self.pixels.flops(here)
        return layout.batch_size * (backward.passes * total + self.quantizer.search_flops(patches))

    def codes(self, patches: Tensor) -> Tensor:
        """Numbers of the codes, int64 ``[B * N]``, of patches ``[B, N, D]``."""
        return self.quantizer.codes(self.vectors(patches).flatten(0, 1))

    def vectors(self, patches: Tensor) -> Tensor:
        """What is quantized, fp32 ``[B, N, W]``, of patches ``[B, N, D]``."""
        found: Tensor = self.inner(patches).float()
        return found

    def nearest(self, vectors: Tensor) -> Tensor:
        """The vectors of the codes nearest to vectors ``[B, N, W]``."""
        return self.quantizer.vectors_of(self.quantizer.codes(vectors.flatten(0, 1))).view_as(vectors)

    def restored(self, vectors: Tensor, side: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Images ``[B, 3, H, W]`` of ``side`` pixels, from -1 to 1, of codes' vectors ``[B, N, W]``, in ``dtype``."""
        rows, columns = (one // self.patch_size for one in side)
        x = self.outer(vectors.to(dtype)).reshape(len(vectors), rows, columns, -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
        pixels: Tensor = self.pixels(F.relu(self.norm(x)))
        return pixels

    def forward(self, patches: Tensor, side: tuple[int, int], gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
        """Restores images.

        Args:
            patches: ``[B, N, D]``.
            side: Height and width of the images in pixels.
            gather: For what the quantizer takes over all replicas.

        Returns:
            Images ``[B, 3, H, W]``, from -1 to 1 once they are learnt; codes, int64 ``[B * N]``; the quantizer's loss.
        """
        vectors = self.vectors(patches)
        quantized, codes, loss = self.quantizer(vectors.flatten(0, 1), gather)
        return self.restored(quantized.view_as(vectors), side, patches.dtype), codes, loss

    def after_step(self, gather: Gather) -> None:
        """Updates the codebook."""
        self.quantizer.after_step(gather)

    def discard_step(self) -> None:
        """Drops what the quantizer kept."""
        self.quantizer.discard_step()


class Doubling(nn.Module):
    """A residual block of two 3 x 3 convolutions behind a grid that is twice as fine.

    All channels are normalised together: a channel alone has no variance where all patches of an image have one code.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs, groups=1), Convolution(inputs, outputs, 3)
        self.norm2, self.conv2 = GroupNorm(outputs, groups=1), Convolution(outputs, outputs, 3)
        self.shortcut = Convolution(inputs, outputs, 1)

    def flops(self, side: float) -> float:
        """Operations on one image of ``side`` x ``side`` positions behind the doubling, forward."""
        return self.conv1.flops(side) + self.conv2.flops(side) + self.shortcut.flops(side)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]`` to ``[B, C', 2h, 2w]``."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        added: Tensor = self.shortcut(x) + y
        return added
