"""What a scene consists of: a ground of some colour, and drawings with place and size.

A scene is a grid of three by three cells. A thing stands in one of them, a little off its middle; a second thing may
stand in the same cell and cover a part of the first.

Units: places and sides are fractions of the picture's side, x to the right, y downwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Colour = tuple[int, int, int]

GROUNDS: Mapping[str, Colour] = {
    "grey": (128, 128, 128),
    "blue": (112, 128, 148),
    "green": (112, 142, 118),
    "yellow": (146, 138, 106),
    "pink": (150, 116, 130),
    "purple": (130, 116, 148),
}
"""Colours of the ground by name, RGB.

They are tints of the grey that pixels are measured from, so that things, not the ground, are what most of the
differences between patches consist of: a small model sees them hundreds of steps earlier.
"""

PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
"""Names of the cells, row by row."""

GRID = 3
SMALL, LARGE = 0.19, 0.31
"""Sides of small and large drawings."""

COVERED = 0.45
"""How far a covering drawing is moved sideways, in sides of what it covers."""

RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE: Mapping[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Thing:
    """A drawing in a scene.

    Attributes:
        name: The concept's name.
        drawing: Index of the drawing among the cast's.
        cell: The cell in which it stands, 0 to 8.
        x: Of its centre.
        y: Of its centre.
        side: Of the drawing.
    """

    name: str
    drawing: int
    cell: int
    x: float
    y: float
    side: float

    @property
    def column(self) -> int:
        """0, 1 or 2 from the left."""
        return self.cell % GRID

    @property
    def row(self) -> int:
        """0, 1 or 2 from the top."""
        return self.cell // GRID

    @property
    def is_large(self) -> bool:
        """Whether it has the larger of the two sizes."""
        return self.side == LARGE

    @property
    def place(self) -> str:
        """The name of its cell."""
        return PLACES[self.cell]

    def stands(self, relation: str, other: "Thing") -> bool:
        """Whether it stands in a relation, one of ``RELATIONS``, to another: its column or row is a smaller one, say.

        Args:
            relation: ``self`` is ``relation`` the other.
            other: Another thing of the scene.
        """
        match relation:
            case "left of":
                return self.column < other.column
            case "right of":
                return self.column > other.column
            case "above":
                return self.row < other.row
        return self.row > other.row


@dataclass(frozen=True)
class Scene:
    """Things on a ground.

    Attributes:
        ground: Name of its colour.
        things: In the order in which they are drawn: later ones cover earlier ones.
        screen: The cell that a dark screen hides, drawn last; None for none.
    """

    ground: str
    things: tuple[Thing, ...]
    screen: int | None = None

    def named(self, name: str) -> list[Thing]:
        """The things of a name."""
        return [thing for thing in self.things if thing.name == name]


@dataclass(frozen=True)
class Wanted:
    """A thing to be put into a scene.

    Attributes:
        name: The concept's name.
        drawing: Index of its drawing.
        large: Its size; None draws it.
        cells: The cells in which it may stand; None for any.
    """

    name: str
    drawing: int
    large: bool | None = None
    cells: Sequence[int] | None = None


def arrange(random: np.random.Generator, ground: str, wanted: Sequence[Wanted], screen: int | None = None) -> Scene:
    """Puts things into different cells, those with a choice of cells first.

    Args:
        random: The sample's generator.
        ground: Name of the ground's colour.
        wanted: At most as many things as there are free cells; the restricted ones must leave each other a cell.
        screen: A cell that stays empty and is hidden.

    Returns:
        The scene; its things in the order of ``wanted``.
    """
    free = [int(cell) for cell in random.permutation(GRID * GRID) if cell != screen]
    assert len(wanted) <= len(free), f"{len(wanted)} things for {len(free)} cells"
    placed: dict[int, Thing] = {}
    for number in sorted(range(len(wanted)), key=lambda place: _choice(wanted[place])):
        one = wanted[number]
        cell = next(cell for cell in free if one.cells is None or cell in one.cells)
        free.remove(cell)
        large = bool(random.integers(2)) if one.large is None else one.large
        placed[number] = put(random, one.name, one.drawing, cell, large)
    return Scene(ground, tuple(placed[number] for number in range(len(wanted))), screen)


def put(random: np.random.Generator, name: str, drawing: int, cell: int, large: bool) -> Thing:
    """A thing in a cell, at a place drawn so that it stays in there."""
    side = LARGE if large else SMALL
    slack = 1 / GRID - side
    x, y = ((place + 0.5) / GRID + slack * (random.random() - 0.5) for place in (cell % GRID, cell // GRID))
    return Thing(name, drawing, cell, x, y, side)


def cover(random: np.random.Generator, thing: Thing, name: str, drawing: int) -> Thing:
    """A thing of the same size in front of another: it covers its left or right half, and is drawn later."""
    shift = COVERED * thing.side * (1 if random.integers(2) else -1)
    x = float(np.clip(thing.x + shift, thing.side / 2, 1 - thing.side / 2))
    if abs(x - thing.x) < COVERED * thing.side / 2:  # at the border there is room on one side only
        x = thing.x - shift
    return Thing(name, drawing, thing.cell, x, thing.y, thing.side)


def related_cells(relation: str, cell: int, holds: bool) -> list[int]:
    """The cells whose things are, or are not, in a relation to the thing in ``cell``."""
    here = Thing("", 0, cell, 0.0, 0.0, SMALL)
    others = (Thing("", 0, other, 0.0, 0.0, SMALL) for other in range(GRID * GRID) if other != cell)
    return [other.cell for other in others if other.stands(relation, here) == holds]


def _choice(wanted: Wanted) -> int:
    return GRID * GRID if wanted.cells is None else len(wanted.cells)
