"""Statements about scenes: entailment with one picture, and statements about two pictures.

What is named in a statement is drawn independently of whether it is right, and so is what the pictures show besides.
"""

import numpy as np

from omnivl.data.sources.scenes.captions import inventory
from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick
from omnivl.data.sources.scenes.words import article, plural
from omnivl.data.sources.scenes.world import GRID, Scene, arrange

ENTAILMENT = ("contradiction", "neutral", "entailment")
"""Labels in the order in which SNLI-VE numbers them."""

TRUTH = ("false", "true")


def entailment(random: np.random.Generator, cast: Cast) -> Made:
    """Does a picture entail or contradict that there is a thing, or that there is none?

    In half of the pictures a screen hides a cell. Then of a thing that is not seen nothing can be said: ``neutral``.
    Neither the statement nor the picture alone gives more than half of the answers.
    """
    ground, hidden, says, seen = cast.ground(random), *(bool(random.integers(2)) for _ in range(3))
    wanted = cast.draw(random, 3 + int(random.integers(3)), ground)
    screen = int(random.integers(GRID * GRID)) if hidden else None
    scene = arrange(random, ground, wanted[:-1] if seen else wanted[1:], screen)
    name = wanted[0].name
    statement = f"there is {article(name)}" if says else f"there is no {name}"
    answer = "neutral" if hidden and not seen else "entailment" if says == seen else "contradiction"
    fields = {"answer": answer, "answers": [answer], "premise": inventory(scene)}
    return Made((scene,), (statement,), fields)


def pairs(random: np.random.Generator, cast: Cast) -> Made:
    """Is a statement about two pictures true?"""
    holds = bool(random.integers(2))
    statement, left, right = pick(random, (_both, _one, _more))(random, cast, holds)
    answer = TRUTH[holds]
    return Made((left, right), (statement,), {"answer": answer, "answers": [answer], "statement": statement})


def _both(random: np.random.Generator, cast: Cast, holds: bool) -> tuple[str, Scene, Scene]:
    """False statements are so because of the left picture, of the right one, or of both."""
    shown = (True, True) if holds else pick(random, ((True, False), (False, True), (False, False)))
    name, left, right = _with_and_without(random, cast, shown)
    return f"both pictures show {article(name)}", left, right


def _one(random: np.random.Generator, cast: Cast, holds: bool) -> tuple[str, Scene, Scene]:
    shown = pick(random, ((True, False), (False, True)) if holds else ((True, True), (False, False)))
    name, left, right = _with_and_without(random, cast, shown)
    return f"only one picture shows {article(name)}", left, right


def _more(random: np.random.Generator, cast: Cast, holds: bool) -> tuple[str, Scene, Scene]:
    """Of one thing there are more in the left picture, or more in the right one; of another thing likewise."""
    ground, says_left = cast.ground(random), bool(random.integers(2))
    one, other = cast.draw(random, 2, ground)
    numbers = [_different(random), _different(random)]
    if (numbers[0][0] > numbers[0][1]) != (says_left == holds):
        numbers[0] = numbers[0][::-1]
    left, right = (arrange(random, ground, [one] * numbers[0][side] + [other] * numbers[1][side]) for side in range(2))
    return f"there are more {plural(one.name)} in the {'left' if says_left else 'right'} picture", left, right


def _different(random: np.random.Generator) -> tuple[int, int]:
    """Two different numbers from 0 to 3."""
    first, second = random.permutation(4)[:2].tolist()
    return first, second


def _with_and_without(random: np.random.Generator, cast: Cast, shown: tuple[bool, bool]) -> tuple[str, Scene, Scene]:
    """The name of a thing, and two scenes of which each shows it or does not; their other things are different."""
    ground = cast.ground(random)
    wanted = cast.draw(random, 7, ground)
    subject, others = wanted[0], (wanted[1:4], wanted[4:7])
    left, right = (
        arrange(random, ground, [subject, *own[1:]] if has else own) for has, own in zip(shown, others, strict=True)
    )
    return subject.name, left, right
