"""Questions about scenes with one answer each.

The answer is drawn first, and then a scene that has it, so that for every type of question all its answers are equally
frequent whatever the question names. What else the scene shows is drawn alike for all answers.

=========  =======================================  ========================================
type       question                                 answers
=========  =======================================  ========================================
exist      is there a cat?                          yes, no
count      how many cats are there?                 one, two, three, four
place      where is the cat?                        the nine cells
ground     is the ground blue?                      yes, no
relate     is the cat left of the dog?              yes, no
what       what is left of the cat?                 the concepts
size       is the cat larger than the dog?          yes, no
cover      what covers the cat?                     the concepts
=========  =======================================  ========================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick
from omnivl.data.sources.scenes.words import NUMBERS, article, plural
from omnivl.data.sources.scenes.world import (
    GRID,
    GROUNDS,
    PLACES,
    RELATIONS,
    Scene,
    arrange,
    cover,
    related_cells,
)

MOST_COUNTED = 4
_MOST_THINGS = 6
_ALL_CELLS = GRID * GRID


@dataclass(frozen=True)
class Asked:
    """A question about a scene.

    Attributes:
        scene: The scene.
        question: Its words.
        answer: The only right one.
        program: How the answer is found, step by step.
    """

    scene: Scene
    question: str
    answer: str
    program: tuple[str, ...]


def question(random: np.random.Generator, cast: Cast, types: Sequence[str]) -> Made:
    """A question of one of some types, all equally frequent."""
    kind = pick(random, types)
    asked = TYPES[kind](random, cast)
    return Made(
        (asked.scene,),
        (asked.question,),
        {
            "question": asked.question,
            "question_type": kind,
            "answers": [asked.answer],
            "weights": [1.0],
            "answer": asked.answer,
            "program": list(asked.program),
        },
    )


def answers_of(kind: str, cast: Cast) -> tuple[str, ...]:
    """All answers to the questions of a type."""
    if kind in ("what", "cover"):
        return cast.names
    if kind == "count":
        return NUMBERS[1 : MOST_COUNTED + 1]
    return PLACES if kind == "place" else ("yes", "no")


def _exist(random: np.random.Generator, cast: Cast) -> Asked:
    ground, there = cast.ground(random), bool(random.integers(2))
    wanted = cast.draw(random, 3 + int(random.integers(4)), ground)
    name = wanted[0].name
    scene = arrange(random, ground, wanted[:-1] if there else wanted[1:])
    return Asked(scene, f"is there {article(name)}?", _yes(there), (f"select {name}", "exist"))


def _count(random: np.random.Generator, cast: Cast) -> Asked:
    """As many others are there, some of them equal, so that the picture alone does not say what is counted."""
    ground, number = cast.ground(random), 1 + int(random.integers(MOST_COUNTED))
    subject, other, *_ = cast.draw(random, 2, ground)
    others = 1 + int(random.integers(min(MOST_COUNTED, _MOST_THINGS - number)))
    scene = arrange(random, ground, [subject] * number + [other] * others)
    words = f"how many {plural(subject.name)} are there?"
    return Asked(scene, words, NUMBERS[number], (f"select {subject.name}", "count"))


def _place(random: np.random.Generator, cast: Cast) -> Asked:
    ground, cell = cast.ground(random), int(random.integers(_ALL_CELLS))
    subject, *others = cast.draw(random, 2 + int(random.integers(4)), ground)
    scene = arrange(random, ground, [replace(subject, cells=(cell,)), *others])
    program = (f"select {subject.name}", "query place")
    return Asked(scene, f"where is {the(subject.name)}?", PLACES[cell], program)


def _ground(random: np.random.Generator, cast: Cast) -> Asked:
    named, holds = pick(random, tuple(GROUNDS)), bool(random.integers(2))
    ground = named if holds else pick(random, [colour for colour in GROUNDS if colour != named])
    scene = arrange(random, ground, cast.draw(random, 2 + int(random.integers(4)), ground))
    return Asked(scene, f"is the ground {named}?", _yes(holds), ("select ground", f"verify {named}"))


def _relate(random: np.random.Generator, cast: Cast) -> Asked:
    relation, holds = pick(random, RELATIONS), bool(random.integers(2))
    scene = related_scene(random, cast, relation, holds)
    one, other = scene.things[0].name, scene.things[1].name
    program = (f"select {other}", f"relate {relation}", f"verify {one}")
    return Asked(scene, f"is {the(one)} {relation} {the(other)}?", _yes(holds), program)


def _what(random: np.random.Generator, cast: Cast) -> Asked:
    """All but one of the things are not in the relation."""
    relation, ground = pick(random, RELATIONS), cast.ground(random)
    answer, subject, *others = cast.draw(random, 2 + int(random.integers(1, 3)), ground)
    cell = pick(random, [cell for cell in range(_ALL_CELLS) if related_cells(relation, cell, True)])
    outside = related_cells(relation, cell, False)
    others = others[: len(outside)]
    wanted = [
        replace(answer, cells=related_cells(relation, cell, True)),
        replace(subject, cells=(cell,)),
        *(replace(one, cells=outside) for one in others),
    ]
    program = (f"select {subject.name}", f"relate {relation}", "query name")
    words = f"what is {relation} {the(subject.name)}?"
    return Asked(arrange(random, ground, wanted), words, answer.name, program)


def _size(random: np.random.Generator, cast: Cast) -> Asked:
    ground, holds = cast.ground(random), bool(random.integers(2))
    one, other, *rest = cast.draw(random, 2 + int(random.integers(4)), ground)
    scene = arrange(random, ground, [replace(one, large=holds), replace(other, large=not holds), *rest])
    words = f"is {the(one.name)} larger than {the(other.name)}?"
    return Asked(scene, words, _yes(holds), (f"select {one.name}", f"select {other.name}", "compare size"))


def _cover(random: np.random.Generator, cast: Cast) -> Asked:
    """Another pair of things covers each other, too, so that the picture alone does not say which is asked for.

    Each pair has a row of cells for itself: what covers a thing reaches into the next cell.
    """
    ground = cast.ground(random)
    front, behind, third, fourth, *rest = cast.draw(random, 4 + int(random.integers(2)), ground)
    rows = [range(GRID * row, GRID * (row + 1)) for row in random.permutation(GRID).tolist()]
    covered = [replace(one, large=True, cells=row) for one, row in zip((behind, fourth), rows, strict=False)]
    scene = arrange(random, ground, [*covered, *(replace(one, cells=rows[-1]) for one in rest)])
    pairs = zip(scene.things[:2], (front, third), strict=True)
    over = [cover(random, thing, one.name, one.drawing) for thing, one in pairs]
    words = f"what covers {the(behind.name)}?"
    program = (f"select {behind.name}", "relate covers", "query name")
    return Asked(replace(scene, things=(*scene.things, *over)), words, front.name, program)


def related_scene(random: np.random.Generator, cast: Cast, relation: str, holds: bool) -> Scene:
    """A scene whose first thing is, or is not, in a relation to its second one.

    Where it is not, it is in the opposite relation: nothing is said of things side by side.

    Args:
        random: The sample's generator.
        cast: The concepts.
        relation: One of ``RELATIONS``.
        holds: Whether it holds.
    """
    ground = cast.ground(random)
    one, other, *rest = cast.draw(random, 2 + int(random.integers(4)), ground)
    cells = [(one, other) for other in range(_ALL_CELLS) for one in related_cells(relation, other, True)]
    first, second = pick(random, cells)
    if not holds:
        first, second = second, first
    return arrange(random, ground, [replace(one, cells=(first,)), replace(other, cells=(second,)), *rest])


def the(name: str) -> str:
    """A name with the definite article."""
    return f"the {name}"


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


TYPES: Mapping[str, Callable[[np.random.Generator, Cast], Asked]] = {
    "exist": _exist,
    "count": _count,
    "place": _place,
    "ground": _ground,
    "relate": _relate,
    "what": _what,
    "size": _size,
    "cover": _cover,
}
"""Makers of questions by type."""
