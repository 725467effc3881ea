"""Pictures and clips of their own sizes in one batch: rows whose frames have different numbers of patches.

Shapes: B samples, R rows, T time positions, N patches of the largest frame, S positions of a row, n positions that are
kept, C columns or rows of a position table.

The patches of a frame stand first among its N places, row by row. What lies behind them is padding, which blocks leave
out as they do that of texts (``omnivl.parts.padding``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from omnivl.chain.demands import CLEAN, TWIN
from omnivl.chain.positions import SHARES, chosen_positions, kept_name
from omnivl.chain.state import State
from omnivl.data.batch import num_places
from omnivl.parts.padding import Padding

Order = Literal["tokens first", "frame by frame"]
"""Of a row's positions: one class token, then the patches of all frames; or each frame's patches behind its own one."""

_CUBIC = -0.75
"""The parameter of torch's bicubic interpolation."""
_FRAMES, _PLACES = "_frames", "_places"


@dataclass(frozen=True)
class Ragged:
    """Which positions of visual rows hold a patch or a class token.

    Attributes:
        mask: Bool ``[R, S]``.
        kept: int64 ``[n]``, the positions to compute where they are known (``chosen_positions``).
        kept_frames: Likewise, of the frames as rows of their own, each behind a class token, ``[R * T, 1 + N]``.
        kept_places: Likewise, of the places of a frame, ``[R, N]``.
    """

    mask: Tensor
    kept: Tensor | None = None
    kept_frames: Tensor | None = None
    kept_places: Tensor | None = None

    @classmethod
    def of(cls, state: State, stream: str = "visual") -> "Ragged | None":
        """That of the rows of ``visual``, or of its twin's; None where all pictures have one size."""
        if "visual_mask" not in state:
            return None
        mask = state["visual_mask"] if stream == "visual" else state.of_twins("visual_mask", "visual")
        return cls(mask, *(state.get(kept_name(stream + which)) for which in ("", _FRAMES, _PLACES)))

    def padding(self) -> Padding | None:
        """Of the rows; None if leaving it out saves no time."""
        return Padding.worth_dropping(self.mask, self.kept)

    def places(self, times: int) -> Tensor:
        """Bool ``[R, N]`` of rows with one class token: which places of a frame hold a patch."""
        return self.mask[:, 1 : 1 + (self.mask.shape[1] - 1) // times]

    def frames(self, times: int) -> tuple[Tensor, Padding | None]:
        """The mask of the frames as rows of their own, bool ``[R * T, 1 + N]``, and their padding."""
        places = self.places(times)
        mask = torch.cat([torch.ones_like(places[:, :1]), places], dim=1).repeat_interleave(times, 0)
        return mask, Padding.worth_dropping(mask, self.kept_frames)


def patches_of(grids: Tensor, places: int) -> Tensor:
    """Bool ``[B, N]``: which of ``places`` hold a patch, by the rows and columns of each frame, ``grids [B, 2]``."""
    return torch.arange(places, device=grids.device) < grids.prod(1, keepdim=True)


def row_mask(patches: Tensor, times: int, order: Order) -> Tensor:
    """Bool ``[R, S]`` of rows with ``times`` frames, by the places of a frame that hold a patch, bool ``[R, N]``."""
    token = torch.ones_like(patches[:, :1])
    if order == "frame by frame":
        return torch.cat([token, patches], dim=1).repeat(1, times)
    return torch.cat([token, patches.repeat(1, times)], dim=1)


def visual_mask(state: State, times: int, order: Order) -> dict[str, Tensor]:
    """``visual_mask`` of all rows of the visual stream, by its name; nothing where all pictures have one size.

    Args:
        state: At the head of the chain.
        times: T.
        order: Of the positions.
    """
    if "grids" not in state:
        return {}
    patches = patches_of(state["grids"], num_places(state["frames"]))
    if tuple(state.layout.visual) != (CLEAN,):
        patches = patches[rows_of_segments(state, tuple(state.layout.visual))]
    return {"visual_mask": row_mask(patches, times, order)}


def rows_of_segments(state: State, segments: Sequence[str]) -> Tensor:
    """The sample of each visual row of some segments, int64 ``[R]``."""
    every = torch.arange(state.layout.batch_size, device=state["grids"].device)
    return torch.cat([every if name == CLEAN else state[f"{name}/rows"] for name in segments])


def kept_visual_positions(
    state: State, times: int, order: Order, segments: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The positions of visual rows and of their twins' that hold something, by ``kept_name``; see ``Ragged``.

    Args:
        state: At the head of the chain, on the host.
        times: T.
        order: Of the positions.
        segments: Those that are encoded; None: all.
    """
    if "grids" not in state:
        return {}
    found = {}
    streams: Mapping[str, Sequence[str]] = {
        "visual": tuple(state.layout.visual) if segments is None else segments,
        f"{TWIN}visual": tuple(state.layout.twins.get("visual", ())),
    }
    for stream, names in streams.items():
        if not names:
            continue
        patches = patches_of(state["grids"], num_places(state["frames"]))[rows_of_segments(state, names)]
        masks = {"": row_mask(patches, times, order)}
        if times > 1 and order == "tokens first":
            masks |= {_FRAMES: row_mask(patches, 1, order).repeat_interleave(times, 0), _PLACES: patches}
        for which, mask in masks.items():
            chosen = chosen_positions(mask, max(1, mask.numel() // SHARES))
            if len(chosen) < mask.numel():
                found[kept_name(stream + which)] = chosen
    return found


def resampled(table: Tensor, grids: Tensor, places: int, how: Literal["bicubic", "bilinear"] = "bicubic") -> Tensor:
    """Spatial positions of frames of their own sizes, ``[B, N, D]``; zero where there is no patch.

    The result of ``torch.nn.functional.interpolate`` for each frame, as one matrix product: interpolation is linear in
    the table. ``bilinear`` leaves the corners where they are.

    Args:
        table: Positions of a square, ``[C * C, D]``.
        grids: int64 ``[B, 2]``, rows and columns.
        places: N.
        how: Kind of interpolation.
    """
    side = round(len(table) ** 0.5)
    place = torch.arange(places, device=grids.device)
    rows, columns = grids[:, :1], grids[:, 1:]
    weigh = _cubic_weights if how == "bicubic" else _linear_weights
    down, across = weigh(place // columns, rows, side), weigh(place % columns, columns, side)
    weights = (down[..., :, None] * across[..., None, :]).flatten(2)
    weights = weights * (place < rows * columns)[..., None]
    return weights @ table.float()


def _cubic_weights(index: Tensor, count: Tensor, side: int) -> Tensor:
    """Weights of ``side`` entries at places ``index [B, N]`` of ``count [B, 1]``, fp32 ``[B, N, C]``."""
    at = (index.float() + 0.5) * (side / count.float()) - 0.5
    taps = torch.arange(-2, side + 2, device=index.device)
    far = (at[..., None] - taps).abs()
    near = ((_CUBIC + 2) * far - (_CUBIC + 3)) * far * far + 1
    beyond = ((_CUBIC * far - 5 * _CUBIC) * far + 8 * _CUBIC) * far - 4 * _CUBIC
    weights = torch.where(far <= 1, near, torch.where(far < 2, beyond, 0.0))
    if side == 1:
        return weights.sum(-1, keepdim=True)
    # What lies beyond the border is the entry at the border.
    first, last = weights[..., :3].sum(-1, keepdim=True), weights[..., -3:].sum(-1, keepdim=True)
    return torch.cat([first, weights[..., 3:-3], last], dim=-1)


def _linear_weights(index: Tensor, count: Tensor, side: int) -> Tensor:
    """As ``_cubic_weights``, between the two nearest entries, first and last place at the first and last entry."""
    at = index.float() * ((side - 1) / (count.float() - 1).clamp(min=1))
    return (1.0 - (at[..., None] - torch.arange(side, device=index.device)).abs()).clamp(min=0.0)
