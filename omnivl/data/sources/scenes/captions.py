"""Descriptions of scenes: captions, a paragraph, and phrases and regions with their boxes."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick, shuffled
from omnivl.data.sources.scenes.words import article, counted, listed
from omnivl.data.sources.scenes.world import RELATIONS, Scene, Thing, arrange


def captions(random: np.random.Generator, cast: Cast) -> Made:
    """A scene of two to five kinds of things with several captions, and a region for each thing.

    The captions: what there is; what there is and on which ground; how two things stand; where one thing is.
    """
    scene = crowd(random, cast)
    one, other = scene.things[:2]
    relation = pick(random, [name for name in RELATIONS if one.stands(name, other)])
    texts = (
        inventory(scene),
        f"{inventory(scene)} on {scene.ground} ground",
        f"{article(one.name)} {relation} {article(other.name)}",
        f"{article(one.name)} at the {one.place} on {scene.ground} ground",
    )
    regions = [{"caption": sized(thing)} for thing in scene.things]
    numbers = tuple(range(len(scene.things)))
    fields = {"paragraph": paragraph(scene), "regions": regions, "ground": scene.ground}
    return Made((scene,), texts, fields, {"region_boxes": numbers})


def paragraphs(random: np.random.Generator, cast: Cast) -> Made:
    """A scene as for captions, whose one text is its paragraph."""
    scene = crowd(random, cast)
    return Made((scene,), (paragraph(scene),), {"ground": scene.ground})


def phrases(random: np.random.Generator, cast: Cast) -> Made:
    """A sentence about all things of a scene, and the phrase and the boxes of each of its parts."""
    scene = crowd(random, cast)
    counts = Counter(thing.name for thing in scene.things)
    order = shuffled(random, list(counts))
    parts = [counted(counts[name], name) for name in order]
    numbers = tuple(tuple(number for number, thing in enumerate(scene.things) if thing.name == name) for name in order)
    return Made((scene,), (f"a picture of {listed(parts)}",), {"phrases": parts}, {"phrase_boxes": numbers})


def crowd(random: np.random.Generator, cast: Cast) -> Scene:
    """A scene of two to four kinds of things, one of which may be there two or three times.

    Its first two things are of different kinds.
    """
    ground = cast.ground(random)
    wanted = list(cast.draw(random, 2 + int(random.integers(3)), ground))
    again = pick(random, wanted)
    return arrange(random, ground, [*wanted, *[again] * int(random.integers(3))])


def inventory(scene: Scene) -> str:
    """What there is, in the order of the things: ``a cat, two dogs and an apple``."""
    counts = Counter(thing.name for thing in scene.things)
    return listed([counted(number, name) for name, number in counts.items()])


def paragraph(scene: Scene) -> str:
    """A sentence on the ground and one on each thing, from top left to bottom right."""
    things: Sequence[Thing] = sorted(scene.things, key=lambda thing: thing.cell)
    sentences = [f"the ground is {scene.ground}."]
    sentences += [f"{sized(thing)} is at the {thing.place}." for thing in things]
    return " ".join(sentences)


def sized(thing: Thing) -> str:
    """A thing with its size: ``a large cat``."""
    return f"a {'large' if thing.is_large else 'small'} {thing.name}"
