"""What a parameter is as a whole, whatever share of it a host has left here."""

import math

from torch import Tensor


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter or buffer before ZeRO-3 cuts it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    """Its number of elements."""
    return math.prod(whole_shape(tensor))
