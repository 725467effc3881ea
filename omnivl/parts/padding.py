"""Leaving padded positions out of the work.

Shapes: R rows, L positions, n positions that are kept, D channels.

Captions are much shorter than the longest one. All operations but attention act on each position separately, so a block
computes the n kept positions and puts them back into rows only for attention.

The number of real positions changes from batch to batch, and CPU kernels are compiled for every shape and cached: after
60 steps they took 1.1 GB. Therefore n is rounded up to one of few numbers by keeping some padded positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position without a loss."""


def chosen_positions(mask: Tensor) -> Tensor:
    """Indices where ``mask``, bool ``[R, L]``, is true, counted over all rows; then some where it is false, to fill up.

    Returns:
        int64 ``[n]``, distinct; n is a multiple of R / 4 (rounded down, at least 1), or R * L.
    """
    places, multiple = mask.flatten(), max(1, mask.shape[0] // 4)
    chosen = places.nonzero()[:, 0]
    lacking = -len(chosen) % multiple
    return torch.cat([chosen, (~places).nonzero()[:lacking, 0]]) if lacking else chosen


def prepared_targets(segment: str, targets: Tensor) -> dict[str, Tensor]:
    """Targets of words, int64 ``[R, L]``, as ``{segment}/targets``, and ``{segment}/chosen`` for ``chosen_of``.

    To be called in a data worker: how many positions have a target is then known without waiting for a device.
    """
    return {f"{segment}/targets": targets, f"{segment}/chosen": chosen_positions(targets != IGNORED)}


def chosen_of(state: Mapping[str, Tensor], segment: str) -> Tensor:
    """``chosen_positions`` of a segment's targets, int64 ``[n]``; found here where nobody has prepared them."""
    chosen = state.get(f"{segment}/chosen")
    return chosen_positions(state[f"{segment}/targets"] != IGNORED) if chosen is None else chosen


def selected(x: Tensor, index: Tensor) -> Tensor:
    """Some positions of ``[R, L, D]``, counted over all rows, each at most once: ``[n, D]``."""
    out: Tensor = _Drop.apply(x, index)  # type: ignore[no-untyped-call]
    return out


class Padding:
    """Which positions of ``[R, L]`` hold a token; some of the others are kept as well (``chosen_positions``)."""

    def __init__(self, mask: Tensor) -> None:
        """Finds the positions to keep by ``mask``, bool ``[R, L]``, true where there is a token."""
        self.rows, self.length = mask.shape
        self.index, self._mask = chosen_positions(mask), mask

    @classmethod
    def worth_dropping(cls, mask: Tensor | None) -> "Padding | None":
        """The padding of ``mask``; None if leaving it out saves no time.

        The number of real positions has to be read back from the device, which stalls an accelerator and breaks a
        compiled graph: only on CPUs, not compiled.
        """
        if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        padding = cls(mask)
        return padding if len(padding.index) < mask.numel() else None

    @property
    def valid(self) -> Tensor:
        """Bool ``[n]``: which of the kept positions hold a token."""
        return self._mask.flatten().index_select(0, self.index)

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
