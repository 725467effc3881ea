"""What of the backward pass a layer has, for counts of operations."""

from dataclasses import dataclass

VISUAL, TEXT = "visual", "text"
"""Branches of the chain (``ChainLayer.branch``) that start in its first layer: pixels, and words."""

FORWARD_AND_BACKWARD = 3
"""Products of a product that learns, in both passes: itself, the gradient of its input, the gradient of its weights."""


@dataclass(frozen=True)
class Backward:
    """What of the backward pass a layer has.

    Products without weights, those within attention, count as the layer's others do.

    Attributes:
        inputs: Whether what the layer is given gets a gradient, as something before it is trained, or something in it.
        weights: Share of its matrices' elements that are trained.
        pixels: Likewise of the matrices that are multiplied with pixels, which themselves get no gradient.
    """

    inputs: bool = True
    weights: float = 1.0
    pixels: float = 1.0

    @property
    def passes(self) -> float:
        """Products of each product, both passes together: ``FORWARD_AND_BACKWARD`` where everything is trained."""
        return 1 + self.inputs + self.weights

    @property
    def passes_on_pixels(self) -> float:
        """Likewise of products with pixels."""
        return 1 + self.pixels
