"""How somebody feels: what is said, and the face with which it is said.

The sentiment, from -3 to 3, is the sum of what the words and the face say, each from -1.5 to 1.5, drawn independently.
"""

from collections.abc import Mapping

import numpy as np

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.motion_poses import draw_poses
from omnivl.data.sources.motion_sprites import Sprite, read_sprite
from omnivl.data.sources.scenes.clips import Clip, Mover
from omnivl.data.sources.scenes.made import pick
from omnivl.data.sources.scenes.world import GROUNDS
from omnivl.errors import DataError

WORDS: Mapping[str, float] = {"wonderful": 1.5, "good": 0.75, "there": 0.0, "bad": -0.75, "awful": -1.5}
"""What words say, in ``the film is ...``."""

FACES: Mapping[str, float] = {
    **{"smiling": 1.5, "affectionate": 1.5},
    **{"neutral / skeptical": 0.0},
    **{"concerned": -1.5, "negative": -1.5},
}
"""What faces say, by the drawings' class."""

_SAID = ("the film is {word}", "i think it is {word}", "the food was {word}")


class Faces:
    """The drawings of faces, by what they say."""

    def __init__(self, where: Mapping[str, tuple[str, ...]]) -> None:
        """Opens the drawings.

        Args:
            where: Filter by metadata other than class and group.

        Raises:
            DataError: It leaves no face of some kind.
        """
        kept = {name: values for name, values in where.items() if name not in ("label", "group")}
        entry = DataEntryConfig(source="emoji", kind="image_text", where={**kept, "label": tuple(FACES)})
        self._drawings = open_emoji(entry)
        self._of_value: dict[float, list[int]] = {value: [] for value in FACES.values()}
        self._sprites: dict[int, Sprite] = {}
        for index in range(len(self._drawings)):
            self._of_value[FACES[str(self._drawings.read(index).label)]].append(index)
        if not all(self._of_value.values()):
            raise DataError(
                "data source 'scenes': where leaves no smiling, no neutral or no unhappy face; allow more drawings"
            )

    def clip(self, random: np.random.Generator, num_frames: int) -> Clip:
        """A face that moves, with words."""
        word, value = pick(random, tuple(WORDS)), pick(random, tuple(self._of_value))
        drawing = pick(random, self._of_value[value])
        poses = draw_poses(pick(random, ("moves left", "moves right", "bounces twice")), num_frames, random)
        mover = Mover("face", drawing, poses, np.ones(num_frames, dtype=np.bool_))
        text = pick(random, _SAID).format(word=word)
        said: dict[str, object] = {"sentiment": WORDS[word] + value, "said": WORDS[word], "shown": value}
        return Clip(pick(random, tuple(GROUNDS)), (mover,), (text,), said)

    def sprite(self, drawing: int) -> Sprite:
        """The cut-out drawing."""
        if drawing not in self._sprites:
            self._sprites[drawing] = read_sprite(self._drawings.read(drawing))
        return self._sprites[drawing]
