"""Questions with options to choose from: one with reasons, and a dialogue."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from omnivl.data.sources.scenes.captions import crowd, inventory
from omnivl.data.sources.scenes.cast import Cast
from omnivl.data.sources.scenes.made import Made, pick, shuffled
from omnivl.data.sources.scenes.questions import MOST_COUNTED, the
from omnivl.data.sources.scenes.words import NUMBERS, plural
from omnivl.data.sources.scenes.world import GROUNDS, OPPOSITE, PLACES, RELATIONS, Scene, arrange, related_cells

OPTIONS = 4
"""Options of a question with reasons, as in VCR."""

DIALOGUE_OPTIONS = 10
ROUNDS = 4


def reasons(random: np.random.Generator, cast: Cast) -> Made:
    """What stands in some relation to a thing, and why: four answers and four reasons, of which one each is right.

    Three of the answers are things of the picture; all reasons speak of the right answer and name different places, all
    of which the relation allows equally.
    """
    relation, ground = pick(random, RELATIONS), cast.ground(random)
    answer, subject, *others = cast.draw(random, 5, ground)
    possible = [c for c in range(len(PLACES)) if related_cells(OPPOSITE[relation], c, True)]
    answer_cell = pick(random, possible)
    cell = pick(random, related_cells(OPPOSITE[relation], answer_cell, True))
    outside = related_cells(relation, cell, False)
    shown = others[: min(2, len(outside))]  # there may be no room for both
    scene = arrange(
        random,
        ground,
        [
            replace(answer, cells=(answer_cell,)),
            replace(subject, cells=(cell,)),
            *(replace(one, cells=outside) for one in shown),
        ],
    )
    right = scene.things[0]
    options = shuffled(random, [answer.name, *(one.name for one in others)])
    places = shuffled(random, [right.place, *_others(random, [PLACES[c] for c in possible], right.place, OPTIONS - 1)])
    rationales = [f"the {answer.name} is at the {place}" for place in places]
    question = f"what is {relation} {the(subject.name)}?"
    fields = {
        "question": question,
        "options": options,
        "option": options.index(answer.name),
        "rationales": rationales,
        "rationale": places.index(right.place),
        "objects": [thing.name for thing in scene.things],
        "answer": answer.name,
    }
    return Made((scene,), (question,), fields, {"boxes": tuple(range(len(scene.things)))})


def dialogue(random: np.random.Generator, cast: Cast) -> Made:
    """A round of a dialogue on a scene: what was asked and answered before, a question, and ten answers.

    A later question says ``it`` for the thing that the one before asked for, which only the history names.
    """
    scene = crowd(random, cast)
    rounds = 1 + int(random.integers(ROUNDS))
    history: list[list[str]] = []
    last: str | None = None
    for _ in range(rounds):
        question, answer, supply, last = _turn(random, cast, scene, last)
        history.append([question, answer])
    options = shuffled(random, [answer, *_others(random, supply, answer, DIALOGUE_OPTIONS - 1)])
    fields = {
        "image_caption": inventory(scene),
        "history": history[:-1],
        "question": question,
        "options": options,
        "option": options.index(answer),
        "relevance": [float(option == answer) for option in options],
        "answer": answer,
        "answers": [answer],
        "round_id": rounds,
    }
    return Made((scene,), (question,), fields)


def _turn(
    random: np.random.Generator, cast: Cast, scene: Scene, last: str | None
) -> tuple[str, str, Sequence[str], str | None]:
    """A question, its answer, what answers to choose from, and the thing to which the next question may refer."""
    once = [thing for thing in scene.things if len(scene.named(thing.name)) == 1]
    supply = [*PLACES, "large", "small", *NUMBERS[: MOST_COUNTED + 1], *GROUNDS]
    kinds = ["count", "ground", *(["place"] if once else []), *(["it"] * 2 if last is not None else [])]
    kind = pick(random, kinds)
    if kind == "ground":
        return "which color is the ground?", scene.ground, supply, None
    if kind == "count":
        there = pick(random, scene.things).name if random.random() < 0.75 else cast.absent(random, _names(scene))
        number = len(scene.named(there))
        return f"how many {plural(there)} are there?", NUMBERS[number], supply, there if number == 1 else None
    if kind == "it":
        assert last is not None
        thing = scene.named(last)[0]
        if random.integers(2):
            return "how large is it?", "large" if thing.is_large else "small", supply, last
        return "where is it?", thing.place, supply, last
    thing = pick(random, once)
    return f"where is {the(thing.name)}?", thing.place, supply, thing.name


def _names(scene: Scene) -> list[str]:
    return [thing.name for thing in scene.things]


def _others(random: np.random.Generator, supply: Sequence[str], right: str, count: int) -> list[str]:
    """So many wrong choices."""
    return shuffled(random, [one for one in supply if one != right])[:count]
