"""Grounded captions: F1 of what captions name, by hand and through a chain."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FOOD, MODEL, TOKENIZER, Oracle, Says, encoder_of
from torch import Tensor

from omnivl.data.sources.base import Sample
from omnivl.errors import DataError, UserError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.search import SearchOptions
from omnivl.objectives import LM, VQA, Locate
from omnivl.tasks import GroundedCaptionsTask, Lack, Provided
from omnivl.tasks.captions import write_captions
from omnivl.tasks.results import write_files
from omnivl.tasks.run import run_tasks
from omnivl.tasks.spelling import comparable

HERE, THERE, HALF = [0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0]


class Writes(Oracle):
    """Writes the caption that a sample's ``written`` says."""

    def generate(
        self, objective: str, pictures: PictureSet, search: SearchOptions, texts: Sequence[str] = ()
    ) -> Tensor:
        return torch.from_numpy(TOKENIZER.encode([str(one.meta["written"]) for one in pictures.samples], 64))[:, 1:]


@dataclass(frozen=True)
class Given(GroundedCaptionsTask):
    """The task on samples of its own: (picture, sentence, phrases with boxes, caption written)."""

    given: tuple[Any, ...] = ()

    def picture_set(self, encoder: Encoder) -> PictureSet:
        frames = np.zeros((1, 100, 200, 3), np.uint8)
        samples = [
            Sample(
                key=str(place),
                where=f"given:{place}",
                frames=frames,
                captions=(sentence,),
                identity=picture,
                meta={"phrases": list(phrases), "phrase_boxes": list(phrases.values()), "written": written},
            )
            for place, (picture, sentence, phrases, written) in enumerate(self.given)
        ]
        return PictureSet.of(samples, "image", encoder.model.inputs)


def writer(says: Says) -> Encoder:
    made = encoder_of(LM(), Locate(), says=says)
    encoder = Writes(made.chain, MODEL, TOKENIZER, made.gather, made.device, batch_size=8)
    object.__setattr__(encoder, "says", says)
    return encoder


def in_view(box: Sequence[float]) -> Tensor:
    """A box of the whole picture, 200 x 100, in its middle square."""
    left, top, right, bottom = box
    return torch.tensor([2 * left - 0.5, top, 2 * right - 0.5, bottom])


MIDDLE, RIGHT = [0.25, 0.0, 0.5, 0.5], [0.5, 0.5, 0.75, 1.0]
SAMPLES = (
    ("one", "A man and two dogs near a hat.", {"A man": [MIDDLE], "two dogs": [RIGHT], "near": []}, "a man with a dog"),
    ("one", "Someone in a hat.", {"Someone": [MIDDLE], "a hat": [MIDDLE]}, "never asked for"),
    ("two", "A dog.", {"A dog": [MIDDLE]}, "the dog in the hat"),
)


def test_f1_by_hand() -> None:
    """The classes are man, dog, someone and hat. Men are found, dogs are put in the middle, hats at the right."""
    asked = []

    def says(sample: Sample, text: str) -> Tensor:
        asked.append(text)
        return in_view(RIGHT if "hat" in text else MIDDLE)

    (result,) = run_tasks([Given(given=SAMPLES, gallery=2)], writer(says))
    scores = {score.metric: (score.value, score.count) for score in result.scores}
    assert set(asked) == {"a man", "a dog", "the dog", "the hat"}, "the words that lead to a thing, without the rest"
    # Precision. man: right in the first sentence; the second does not have it. dog: wrong in the first, not in the
    # second, right in the picture two. hat: not in the sentence of picture two. someone: never named.
    assert scores["precision_all"] == (pytest.approx((1 / 2 + 1 / 3) / 4), 2)
    assert scores["precision_loc"] == (pytest.approx((1 + 1 / 2) / 4), 2)
    # Recall. man 1 of 1, dog 0 and 1, someone 0 of 1, hat 0 of 1; of both: man 1, dog 0 and 1.
    assert scores["recall_all"] == scores["recall_loc"] == (pytest.approx((1 + 1 / 2) / 4), 2)
    precision, recall = 5 / 24, 3 / 8
    assert scores["F1_all"][0] == pytest.approx(2 * precision * recall / (precision + recall))
    assert scores["F1_loc"][0] == pytest.approx(3 / 8)
    (gallery,) = result.galleries
    assert [(one.given, one.wanted, one.measure, one.right) for one in gallery.examples] == [
        ("a man with a dog", SAMPLES[0][1], "1 of 2 things that both name in place", False),
        ("a man with a dog", SAMPLES[1][1], "0 of 0 things that both name in place", False),
    ]
    assert gallery.marks == "boxes" and gallery.examples[1].picture.text == (
        "picture with boxes in per cent of its sides: right left 25 top 0 right 50 bottom 50; "
        "right left 25 top 0 right 50 bottom 50; given left 25 top 0 right 50 bottom 50; "
        "given left 25 top 0 right 50 bottom 50"
    )


def test_what_the_sentence_says_without_a_box_is_not_held_against_the_caption() -> None:
    """The first sentence says "hat", and only the second one has a box of it."""
    samples = (("a", "A man near hats.", {"A man": [MIDDLE]}, "a man near a hat"), ("b", "Hat.", {"Hat": [MIDDLE]}, ""))
    middle = writer(lambda sample, text: in_view(MIDDLE))
    (result,) = run_tasks([Given(given=samples)], middle)
    scores = {score.metric: score.value for score in result.scores}
    assert scores["precision_all"] == 1 / 2, "man of man and hat"
    (result,) = run_tasks([Given(given=samples, classes=("man",))], middle)
    assert {score.value for score in result.scores} == {1.0}, "hats are no class"


def test_names_of_several_words_and_boxes_around_several() -> None:
    """The longest name counts; two boxes are one around both, in the pixels of the picture."""
    samples = (("a", "Two hot dogs.", {"Two hot dogs": [MIDDLE, RIGHT]}, "hot dogs on a dog"),)
    around = [0.25, 0.0, 0.75, 1.0]
    encoder = writer(lambda sample, text: in_view(around if text == "hot dogs" else MIDDLE))
    (result,) = run_tasks([Given(given=samples, classes=("dog", "hot dog"))], encoder)
    scores = {score.metric: score.value for score in result.scores}
    # The dog belongs to no class of the sentences, which have hot dogs alone: it adds 0 to the sum over one class.
    assert scores == dict.fromkeys(scores, 1.0)


def test_a_plan_trained_on_both_heads_runs_to_the_end(tmp_path: Path) -> None:
    """A chain of random weights: captions, words and boxes are those that its heads give one by one."""
    encoder = encoder_of(LM(), Locate())
    task = GroundedCaptionsTask(where={**FOOD, "task": ("phrases",)}, max_samples=4, num_beams=2, predictions=True)
    pictures = task.picture_set(encoder)
    captions = write_captions(pictures, encoder, "lm", 2)
    named = [word for caption in captions for word in comparable(caption).split() if word.isalpha()]
    assert named, "the random decoder writes words"
    heads = [str(phrase).split()[-1] for one in pictures.samples for phrase in one.meta["phrases"]]  # type: ignore[attr-defined]
    task = replace(task, classes=tuple(dict.fromkeys([*named, *heads])))
    (result,) = run_tasks([task], encoder)
    assert {score.metric for score in result.scores} == set(task.figures)
    assert all(0.0 <= score.value <= 1.0 and score.count == 4 for score in result.scores)
    (path,) = write_files([result], tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["caption"] for line in lines] == captions
    assert any(line["words"] for line in lines)
    for place, line in enumerate(lines):
        words = comparable(line["caption"]).split()
        assert len(line["boxes"]) == len(line["words"]) and set(line["words"]) <= set(words)
        if line["words"] and words[0] == line["words"][0]:
            alone = encoder.predict("locate", pictures.chosen([place]), [words[0]])
            assert line["boxes"][0] == pytest.approx(alone[0].tolist(), abs=1e-5)
    blind = [{name: line[name] for name in ("caption", "words", "boxes")} for line in lines]
    with torch.no_grad():
        bare = task.unjudged(encoder)
        bare.samples = [replace(one, meta={}, captions=()) for one in bare.samples]
        found = task.lines(bare, encoder)
    assert [line["caption"] for line in found] == captions
    for one, line in zip(found, blind, strict=True):
        np.testing.assert_allclose(one["boxes"], np.array(line["boxes"]).reshape(-1, 4), atol=1e-6)


def test_what_is_refused(tmp_path: Path) -> None:
    nowhere = writer(lambda sample, text: in_view(MIDDLE))
    with pytest.raises(DataError, match=r"no phrase of 1 samples that names a class has a box; .* change 'classes'"):
        run_tasks([Given(given=SAMPLES[:1], classes=("cat",))], nowhere)
    with pytest.raises(DataError, match="no phrase of 1 samples that names a class has a box"):
        run_tasks([Given(given=(("a", "A man.", {"A man": []}, "a man"),))], nowhere)
    with pytest.raises(UserError, match=r"task grounded_captions: classes\.1 is 'cat' a second time"):
        GroundedCaptionsTask(classes=("cat", "cat"))
    lacks = GroundedCaptionsTask().lacks(Provided(MODEL, (LM(), VQA(name="locate", answers=("a", "b")))))
    assert lacks == [Lack("trains 'locate', which is of another kind", "name an objective of kind 'locate'")]
