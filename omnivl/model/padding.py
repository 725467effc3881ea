"""Leaving padded positions out of the work.

Shapes: R rows, L positions, n positions that hold a token, D channels.

Captions are much shorter than the longest one. Everything but attention itself looks at one position at a time, so a
block works on the n real positions and puts them back into rows only around attention.
"""

from typing import Any

import torch
from torch import Tensor


class Padding:
    """Which positions of ``[R, L]`` hold a token."""

    def __init__(self, mask: Tensor) -> None:
        """Finds the real positions of ``mask``, bool ``[R, L]``."""
        self.rows, self.length = mask.shape
        self.index = mask.flatten().nonzero()[:, 0]

    @classmethod
    def worth_dropping(cls, mask: Tensor | None) -> "Padding | None":
        """The padding of ``mask``; None where leaving it out gains nothing.

        The number of real positions has to be read back from the device, which stalls an accelerator: CPU only.
        """
        if mask is None or mask.device.type != "cpu":
            return None
        padding = cls(mask)
        return padding if len(padding.index) < mask.numel() else None

    def drop(self, x: Tensor) -> Tensor:
        """``[R, L, D]`` to the real positions ``[n, D]``."""
        out: Tensor = _Drop.apply(x, self.index)  # type: ignore[no-untyped-call]
        return out

    def restore(self, x: Tensor) -> Tensor:
        """``[n, D]`` back to ``[R, L, D]``, zero where there is padding."""
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
