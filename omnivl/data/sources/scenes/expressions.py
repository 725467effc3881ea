"""Referring expressions: words that fit one thing of a scene alone, with its box and its mask.

=========  ==============================  ==========================================================
type       expression                      what else is there
=========  ==============================  ==========================================================
name       the cat                         other things
size       the large cat                   a small cat
place      the cat on the left             two cats, the other one further to the right
relation   the cat below the dog           two cats, of which the other one is not below the dog
=========  ==============================  ==========================================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick, shuffled
from omnivl.data.sources.scenes.world import GRID, OPPOSITE, RELATIONS, Scene, Wanted, arrange, related_cells

Chosen = tuple[str, Sequence[Wanted]]
"""An expression, and the things of its scene, the one that it means first."""

_SIDES: Mapping[str, str] = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}
_CELLS = range(GRID * GRID)


def expression(random: np.random.Generator, cast: Cast) -> Made:
    """An expression of one of all types. Things are shuffled, so that their order does not say which is meant."""
    kind = pick(random, tuple(TYPES))
    ground = cast.ground(random)
    words, wanted = TYPES[kind](random, cast, ground)
    scene = arrange(random, ground, wanted)
    order = shuffled(random, range(len(wanted)))
    scene = Scene(ground, tuple(scene.things[number] for number in order))
    target, every = order.index(0), tuple(range(len(order)))
    fields = {"expression_type": kind, "target": target}
    return Made((scene,), (words,), fields, {"box": target, "candidates": every}, mask=target)


def _name(random: np.random.Generator, cast: Cast, ground: str) -> Chosen:
    wanted = cast.draw(random, 3 + int(random.integers(3)), ground)
    return f"the {wanted[0].name}", wanted


def _size(random: np.random.Generator, cast: Cast, ground: str) -> Chosen:
    large = bool(random.integers(2))
    subject, *others = cast.draw(random, 2 + int(random.integers(3)), ground)
    both = [replace(subject, large=large), replace(subject, large=not large)]
    return f"the {'large' if large else 'small'} {subject.name}", [*both, *others]


def _place(random: np.random.Generator, cast: Cast, ground: str) -> Chosen:
    relation = pick(random, RELATIONS)
    subject, *others = cast.draw(random, 2 + int(random.integers(3)), ground)
    cell = pick(random, [cell for cell in _CELLS if related_cells(OPPOSITE[relation], cell, True)])
    both = [replace(subject, cells=(cell,)), replace(subject, cells=related_cells(OPPOSITE[relation], cell, True))]
    return f"the {subject.name} on the {_SIDES[relation]}", [*both, *others]


def _relation(random: np.random.Generator, cast: Cast, ground: str) -> Chosen:
    relation = pick(random, RELATIONS)
    subject, other, *others = cast.draw(random, 2 + int(random.integers(3)), ground)
    cell = pick(random, [cell for cell in _CELLS if related_cells(relation, cell, True)])
    wanted = [
        replace(subject, cells=related_cells(relation, cell, True)),
        replace(subject, cells=related_cells(relation, cell, False)),
        replace(other, cells=(cell,)),
    ]
    return f"the {subject.name} {relation} the {other.name}", [*wanted, *others]


TYPES: Mapping[str, Callable[[np.random.Generator, Cast, str], Chosen]] = {
    "name": _name,
    "size": _size,
    "place": _place,
    "relation": _relation,
}
"""Makers of expressions by type."""
