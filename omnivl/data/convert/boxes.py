"""Boxes in pixels, as data sets have them, to boxes as fractions of width and height, as training reads them."""

import json
from collections.abc import Callable
from typing import Literal, get_args

from omnivl.data.convert.records import shown
from omnivl.data.sources.base import BadSampleError, Rejection

BoxForm = Literal["xywh", "xyxy"]
"""Left, top, width, height; or left, top, right, bottom."""
BOX_FORMS: tuple[BoxForm, ...] = get_args(BoxForm)


_MAX_DEPTH = 3


def as_fractions(
    value: object,
    form: BoxForm,
    size: tuple[int, int],
    column: str,
    where: str,
    leave_out: Callable[[Rejection], None] | None = None,
) -> object:
    """One box, or lists of boxes, left, top, right, bottom, cut at the picture's border.

    Args:
        value: Four numbers in pixels, a list of such, or of lists of such; in a CSV file as JSON. An object has its box
            in ``box``, and keeps its other fields.
        form: What the numbers are.
        size: (width, height) of the picture in pixels.
        column: For messages.
        where: For messages.
        leave_out: Takes the objects of a list that have no box in the picture; without it they are errors.

    Raises:
        BadSampleError: ``wrong_field``: no box, or one of which nothing lies in the picture.
    """

    def convert(value: object, depth: int = 0) -> object:
        if isinstance(value, dict) and "box" in value:
            return {**value, "box": convert(value["box"], _MAX_DEPTH)}
        if isinstance(value, list) and depth < _MAX_DEPTH and all(isinstance(one, list | dict) for one in value):
            found = (converted(one, depth + 1) for one in value)
            return [one for one in found if one is not None]
        box = _fractions(value, form, size)
        if box is None:
            detail = f"{column!r} is {shown(value)} in a picture of {size[0]} x {size[1]}"
            raise BadSampleError("wrong_field", where, f"{detail}; allowed: boxes of four numbers, {form}")
        return box

    def converted(value: object, depth: int) -> object:
        try:
            return convert(value, depth)
        except BadSampleError as error:
            if leave_out is None or not isinstance(value, dict):
                raise
            leave_out(error.rejection)
            return None

    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    return convert(value)


def _fractions(box: object, form: BoxForm, size: tuple[int, int]) -> list[float] | None:
    if not isinstance(box, list) or len(box) != 4 or any(type(one) not in (int, float) for one in box):
        return None
    left, top, right, bottom = (float(one) for one in box)
    if form == "xywh":
        right, bottom = left + right, top + bottom
    left, right = (min(max(edge / size[0], 0.0), 1.0) for edge in (left, right))
    top, bottom = (min(max(edge / size[1], 0.0), 1.0) for edge in (top, bottom))
    return [left, top, right, bottom] if left < right and top < bottom else None
