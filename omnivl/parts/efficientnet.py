"""EfficientNet: blocks of convolutions, and batch normalisation whose running statistics change once per step.

Shapes: R rows, H x W pixels, S = h * w positions of a row (row by row, fewer behind each stride), C channels.

The stream is ``[R, S, C]``, which a convolution reads as channels last; convolutions of one pixel are matrix products.

Source: Tan and Le, EfficientNet, arXiv 1905.11946, table 1 (B0) and section 3 (scaling); blocks are those of Sandler et
    al., MobileNetV2, arXiv 1801.04381, with squeeze and excitation (Hu et al., arXiv 1709.01507); normalisation: Ioffe
    and Szegedy, arXiv 1502.03167. Paddings are TensorFlow's "same".
Differs: there is no convolution behind the last block, as in ALIGN. Running statistics are updated behind an optimizer
    step, by the mean of the statistics of its micro-batches.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.linear import Role
from moe.ranges import Range
from moe.working import working
from omnivl.chain.backward import VISUAL
from omnivl.chain.flops import num_rows
from omnivl.chain.gather import Gather, LocalGather
from omnivl.chain.positions import ids_name, kept_positions
from omnivl.chain.state import State, StepLayout, joined
from omnivl.parts.block import BlockLayer, EmbeddingLayer
from omnivl.parts.drop_path import drop_path
from omnivl.parts.embed import TextEmbedding
from omnivl.parts.linear import Linear, draw_normal
from omnivl.parts.sizes import Transformer, Words

_DIVISOR = 8
"""Of all numbers of channels."""


@dataclass(frozen=True)
class _Stage:
    """Blocks of one resolution: kernel, stride of the first one, expansion, channels, and how many."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    repeats: int


_B0 = (
    *(_Stage(3, 1, 1, 16, 1), _Stage(3, 2, 6, 24, 2), _Stage(5, 2, 6, 40, 2), _Stage(3, 2, 6, 80, 3)),
    *(_Stage(5, 1, 6, 112, 3), _Stage(5, 2, 6, 192, 4), _Stage(3, 1, 6, 320, 1)),
)
_STEM = 32


@dataclass(frozen=True)
class Convolved:
    """One block of an EfficientNet.

    Attributes:
        inputs: Channels that it reads.
        outputs: Channels that it writes.
        kernel: Side of its convolution.
        stride: Of its convolution.
        expansion: Inner channels over ``inputs``.
        adds: Whether its input is added to its output.
        side: Side of the square of positions that it reads.
        drop_path: Probability that it is left out.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    expansion: int
    adds: bool
    side: int
    drop_path: float

    @property
    def inner(self) -> int:
        """Inner channels."""
        return self.inputs * self.expansion

    @property
    def squeezed(self) -> int:
        """Channels between squeeze and excitation: a quarter of those that are read."""
        return max(1, self.inputs // 4)

    @property
    def next_side(self) -> int:
        """Side of the square of positions that it writes."""
        return math.ceil(self.side / self.stride)

    @property
    def flops(self) -> float:
        """Operations on one image, forward."""
        before, after = self.side**2, self.next_side**2
        expanding = before * self.inputs * self.inner if self.expansion > 1 else 0
        convolving = after * self.kernel**2 * self.inner
        return 2.0 * (expanding + convolving + 2 * self.inner * self.squeezed + after * self.inner * self.outputs)


@dataclass(frozen=True)
class EfficientNet:
    """An EfficientNet. The defaults are B7's.

    Attributes:
        width: Factor of the channels of B0, which are then rounded to multiples of 8.
        depth: Factor of the blocks of each resolution of B0, which are then rounded up.
        drop_path: Rate of stochastic depth behind the last block, rising linearly from 0.
        norm_eps: Added to the variance in normalisations.
        norm_decay: Share of themselves that running statistics keep in each optimizer step.
        statistics: Whether batches are normalised by the statistics of this replica's images (``local``; running ones
            are means over replicas) or of all replicas' (``global``: the result does not depend on their number; one
            exchange for each normalisation).
    """

    width: Annotated[float, Range(above=0)] = 2.0
    depth: Annotated[float, Range(above=0)] = 3.1
    drop_path: Annotated[float, Range(0, 1)] = 0.2
    norm_eps: Annotated[float, Range(above=0)] = 1e-3
    norm_decay: Annotated[float, Range(0, 1)] = 0.99
    statistics: Literal["local", "global"] = "local"

    def channels(self, of_b0: int) -> int:
        """A number of channels of B0, scaled."""
        scaled = self.width * of_b0
        rounded = max(_DIVISOR, int(scaled + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
        return rounded if rounded >= 0.9 * scaled else rounded + _DIVISOR

    @property
    def stem(self) -> int:
        """Channels of the first convolution."""
        return self.channels(_STEM)

    @property
    def outputs(self) -> int:
        """Channels behind the last block."""
        return self.channels(_B0[-1].channels)

    @property
    def layers(self) -> int:
        """Blocks."""
        return sum(math.ceil(self.depth * stage.repeats) for stage in _B0)

    def blocks(self, image_size: int) -> list[Convolved]:
        """All blocks, for images of a size."""
        side, inputs, found, layers = math.ceil(image_size / 2), self.stem, list[Convolved](), self.layers
        for stage in _B0:
            for number in range(math.ceil(self.depth * stage.repeats)):
                found.append(
                    Convolved(
                        inputs=inputs,
                        outputs=self.channels(stage.channels),
                        kernel=stage.kernel,
                        stride=1 if number else stage.stride,
                        expansion=stage.expansion,
                        adds=number > 0,
                        side=side,
                        drop_path=self.drop_path * len(found) / layers,
                    )
                )
                side, inputs = found[-1].next_side, found[-1].outputs
        return found


class BatchNorm(nn.Module):
    """Normalises channels by the mean and variance over rows and positions; in evaluation by running ones.

    Buffers ``mean`` and ``variance`` change by ``follow`` alone, which is called once per step.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, config: EfficientNet) -> None:
        super().__init__()
        self.eps, self.decay = config.norm_eps, config.norm_decay
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """``x [R, S, C]`` normalised, and mean and unbiased variance of the batch, fp32 ``[2, C]``, no gradient.

        Args:
            x: In any dtype; computed in fp32.
            gather: The replicas whose images are normalised together.
        """
        rows = x.float().flatten(0, 1)
        if not self.training:
            made = F.batch_norm(rows, self.mean, self.variance, self.weight, self.bias, False, 0.0, self.eps)
            return made.view(x.shape).to(x.dtype), torch.stack([self.mean, self.variance])
        variance, mean = torch.var_mean(rows, 0, correction=0)
        count = len(rows) * gather.replicas
        if gather.replicas == 1:
            made = F.batch_norm(rows, None, None, self.weight, self.bias, True, 0.0, self.eps)
        else:  # replicas have equally many images
            means, variances = gather.join(torch.stack([mean, variance])[None]).unbind(1)
            mean = means.mean(0)
            variance = (variances + (means - mean).square()).mean(0)
            scale = self.weight * (variance + self.eps).rsqrt()
            made = rows * scale + (self.bias - mean * scale)
        unbiased = variance.detach() * (count / max(1, count - 1))
        return made.view(x.shape).to(x.dtype), torch.stack([mean.detach(), unbiased])

    @torch.no_grad()
    def follow(self, statistics: Tensor) -> None:
        """Moves the running statistics towards those of a step, ``[2, C]``."""
        for running, now in zip((self.mean, self.variance), statistics, strict=True):
            running.lerp_(now.to(running.dtype), 1.0 - self.decay)


class Convolution(nn.Module):
    """A convolution without a bias, padded so that a stride of s leaves ``ceil(side / s)`` positions per side."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, groups
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        # Variance 1 of the output where that of the input is 1.
        draw_normal(self.weight, std=(groups / (inputs * kernel**2)) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, outputs, h', w']`` of ``x [R, inputs, h, w]``, in its dtype."""
        padding: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):
            lacking = max(0, (math.ceil(side / self.stride) - 1) * self.stride + self.kernel - side)
            padding += [lacking // 2, lacking - lacking // 2]
        return F.conv2d(F.pad(x, padding), working(self.weight, x.dtype), stride=self.stride, groups=self.groups)


def as_image(x: Tensor, side: int) -> Tensor:
    """``[R, C, side, side]`` of ``x [R, S, C]``, channels last; no copy."""
    return x.view(len(x), side, side, -1).permute(0, 3, 1, 2)


def as_positions(x: Tensor) -> Tensor:
    """``[R, S, C]`` of ``x [R, C, h, w]``."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class ConvolutionBlock(nn.Module):
    """Expands channels, convolves each, squeezes and excites them, and projects, without the chain around it."""

    def __init__(self, sizes: Convolved, config: EfficientNet) -> None:
        super().__init__()
        self.sizes, inner = sizes, sizes.inner
        self.is_global = config.statistics == "global"
        self.expand = Linear(sizes.inputs, inner, bias=False) if sizes.expansion > 1 else None
        self.expand_norm = BatchNorm(inner, config) if sizes.expansion > 1 else None
        self.convolution = Convolution(inner, inner, sizes.kernel, sizes.stride, groups=inner)
        self.convolution_norm = BatchNorm(inner, config)
        self.squeeze, self.excite = Linear(inner, sizes.squeezed), Linear(sizes.squeezed, inner)
        self.project = Linear(inner, sizes.outputs, bias=False)
        self.project_norm = BatchNorm(sizes.outputs, config)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``: a block's own perceptron, over channels."""
        yield from (("feed_forward", one) for one in (self.expand, self.squeeze, self.excite, self.project) if one)

    @property
    def norms(self) -> list[BatchNorm]:
        """Its normalisations, in the order of the statistics that ``forward`` returns."""
        own = (self.expand_norm, self.convolution_norm, self.project_norm)
        return [norm for norm in own if norm is not None]

    def forward(self, x: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        """Advances ``x [R, S, C]``; beside it the statistics of all norms, fp32 ``[2, sum of their channels]``."""
        world, found, inner = gather if self.is_global else LocalGather(), list[Tensor](), x
        if self.expand is not None and self.expand_norm is not None:
            inner, statistics = self.expand_norm(self.expand(inner), world)
            inner = F.silu(inner)
            found.append(statistics)
        convolved = as_positions(self.convolution(as_image(inner, self.sizes.side)))
        inner, statistics = self.convolution_norm(convolved, world)
        inner = F.silu(inner)
        found.append(statistics)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(inner.mean(1)))))
        inner, statistics = self.project_norm(self.project(inner * gate[:, None]), world)
        found.append(statistics)
        if self.sizes.adds:
            inner = x + drop_path(inner, self.sizes.drop_path, self.training)
        return inner, torch.cat(found, dim=1)


class NormedLayer(BlockLayer):
    """Base of layers whose block has batch normalisations: their statistics are kept until the step is done."""

    _kept: Tensor | None = None
    _count: Tensor | None = None

    @property
    @abstractmethod
    def norms(self) -> Sequence[BatchNorm]:
        """The normalisations, in the order of ``keep``."""

    def keep(self, statistics: Tensor) -> None:
        """Adds the statistics of a micro-batch, ``[2, channels of all norms]``, to the step's."""
        if self.training and torch.is_grad_enabled():
            kept, count = self.step_sums()
            kept.add_(statistics.detach())
            count.add_(1.0)

    def step_sums(self) -> tuple[Tensor, ...]:
        """Sums of statistics, and the number of micro-batches."""
        if self._kept is None or self._count is None:
            like = self.norms[0].mean
            self._kept = like.new_zeros(2, sum(len(norm.mean) for norm in self.norms), dtype=torch.float32)
            self._count = like.new_zeros(1, dtype=torch.float32)
        return self._kept, self._count

    def after_step(self) -> None:
        """Moves the running statistics."""
        super().after_step()
        if self._kept is None or self._count is None:
            return
        sums = self.gather.total(torch.cat([self._kept.flatten(), self._count]))
        # A step without an image leaves them as they are.
        kept, count = sums[:-1].view_as(self._kept), sums[-1]
        means = torch.split(kept / count.clamp(min=1.0), [len(norm.mean) for norm in self.norms], dim=1)
        for norm, own in zip(self.norms, means, strict=True):
            norm.follow(torch.where(count > 0, own, torch.stack([norm.mean, norm.variance]).to(own.dtype)))
        self.discard_step()

    def discard_step(self) -> None:
        """Drops the sums."""
        super().discard_step()
        self._kept = self._count = None


class ConvolutionLayer(NormedLayer):
    """A block of the image encoder on all visual rows."""

    stack = branch = VISUAL

    def __init__(self, index: int, sizes: Convolved, config: EfficientNet) -> None:
        """Builds block ``index`` of the encoder."""
        super().__init__(f"visual_{index:02d}", lambda still: ConvolutionBlock(sizes, config))
        self.level = index

    @property
    def norms(self) -> Sequence[BatchNorm]:
        """Those of the block."""
        assert isinstance(self.block, ConvolutionBlock)
        return self.block.norms

    def acts(self, layout: StepLayout) -> bool:
        """Whether there are visual rows."""
        return bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all visual rows."""
        assert isinstance(self.block, ConvolutionBlock)
        return self.backward.passes * num_rows(layout.visual) * self.block.sizes.flops

    def forward(self, state: State) -> State:
        """Advances ``visual``."""
        if not self.acts(state.layout):
            return state
        x, statistics = self.run(state["visual"], self.gather)
        self.keep(statistics)
        return state.updated(visual=x)


class ConvolvedTowers(nn.Module):
    """The first convolution of images, and the embedding of words."""

    def __init__(self, image: EfficientNet, words: Words, text: Transformer) -> None:
        super().__init__()
        self.is_global = image.statistics == "global"
        stem = {"convolution": Convolution(3, image.stem, 3, 2), "norm": BatchNorm(image.stem, image)}
        self.visual = nn.ModuleDict(stem)
        self.text = TextEmbedding(words, text)

    def forward(self, frames: Tensor, dtype: torch.dtype, gather: Gather) -> tuple[Tensor, Tensor]:
        """``[B, S, C]`` of ``dtype``, of uint8 ``frames [B, 1, 3, H, W]``; beside it the statistics of the norm."""
        pixels = (frames[:, 0].float() / 127.5 - 1.0).to(dtype)
        convolved = as_positions(self.visual["convolution"](pixels))
        x, statistics = self.visual["norm"](convolved, gather if self.is_global else LocalGather())
        return F.silu(x), statistics


class EmbedConvolved(NormedLayer, EmbeddingLayer):
    """Pixels and token ids to the start of each stream."""

    def __init__(
        self, image: EfficientNet, image_size: int, words: Words, text: Transformer, pad: int, dtype: torch.dtype
    ) -> None:
        """Builds the embeddings.

        Args:
            image: The image encoder.
            image_size: Side of an image in pixels.
            words: Of the texts.
            text: The stack that reads the words.
            pad: The padding token's id.
            dtype: The compute dtype.
        """
        super().__init__(lambda still: ConvolvedTowers(image, words, text), dtype)
        self.pad = pad
        self._stem_flops = 2.0 * math.ceil(image_size / 2) ** 2 * 27 * image.stem

    @property
    def norms(self) -> Sequence[BatchNorm]:
        """That behind the first convolution."""
        assert isinstance(self.block, ConvolvedTowers)
        norm = self.block.visual["norm"]
        assert isinstance(norm, BatchNorm)
        return [norm]

    def acts(self, layout: StepLayout) -> bool:
        """Whether a stream starts here."""
        return bool(layout.visual or layout.text)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of the first convolution. No gradient flows into pixels: one product less."""
        return self.backward.passes_on_pixels * num_rows(layout.visual) * self._stem_flops

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The embedding of an encoder that no step uses."""
        assert isinstance(self.block, ConvolvedTowers)
        if not any(layout.visual for layout in layouts):
            yield from self.block.visual.parameters()
        if not any(layout.text for layout in layouts):
            yield from self.block.text.parameters()

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``."""
        return kept_positions(state, lambda token_ids: token_ids != self.pad)

    def forward(self, state: State) -> State:
        """Adds ``visual``, ``text`` and the texts' mask, as the layout asks."""
        layout, block, made = state.layout, self.block, dict[str, Tensor]()
        assert isinstance(block, ConvolvedTowers)
        if layout.visual:
            made["visual"], statistics = self.run(state["frames"], self.dtype, self.gather)
            self.keep(statistics)
        if layout.text:
            token_ids = joined([state[ids_name(name)] for name in layout.text])
            made |= {"text": block.text(token_ids, self.dtype), "text_mask": token_ids != self.pad}
        return state.merged(made)
