"""The drawings that take part in scenes: which concepts there are, and which of them are held out of training.

Two things are never seen in training:

- pairs: a fifth of all pairs of concepts never stand in one scene. In part ``pairs`` the two things that matter are
  such a pair;
- concepts: those whose drawings are of split ``test``. In part ``concepts`` the thing that matters is one of them.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from omnivl.data.config import DataEntryConfig
from omnivl.data.sources import generated
from omnivl.data.sources.base import Sample
from omnivl.data.sources.emoji import open_emoji
from omnivl.data.sources.motion_sprites import MIN_CONTRAST, Sprite, read_sprite
from omnivl.data.sources.scenes.world import GROUNDS, Wanted
from omnivl.errors import DataError
from omnivl.randomness import stable_hash

PARTS = (*generated.PARTS, "pairs", "concepts")
GROUPS = ("animals & nature", "food & drink", "objects", "travel & places")
"""The groups whose drawings take part where ``where`` names neither groups nor labels: things that can be counted."""

LEAST_CONCEPTS = 12
_HELD_OUT = 5
"""One of so many pairs is held out."""

_MAX_SPRITES = 1024
_MAX_ATTEMPTS = 2_000
_MAX_TRIED = 100
"""Draws after which a scene is begun anew."""


class Cast:
    """The concepts of a source's scenes, by name, with their drawings.

    Only concepts take part whose name is one word, of which a sentence can speak.
    """

    def __init__(self, where: Mapping[str, tuple[str, ...]], part: str) -> None:
        """Opens the drawings.

        Args:
            where: Filter of the drawings by their metadata.
            part: One of ``PARTS``.

        Raises:
            DataError: Too few concepts are left.
        """
        limits = where if {"group", "label"} & where.keys() else {**where, "group": GROUPS}
        self._drawings = open_emoji(DataEntryConfig(source="emoji", kind="image_text", where=limits))
        self._sprites: OrderedDict[int, Sprite] = OrderedDict()
        self._stand_out: dict[tuple[int, str], bool] = {}
        self._part = part
        of_name: dict[str, list[int]] = defaultdict(list)
        novel: set[str] = set()
        for index in range(len(self._drawings)):
            meta = self._drawings.read(index).meta
            name = str(meta["name"])
            if name.isalpha():
                of_name[name].append(index)
                if meta["split"] == "test":
                    novel.add(name)
        self._of_name = {name: tuple(of_name[name]) for name in sorted(of_name)}
        self.known = tuple(name for name in self._of_name if name not in novel)
        self.novel = tuple(name for name in self._of_name if name in novel)
        if len(self.known) < LEAST_CONCEPTS or (part == "concepts" and not self.novel):
            raise DataError(
                f"data source 'scenes': where leaves {len(self.known)} concepts with a name of one word"
                f"{'' if self.novel else ', none of them held out'}; allowed: {LEAST_CONCEPTS} or more, of which part "
                "'concepts' has held out some; allow more drawings"
            )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_sprites": OrderedDict()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all concepts, those that are held out last."""
        return (*self.known, *self.novel)

    def ground(self, random: np.random.Generator) -> str:
        """The colour of a scene's ground."""
        return tuple(GROUNDS)[int(random.integers(len(GROUNDS)))]

    def draw(
        self, random: np.random.Generator, count: int, ground: str, avoid: Collection[str] = ()
    ) -> tuple[Wanted, ...]:
        """Different concepts that may stand in one scene, each with a drawing that can be seen on the ground.

        The part decides about the first two: in part ``pairs`` they are a pair that is held out, in part ``concepts``
        the first is held out. All others are a scene of training.

        Args:
            random: The sample's generator.
            count: How many, 2 or more.
            ground: Name of the ground's colour.
            avoid: Names that must not be among them.
        """
        found: list[Wanted] = []
        for attempt in range(_MAX_ATTEMPTS):
            if attempt % _MAX_TRIED == _MAX_TRIED - 1:
                found.clear()  # those that were drawn may leave no other that goes with all of them
            names = self.novel if self._part == "concepts" and not found else self.known
            name = names[int(random.integers(len(names)))]
            taken = [one.name for one in found]
            apart = self._part == "pairs" and len(found) == 1
            if name in taken or name in avoid or self._clashes(name, taken) != apart:
                continue
            drawing = self.drawing(random, name, ground)
            if drawing is not None:
                found.append(Wanted(name, drawing))
                if len(found) == count:
                    return tuple(found)
        raise DataError(
            f"data source 'scenes': no {count} of {len(self.known)} concepts were found that may stand together on "
            f"{ground} ground; allow more drawings in where"
        )

    def draw_apart(self, random: np.random.Generator, count: int, ground: str) -> tuple[Wanted, ...]:
        """Different concepts for pictures of their own, each with a drawing that can be seen on the ground.

        All are of the part's supply: in part ``concepts`` every one is held out.

        Args:
            random: The sample's generator.
            count: How many.
            ground: Name of the ground's colour.

        Raises:
            DataError: There are not so many.
        """
        names, found = self.novel if self._part == "concepts" else self.known, list[Wanted]()
        for place in random.permutation(len(names)).tolist():
            drawing = self.drawing(random, names[place], ground)
            if drawing is not None:
                found.append(Wanted(names[place], drawing))
                if len(found) == count:
                    return tuple(found)
        raise DataError(
            f"data source 'scenes': {len(found)} of {len(names)} concepts of part {self._part!r} can be seen on "
            f"{ground} ground, for documents that name {count}; allow more drawings in where, or lower where.shots"
        )

    def absent(self, random: np.random.Generator, present: Sequence[str]) -> str:
        """A concept that could stand in a scene but does not: of the same supply as the first one that does."""
        names = self.novel if self._part == "concepts" and len(self.novel) > 1 else self.known
        left = [name for name in names if name not in present] or [name for name in self.known if name not in present]
        return left[int(random.integers(len(left)))]

    def drawing(self, random: np.random.Generator, name: str, ground: str) -> int | None:
        """One of a concept's drawings that stands out from the ground; None if there is none."""
        seen = self.drawings(name, ground)
        return seen[int(random.integers(len(seen)))] if seen else None

    def drawings(self, name: str, ground: str) -> list[int]:
        """All of a concept's drawings that stand out from the ground."""
        return [index for index in self._of_name[name] if self._stands_out(index, ground)]

    def sprite(self, drawing: int) -> Sprite:
        """The cut-out drawing."""
        sprite = self._sprites.get(drawing)
        if sprite is None:
            sprite = read_sprite(self.sample(drawing))
            self._sprites[drawing] = sprite
            if len(self._sprites) > _MAX_SPRITES:
                self._sprites.popitem(last=False)
        return sprite

    def sample(self, drawing: int) -> Sample:
        """The sample of a drawing."""
        return self._drawings.read(drawing)

    def _stands_out(self, drawing: int, ground: str) -> bool:
        found = self._stand_out.get((drawing, ground))
        if found is None:
            found = self.sprite(drawing).contrast(GROUNDS[ground]) >= MIN_CONTRAST
            self._stand_out[drawing, ground] = found
        return found

    def _clashes(self, name: str, taken: Sequence[str]) -> bool:
        return any(held_out(name, other) for other in taken if name in self.known and other in self.known)


def held_out(one: str, other: str) -> bool:
    """Whether two concepts never stand in one scene of training, whatever the seed."""
    return stable_hash("scenes", "pair", *sorted((one, other))) % _HELD_OUT == 0
