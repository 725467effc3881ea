"""Interleaved documents: pictures and sentences in turn that bind made-up names to things, and a question at the end.

A document shows ``shots`` different things, one in each picture, and says of each what it is called: ``this is a dra.
this is a lun. what is this?``. The last picture shows one of these things again: another drawing of it where there is
one, of another size in another place. The answer is the name that the document has given it.

Names and their order are drawn independently of the things, and so is which thing is asked for: neither the text nor
the last picture says the answer.

Documents that call things by their own names (``this is a cat. this is a bus. what is this?``) teach what has to be
learnt before: which sentence goes with which picture, and what that shows. Brief ones (``cat. bus. what?``) say the
same in two tokens a picture.

Source: Tsimpoukelli et al., Frozen, arXiv 2106.13884, section 4.3 (Open-Ended miniImageNet, and with real names);
    Alayrac et al., Flamingo, arXiv 2204.14198, section 3.1.3 (interleaved pictures and text).
Differs: Frozen's dax and blicket are several tokens each. Here a made-up name is one token, as an own name is, so that
    a sentence has the same place in every document.
"""

from collections.abc import Sequence

import numpy as np

from omnivl.data.documents import END, PICTURE
from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick, shuffled
from omnivl.data.sources.scenes.world import Scene, Thing

NAMES = (
    *("dra", "gra", "pla", "fla", "glo", "cro", "bla", "pol"),
    *("lun", "vol", "vir", "sau", "ske", "wra", "nur", "tra"),
)
"""Made-up names; each is one token of the embedded vocabulary, as the names of all its concepts are."""

MADE_UP, OWN = "made_up", "own"
CALLED = (MADE_UP, OWN)
"""How a document calls its things."""

SHOTS = tuple(range(1, 9))
"""Allowed numbers of things that a document names."""

DEFAULT_SHOTS = 4

SENTENCES, BRIEF = "sentences", "brief"
WORDINGS = (SENTENCES, BRIEF)
"""How a document is worded."""

QUESTIONS = {SENTENCES: "what is this?", BRIEF: "what?"}
_STATEMENTS = {SENTENCES: "this is a {}.", BRIEF: "{}."}
QUERY = "query.png"

LEAST_SIDE = 48
"""Smallest side of a document's pictures: the smallest thing has 21 pixels then."""

_SMALLEST, _LARGEST = 0.45, 0.8
"""Sides of things that a picture shows alone."""

_MIDDLE = 4


def files_of(shots: int) -> tuple[str, ...]:
    """Names of a document's pictures, in its order: ``1.png``, ``2.png`` ... and ``query.png``."""
    return (*(f"{number}.png" for number in range(1, shots + 1)), QUERY)


def document(
    random: np.random.Generator, cast: Cast, shots: int, called: str = MADE_UP, wording: str = SENTENCES
) -> Made:
    """A document that names so many things, of which the last picture shows one again.

    Args:
        random: The sample's generator.
        cast: The drawings.
        shots: Number of things, one of ``SHOTS``.
        called: How they are called, one of ``CALLED``; the same things are shown either way.
        wording: One of ``WORDINGS``; the same names are said either way.
    """
    ground = cast.ground(random)  # one for all pictures, so that it is no mark of any of them
    things = cast.draw_apart(random, shots, ground)
    made_up = shuffled(random, NAMES)[:shots]
    names = [one.name for one in things] if called == OWN else made_up
    asked = pick(random, range(shots))
    shown = [alone(random, one.name, one.drawing) for one in things]
    others = [one for one in cast.drawings(things[asked].name, ground) if one != things[asked].drawing]
    shown.append(alone(random, things[asked].name, pick(random, others or [things[asked].drawing])))
    fields = {
        "question": QUESTIONS[wording],
        "options": names,
        "option": asked,
        "answer": names[asked],
        "answers": [names[asked]],
        "shots": shots,
        "interleaved": interleaved(names, names[asked], wording),
        "concepts": [one.name for one in things],
    }
    return Made(tuple(Scene(ground, (one,)) for one in shown), (text_of(names, wording),), fields)


def text_of(names: Sequence[str], wording: str = SENTENCES) -> str:
    """The text of a document, in which things have these names."""
    return " ".join([*(_STATEMENTS[wording].format(name) for name in names), QUESTIONS[wording]])


def interleaved(names: Sequence[str], answer: str, wording: str = SENTENCES) -> str:
    """The text of a document with the places of its pictures, in the order of its files, and the answer."""
    said = [*(_STATEMENTS[wording].format(name) for name in names), f"{QUESTIONS[wording]} {answer}"]
    return "".join(f"{PICTURE}{one}{END}" for one in said)


def alone(random: np.random.Generator, name: str, drawing: int) -> Thing:
    """A thing that has a picture for itself, anywhere in it."""
    side = _SMALLEST + (_LARGEST - _SMALLEST) * random.random()
    x, y = (side / 2 + (1 - side) * random.random() for _ in range(2))
    return Thing(name, drawing, _MIDDLE, x, y, side)
