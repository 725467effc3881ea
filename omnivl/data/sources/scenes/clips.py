"""Clips of two things that move: questions, statements and captions about what they do.

Places, sizes and angles run around a circle, as in ``motion_poses``, so that no single frame says what moves how.

======  ==============================  ===========================================
type    question                        answers
======  ==============================  ===========================================
does    what does the cat do?           the motions
who     what moves left?                the concepts
first   what appears first?             the concepts
======  ==============================  ===========================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from omnivl.data.sources.motion_poses import BOUNCES, MOVES, Poses, draw_poses
from omnivl.data.sources.motion_sprites import CENTRE, Sprite
from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import pick, shuffled
from omnivl.data.sources.scenes.questions import the
from omnivl.data.sources.scenes.statements import TRUTH
from omnivl.data.sources.scenes.world import GROUNDS, Wanted

ACTIONS: tuple[str, ...] = (*MOVES, *BOUNCES)
SMALLEST, LARGEST = 0.25, 0.45
"""Side of a thing over that of the frame, at the ends of its zoom."""


@dataclass(frozen=True)
class Mover:
    """A thing of a clip.

    Attributes:
        name: The concept's name.
        drawing: Index of its drawing.
        poses: Where it is in each frame.
        shown: bool ``[T]``: in which frames it is shown.
    """

    name: str
    drawing: int
    poses: Poses
    shown: NDArray[np.bool_]


@dataclass(frozen=True)
class Clip:
    """A clip and what is said about it.

    Attributes:
        ground: Name of the ground's colour.
        movers: Later ones cover earlier ones; in random order, so that this does not say what they do.
        captions: Texts.
        fields: Further fields of the sample.
    """

    ground: str
    movers: tuple[Mover, ...]
    captions: tuple[str, ...]
    fields: Mapping[str, object]


def clip_question(random: np.random.Generator, cast: Cast, num_frames: int, types: Sequence[str]) -> Clip:
    """A question of one of some types."""
    kind = pick(random, types)
    ground = cast.ground(random)
    if kind == "first":
        movers = _one_after_the_other(random, cast, ground, num_frames)
        question, answer = "what appears first?", movers[0].name
    else:
        movers, actions = _both_move(random, cast, ground, num_frames)
        asked = int(random.integers(2))
        name, action = movers[asked].name, actions[asked]
        question, answer = (f"what does {the(name)} do?", action) if kind == "does" else (f"what {action}?", name)
    fields = {"question": question, "question_type": kind, "answers": [answer], "answer": answer}
    return Clip(ground, tuple(shuffled(random, movers)), (question,), fields)


def clip_statement(random: np.random.Generator, cast: Cast, num_frames: int, types: Sequence[str]) -> Clip:
    """Is a statement about a clip true? False ones name the other thing, or the other order."""
    kind, holds, ground = pick(random, types), bool(random.integers(2)), cast.ground(random)
    if kind == "first":
        movers = _one_after_the_other(random, cast, ground, num_frames)
        earlier, later = movers if holds else movers[::-1]
        statement = f"{the(earlier.name)} appears before {the(later.name)}"
    else:
        movers, actions = _both_move(random, cast, ground, num_frames)
        asked = int(random.integers(2))
        statement = f"{the(movers[asked].name)} {actions[asked if holds else 1 - asked]}"
    answer = TRUTH[holds]
    return Clip(ground, tuple(shuffled(random, movers)), (statement,), {"answer": answer, "answers": [answer]})


def clip_caption(random: np.random.Generator, cast: Cast, num_frames: int, types: Sequence[str]) -> Clip:
    """Captions: what both things do, or in which order they appear."""
    kind, ground = pick(random, types), cast.ground(random)
    if kind == "first":
        movers = _one_after_the_other(random, cast, ground, num_frames)
        texts = (
            f"{the(movers[0].name)} appears before {the(movers[1].name)}",
            f"{the(movers[1].name)} appears after {the(movers[0].name)}",
        )
    else:
        movers, actions = _both_move(random, cast, ground, num_frames)
        said = [f"{the(mover.name)} {action}" for mover, action in zip(movers, actions, strict=True)]
        texts = (" while ".join(said), " while ".join(said[::-1]))
    return Clip(ground, tuple(shuffled(random, movers)), texts, {"ground": ground})


ClipMaker = Callable[[np.random.Generator, Cast, int, Sequence[str]], Clip]

QUESTION_TYPES = ("does", "who", "first")
STATEMENT_TYPES = ("does", "first")


def draw_clip(clip: Clip, sprite: Callable[[int], Sprite], size: int) -> NDArray[np.uint8]:
    """Draws a clip, uint8 ``[T, S, S, 3]``.

    Args:
        clip: The clip.
        sprite: The drawing of an index.
        size: S.
    """
    frames: NDArray[np.uint8] = np.empty((len(clip.movers[0].shown), size, size, 3), dtype=np.uint8)
    frames[:] = GROUNDS[clip.ground]
    for mover in clip.movers:
        layers = np.concatenate([sprite(mover.drawing).colours, sprite(mover.drawing).alpha], axis=2)
        while layers.shape[0] >= 2 * LARGEST * size:  # so that scaling down leaves nothing out
            layers = cv2.resize(layers, (layers.shape[1] // 2, layers.shape[0] // 2), interpolation=cv2.INTER_AREA)
        for frame, pose, shown in zip(frames, mover.poses.values, mover.shown, strict=True):
            if shown:
                _stamp(frame, layers, pose)
    return frames


def _stamp(frame: NDArray[np.uint8], layers: NDArray[np.uint8], pose: NDArray[np.float64]) -> None:
    """Draws a sprite ``[H, W, 4]``, colours multiplied by alpha, over a frame at a pose."""
    x, y, turn, zoom = (float(value) for value in pose)
    size, (height, width) = frame.shape[0], layers.shape[:2]
    scale = SMALLEST * (LARGEST / SMALLEST) ** zoom * size / height
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), -360.0 * turn, scale)
    low, high = CENTRE
    for axis, (place, middle) in enumerate(((x, width / 2), (y, height / 2))):
        matrix[axis, 2] += (low + (high - low) * place) * size - middle
    drawn = cv2.warpAffine(layers, matrix, (size, size), flags=cv2.INTER_LINEAR).astype(np.uint16)
    behind = ((255 - drawn[..., 3:]) * frame + 127) // 255
    frame[:] = np.minimum(drawn[..., :3] + behind, 255).astype(np.uint8)


def _both_move(
    random: np.random.Generator, cast: Cast, ground: str, num_frames: int
) -> tuple[list[Mover], tuple[str, str]]:
    """Two things with different motions."""
    first, second = (ACTIONS[place] for place in random.permutation(len(ACTIONS))[:2].tolist())
    things = cast.draw(random, 2, ground)
    everywhere = np.ones(num_frames, dtype=np.bool_)
    movers = [
        _mover(one, draw_poses(action, num_frames, random), everywhere)
        for one, action in zip(things, (first, second), strict=True)
    ]
    return movers, (first, second)


def _one_after_the_other(random: np.random.Generator, cast: Cast, ground: str, num_frames: int) -> list[Mover]:
    """Two things of which one is shown first, and then the other in its place."""
    things = cast.draw(random, 2, ground)
    change = int(random.integers(num_frames // 2 - 1, (num_frames + 1) // 2 + 2))
    still = Poses(np.repeat(random.random(4)[None], num_frames, axis=0), np.zeros(num_frames, dtype=np.bool_))
    early = np.arange(num_frames) < change
    movers = [_mover(one, still, shown) for one, shown in zip(things, (early, ~early), strict=True)]
    return movers if random.integers(2) else [_mover(things[1], still, early), _mover(things[0], still, ~early)]


def _mover(wanted: Wanted, poses: Poses, shown: NDArray[np.bool_]) -> Mover:
    return Mover(wanted.name, wanted.drawing, poses, shown)
