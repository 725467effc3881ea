"""Boxes in pixels, as data sets have them, to boxes as fractions of width and height, as training reads them."""

import json
from typing import Literal, get_args

from omnivl.data.sources.base import BadSampleError

BoxForm = Literal["xywh", "xyxy"]
"""Left, top, width, height; or left, top, right, bottom."""
BOX_FORMS: tuple[BoxForm, ...] = get_args(BoxForm)


def as_fractions(value: object, form: BoxForm, size: tuple[int, int], column: str, where: str) -> object:
    """One box or a list of boxes, left, top, right, bottom, cut at the picture's border.

    Args:
        value: Four numbers or a list of such, in pixels; in a CSV file as JSON.
        form: What the numbers are.
        size: (width, height) of the picture in pixels.
        column: For messages.
        where: For messages.

    Raises:
        BadSampleError: ``wrong_field``: no box, or one of which nothing lies in the picture.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    several = isinstance(value, list) and all(isinstance(one, list) for one in value)
    boxes = [_fractions(box, form, size) for box in (value if several and isinstance(value, list) else [value])]
    if any(box is None for box in boxes):
        shown = repr(value)[:80]
        detail = f"{column!r} is {shown} in a picture of {size[0]} x {size[1]}; allowed: boxes of four numbers, {form}"
        raise BadSampleError("wrong_field", where, detail)
    return boxes if several else boxes[0]


def _fractions(box: object, form: BoxForm, size: tuple[int, int]) -> list[float] | None:
    if not isinstance(box, list) or len(box) != 4 or any(type(one) not in (int, float) for one in box):
        return None
    left, top, right, bottom = (float(one) for one in box)
    if form == "xywh":
        right, bottom = left + right, top + bottom
    left, right = (min(max(edge / size[0], 0.0), 1.0) for edge in (left, right))
    top, bottom = (min(max(edge / size[1], 0.0), 1.0) for edge in (top, bottom))
    return [left, top, right, bottom] if left < right and top < bottom else None
