"""Maps points of a picture to points of a view of it, for boxes and masks.

Points are fractions of width and height, from edge to edge: (0, 0) is the outer corner of the first pixel, (1, 1) that
of the last one.

Shapes: N boxes, H x W pixels, S side of the view.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Step = Callable[[], Matrix]
"""Computes an affine map of points, float64 ``[3, 3]``, for columns (x, y, 1)."""

LEAST_VISIBLE = 0.5
"""Least share of a box's area within the view; boxes with less are dropped."""


@dataclass(frozen=True)
class Placement:
    """An affine map from the points of a picture to those of its view.

    It is computed when a point is mapped: most samples have neither boxes nor masks.

    Attributes:
        steps: Maps of which it consists, the first one first; none for the identity.
    """

    steps: tuple[Step, ...] = ()

    @cached_property
    def matrix(self) -> Matrix:
        """The map, float64 ``[3, 3]``, for columns (x, y, 1)."""
        found: Matrix = np.eye(3)
        for step in self.steps:
            found = step() @ found
        return found

    def then(self, *steps: Step) -> "Placement":
        """This map followed by others."""
        return Placement((*self.steps, *steps))

    def inverse(self) -> "Placement":
        """The map from the points of the view to those of the picture."""

        def back() -> Matrix:
            found: Matrix = np.linalg.inv(self.matrix).astype(np.float64, copy=False)
            return found

        return Placement((back,))

    def boxes(self, boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Maps boxes into the view.

        A rotated box becomes the smallest upright box around it. Boxes are clipped at the border of the view; a box
        that keeps less than ``LEAST_VISIBLE`` of its area is dropped.

        Args:
            boxes: ``[N, 4]``: left, top, right, bottom.

        Returns:
            The boxes ``[N, 4]``, zeros where dropped, and bool ``[N]``: which are left.
        """
        left, top, right, bottom = boxes.T
        corners = np.stack([[left, right, right, left], [top, top, bottom, bottom], np.ones((4, len(boxes)))])
        moved = np.einsum("ij,jcn->icn", self.matrix, corners)[:2]
        whole = np.concatenate([moved.min(axis=1), moved.max(axis=1)]).T
        clipped = np.clip(whole, 0.0, 1.0)
        kept = _area(clipped) >= LEAST_VISIBLE * _area(whole)
        return np.where(kept[:, None], clipped, 0.0), kept

    def mask(self, mask: NDArray[np.bool_], size: int) -> NDArray[np.bool_]:
        """Maps a mask into the view: a pixel has the mask's value at the pixel's centre, and false beyond the border.

        Args:
            mask: ``[H, W]``.
            size: S.

        Returns:
            ``[S, S]``.
        """
        middles = (np.arange(size) + 0.5) / size
        back = np.linalg.inv(self.matrix)
        x = back[0, 0] * middles[None, :] + back[0, 1] * middles[:, None] + back[0, 2]
        y = back[1, 0] * middles[None, :] + back[1, 1] * middles[:, None] + back[1, 2]
        height, width = mask.shape
        columns, rows = np.floor(x * width).astype(np.int64), np.floor(y * height).astype(np.int64)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        found: NDArray[np.bool_] = inside & mask[rows.clip(0, height - 1), columns.clip(0, width - 1)]
        return found


def crop_placement(left: int, top: int, width: int, height: int, picture: tuple[float, float]) -> Placement:
    """The map of a crop that fills its view.

    Args:
        left: First column of the crop, in pixels of the picture.
        top: First row.
        width: Columns.
        height: Rows.
        picture: (width, height) of the picture in pixels; of a shrunk one, the last pixels may jut out.
    """
    across, down = [picture[0] / width, 0.0, -left / width], [0.0, picture[1] / height, -top / height]
    return Placement((lambda: np.array([across, down, [0.0, 0.0, 1.0]]),))


def pixel_map(linear: Matrix, shift: Matrix, source: tuple[float, float], target: tuple[float, float]) -> Matrix:
    """The map of fractions for a map of pixel numbers, whose points are the middles of pixels.

    Args:
        linear: ``[2, 2]``.
        shift: ``[2]``; pixel p goes to ``linear @ p + shift``.
        source: (width, height) in pixels of what is mapped.
        target: (width, height) in pixels of what it is mapped to.
    """
    half = np.full(2, 0.5)
    matrix = np.eye(3)
    matrix[:2, :2] = linear
    matrix[:2, 2] = shift + half - linear @ half
    mapped: Matrix = np.diag([1 / target[0], 1 / target[1], 1.0]) @ matrix @ np.diag([*source, 1.0])
    return mapped


def mirror() -> Matrix:
    """Exchanges left and right."""
    return np.array([[-1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


def _area(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    area: NDArray[np.float64] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return area
