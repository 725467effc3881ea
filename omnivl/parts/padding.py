"""Leaving padded positions out of the work.

Shapes: R rows, L positions, n positions that are kept, D channels.

Captions are much shorter than the longest one. All operations but attention act on each position separately, so a block
computes the n kept positions and puts them back into rows only for attention.
"""

from typing import Any

import torch
from torch import Tensor

from omnivl.chain.positions import chosen_positions, most_filled


def selected(x: Tensor, index: Tensor) -> Tensor:
    """Some positions of ``[R, L, D]``, counted over all rows, each at most once: ``[n, D]``."""
    out: Tensor = _Drop.apply(x, index)  # type: ignore[no-untyped-call]
    return out


class Padding:
    """Which positions of ``[R, L]`` hold a token; some of the others are kept as well (``chosen_positions``)."""

    def __init__(self, mask: Tensor, kept: Tensor | None = None, *, in_order: bool = True) -> None:
        """Finds the positions to keep.

        Args:
            mask: Bool ``[R, L]``, true where there is a token.
            kept: int64 ``[n]``, the positions where they are known (``kept_positions``).
            in_order: Whether the tokens come row by row before all padding, as ``chosen_positions`` returns them.
        """
        self.rows, self.length = mask.shape
        self.index, self._mask = chosen_positions(mask) if kept is None else kept, mask
        self.in_order, self.most_filled = in_order, most_filled(*mask.shape)

    @classmethod
    def worth_dropping(cls, mask: Tensor | None, kept: Tensor | None = None) -> "Padding | None":
        """The padding of ``mask``; None if leaving it out saves no time.

        Where the positions are not known, their number has to be read back from the device, which stalls an accelerator
        and breaks a compiled graph: then on CPUs only, not compiled.
        """
        if mask is not None and kept is not None:
            return cls(mask, kept)
        if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        padding = cls(mask)
        return padding if len(padding.index) < mask.numel() else None

    @property
    def valid(self) -> Tensor:
        """Bool ``[n]``: which of the kept positions hold a token."""
        return self._mask.flatten().index_select(0, self.index)

    def starts(self) -> Tensor:
        """Where the tokens of each row begin among the kept positions, the padding behind them, and the end.

        Returns:
            int32 ``[R + 2]``; found on the device, without waiting for it.
        """
        ends = self._mask.sum(1).cumsum(0)
        return torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(self.index))]).to(torch.int32)

    def drop(self, x: Tensor) -> Tensor:
        """``[R, L, D]`` to the positions that are kept, ``[n, D]``."""
        return selected(x, self.index)

    def restore(self, x: Tensor) -> Tensor:
        """``[n, D]`` back to ``[R, L, D]``, zero where nothing was kept."""
        out: Tensor = _Restore.apply(x, self.index, self.rows, self.length)  # type: ignore[no-untyped-call]
        return out


def _put(x: Tensor, index: Tensor, positions: int) -> Tensor:
    return x.new_zeros(positions, x.shape[-1]).index_copy_(0, index, x)


class _Drop(torch.autograd.Function):
    """``index_select`` whose backward copies: no position occurs twice, so nothing has to be added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _put(grads[0], index, ctx.shape[0] * ctx.shape[1]).view(ctx.shape), None


class _Restore(torch.autograd.Function):
    """The reverse of ``_Drop``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int, length: int) -> Tensor:
        ctx.save_for_backward(index)
        return _put(x, index, rows * length).view(rows, length, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].flatten(0, 1).index_select(0, index), None, None, None
