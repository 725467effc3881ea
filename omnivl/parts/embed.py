"""The first layer: pixels and token ids to embeddings.

Shapes: B samples, T frames, C = 3 * patch * patch values of a 2D patch, T' = T / tubelet size time positions, N patches
of a frame, S = 1 + T' * N, L text positions, D hidden size, M rows of a masked pass.

- images are cut into 2D patches, clips into 3D ones (tubelets); both are matrix products on unfolded pixels;
- the 3D kernel is the 2D kernel spread evenly over the tubelet's frames plus a learnt difference that starts from zero;
- class token, spatial positions (bicubic where a frame's grid differs from the table's), temporal positions that start
  from zero (see ``temporal_gain``);
- masked passes reuse the patches of the clean one and put the mask token in place of masked patches;
- text: word plus position, LayerNorm, as in BERT; the generation stream shares these tables.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.working import keep_exact, working
from omnivl.chain.demands import CLEAN
from omnivl.chain.flops import num_rows
from omnivl.chain.positions import ids_name, kept_positions
from omnivl.chain.state import State, StepLayout, joined
from omnivl.errors import ModelError
from omnivl.parts.block import EmbeddingLayer
from omnivl.parts.linear import LayerNorm, draw_normal, linear
from omnivl.parts.patches import num_kept, num_patches, num_times
from omnivl.parts.ragged import kept_visual_positions, resampled, visual_mask
from omnivl.parts.sizes import MomentumConfig, Patches, Transformer, Words


class PatchEmbedding(nn.Module):
    """2D patches of images and 3D patches of clips.

    Source: OmniVL, arXiv 2209.07526, section 3.1 (2D and 3D tokenizers); Arnab et al., ViViT, arXiv 2103.15691,
        section 3.4 (inflation).
    Differs: the 3D kernel is ``weight / t + video_delta``. An inflated copy would equal the image's kernel only at the
        moment of copying; the sum equals it until the first clip is trained on, whatever earlier stages trained.
    """

    def __init__(self, sizes: Patches, hidden_size: int) -> None:
        super().__init__()
        self.patch_size, self.tubelet_size = sizes.patch_size, sizes.tubelet_size
        self.hidden_size = hidden_size
        values = 3 * sizes.patch_size**2
        self.weight = nn.Parameter(torch.empty(hidden_size, values))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.video_delta = nn.Parameter(torch.zeros(sizes.tubelet_size, hidden_size, values))
        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04)

    def flops(self, num_frames: int, num_patches: float) -> float:
        """Operations on one image or clip with ``num_patches`` patches of a frame, forward."""
        return num_frames * num_patches * 2.0 * 3 * self.patch_size**2 * self.hidden_size

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes the 3D kernel ``[t, D, C]``: stretched over the new tubelet, with the same sum over frames."""
        if name != "video_delta":
            return None
        frames, hidden, values = before.shape
        stretched = resize_times(before.reshape(frames, hidden * values), own.shape[0]).reshape(own.shape)
        return stretched + (before.sum(0) - stretched.sum(0)) / own.shape[0]

    def forward(self, pixels: Tensor, is_video: bool) -> Tensor:
        """Embeds ``pixels [B, T, N, C]`` (``pixel_values``) to ``[B, T', N, D]``.

        Raises:
            ModelError: The number of frames is no multiple of the tubelet size.
        """
        keep_exact(self.weight)  # clips add to it before they cast
        if not is_video:
            return linear(pixels, self.weight, self.bias)
        if pixels.shape[1] % self.tubelet_size != 0:
            raise ModelError(
                f"clip of {pixels.shape[1]} frames: not a multiple of tubelet_size {self.tubelet_size}; "
                "change num_frames or tubelet_size"
            )
        kernels = self.weight / self.tubelet_size + self.video_delta
        # One product per frame of the tubelet, then a sum: for equal frames and an even kernel all products round
        # alike, so that their sum is the image's product to the last bit.
        parts = [linear(pixels[:, i :: self.tubelet_size], kernels[i]) for i in range(self.tubelet_size)]
        return torch.stack(parts).sum(0) + working(self.bias, pixels.dtype)


def pixel_values(frames: Tensor, patch_size: int, dtype: torch.dtype) -> Tensor:
    """uint8 ``[B, T, 3, H, W]`` to the patches' values ``[B, T, N, C]``, from -1 to 1.

    Raises:
        ModelError: See ``unfold``.
    """
    return unfold(frames, patch_size).div(127.5).sub_(1.0).to(dtype)  # in fp32 until the end


def unfold(frames: Tensor, patch_size: int) -> Tensor:
    """Cuts ``[B, T, 3, H, W]`` into patches ``[B, T, N, C]``, row by row; a patch is laid out (channel, row, column).

    Raises:
        ModelError: Height or width is no multiple of the patch size.
    """
    batch, times, channels, height, width = frames.shape
    if height % patch_size or width % patch_size:
        raise ModelError(
            f"frames of {height} x {width} pixels: not a multiple of patch_size {patch_size}; change the size"
        )
    rows, columns = height // patch_size, width // patch_size
    cut = frames.reshape(batch, times, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, times, rows * columns, -1)


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of spatial positions ``[side * side, D]`` to ``[rows * columns, D]`` of another grid."""
    side = round(table.shape[0] ** 0.5)
    if grid == (side, side):
        return table
    image = table.t().reshape(1, -1, side, side)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].t()


def resize_times(table: Tensor, times: int) -> Tensor:
    """Linear interpolation of temporal positions ``[T', D]`` to another number of time positions."""
    if times == table.shape[0]:
        return table
    return F.interpolate(table.t()[None], size=times, mode="linear", align_corners=False)[0].t()


def numbered(table: Tensor, count: int) -> Tensor:
    """Places of the pictures of a set, ``[P, D]``, from temporal positions ``[T', D]``: row i is picture i's.

    A picture keeps its place whatever the number of pictures behind it. A set of more pictures than rows stretches the
    table, as a longer clip does.
    """
    return table[:count] if count <= len(table) else resize_times(table, count)


def nearest_times(table: Tensor, times: int) -> Tensor:
    """The same by the nearest position before it, as TimeSformer does (transformers, ``TimesformerEmbeddings``)."""
    return F.interpolate(table.t()[None], size=times, mode="nearest")[0].t()


def drop_patches(patches: Tensor, rate: float) -> Tensor:
    """Keeps a random share ``1 - rate`` of the patches of each row, at least one; the same places in all frames.

    Source: Li et al., FLIP, arXiv 2212.00794, section 3; tubes: Tong et al., VideoMAE, arXiv 2203.12602, section 3.3.

    Args:
        patches: ``[R, T', N, D]``.
        rate: Share to leave out, in [0, 1).
    """
    rows, times, places, size = patches.shape
    kept = num_kept(places, rate)
    chosen = torch.rand(rows, places, device=patches.device).argsort(1)[:, None, :kept, None]
    return patches.gather(2, chosen.expand(rows, times, kept, size))


class VisualEmbedding(nn.Module):
    """Patches, class token, mask token and positions."""

    def __init__(self, sizes: Patches, visual: Transformer) -> None:
        super().__init__()
        self.patch_dropout = sizes.patch_dropout
        size = visual.hidden_size
        self.patches = PatchEmbedding(sizes, size)
        rows, columns = sizes.grid(is_video=False)
        self.class_token = nn.Parameter(torch.empty(size))
        self.mask_token = nn.Parameter(torch.empty(size))
        self.positions = nn.Parameter(torch.empty(1 + rows * columns, size))
        self.times = nn.Parameter(torch.zeros(sizes.time_positions(sizes.num_frames), size))
        self.norm = LayerNorm(size, visual.norm_eps) if sizes.norm_embeddings else nn.Identity()
        for table, std in ((self.class_token, 0.02), (self.mask_token, 0.02), (self.positions, sizes.position_std)):
            nn.init.trunc_normal_(table, std=std, a=-2 * std, b=2 * std)
        if sizes.temporal_gain > 0:
            draw_normal(self.times, std=sizes.temporal_gain)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The positions."""
        yield from (self.positions, self.times)

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes spatial positions to another grid, keeping the class token's, or temporal ones to another number."""
        if name == "positions":
            side = round((own.shape[0] - 1) ** 0.5)
            return torch.cat([before[:1], resize_positions(before[1:], (side, side))])
        return resize_times(before, own.shape[0]) if name == "times" else None

    def forward(
        self,
        pixels: Tensor,
        grid: tuple[int, int],
        is_video: bool,
        masked: tuple[tuple[Tensor, Tensor], ...],
        clean: bool,
        grids: Tensor | None = None,
    ) -> Tensor:
        """Embeds frames and their masked versions.

        Args:
            pixels: ``[B, T, N, C]``, see ``pixel_values``; the result has their dtype.
            grid: Rows and columns of patches of a frame.
            is_video: Whether to use 3D patches and temporal positions.
            masked: Pairs of rows int64 ``[M]`` and mask bool ``[M, T', N]``; one per masked pass.
            clean: Whether to embed the unmasked frames too; their rows come first.
            grids: int64 ``[B, 2]``, where patches of pictures of their own sizes stand side by side; see ``Batch``.

        Returns:
            ``[R_visual, S, D]``.
        """
        patches, dtype = self.patches(pixels, is_video), pixels.dtype
        stacks = [patches] if clean else []
        for rows, mask in masked:
            stacks.append(torch.where(mask[..., None], working(self.mask_token, dtype), patches.index_select(0, rows)))
        stack = joined(stacks)
        if grids is None:
            where = resize_positions(self.positions[1:], grid)[None, None]
        else:
            where = resampled(self.positions[1:], grids, patches.shape[2])[:, None]
            if masked:
                own = [where] if clean else []
                where = torch.cat([*own, *(where.index_select(0, rows) for rows, _ in masked)])
        if is_video or patches.shape[1] > 1:  # of a set, which picture it is
            places = resize_times if is_video else numbered
            where = where + places(self.times, patches.shape[1])[None, :, None]
        stack = stack + where.to(dtype)
        if self.training and self.patch_dropout > 0.0 and not masked:
            stack = drop_patches(stack, self.patch_dropout)
        body = stack.flatten(1, 2)
        head = (self.class_token + self.positions[0]).to(dtype).expand(len(body), 1, -1)
        embedded: Tensor = self.norm(torch.cat([head, body], dim=1))
        return embedded


class WordTables(nn.Module):
    """A table of words and one of positions."""

    def __init__(self, words: int, positions: int, hidden_size: int) -> None:
        super().__init__()
        self.words = nn.Parameter(torch.empty(words, hidden_size))
        self.positions = nn.Parameter(torch.empty(positions, hidden_size))
        for table in (self.words, self.positions):
            draw_normal(table, std=0.02)

    def undecayed(self) -> Iterator[nn.Parameter]:
        """The tables."""
        yield from (self.words, self.positions)

    def resize(self, name: str, before: Tensor, own: Tensor) -> Tensor | None:
        """Resizes positions to shorter or longer texts: rows keep their places, further rows are fresh."""
        if name != "positions":
            return None
        kept = min(len(before), len(own))
        return torch.cat([before[:kept], own[kept:].float()])


class TextEmbedding(WordTables):
    """Word plus position, normalised if ``norm_embeddings`` is set.

    Differs: BERT's token types are folded into the positions, because a text is always one segment.
    """

    def __init__(self, words: Words, text: Transformer) -> None:
        super().__init__(words.vocab_size, words.length, text.hidden_size)
        self.dropout = text.dropout
        self.norm = LayerNorm(text.hidden_size, text.norm_eps) if words.norm_embeddings else nn.Identity()

    def places(self) -> Tensor:
        """The position embeddings, ``[length, D]``."""
        return self.positions

    def forward(self, token_ids: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """Embeds ``token_ids [R, L]``, whose first position is ``start``, to ``[R, L, D]`` of ``dtype``.

        Raises:
            ModelError: The text is longer than the position table.
        """
        return self.placed(F.embedding(token_ids, self.words), dtype, start)

    def placed(self, words: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
        """``forward`` of texts whose words ``[R, L, D]`` are embedded already."""
        end = start + words.shape[1]
        if end > len(self.positions):
            raise ModelError(
                f"text of {end} tokens: the model has {len(self.positions)} positions; raise model.text_length or cut"
            )
        x = self.norm(words + self.places()[start:end])
        return F.dropout(x.to(dtype), self.dropout, self.training)


class Embeddings(nn.Module):
    """Embeddings of both modalities: the module that ``Embed`` trains and that its momentum twin copies."""

    def __init__(self, sizes: Patches, visual: Transformer, words: Words, text: Transformer) -> None:
        super().__init__()
        self.visual = VisualEmbedding(sizes, visual)
        self.text = TextEmbedding(words, text)


class Embed(EmbeddingLayer):
    """Frames and token ids to the start of each stream.

    Masked visual segments read ``{name}/rows`` and ``{name}/mask``. Causal joins and text segments other than the clean
    one read ``{name}/token_ids``. When decoding with a cache, the generation stream starts at position ``cache/start``.
    """

    def __init__(
        self,
        sizes: Patches,
        visual: Transformer,
        words: Words,
        text: Transformer,
        pad: int,
        dtype: torch.dtype,
        *,
        momentum: MomentumConfig | None = None,
        joins_inputs: bool = False,
    ) -> None:
        """Builds the embeddings.

        Args:
            sizes: Sizes of pictures and patches.
            visual: The stack that reads the patches.
            words: Of the texts.
            text: The stack that reads the words.
            pad: The padding token's id.
            dtype: The compute dtype: every stream starts in it.
            momentum: Of the twin; None builds none.
            joins_inputs: Whether rows are joined as this layer returns them (``visual_input``, ``text_input``), so that
                only rows that are also read unjoined go through the encoder (``encoded_rows``).
        """

        def build(still: bool) -> nn.Module:
            if still:
                return Embeddings(replace(sizes, patch_dropout=0.0), visual.still(), words, text.still())
            return Embeddings(sizes, visual, words, text)

        super().__init__(build, dtype, momentum)
        self.sizes, self.pad, self.joins_inputs = sizes, pad, joins_inputs

    def kept_positions(self, state: State) -> dict[str, Tensor]:
        """See ``ChainLayer``. Rows that are only joined go through no stream of their own."""
        layout = state.layout
        texts, pictures = (self._encoded(layout, stream) for stream in ("text", "visual"))
        kept = kept_positions(state, lambda token_ids: token_ids != self.pad, texts)
        return kept | kept_visual_positions(state, self._times(layout), "tokens first", pictures)

    def _encoded(self, layout: StepLayout, stream: str) -> list[str]:
        """The segments of a stream whose rows go through the encoder."""
        segments = layout.segments(stream)
        rows = encoded_rows(layout, stream) if self.joins_inputs else slice(0, num_rows(segments))
        return [name for name, own in segments.items() if rows.start <= own.start and own.stop <= rows.stop]

    def forward(self, state: State) -> State:
        """Adds ``visual``, ``text``, ``generation``, their masks, and the twins' streams, as the layout asks."""
        layout = state.layout
        online, twin = self.block, self.momentum_block
        assert isinstance(online, Embeddings)
        if layout.visual:
            seen = visual_mask(state, self._times(layout), "tokens first")
            pixels = pixel_values(state["frames"], self.sizes.patch_size, self.dtype)
            state = state.merged({"visual": self._visual(online, state, pixels, layout.visual), **seen})
        if layout.text:
            token_ids = joined([state[ids_name(name)] for name in layout.text])
            state = state.updated(text=online.text(token_ids, self.dtype), text_mask=token_ids != self.pad)
        if self.joins_inputs:
            streams = [name for name in ("visual", "text") if name in state]
            inputs = {f"{name}_input": state[name] for name in streams if layout.fused}
            rows = {name: state[name][encoded_rows(layout, name)] for name in streams}
            state = state.merged({**inputs, **rows})
        if layout.generation:
            token_ids = joined([state[ids_name(layout.joins[name].text)] for name in layout.generation])
            start = int(state["cache/start"]) if "cache/start" in state else 0
            stream = online.text(token_ids, self.dtype, start)
            state = state.updated(generation=stream, generation_mask=token_ids != self.pad)
        if layout.twins:
            assert isinstance(twin, Embeddings), "the layout asks for momentum twins, none was built"
            with torch.no_grad():
                if "visual" in layout.twins:
                    if "second_view" in state:
                        pixels = pixel_values(twins_see(state), self.sizes.patch_size, self.dtype)
                    state = state.updated(momentum_visual=self._visual(twin, state, pixels, layout.twins["visual"]))
                if "text" in layout.twins:
                    token_ids = joined([state[ids_name(name)] for name in layout.twins["text"]])
                    state = state.updated(momentum_text=twin.text(token_ids, self.dtype))
        return state

    def flops(self, layout: StepLayout, tokens: float | None, number: int = 0) -> float:
        """Operations on the patches; masked passes reuse those of the clean one."""
        assert isinstance(self.block, Embeddings)
        one = self.block.visual.patches.flops(layout.num_frames, num_patches(self.sizes, layout))
        # No gradient flows into pixels: one product less. Patches are dropped after the embedding.
        online = layout.batch_size * self.backward.passes_on_pixels if layout.visual else 0
        return (online + layout.batch_size * ("visual" in layout.twins)) * one

    def _visual(self, embeddings: Embeddings, state: State, pixels: Tensor, segments: Collection[str]) -> Tensor:
        """The rows of some segments, the clean ones first."""
        masked = tuple((state[f"{name}/rows"], state[f"{name}/mask"]) for name in segments if name != CLEAN)
        is_video, clean = state.layout.is_video, CLEAN in segments
        rows, columns = (side // self.sizes.patch_size for side in state["frames"].shape[-2:])
        stream: Tensor = embeddings.visual(pixels, (rows, columns), is_video, masked, clean, state.get("grids"))
        return stream

    def _times(self, layout: StepLayout) -> int:
        return num_times(self.sizes, layout)

    def idle_parameters(self, layouts: Sequence[StepLayout]) -> Iterator[nn.Parameter]:
        """The parameters of clips, of masks or of a modality that no step has."""
        assert isinstance(self.block, Embeddings)
        visual, text = self.block.visual, self.block.text
        if not any(layout.visual for layout in layouts):
            yield from visual.parameters()
        if not any(self._reads_text(layout) for layout in layouts):
            yield from text.parameters()
        shown = [layout for layout in layouts if layout.visual]
        if not any(layout.is_video for layout in shown):
            yield visual.patches.video_delta
        if not any(layout.is_video or layout.num_frames > 1 for layout in shown):
            yield visual.times
        if all(layout.visual.keys() <= {CLEAN} for layout in layouts):
            yield visual.mask_token

    def _reads_text(self, layout: StepLayout) -> bool:
        encoded = encoded_rows(layout, "text") if self.joins_inputs else slice(0, len(layout.text))
        return encoded.stop > encoded.start or bool(layout.fused) or bool(layout.generation)

    def acts(self, layout: StepLayout) -> bool:
        """Whether a stream starts here."""
        return bool(layout.visual or layout.text or layout.generation)


def twins_see(state: State) -> Tensor:
    """The pixels that momentum twins see: the second view, where there is one."""
    return state.get("second_view", state["frames"])


def num_encoded(layout: StepLayout, stream: str) -> int:
    """How many rows ``encoded_rows`` has."""
    rows = encoded_rows(layout, stream)
    return int(rows.stop - rows.start)


def encoded_rows(layout: StepLayout, stream: str) -> slice:
    """The stacked rows of ``visual`` or ``text`` that go through the encoder if inputs are joined.

    In training, rows that are only joined need no encoder.
    """
    segments = layout.segments(stream)
    wanted = [rows for name, rows in segments.items() if _is_read_apart(layout, stream, name)]
    return slice(min(rows.start for rows in wanted), max(rows.stop for rows in wanted)) if wanted else slice(0, 0)


def _is_read_apart(layout: StepLayout, stream: str, segment: str) -> bool:
    if layout.mode == "encode":
        return True
    if segment != CLEAN:
        return segment not in layout.joined
    return layout.embeds or stream in layout.fields
