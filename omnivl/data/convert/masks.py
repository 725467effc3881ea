"""Masks of COCO's annotations: polygons and run lengths, drawn into PNG files."""

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.convert.records import Record
from omnivl.data.limits import DecodeLimits

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
    if min(size) < 1:
        record.refuse("wrong_field", f"the picture is {size[0]} by {size[1]}; allowed: a pixel or more")
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
        mask |= _filled(np.clip(np.reshape(flat, (-1, 2)), 0, size), size)
    if not values:
        record.wrong(name, "a polygon or more")
    return mask


def _filled(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels whose centres lie inside of a polygon of points ``[N, 2]``. OpenCV's takes those on its line as well.

    Each edge turns what lies right of it, in every row whose centre it crosses, from outside to inside or back.
    """
    turns = np.zeros((size[1], size[0] + 1), np.uint8)
    for (left, top), (right, bottom) in zip(points, np.roll(points, -1, axis=0), strict=True):
        first, last = (int(np.ceil(end - 0.5)) for end in sorted((top, bottom)))
        if first < last:
            rows = np.arange(first, last)
            crossed = left + (rows + 0.5 - top) * ((right - left) / (bottom - top))
            turns[rows, np.clip(np.ceil(crossed - 0.5).astype(int), 0, size[0])] ^= 1
    inside: NDArray[np.uint8] = np.bitwise_xor.accumulate(turns[:, :-1], axis=1)
    return inside


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
