"""Pictures of galleries, with boxes, masks and attention drawn into them.

What is right is green and continuous, what was given is orange and dashed or tinted, so that neither the colour nor the
form is needed to tell them apart.

Shapes: H x W pixels, T frames or pictures of a set, S side of a mask.
"""

import base64
from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.inference.pictures import PictureSet, fitted
from omnivl.tasks.results import Drawing, evenly

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float64]

RIGHT, GIVEN = (0, 158, 115), (230, 159, 0)
"""Red, green and blue, told apart by people with any colour vision: Okabe and Ito's bluish green and orange."""

SIDE, MOST_FRAMES = 168, 4
_WHITE = (255, 255, 255)
_DASH, _GAP = 6, 4
_QUALITY = 85


def shown(pictures: PictureSet, index: int) -> Drawing:
    """One sample, all of it: of a clip some frames, of a set all pictures, side by side."""
    frames = _frames(pictures, index)
    one = "picture" if pictures.media == "image" else "frame"
    return Drawing(_encoded(frames), one if len(frames) == 1 else f"{len(frames)} {one}s side by side")


def with_boxes(pictures: PictureSet, index: int, right: Sequence[Boxes], given: Sequence[Boxes]) -> Drawing:
    """A picture with right boxes and given ones.

    Args:
        pictures: The pictures.
        index: Which one.
        right: ``[4]`` each: left, top, right, bottom as fractions of the whole picture.
        given: Likewise.
    """
    drawn = _frames(pictures, index)[0]
    for boxes, colour in ((right, RIGHT), (given, GIVEN)):
        for box in boxes:
            _outline(drawn, box, colour, dashed=colour == GIVEN)
    said = [f"{name} {_place(box)}" for name, boxes in (("right", right), ("given", given)) for box in boxes]
    return Drawing(_encoded([drawn]), f"picture with boxes in per cent of its sides: {'; '.join(said)}")


def with_masks(pictures: PictureSet, index: int, right: NDArray[np.bool_], given: NDArray[np.bool_]) -> Drawing:
    """A picture in which the given mask is tinted and the right one outlined.

    Args:
        pictures: The pictures.
        index: Which one.
        right: Mask of the whole picture, scaled to ``[S, S]``.
        given: Likewise.
    """
    drawn = _frames(pictures, index)[0]
    own, other = (_enlarged(one.astype(np.uint8), drawn.shape[1::-1]) for one in (given, right))
    tint = np.array(GIVEN, dtype=np.float64)
    drawn[own > 0] = np.rint(0.4 * drawn[own > 0] + 0.6 * tint).astype(np.uint8)
    outlines, _ = cv2.findContours(other, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for colour, width in ((_WHITE, 4), (RIGHT, 2)):
        cv2.drawContours(drawn, outlines, -1, colour, width)
    parts = f"right {right.mean():.0%}, given {given.mean():.0%}, both {(right & given).mean():.0%}"
    return Drawing(_encoded([drawn]), f"picture with masks; share of its area: {parts}")


def with_attention(pictures: PictureSet, index: int, grid: NDArray[np.float32], share: float) -> Drawing:
    """What the model saw of a sample in grey, coloured patch by patch from nothing (violet) to the most (yellow).

    Args:
        pictures: The pictures.
        index: Which one.
        grid: The attention of each patch, ``[T, rows, columns]``, adding up to 1.
        share: The share of all attention that patches have.
    """
    frames = pictures.view(index).permute(0, 2, 3, 1).numpy()
    times, most = len(grid), float(grid.max())
    time, row, column = (int(one) for one in np.unravel_index(int(grid.argmax()), grid.shape))
    kept = evenly(times, MOST_FRAMES)
    kept[int(np.abs(np.array(kept) - time).argmin())] = time  # so that the patch with the most is shown
    painted = []
    for place in kept:
        frame = frames[place * len(frames) // times]
        size = fitted(frame.shape[1], frame.shape[0], SIDE)
        grey = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY)
        level = np.rint(255 * grid[place] / max(most, 1e-12)).astype(np.uint8)
        colours = cv2.applyColorMap(_enlarged(level, size), cv2.COLORMAP_VIRIDIS)[..., ::-1]
        painted.append(np.rint(0.4 * grey[..., None] + 0.6 * colours).astype(np.uint8))
    where = f"row {row + 1}, column {column + 1} of {grid.shape[1]} x {grid.shape[2]}"
    where = where if times == 1 else f"{where}, number {time + 1} of {times}"
    return Drawing(_encoded(painted), f"{share:.0%} on patches; of that most, {most:.1%}, at {where}")


def _frames(pictures: PictureSet, index: int) -> list[Pixels]:
    """uint8 ``[H, W, 3]`` each."""
    frames = pictures.whole(index, SIDE, MOST_FRAMES)
    return [np.ascontiguousarray(one.permute(1, 2, 0).numpy()) for one in frames]


def _enlarged(grid: Pixels, size: tuple[int, ...]) -> Pixels:
    """A grid as a picture of (width, height), each cell in one colour."""
    return np.asarray(cv2.resize(grid, (size[0], size[1]), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def _outline(picture: Pixels, box: Boxes, colour: tuple[int, int, int], *, dashed: bool) -> None:
    """Draws a box into a picture, with a white border that shows it on any ground."""
    height, width = picture.shape[:2]
    left, top, right, bottom = np.rint(np.asarray(box) * (2 * [width - 1, height - 1])).astype(int).tolist()
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    cv2.rectangle(picture, corners[0], corners[2], _WHITE, 4)
    for (x, y), (end_x, end_y) in pairwise(corners):
        length = max(abs(end_x - x), abs(end_y - y), 1)
        step, drawn = (_DASH + _GAP, _DASH) if dashed else (length, length)
        for start in range(0, length, step):
            stop = min(start + drawn, length)
            points = [
                (round(x + (end_x - x) * part / length), round(y + (end_y - y) * part / length))
                for part in (start, stop)
            ]
            cv2.line(picture, points[0], points[1], colour, 2)


def _place(box: Boxes) -> str:
    left, top, right, bottom = (f"{100 * one:.0f}" for one in box)
    return f"left {left} top {top} right {right} bottom {bottom}"


def _encoded(frames: Sequence[Pixels]) -> str:
    """Frames side by side as a WebP data URI."""
    height = max(len(frame) for frame in frames)
    parts: list[Pixels] = []
    for frame in frames:
        white = np.full((height, frame.shape[1] + 4 * bool(parts), 3), 255, dtype=np.uint8)
        white[: len(frame), white.shape[1] - frame.shape[1] :] = frame
        parts.append(white)
    whole = np.ascontiguousarray(np.concatenate(parts, axis=1)[..., ::-1])
    written, data = cv2.imencode(".webp", whole, [cv2.IMWRITE_WEBP_QUALITY, _QUALITY])
    assert written, "OpenCV writes WebP"
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode()
