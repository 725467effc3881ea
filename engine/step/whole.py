"""The whole shape of a parameter that may be sharded."""

import math

from torch import Tensor


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter or buffer before ZeRO-3 shards it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def whole_numel(tensor: Tensor) -> int:
    """Its number of elements."""
    return math.prod(whole_shape(tensor))
