"""What is asked and said about scenes is true: read back from the words alone and looked up in the scene."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest

from omnivl.data.sources.scenes.captions import captions, inventory, paragraph, phrases
from omnivl.data.sources.scenes.cast import Cast, held_out
from omnivl.data.sources.scenes.choices import DIALOGUE_OPTIONS, OPTIONS, dialogue, reasons
from omnivl.data.sources.scenes.documents import (
    BRIEF,
    CALLED,
    NAMES,
    OWN,
    QUESTIONS,
    SENTENCES,
    SHOTS,
    WORDINGS,
    document,
    files_of,
)
from omnivl.data.sources.scenes.expressions import expression
from omnivl.data.sources.scenes.made import Made
from omnivl.data.sources.scenes.questions import TYPES, question
from omnivl.data.sources.scenes.statements import entailment, pairs
from omnivl.data.sources.scenes.words import NUMBERS, article, counted, listed, plural
from omnivl.data.sources.scenes.words import singular as singular_of
from omnivl.data.sources.scenes.world import LARGE, Scene, Thing
from omnivl.data.tokenizer import TextReader, load_tokenizer
from omnivl.randomness import generator

WHERE = {"style": ("fluent", "noto"), "label": ("fruit", "vegetables", "mammals")}
RELATED = r"(left of|right of|above|below)"
FEW = 300


@pytest.fixture(scope="module")
def cast() -> Cast:
    return Cast(WHERE, "train")


def singular(cast: Cast, words: str) -> str:
    """The name whose plural, or name with an article, is ``words``."""
    words = re.sub(r"^(the|a|an) ", "", words)
    found = [name for name in cast.names if words in (name, plural(name))]
    assert len(found) == 1, words
    return found[0]


def is_so(relation: str, one: Thing, other: Thing) -> bool:
    """By where their centres are, whatever their cells."""
    along = {
        "left of": other.x - one.x,
        "right of": one.x - other.x,
        "above": other.y - one.y,
        "below": one.y - other.y,
    }
    return along[relation] > 0


def only(things: Sequence[Thing]) -> Thing:
    (thing,) = things
    return thing


def answer_to(asked: str, scene: Scene, cast: Cast) -> str:
    """The answer, from the words of a question and the scene."""
    if found := re.fullmatch(r"is there (.+)\?", asked):
        return "yes" if scene.named(singular(cast, found[1])) else "no"
    if found := re.fullmatch(r"how many (.+) are there\?", asked):
        return NUMBERS[len(scene.named(singular(cast, found[1])))]
    if found := re.fullmatch(r"where is (the .+)\?", asked):
        thing = only(scene.named(singular(cast, found[1])))
        across = ("left", "", "right")[int(thing.x * 3)]
        down = ("top", "", "bottom")[int(thing.y * 3)]
        return f"{down} {across}".strip() or "middle"
    if found := re.fullmatch(r"is the ground (.+)\?", asked):
        return "yes" if scene.ground == found[1] else "no"
    if found := re.fullmatch(rf"is (the .+) {RELATED} (the .+)\?", asked):
        one, other = (only(scene.named(singular(cast, found[place]))) for place in (1, 3))
        return "yes" if is_so(found[2], one, other) else "no"
    if found := re.fullmatch(rf"what is {RELATED} (the .+)\?", asked):
        subject = only(scene.named(singular(cast, found[2])))
        others = [thing for thing in scene.things if thing is not subject and thing.stands(found[1], subject)]
        assert is_so(found[1], only(others), subject)
        return only(others).name
    if found := re.fullmatch(r"is (the .+) larger than (the .+)\?", asked):
        one, other = (only(scene.named(singular(cast, found[place]))) for place in (1, 2))
        assert one.side != other.side
        return "yes" if one.side > other.side else "no"
    found = re.fullmatch(r"what covers (the .+)\?", asked)
    assert found is not None, asked
    behind = only(scene.named(singular(cast, found[1])))
    after = scene.things[scene.things.index(behind) + 1 :]
    near = [one for one in after if abs(one.x - behind.x) < LARGE * 0.6 and abs(one.y - behind.y) < LARGE * 0.5]
    return only(near).name


@pytest.mark.parametrize("kind", list(TYPES))
def test_answers_are_right(kind: str, cast: Cast) -> None:
    for index in range(FEW):
        made = question(generator(index, kind), cast, (kind,))
        assert made.fields["question_type"] == kind
        assert answer_to(str(made.fields["question"]), made.scenes[0], cast) == made.fields["answer"]
        assert made.fields["answers"] == [made.fields["answer"]] and made.captions == (made.fields["question"],)


@pytest.mark.parametrize("kind", list(TYPES))
def test_neither_the_question_nor_what_is_shown_says_the_answer(kind: str, cast: Cast) -> None:
    """Answers are equally frequent, and as frequent whatever number of things the scene shows."""
    found = [question(generator(index, "balance", kind), cast, (kind,)) for index in range(2000)]
    answers = [str(made.fields["answer"]) for made in found]
    shares = {answer: answers.count(answer) / len(answers) for answer in set(answers)}
    even = 1 / len(shares)
    assert max(shares.values()) < even + 3.5 * np.sqrt(even * (1 - even) / len(answers))
    if kind in ("exist", "ground", "relate", "size", "place"):
        by_count = [len(made.scenes[0].things) for made in found]
        for count in set(by_count):
            own = [answer for answer, things in zip(answers, by_count, strict=True) if things == count]
            most = max(own.count(answer) for answer in shares) / len(own)
            assert most < even + 4.5 * np.sqrt(even * (1 - even) / len(own))


def test_entailment_follows_from_what_is_seen(cast: Cast) -> None:
    answers = []
    for index in range(2000):
        made = entailment(generator(index, "entailment"), cast)
        (scene,), (said,) = made.scenes, made.captions
        found = re.fullmatch(r"there is (no )?(.+)", said)
        assert found is not None
        seen = bool(scene.named(singular(cast, found[2])))
        assert all(thing.cell != scene.screen for thing in scene.things), "a hidden thing may be anything"
        if scene.screen is not None and not seen:
            wanted = "neutral"
        else:
            wanted = "entailment" if seen == (found[1] is None) else "contradiction"
        assert made.fields["answer"] == wanted
        answers.append((wanted, found[1] is None, scene.screen is not None))
    for told in (1, 2):  # by the statement alone, by the picture alone
        right = 0
        for value in (False, True):
            own = [answer[0] for answer in answers if answer[told] == value]
            right += max(own.count(one) for one in set(own))
        assert 0.46 < right / len(answers) < 0.54


def test_statements_about_two_pictures(cast: Cast) -> None:
    answers = []
    for index in range(1200):
        made = pairs(generator(index, "pairs"), cast)
        (left, right), (said,) = made.scenes, made.captions
        if found := re.fullmatch(r"(both pictures show|only one picture shows) (.+)", said):
            shown = [bool(scene.named(singular(cast, found[2]))) for scene in (left, right)]
            holds = all(shown) if found[1].startswith("both") else shown[0] != shown[1]
        else:
            found = re.fullmatch(r"there are more (.+) in the (left|right) picture", said)
            assert found is not None, said
            numbers = [len(scene.named(singular(cast, found[1]))) for scene in (left, right)]
            assert numbers[0] != numbers[1]
            holds = (numbers[0] > numbers[1]) == (found[2] == "left")
        assert made.fields["answer"] == str(holds).lower()
        answers.append(holds)
    assert abs(sum(answers) / len(answers) - 0.5) < 0.05


def test_an_expression_fits_one_thing(cast: Cast) -> None:
    for index in range(FEW):
        made = expression(generator(index, "expression"), cast)
        (scene,), (said,) = made.scenes, made.captions
        assert made.boxes["box"] == made.mask == made.fields["target"]
        assert made.boxes["candidates"] == tuple(range(len(scene.things)))
        if found := re.fullmatch(r"the (large|small) (.+)", said):
            fits = [one for one in scene.named(found[2]) if one.is_large == (found[1] == "large")]
        elif found := re.fullmatch(r"the (.+) on the (left|right|top|bottom)", said):
            axis, most = {"left": ("x", min), "right": ("x", max), "top": ("y", min), "bottom": ("y", max)}[found[2]]
            things = scene.named(found[1])
            assert len(things) == 2
            fits = [most(things, key=lambda thing, axis=axis: getattr(thing, axis))]
        elif found := re.fullmatch(rf"the (.+) {RELATED} (the .+)", said):
            other = only(scene.named(singular(cast, found[3])))
            fits = [thing for thing in scene.named(found[1]) if thing.stands(found[2], other)]
        else:
            fits = scene.named(said.removeprefix("the "))
        assert only(fits) is scene.things[int(str(made.fields["target"]))]


def test_reasons(cast: Cast) -> None:
    for index in range(FEW):
        made = reasons(generator(index, "reasons"), cast)
        answer = answer_to(str(made.fields["question"]), made.scenes[0], cast)
        options, rationales = made.fields["options"], made.fields["rationales"]
        assert isinstance(options, list) and isinstance(rationales, list)
        assert len(set(options)) == len(set(rationales)) == OPTIONS
        assert options[int(str(made.fields["option"]))] == answer
        right = f"the {answer} is at the {only(made.scenes[0].named(answer)).place}"
        assert rationales[int(str(made.fields["rationale"]))] == right
        shown = {thing.name for thing in made.scenes[0].things}
        assert len(shown & set(options)) >= 2, "the picture alone does not say which"


def test_no_reason_is_likelier_by_the_words_of_the_question(cast: Cast) -> None:
    """Places of which a relation makes some likelier once let the text alone find the reason in half of all samples."""
    often: Counter[tuple[str, str]] = Counter()
    right = 0
    for index in range(4 * FEW):
        made = reasons(generator(index, "balance"), cast)
        found = re.fullmatch(rf"what is {RELATED} .+", str(made.fields["question"]))
        rationales, place = made.fields["rationales"], int(str(made.fields["rationale"]))
        assert found is not None and isinstance(rationales, list)
        keys = [(found[1], one.partition(" at the ")[2]) for one in rationales]
        if index < 3 * FEW:
            often.update({key: 3 if one == place else -1 for one, key in enumerate(keys)})
        else:
            right += max(range(OPTIONS), key=lambda one: often[keys[one]]) == place
    assert right / FEW == pytest.approx(1 / OPTIONS, abs=0.1), "four deviations"


def test_dialogues(cast: Cast) -> None:
    """``it`` is what the question before asked for."""
    referred = 0
    for index in range(FEW):
        made = dialogue(generator(index, "dialogue"), cast)
        scene, history = made.scenes[0], made.fields["history"]
        assert isinstance(history, list)
        subject = None
        for asked, answer in [*history, [made.fields["question"], made.fields["answer"]]]:
            if asked == "which color is the ground?":
                assert answer == scene.ground
                subject = None
            elif asked in ("how large is it?", "where is it?"):
                assert subject is not None
                referred += 1
                assert answer == (
                    {True: "large", False: "small"}[subject.is_large] if "large" in asked else subject.place
                )
            else:
                assert answer_to(asked, scene, cast) == answer
                name = singular(cast, re.sub(r"^(where is|how many) | are there\?$|\?$", "", asked).strip())
                subject = only(scene.named(name)) if len(scene.named(name)) == 1 else None
        options = made.fields["options"]
        assert isinstance(options, list) and len(set(options)) == DIALOGUE_OPTIONS
        assert options[int(str(made.fields["option"]))] == made.fields["answer"]
        assert sum(made.fields["relevance"]) == 1  # type: ignore[call-overload]
    assert referred > FEW / 5


def test_captions_and_phrases(cast: Cast) -> None:
    for index in range(FEW):
        made = captions(generator(index, "captions"), cast)
        scene = made.scenes[0]
        there, on_ground, related, placed = made.captions
        assert on_ground == f"{there} on {scene.ground} ground"
        found = re.fullmatch(rf"(.+) {RELATED} (.+)", related)
        assert found is not None
        one, other = scene.things[:2]
        assert (singular(cast, found[1]), singular(cast, found[3])) == (one.name, other.name)
        assert is_so(found[2], one, other) and one.place in placed
        assert len(made.fields["regions"]) == len(scene.things)  # type: ignore[arg-type]
        said = paragraph(scene)
        assert said.count(".") == 1 + len(scene.things) and scene.ground in said
        made = phrases(generator(index, "phrases"), cast)
        scene, parts = made.scenes[0], made.fields["phrases"]
        assert isinstance(parts, list) and made.captions == (f"a picture of {listed(parts)}",)
        for part, numbers in zip(parts, made.boxes["phrase_boxes"], strict=True):  # type: ignore[arg-type]
            names = {scene.things[number].name for number in numbers}
            assert part == counted(len(numbers), names.pop()) and not names


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("shots", [1, 2, 4, 8])
def test_documents_bind_names_to_what_their_pictures_show(shots: int, wording: str, cast: Cast) -> None:
    """The answer is the name in the sentence of the picture that shows the thing of the last one."""
    again = 0
    for index in range(FEW):
        made = document(generator(index, "document", shots), cast, shots, wording=wording)
        (said,), scenes = made.captions, made.scenes
        *sentences, asked = re.split(r"(?<=[.?]) ", said)
        assert (
            asked == QUESTIONS[wording] == made.fields["question"] and len(sentences) == shots == made.fields["shots"]
        )
        statement = r"this is a (\w+)\." if wording == SENTENCES else r"(\w+)\."
        names = [re.fullmatch(statement, one)[1] for one in sentences]  # type: ignore[index]
        shown, query = [only(scene.things) for scene in scenes[:-1]], only(scenes[-1].things)
        called = {thing.name: name for thing, name in zip(shown, names, strict=True)}
        assert len(called) == len(set(names)) == shots, "each thing once, with a name of its own"
        assert called[query.name] == made.fields["answer"]
        assert made.fields["answers"] == [made.fields["answer"]] and made.fields["options"] == names
        assert names[int(str(made.fields["option"]))] == made.fields["answer"]
        assert made.fields["concepts"] == [thing.name for thing in shown]
        assert len({scene.ground for scene in scenes}) == 1 and len(scenes) == len(files_of(shots))
        support = shown[int(str(made.fields["option"]))]
        assert query != support and not set(names) & set(cast.names)
        again += query.drawing == support.drawing
        for thing in (*shown, query):
            assert thing.side / 2 <= min(thing.x, thing.y) and max(thing.x, thing.y) <= 1 - thing.side / 2
    assert again < FEW / 5, "most concepts have a second drawing"


def test_neither_the_text_nor_the_last_picture_of_a_document_says_the_name(cast: Cast) -> None:
    """Each name and each place is right equally often, and so is each name whatever the last picture shows."""
    found = [document(generator(index, "names"), cast, 4) for index in range(3000)]
    places = [int(str(made.fields["option"])) for made in found]
    answers = [str(made.fields["answer"]) for made in found]
    for values, number in ((places, 4), (answers, len(NAMES))):
        even = 1 / number
        most = max(values.count(one) for one in set(values)) / len(found)  # type: ignore[arg-type]
        assert len(set(values)) == number and most < even + 3.5 * np.sqrt(even * (1 - even) / len(found))
    joint = Counter(
        (made.scenes[-1].things[0].name, answer, made.scenes[-1].ground)
        for made, answer in zip(found, answers, strict=True)
    )
    for told in (0, 2):  # by the thing alone, by the ground alone
        of_value: dict[str, Counter[str]] = defaultdict(Counter)
        for key, number in joint.items():
            of_value[key[told]][key[1]] += number
        # Chi-square of independence: its mean is the number of degrees of freedom, its deviation sqrt(2 of them).
        total = Counter(answers)
        square = sum(
            (own[name] - own.total() * total[name] / len(found)) ** 2 / (own.total() * total[name] / len(found))
            for own in of_value.values()
            for name in NAMES
        )
        free = (len(of_value) - 1) * (len(NAMES) - 1)
        assert abs(square - free) < 4 * np.sqrt(2 * free)


def test_names_of_documents_are_one_token_each_for_the_embedded_tokenizer(cast: Cast) -> None:
    """Made-up and own ones alike, so that a sentence has one place; none is unknown, or what a thing is called."""
    tokenizer = load_tokenizer("emoji")
    reader = TextReader(tokenizer, 64)
    every = Cast({}, "train").names
    assert len(NAMES) == len(set(NAMES)) == 2 * SHOTS[-1] and not set(NAMES) & set(every)
    assert {len(reader.words(name)) for name in (*NAMES, *every)} == {1}
    assert [tokenizer.decode(reader.words(name)) for name in NAMES] == list(NAMES)


def test_documents_may_call_things_by_their_own_names(cast: Cast) -> None:
    """The same pictures as under made-up names; the answer is what the last one shows."""
    for index in range(FEW // 3):
        made, bound = (document(generator(index, "own"), cast, 4, called) for called in CALLED[::-1])
        assert made.scenes == bound.scenes and made.fields["option"] == bound.fields["option"]
        names = [only(scene.things).name for scene in made.scenes]
        assert made.fields["options"] == made.fields["concepts"] == names[:-1]
        assert made.fields["answers"] == [made.fields["answer"]] == names[-1:]
        assert made.captions == (" ".join([*(f"this is a {name}." for name in names[:-1]), "what is this?"]),)
        assert set(bound.fields["options"]) <= set(NAMES)  # type: ignore[call-overload]
        brief = document(generator(index, "own"), cast, 4, OWN, BRIEF)
        assert brief.scenes == made.scenes and brief.captions == (
            " ".join([*(f"{name}." for name in names[:-1]), "what?"]),
        )


def test_documents_of_held_out_concepts_show_nothing_else() -> None:
    cast, known = Cast({"style": ("noto",)}, "concepts"), Cast({"style": ("noto",)}, "train")
    for index in range(FEW // 3):
        for own, supply in ((cast, cast.novel), (known, known.known)):
            made = document(generator(index, "concepts"), own, 8)
            assert {thing.name for scene in made.scenes for thing in scene.things} <= set(supply)


def test_held_out_pairs_never_meet_in_training() -> None:
    def names(made: Made) -> set[str]:
        return {thing.name for scene in made.scenes for thing in scene.things}

    for part in ("train", "pairs"):
        cast, met = Cast(WHERE, part), 0
        for index in range(FEW):
            made = question(generator(index, part), cast, ("relate",))
            found = sorted(names(made))
            met += any(held_out(one, other) for one in found for other in found if one < other)
        assert met == (0 if part == "train" else FEW)


def test_held_out_concepts_are_what_matters() -> None:
    cast = Cast({"style": ("noto",)}, "concepts")
    assert len(cast.novel) > 20 and not set(cast.novel) & set(cast.known)
    for index in range(FEW):
        made = question(generator(index, "concepts"), cast, ("what", "cover"))
        assert made.fields["answer"] in cast.novel
        scene = question(generator(index, "place"), cast, ("place",)).scenes[0]
        assert sum(thing.name in cast.novel for thing in scene.things) == 1


def test_english() -> None:
    assert [article(name) for name in ("apple", "cat", "unicorn", "grapes")] == [
        "an apple",
        "a cat",
        "a unicorn",
        "grapes",
    ]
    names = ("cat", "bus", "fox", "cherry", "key", "mouse", "grapes", "wolf", "cactus", "peach")
    wanted = ["cats", "buses", "foxes", "cherries", "keys", "mice", "grapes", "wolves", "cactuses", "peaches"]
    assert [plural(name) for name in names] == wanted
    assert [singular_of(name) for name in wanted] == [*names[:6], "grape", *names[7:]]
    assert [singular_of(name) for name in names] == [*names[:6], "grape", *names[7:]]
    others = ("men", "people", "houses", "horses", "glasses", "glass", "fish", "s")
    assert [singular_of(name) for name in others] == ["man", "person", "house", "horse", "glass", "glass", "fish", "s"]
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert counted(1, "cat") == "a cat" and counted(3, "cat") == "three cats"


def test_an_inventory_counts() -> None:
    things = tuple(Thing(name, 0, cell, 0.5, 0.5, LARGE) for cell, name in enumerate(("cat", "dog", "cat")))
    assert inventory(Scene("blue", things)) == "two cats and a dog"
