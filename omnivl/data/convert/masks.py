"""Masks of COCO's annotations: polygons and run lengths, drawn into PNG files."""

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.convert.records import Record
from omnivl.data.limits import DecodeLimits

_SHIFT = 4  # bits behind the point that OpenCV takes of a polygon's coordinates
_LIMITS = DecodeLimits()


def mask_png(record: Record, name: str, size: tuple[int, int]) -> bytes:
    """A mask as PNG of one channel: 255 inside, 0 outside.

    Args:
        record: An annotation.
        name: Its field: polygons, each a flat list of coordinates in pixels, or an object with ``counts`` and ``size``.
        size: (width, height) of the picture in pixels.

    Raises:
        BadSampleError: ``wrong_field``: it is neither, or of another size; ``too_many_pixels``.
    """
    _LIMITS.check_size(size, record.where)
    value = record.get(name)
    if isinstance(value, dict):
        mask = _from_runs(Record(record.file, f"{record.place}.{name}", value), size)
    else:
        mask = _from_polygons(record, name, size)
    return bytes(cv2.imencode(".png", mask * np.uint8(255))[1])


def _from_polygons(record: Record, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    mask = np.zeros((size[1], size[0]), np.uint8)
    values = record.values(name)
    for number, _ in enumerate(values):
        one = Record(record.file, f"{record.place}.{name}", {f"[{number}]": values[number]})
        flat = one.numbers(f"[{number}]")
        if len(flat) < 6 or len(flat) % 2:
            one.wrong(f"[{number}]", "a polygon of three points or more, x and y of each")
        points = (
            np.clip(np.reshape(flat, (-1, 2)), 0, size) - 0.5
        )  # COCO counts from a pixel's corner, OpenCV its centre
        cv2.fillPoly(mask, [np.rint(points * (1 << _SHIFT)).astype(np.int32)], 1, shift=_SHIFT)
    if not values:
        record.wrong(name, "a polygon or more")
    return mask


def _from_runs(runs: Record, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Lengths of runs of 0 and 1 in turn, down the columns, as numbers or in COCO's letters."""
    if runs.get("size") != [size[1], size[0]]:
        runs.wrong("size", f"height and width of the picture, {size[1]} and {size[0]}")
    counts = runs.get("counts")
    lengths = _decoded(counts) if isinstance(counts, str) else [int(one) for one in runs.numbers("counts")]
    if lengths is None or min(lengths, default=-1) < 0 or sum(lengths) != size[0] * size[1]:
        runs.wrong("counts", f"lengths of runs, {size[0] * size[1]} in all")
    flat = np.repeat(np.arange(len(lengths), dtype=np.uint8) & 1, lengths)
    return np.ascontiguousarray(flat.reshape(size[0], size[1]).T)


def _decoded(letters: str) -> list[int] | None:
    """Run lengths from COCO's letters; None where they are none.

    A letter holds five bits and whether more follow, lowest first and with a sign; from the fourth on a number is the
    difference to the one two before it.
    """
    lengths: list[int] = []
    number, shift = 0, 0
    for code in (ord(letter) - 48 for letter in letters):
        if not 0 <= code < 64 or shift > 60:
            return None
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                number -= 1 << shift
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number, shift = 0, 0
    return None if shift else lengths
