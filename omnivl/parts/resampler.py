"""The perceiver resampler: learnt latents gather a fixed number of states from a picture or clip.

Shapes: B samples, M pictures of a sample (1 clip), T frames, S positions of an encoded frame, Q latents, D width, I
inner width of the attention (heads times head size), K positions that latents see.

Source: Alayrac et al., Flamingo, arXiv 2204.14198, section 3.1.1 and figure 5; numbers as in OpenFlamingo's code: keys
    and values of positions and latents end to end, both normalised, no biases in maps, a feed-forward layer of four
    widths, normalised output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.ranges import Range
from omnivl.chain.backward import VISUAL
from omnivl.chain.flops import num_rows
from omnivl.chain.state import State, StepLayout
from omnivl.parts.block import BlockLayer
from omnivl.parts.embed import resize_times
from omnivl.parts.linear import LayerNorm, Linear, Role, draw_normal
from omnivl.parts.patches import num_patches
from omnivl.parts.sizes import Patches, Transformer

EPS = 1e-5
_RATIO = 4


@dataclass(frozen=True)
class AttentionHeads:
    """Heads of an attention whose inner width is not that of its stream.

    Attributes:
        num_heads: Their number.
        head_size: Width of each.
    """

    num_heads: Annotated[int, Range(1)] = 16
    head_size: Annotated[int, Range(1)] = 128

    @property
    def inner(self) -> int:
        """I."""
        return self.num_heads * self.head_size


@dataclass(frozen=True)
class Resampler(AttentionHeads):
    """Sizes of a resampler, of the width of the encoder. The defaults are Flamingo's.

    Attributes:
        latents: Q.
        layers: Blocks.
        activation: Of the feed-forward layers: ``gelu`` as in OpenFlamingo, or ``relu`` as in IDEFICS.
    """

    latents: Annotated[int, Range(1)] = 64
    layers: Annotated[int, Range(1)] = 6
    activation: Literal["gelu", "relu"] = "gelu"


class WideAttention(nn.Module):
    """Attention without biases from a normalised stream to a memory."""

    def __init__(self, size: int, memory_size: int, heads: AttentionHeads) -> None:
        """Builds it.

        Args:
            size: Width of the stream.
            memory_size: Width of the memory.
            heads: Of the attention.
        """
        super().__init__()
        self.num_heads = heads.num_heads
        self.norm = LayerNorm(size, EPS)
        self.q = Linear(size, heads.inner, bias=False)
        self.kv = Linear(memory_size, 2 * heads.inner, bias=False, matrices=2)
        self.out = Linear(heads.inner, size, bias=False)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("cross_attention", one) for one in (self.q, self.kv, self.out))

    def flops(self, queries: float, seen: float) -> float:
        """Operations on one row of ``queries`` positions that see ``seen`` ones, without keys and values, forward."""
        return 4.0 * queries * self.q.out_features * (self.q.in_features + seen)

    def project_flops(self, seen: float) -> float:
        """Operations of keys and values of ``seen`` positions, forward."""
        return 2.0 * seen * self.kv.in_features * self.kv.out_features

    def attend(self, q: Tensor, kv: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attends with projected queries.

        Args:
            q: ``[R, Q, I]``.
            kv: Keys and values side by side, ``[R, K, 2 I]``.
            allowed: bool ``[R, Q, K]``, what each query sees; None: all. Each needs one true key.

        Returns:
            ``[R, Q, D]``.
        """
        q, k, v = (x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in (q, *kv.chunk(2, dim=-1)))
        attended = F.scaled_dot_product_attention(q, k, v, None if allowed is None else allowed[:, None])
        made: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return made


class WideFeedForward(nn.Module):
    """Normalisation and two maps without biases."""

    def __init__(self, size: int, activation: Literal["gelu", "relu"] = "gelu") -> None:
        super().__init__()
        self.activation = F.gelu if activation == "gelu" else F.relu
        self.norm = LayerNorm(size, EPS)
        self.fc1, self.fc2 = Linear(size, _RATIO * size, bias=False), Linear(_RATIO * size, size, bias=False)

    def maps(self) -> Iterator[tuple[Role, Linear]]:
        """See ``HasMaps``."""
        yield from (("feed_forward", one) for one in (self.fc1, self.fc2))

    @property
    def flops(self) -> float:
        """Operations on one position, forward."""
        return 4.0 * self.fc1.in_features * self.fc1.out_features

    def forward(self, x: Tensor) -> Tensor:
        """The branch of ``[..., D]``."""
        made: Tensor = self.fc2(self.activation(self.fc1(self.norm(x))))
        return made


class ResamplerBlock(nn.Module):
    """Latents attend to positions and to themselves, then pass a feed-forward layer."""

    def __init__(self, size: int, sizes: Resampler) -> None:
        super().__init__()
        self.norm_memory = LayerNorm(size, EPS)
        self.attention = WideAttention(size, size, sizes)
        self.ffn = WideFeedForward(size, sizes.activation)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        """Advances ``latents [R, Q, D]`` that see ``x [R, K, D]``."""
        own = self.attention.norm(latents)
        kv = self.attention.kv(torch.cat([self.norm_memory(x), own], dim=1))
        latents = latents + self.attention.attend(self.attention.q(own), kv)
        advanced: Tensor = latents + self.ffn(latents)
        return advanced


class PerceiverResampler(nn.Module):
    """The resampler without the chain around it."""

    def __init__(self, size: int, sizes: Resampler, frames: int = 1) -> None:
        """Builds it.

        Args:
            size: D.
            sizes: The rest.
            frames: Frames of a clip; if there are several, each has a learnt embedding, a picture that of the first.
        """
        super().__init__()
        self.latents = nn.Parameter(torch.empty(sizes.latents, size))
        self.times = nn.Parameter(torch.empty(frames, size)) if frames > 1 else None
        for table in (self.latents, self.times):
            if table is not None:
                draw_normal(table, std=1.0)
        self.blocks = nn.ModuleList(ResamplerBlock(size, sizes) for _ in range(sizes.layers))
        self.norm = LayerNorm(size, EPS)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """Latents and the frames' embeddings."""
        yield self.latents
        if self.times is not None:
            yield self.times

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes the frames' embeddings to another number of frames."""
        return resize_times(before, len(own)) if name == "times" else None

    def flops(self, seen: float) -> float:
        """Operations on one row of ``seen`` positions, forward."""
        count, total = len(self.latents), 0.0
        for block in self.blocks:
            assert isinstance(block, ResamplerBlock)
            attention = block.attention
            total += attention.flops(count, seen + count) + attention.project_flops(seen + count)
            total += count * block.ffn.flops
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Gathers ``x [R, T, S, D]`` to ``[R, Q, D]``."""
        if self.times is not None:
            frames = x.shape[1]
            times = self.times[:1] if frames == 1 else resize_times(self.times, frames)
            x = x + times[:, None].to(x.dtype)
        seen, latents = x.flatten(1, 2), self.latents.to(x.dtype).expand(len(x), -1, -1)
        for block in self.blocks:
            latents = block(latents, seen)
        made: Tensor = self.norm(latents)
        return made


class Resample(BlockLayer):
    """Clean ``visual`` rows to ``pictures``: those of a set one by one, the frames of a clip together."""

    stack, branch = "resampler", VISUAL

    def __init__(self, sizes: Resampler, vision: Transformer, patches: Patches) -> None:
        """Builds the resampler behind the encoder ``vision`` of ``patches``."""
        frames = patches.num_frames
        super().__init__("resampler", lambda still: PerceiverResampler(vision.hidden_size, sizes, frames))
        self.patches = patches

    def acts(self, layout: StepLayout) -> bool:
        """Whether texts look at pictures."""
        return "interleaved" in layout.reads and bool(layout.visual)

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Of all pictures."""
        assert isinstance(self.block, PerceiverResampler)
        frame = 1 + num_patches(self.patches, layout)
        apart, together = (1, layout.num_frames) if layout.is_video else (layout.num_frames, 1)
        rows = num_rows(layout.visual) * apart * self.acts(layout)
        return self.backward.passes * rows * self.block.flops(together * frame)

    def forward(self, state: State) -> State:
        """See the class."""
        layout = state.layout
        if not self.acts(layout):
            return state
        visual = state["visual"]
        rows = len(visual)
        frames = visual.reshape(rows, layout.num_frames, -1, visual.shape[-1])
        gathered = self.run(frames if layout.is_video else frames.flatten(0, 1)[:, None])
        return state.updated(drop=("visual",), pictures=gathered.reshape(rows, -1, gathered.shape[-1]))
