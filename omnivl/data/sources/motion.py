"""Generated clips: a sprite of an embedded drawing that moves; the caption says what and how.

Nothing is stored. A clip is a pure function of (seed, part, index).

Shapes: T frames, S side of a frame.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.base import Rejection, Sample
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.generated import PARTS, check_kind, chosen, drawings_of
from omnivl.data.sources.motion_poses import MIN_FRAMES, MOTION_CLASSES, ORDER, Poses, draw_poses
from omnivl.data.sources.motion_sprites import (
    BACKGROUNDS,
    MIN_ASYMMETRY,
    MIN_CONTRAST,
    Sprite,
    draw_frame,
    read_sprite,
    shrink,
)
from omnivl.errors import DataError
from omnivl.randomness import generator

DEFAULT_LENGTH = 100_000
_MAX_SPRITES = 1024  # kept decoded, 38 KB each
_MAX_ATTEMPTS = 100


class MotionSource:
    """A source of generated clips, of kind ``video_text`` or ``video_label``.

    ``where`` filters the drawings by their metadata (``style``, ``split``, ``label`` ...); ``where: {part: [test]}``
    takes another endless supply of clips of them (``train``, the default, ``val`` or ``test``).
    """

    def __init__(
        self,
        config: DataEntryConfig,
        *,
        seed: int,
        num_frames: int = 8,
        size: int = 64,
        length: int = DEFAULT_LENGTH,
    ) -> None:
        """Opens the drawings.

        Args:
            config: Kind and ``where`` are used.
            seed: Seed of the clips.
            num_frames: T.
            size: S in pixels.
            length: Number of clips.

        Raises:
            DataError: The kind is an image, ``where`` leaves no drawing, or there are too few frames to show a motion.
        """
        check_kind(config, of=", since one frame shows no motion")
        if num_frames < MIN_FRAMES:
            raise DataError(f"data source 'motion': num_frames is {num_frames}; allowed: {MIN_FRAMES} or more")
        (self._part,) = chosen(config, "part", PARTS, PARTS[:1])
        where = drawings_of(config, ("part",))
        self._drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where=where))
        self._seed = seed
        self._num_frames, self._size, self._length = num_frames, size, length
        self._sprites: OrderedDict[int, Sprite] = OrderedDict()

    @property
    def classes(self) -> tuple[str, ...]:
        """All motions, sorted."""
        return tuple(sorted(MOTION_CLASSES))

    @property
    def rejections(self) -> Sequence[Rejection]:
        """None: generated samples are never bad."""
        return ()

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_sprites": OrderedDict()}

    def read(self, index: int) -> Sample:
        """Draws the clip at ``index``.

        Raises:
            BadSampleError: A drawing cannot be read.
        """
        random = generator(self._seed, "motion", self._part, index)
        motion = MOTION_CLASSES[int(random.integers(len(MOTION_CLASSES)))]
        poses = draw_poses(motion, self._num_frames, random)
        background = BACKGROUNDS[int(random.integers(len(BACKGROUNDS)))]
        first = self._choose_drawing(random, background, ())
        second = self._choose_drawing(random, background, (first,)) if motion == ORDER else first
        drawing, other = self._drawings.read(first), self._drawings.read(second)
        name, other_name = str(drawing.meta["name"]), str(other.meta["name"])
        action = f"appears before the {other_name}" if motion == ORDER else motion
        pair = f"{drawing.identity}>{other.identity}" if motion == ORDER else f"{drawing.identity}"
        key = f"{self._part}-{index:08d}"
        return Sample(
            key=key,
            where=f"motion:{self._seed}:{key}",
            frames=self._draw(poses, first, second, background),
            captions=(f"the {name} {action}",),
            label=motion,
            identity=f"{motion}:{pair}",
            meta={
                "name": name,
                "style": drawing.meta["style"],
                "split": drawing.meta["split"],
                "hexcode": drawing.meta["hexcode"],
                "motion": motion,
                "part": self._part,
                "background": background,
                "flip": False,  # a mirror turns left into right, also where the prompt does not say so
            },
        )

    def _choose_drawing(
        self, random: np.random.Generator, background: tuple[int, int, int], taken: tuple[int, ...]
    ) -> int:
        """Draws until the sprite differs enough from the background and from itself rotated, whatever the motion is."""
        identities = {self._drawings.read(index).identity for index in taken}
        index = 0
        for _ in range(_MAX_ATTEMPTS):
            index = int(random.integers(len(self._drawings)))
            sprite = self._sprite(index)
            if sprite.asymmetry < MIN_ASYMMETRY or sprite.contrast(background) < MIN_CONTRAST:
                continue
            if not identities or self._drawings.read(index).identity not in identities:
                return index
        raise DataError(
            f"data source 'motion': none of {_MAX_ATTEMPTS} drawings can be told from its background and from itself "
            f"turned; allow more than {len(self._drawings)} drawings in where"
        )

    def _draw(self, poses: Poses, first: int, second: int, background: tuple[int, int, int]) -> NDArray[np.uint8]:
        pictures = [shrink(self._sprite(index).on(background), self._size) for index in (first, second)]
        return np.stack(
            [
                draw_frame(pictures[int(shows_second)], background, pose, self._size)
                for pose, shows_second in zip(poses.values, poses.second, strict=True)
            ]
        )

    def _sprite(self, index: int) -> Sprite:
        sprite = self._sprites.get(index)
        if sprite is None:
            sprite = read_sprite(self._drawings.read(index))
            self._sprites[index] = sprite
            if len(self._sprites) > _MAX_SPRITES:
                self._sprites.popitem(last=False)
        return sprite
