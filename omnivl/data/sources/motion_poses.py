"""How a sprite moves: the closed list of motions, and poses frame by frame.

A single frame must not tell the motion, not even to a model that knows the frame's index. So every parameter of a pose
(place, size, angle) is periodic: it starts at a uniformly drawn value and wraps around, and parameters that a motion
does not change are drawn from the same distribution. Each single frame of each motion then has the same distribution of
poses: ``x``, ``y``, ``turn`` and ``zoom`` independent and uniform. Only the order of frames distinguishes the motions.
(Without wrapping this is impossible, since the mean position would move with the motion.)

Shapes: T frames. Units: parameters run from 0 to 1 around their circle.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOVES: dict[str, tuple[str, int]] = {
    "moves left": ("x", -1),
    "moves right": ("x", 1),
    "moves up": ("y", -1),
    "moves down": ("y", 1),
    "zooms in": ("zoom", 1),
    "zooms out": ("zoom", -1),
    "rotates clockwise": ("turn", 1),
    "rotates counterclockwise": ("turn", -1),
}
BOUNCES: dict[str, int] = {"bounces once": 1, "bounces twice": 2, "bounces three times": 3}
ORDER = "appears before another"
MOTION_CLASSES: tuple[str, ...] = (*MOVES, *BOUNCES, ORDER)
MIN_FRAMES = 2 * max(BOUNCES.values()) + 1  # with fewer frames, three bounces look like one
TRAVEL = (0.3, 0.5)  # share of the period per clip; from 0.5 on, first and last frame alone would mostly mislead


@dataclass(frozen=True)
class Poses:
    """Poses of one clip's frames.

    Attributes:
        values: float64 ``[T, 4]``: ``x``, ``y`` (downwards), ``turn`` (clockwise), ``zoom``, each in [0, 1).
        second: bool ``[T]``: frames that show the second sprite instead of the first.
    """

    values: NDArray[np.float64]
    second: NDArray[np.bool_]


PARAMETERS = ("x", "y", "turn", "zoom")


def draw_poses(motion: str, num_frames: int, random: np.random.Generator) -> Poses:
    """Draws a clip of a motion.

    Args:
        motion: One of ``MOTION_CLASSES``.
        num_frames: T, at least ``MIN_FRAMES``.
        random: Generator of the clip. The same number of draws is taken for every motion.
    """
    assert num_frames >= MIN_FRAMES, f"{num_frames} frames cannot show three bounces"
    start = random.random(len(PARAMETERS))
    travel = random.uniform(*TRAVEL)
    change = int(random.integers(num_frames // 2 - 1, (num_frames + 1) // 2 + 2))
    values = np.repeat(start[None], num_frames, axis=0)
    second = np.zeros(num_frames, dtype=np.bool_)
    time = np.arange(num_frames)
    if motion in MOVES:
        parameter, sign = MOVES[motion]
        column = PARAMETERS.index(parameter)
        values[:, column] = (start[column] + sign * travel * time / (num_frames - 1)) % 1.0
    elif motion in BOUNCES:
        phase = (start[1] + BOUNCES[motion] * time / num_frames) % 1.0
        values[:, 1] = np.minimum(1 - np.abs(2 * phase - 1), np.nextafter(1.0, 0.0))
    else:
        assert motion == ORDER, motion
        second = time >= change
    return Poses(values, second)
