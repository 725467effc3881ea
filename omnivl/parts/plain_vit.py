"""A visual encoder without a temporal branch: ViT. The frames of a clip are encoded as images.

Shapes: R rows, T frames, N patches of a frame, S = T * (1 + N) positions (frame by frame, each with a class token of
its own first), D hidden size.

Nothing here depends on time: an image is a clip of one frame, and frames are combined after the encoder
(``frame_tokens``).

Source: Dosovitskiy et al., ViT, arXiv 2010.11929, section 3.1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.feed_forward import build_feed_forward
from moe.sizes import slot_flops
from moe.slot import FeedForwardOutput, Slot
from moe.tokens import Tokens
from moe.working import working
from omnivl.chain.demands import CLEAN
from omnivl.chain.state import State, joined
from omnivl.parts.attention import SelfAttention
from omnivl.parts.attributes import attributes_of
from omnivl.parts.drop_path import drop_path, drop_path_rates
from omnivl.parts.embed import pixel_values, resize_positions
from omnivl.parts.linear import LayerNorm, Linear
from omnivl.parts.padding import Padding
from omnivl.parts.ragged import Ragged, resampled
from omnivl.parts.recompute import recomputed
from omnivl.parts.sizes import MODALITIES, Patches, Transformer
from omnivl.parts.vit import VISUAL_MODALITIES, VisualModule, layer_scale, valid_tokens


class ImageEmbedding(nn.Module):
    """Patches, a class token for each frame, and positions."""

    interpolation: ClassVar[Literal["bicubic", "bilinear"]] = "bicubic"
    """Of positions, for frames whose grid is not the table's."""

    def __init__(self, sizes: Patches, visual: Transformer, *, bias: bool = True, masks: bool = False) -> None:
        """Builds the embedding.

        Args:
            sizes: Sizes of pictures and patches.
            visual: The stack that reads the patches.
            bias: Whether the patch embedding has one.
            masks: Whether there is a learnt token in place of masked patches.
        """
        super().__init__()
        self.patch_size, size = sizes.patch_size, visual.hidden_size
        rows, columns = sizes.grid(is_video=False)
        self.patches = Linear(3 * sizes.patch_size**2, size, bias)
        self.class_token = nn.Parameter(torch.empty(size))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, size))
        self.norm = LayerNorm(size, visual.norm_eps) if sizes.norm_embeddings else nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(size)) if masks else None
        for table in (self.class_token, self.positions, *((self.mask_token,) if self.mask_token is not None else ())):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The positions."""
        yield self.positions

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes positions to another grid; the class token keeps its own."""
        if name != "positions":
            return None
        side = round((own.shape[0] - 1) ** 0.5)
        return torch.cat([before[:1], self.resized(before[1:], (side, side))])

    def resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Spatial positions ``[side * side, D]`` of another grid, ``[rows * columns, D]``."""
        return resize_positions(table, grid) if self.interpolation == "bicubic" else resize_bilinear(table, grid)

    def flops(self, num_frames: int, num_patches: float) -> float:
        """Operations on one image or clip with ``num_patches`` patches of a frame, forward."""
        return 2.0 * num_frames * num_patches * self.patches.in_features * self.patches.out_features

    def forward(
        self,
        frames: Tensor,
        dtype: torch.dtype,
        grids: Tensor | None = None,
        masked: Sequence[tuple[Tensor, Tensor]] = (),
        clean: bool = True,
    ) -> Tensor:
        """Embeds uint8 ``frames [B, T, 3, H, W]`` and their masked versions to ``[R, S, D]`` of ``dtype``.

        Args:
            frames: The pixels.
            dtype: Of the result.
            grids: int64 ``[B, 2]``, where patches of pictures of their own sizes stand side by side; see ``Batch``.
            masked: Pairs of rows int64 ``[M]`` and mask bool ``[M, T, N]``; one for each masked pass.
            clean: Whether to embed the unmasked frames too; their rows come first.

        Raises:
            ModelError: The frames' size is no multiple of the patch size.
        """
        patches = self.patches(pixel_values(frames, self.patch_size, dtype))
        if grids is None:
            grid = frames.shape[-2] // self.patch_size, frames.shape[-1] // self.patch_size
            where = self.resized(self.positions[1:], grid)
        else:
            where = resampled(self.positions[1:], grids, patches.shape[2], self.interpolation)[:, None]
        if masked:
            assert self.mask_token is not None, "built without a token for masked patches"
            token = working(self.mask_token, dtype)
            stacks = [torch.where(mask[..., None], token, patches.index_select(0, rows)) for rows, mask in masked]
            if grids is not None:
                own = [where] if clean else []
                where = torch.cat([*own, *(where.index_select(0, rows) for rows, _ in masked)])
            patches = joined([patches, *stacks] if clean else stacks)
        body = patches + where.to(dtype)
        head = (self.class_token + self.positions[0]).to(dtype).expand(*body.shape[:2], 1, -1)
        embedded: Tensor = self.norm(torch.cat([head, body], dim=2).flatten(1, 2))
        return embedded


class ImageBlock(VisualModule):
    """A pre-norm block that attends within each frame, without the chain around it."""

    def __init__(self, sizes: Transformer, patches: Patches, index: int) -> None:
        super().__init__(sizes, patches, index)
        self.recomputes_ffn, self.dropout = sizes.recompute == "ffn", sizes.dropout
        self.drop_path_rate = drop_path_rates(sizes.drop_path, sizes.layers)[index]
        self.norm1 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        self.attention = SelfAttention(sizes.hidden_size, sizes.num_heads, sizes.recompute == "attention")
        self.scale1 = layer_scale(sizes)
        self.norm2 = LayerNorm(sizes.hidden_size, sizes.norm_eps)
        slot = Slot(index, VISUAL_MODALITIES, MODALITIES, depth=sizes.layers, activation=sizes.activation)
        self.ffn = build_feed_forward(sizes.ffn, sizes.hidden_size, sizes.inner_size, slot)
        self.slot_flops = slot_flops(sizes.ffn, sizes.hidden_size, sizes.inner_size, index, sizes.layers)
        self.scale2 = layer_scale(sizes)

    def flops(self, times: int, patches: float, is_video: bool, first_only: bool) -> float:
        """See ``VisualModule``."""
        positions = 1 + patches
        if first_only:
            return times * (self.attention.first_flops(positions) + self.slot_flops)
        return times * (self.attention.flops(positions, positions) + positions * self.slot_flops)

    def forward(
        self, x: Tensor, times: int, is_video: bool, first_only: bool = False, ragged: Ragged | None = None
    ) -> FeedForwardOutput:
        """Advances ``x [R, S, D]``; if only class tokens are wanted the result is ``[R, T, D]``."""
        rows, _, size = x.shape
        frames = x.reshape(rows * times, -1, size)
        if ragged is not None:  # a frame is a row here
            ragged = replace(ragged, mask=ragged.mask.view(rows * times, -1))
        mask = None if ragged is None else ragged.mask
        padding = None if ragged is None or first_only else ragged.padding()
        frames = frames if padding is None else padding.drop(frames)
        read = self.norm1(frames)
        attended = self.attention.first(read, mask) if first_only else self.attention(read, mask, padding=padding)
        frames = self._add(frames[:, :1] if first_only else frames, self.scale1(attended), padding)
        modality = VISUAL_MODALITIES[is_video]
        valid = valid_tokens(ragged, padding, first_only)
        tokens = Tokens.of(modality, frames, valid, attributes=attributes_of(modality))
        out: FeedForwardOutput = recomputed(self.recomputes_ffn, self.ffn, self.norm2(frames), tokens)
        frames = self._add(frames, self.scale2(out.y), padding)
        y = (frames if padding is None else padding.restore(frames)).reshape(rows, -1, size)
        return FeedForwardOutput(y, out.router_sums)

    def _add(self, x: Tensor, branch: Tensor, padding: Padding | None) -> Tensor:
        branch = F.dropout(branch, self.dropout, self.training)
        return x + drop_path(branch, self.drop_path_rate, self.training, padding)


def resize_bilinear(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Spatial positions ``[side * side, D]`` of another grid, ``[rows * columns, D]``; corners stay where they are."""
    side = round(table.shape[0] ** 0.5)
    if grid == (side, side):
        return table
    image = table.t().reshape(1, -1, side, side)
    return F.interpolate(image, size=grid, mode="bilinear", align_corners=True).flatten(2)[0].t()


def frame_tokens(stream: Tensor, state: State, segment: str = CLEAN) -> Tensor:
    """The class tokens of all frames ``[B, T, D]`` of ``stream [B, S, D]``, whose embeddings ``Project`` averages.

    For images the only class token, ``[B, D]``.

    Source: Luo et al., CLIP4Clip, arXiv 2104.08860, section 3.3 (mean pooling).
    """
    frames = state.layout.num_frames
    return stream[:, 0] if frames == 1 else stream.reshape(len(stream), frames, -1, stream.shape[-1])[:, :, 0]
