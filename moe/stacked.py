"""How matrices lie in a parameter."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stacked:
    """Matrices that lie in a parameter ``[..., count * n, m]``.

    Attributes:
        count: Matrices that are stacked along the last dimension but one; 0 where it holds none, although it has two
            dimensions.
        transposed: Whether n counts inputs and m outputs.
    """

    count: int = 1
    transposed: bool = False
