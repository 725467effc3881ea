"""Interleaved documents: pictures and sentences in turn that bind made-up names to things, and a question at the end.

A document shows ``shots`` different things, one in each picture, and says of each what it is called: ``this is a dax.
this is a wug. what is this?``. The last picture shows one of these things again: another drawing of it where there is
one, of another size in another place. The answer is the name that the document has given it.

Names and their order are drawn independently of the things, and so is which thing is asked for: neither the text nor
the last picture says the answer.

Source: Tsimpoukelli et al., Frozen, arXiv 2106.13884, section 4.3 (Open-Ended miniImageNet, with the words dax and
    blicket); Alayrac et al., Flamingo, arXiv 2204.14198, section 3.1.3 (interleaved pictures and text).
"""

from collections.abc import Sequence

import numpy as np

from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick, shuffled
from omnivl.data.sources.scenes.world import Scene, Thing

NAMES = (
    *("dax", "wug", "blicket", "toma", "fep", "zup", "bouba", "vek"),
    *("gip", "plon", "quib", "tupa", "mep", "pim", "lum", "geck"),
)
"""Made-up names; each is two tokens of the embedded vocabulary, of which the first is no other one's."""

SHOTS = tuple(range(1, 9))
"""Allowed numbers of things that a document names."""

DEFAULT_SHOTS = 4
QUESTION = "what is this?"
QUERY = "query.png"

LEAST_SIDE = 48
"""Smallest side of a document's pictures: the smallest thing has 21 pixels then."""

_SMALLEST, _LARGEST = 0.45, 0.8
"""Sides of things that a picture shows alone."""

_MIDDLE = 4


def files_of(shots: int) -> tuple[str, ...]:
    """Names of a document's pictures, in its order: ``1.png``, ``2.png`` ... and ``query.png``."""
    return (*(f"{number}.png" for number in range(1, shots + 1)), QUERY)


def document(random: np.random.Generator, cast: Cast, shots: int) -> Made:
    """A document that names so many things, of which the last picture shows one again.

    Args:
        random: The sample's generator.
        cast: The drawings.
        shots: Number of things, one of ``SHOTS``.
    """
    ground = cast.ground(random)  # one for all pictures, so that it is no mark of any of them
    things = cast.draw_apart(random, shots, ground)
    names = shuffled(random, NAMES)[:shots]
    asked = pick(random, range(shots))
    shown = [alone(random, one.name, one.drawing) for one in things]
    others = [one for one in cast.drawings(things[asked].name, ground) if one != things[asked].drawing]
    shown.append(alone(random, things[asked].name, pick(random, others or [things[asked].drawing])))
    fields = {
        "question": QUESTION,
        "options": names,
        "option": asked,
        "answer": names[asked],
        "answers": [names[asked]],
        "shots": shots,
        "concepts": [one.name for one in things],
    }
    return Made(tuple(Scene(ground, (one,)) for one in shown), (text_of(names),), fields)


def text_of(names: Sequence[str]) -> str:
    """The text of a document, in which things have these names."""
    return " ".join([*(f"this is a {name}." for name in names), QUESTION])


def alone(random: np.random.Generator, name: str, drawing: int) -> Thing:
    """A thing that has a picture for itself, anywhere in it."""
    side = _SMALLEST + (_LARGEST - _SMALLEST) * random.random()
    x, y = (side / 2 + (1 - side) * random.random() for _ in range(2))
    return Thing(name, drawing, _MIDDLE, x, y, side)
