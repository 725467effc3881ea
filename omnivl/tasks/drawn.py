"""Pictures of galleries with what was found drawn into them."""

import base64
from collections.abc import Mapping, Sequence
from typing import Literal

import cv2
import numpy as np
from numpy.typing import ArrayLike

from omnivl.inference.pictures import PictureSet

_COLOURS: Mapping[str, tuple[int, int, int]] = {"right": (0, 160, 60), "found": (220, 30, 30)}


def with_boxes(
    pictures: PictureSet, index: int, boxes: Sequence[ArrayLike], what: Literal["right", "found"], size: int = 120
) -> str:
    """A small picture with boxes, as a PNG data URI.

    Args:
        pictures: The pictures.
        index: Which one.
        boxes: ``[4]`` each: left, top, right, bottom as fractions.
        what: Green boxes, which are right, or red ones, which were found.
        size: Side in pixels.
    """
    drawn = np.ascontiguousarray(pictures.frames([index], size)[0, 0].permute(1, 2, 0).numpy()[..., ::-1])
    for box in boxes:
        left, top, right, bottom = np.rint(np.asarray(box, dtype=np.float64) * (size - 1)).astype(int).tolist()
        cv2.rectangle(drawn, (left, top), (right, bottom), _COLOURS[what][::-1], 2)
    written, png = cv2.imencode(".png", drawn)
    assert written
    return "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()
