"""Galleries of predictions: which samples they show, what is drawn into pictures, and what is said beside them."""

import base64
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from oracle import FOOD, MODEL, encoder_of
from torch import Tensor

from omnivl.chain.objective import Objective
from omnivl.data.sources.base import Sample
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import LM, VQA, Answer, Choose, Locate, Recognize, Regress, Segment
from omnivl.tasks import (
    CaptionTask,
    ClassificationTask,
    Drawing,
    FewShotTask,
    Gallery,
    GroundedCaptionsTask,
    GroundingTask,
    MatchingTask,
    NeighborsTask,
    OptionsTask,
    PhrasesTask,
    PredictingTask,
    SegmentationTask,
    SentimentTask,
    VQATask,
    ZeroShotTask,
)
from omnivl.tasks.drawn import GIVEN, RIGHT, SIDE, shown, with_attention, with_boxes, with_masks
from omnivl.tasks.results import evenly
from omnivl.tasks.run import run_tasks

ANSWERS = ("contradiction", "neutral", "entailment")
ENTAILMENT = ClassificationTask(where={**FOOD, "task": ("entailment",)}, max_samples=20, gallery=6)
EXPRESSIONS = {"where": {**FOOD, "task": ("expressions",)}, "max_samples": 6, "gallery": 3}


def pixels(drawing: Drawing) -> np.ndarray:
    """RGB of a picture of a page."""
    head, _, data = drawing.source.partition(",")
    assert head == "data:image/webp;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def near(colour: tuple[int, int, int], found: np.ndarray) -> np.ndarray:
    """Which pixels nearly have a colour; compression changes it a little."""
    return (np.abs(found - np.array(colour)) < 40).all(axis=-1)


def gallery_of(task: PredictingTask | ZeroShotTask, encoder: Encoder) -> Gallery:
    (result,) = run_tasks([task], encoder)
    (gallery,) = result.galleries
    assert not gallery.rows and all(one.picture.text for one in gallery.examples)
    return gallery


def test_rows_of_a_gallery_are_different_and_evenly_spread() -> None:
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(3, 3) == evenly(3, 12) == [0, 1, 2]
    assert evenly(0, 12) == evenly(3, 0) == []


def test_samples_are_chosen_before_anything_is_known_of_them() -> None:
    """A model that is right and one that is wrong show the same samples, and say how many of all are right."""
    heads = VQA(answers=ANSWERS, loss_kind="softmax")

    def right(sample: Sample, text: str) -> Tensor:
        return 3 * torch.eye(3)[ANSWERS.index(str(sample.meta["answer"]))]

    good = gallery_of(ENTAILMENT, encoder_of(heads, says=right))
    always = gallery_of(ENTAILMENT, encoder_of(heads, says=lambda sample, text: torch.eye(3)[1]))
    assert [(one.picture, one.asked, one.wanted) for one in good.examples] == [
        (one.picture, one.asked, one.wanted) for one in always.examples
    ]
    assert all(one.right and one.given == one.wanted for one in good.examples)
    assert [one.right for one in always.examples] == [one.wanted == "neutral" for one in always.examples]
    assert {one.measure for one in good.examples} == {"probability 91%"}, "e^3 / (e^3 + 2)"
    samples = ENTAILMENT.picture_set(encoder_of(heads)).samples
    chosen = [samples[place] for place in evenly(20, 6)]
    assert [one.asked for one in good.examples] == [one.captions[0] for one in chosen]
    hits = sum(one.right for one in always.examples)
    every = sum(one.meta["answer"] == "neutral" for one in samples)
    assert 0 < hits < 6 and always.notes[0] == (
        "6 of 20 predictions, evenly spread in the order of the samples whatever the model says: "
        f"{hits} right, {6 - hits} wrong; of all predictions {every / 20:.1%} are right. "
        "Right means: what was given is the sample's own."
    )
    few = gallery_of(replace(ENTAILMENT, max_samples=3), encoder_of(heads, says=right))
    assert few.notes[0].startswith("All 3 predictions: 3 right, 0 wrong. Right means:")
    assert replace(ENTAILMENT, gallery=0) == ENTAILMENT.without_gallery()
    assert run_tasks([ENTAILMENT.without_gallery()], encoder_of(heads, says=right))[0].galleries == ()


TASKS: list[tuple[PredictingTask, tuple[Objective, ...], str]] = [
    (ENTAILMENT, (VQA(answers=ANSWERS),), "alignment_00"),
    (
        ClassificationTask(
            where={**FOOD, "task": ("pairs",)}, pictures=("left.png", "right.png"), max_samples=6, gallery=3
        ),
        (VQA(answers=("false", "true")),),
        "alignment_00",
    ),
    (
        ClassificationTask(
            objective="recognize", source="emoji", answer="label", where={"label": ("fruit",)}, max_samples=6, gallery=3
        ),
        (Recognize(classes=("drink", "fruit")),),
        "",
    ),
    (
        VQATask(source="scenes", where={**FOOD, "task": ("questions",)}, max_samples=6, gallery=3),
        (VQA(answers=("yes", "no")),),
        "alignment_00",
    ),
    (
        VQATask(
            source="scenes",
            where={**FOOD, "task": ("questions",)},
            objective="answer",
            answers=("yes", "no"),
            max_samples=6,
            gallery=3,
        ),
        (Answer(),),
        "alignment_00",
    ),
    (
        FewShotTask(
            objective="vqa",
            source="emoji",
            where={"label": ("fruit",)},
            support={"label": ("drink",)},
            answer="label",
            example="{answer}.",
            query="what?",
            shots=(0, 2),
            max_samples=6,
            gallery=3,
        ),
        (VQA(answers=("drink", "fruit")),),
        "alignment_00",
    ),
    (
        OptionsTask(where={**FOOD, "task": ("reasons",)}, reasons="why", max_samples=6, gallery=3),
        (Choose(), Choose(name="why", field="rationales", index="rationale")),
        "alignment_00",
    ),
    (GroundingTask(**EXPRESSIONS), (Locate(),), "alignment_00"),
    (SegmentationTask(**EXPRESSIONS), (Segment(),), "alignment_00"),
    (PhrasesTask(where={**FOOD, "task": ("phrases",)}, max_samples=6, gallery=3), (Locate(),), "alignment_00"),
    (SentimentTask(where={"task": ("sentiment",)}, max_samples=6, gallery=3), (Regress(),), "alignment_00"),
    (CaptionTask(where={"style": ("noto",), "label": ("fruit",)}, max_samples=6, gallery=3), (LM(),), "generation_00"),
    (
        GroundedCaptionsTask(where={**FOOD, "task": ("phrases",)}, max_samples=6, gallery=3),
        (LM(), Locate()),
        "generation_00",
    ),
]


@pytest.mark.parametrize(("task", "heads", "layer"), TASKS, ids=[f"{one[0].kind} {one[1][0].kind}" for one in TASKS])
def test_every_task_shows_samples_of_a_random_model_with_its_attention(
    task: PredictingTask, heads: tuple[Objective, ...], layer: str
) -> None:
    gallery = gallery_of(task, encoder_of(*heads))
    assert len(gallery.examples) == task.gallery and gallery.title == f"{task.name}: predictions"
    assert f"Right means: {task.right_means}." in gallery.notes[0]
    writes = task.kind in ("caption", "grounded_captions")
    boxes = dict.fromkeys(("grounding", "phrases", "grounded_captions"), "boxes")
    marks = {**boxes, "segmentation": "masks"}.get(task.kind, "")
    assert gallery.marks == marks
    for one in gallery.examples:
        assert one.wanted or (marks and not writes)
        assert bool(one.asked) != writes
        wide = {"sentiment": 4, "classification": 1 + bool(task.pictures)}.get(task.kind, 1)
        assert pixels(one.picture).shape == (SIDE, wide * SIDE + 4 * (wide - 1), 3)
        assert (one.attention is None) == (layer == "")
        if one.attention is not None:
            shown = 3 if task.kind == "few_shot" else wide  # examples, too
            assert pixels(one.attention).shape == (SIDE, shown * SIDE + 4 * (shown - 1), 3)
            assert "on patches; of that most," in one.attention.text
    assert [f"reads texts beside pictures, {layer}, from" in note for note in gallery.notes[1:]] == [True] * bool(layer)


def test_classes_without_a_head_and_matches_are_shown_too() -> None:
    made = encoder_of(VQA(answers=("a", "b")))

    class Knowing(Encoder):
        def pictures(self, pictures: PictureSet) -> Tensor:
            return torch.stack([torch.eye(2)[int(sample.label == "fruit")] for sample in pictures.samples])

        def texts(self, texts: list[str]) -> Tensor:  # type: ignore[override]
            return torch.stack([torch.eye(2)[int(text != "fruit")] for text in texts])

        def predict(
            self, objective: str, pictures: PictureSet, texts: object = (), candidates: object = None
        ) -> Tensor:  # type: ignore[override]
            assert isinstance(candidates, Tensor)
            return -candidates.float()

    encoder = Knowing(made.chain, made.model, made.tokenizer, made.gather, made.device)
    labels = {"label": ("fruit", "drink")}
    zero = gallery_of(ZeroShotTask(where={**labels, "style": ("twemoji",)}, gallery=4), encoder)
    assert [one.given != one.wanted for one in zero.examples] == [True] * 4 != [one.right for one in zero.examples]
    near_task = NeighborsTask(where={**labels, "style": ("twemoji",)}, known={**labels, "style": ("noto",)}, gallery=4)
    assert all(one.right and one.given == one.wanted for one in gallery_of(near_task, encoder).examples)
    matching = MatchingTask(where={"label": ("fruit",), "style": ("twemoji",)}, gallery=2)
    (result,) = run_tasks([matching], encoder)
    first, second = result.galleries
    texts = sorted({text for row in (*first.rows, *second.rows) for text in row.answer_texts})
    assert first.rows[0].answer_texts[0] == texts[0], "the first text in the alphabet fits best to every picture"
    assert len(first.rows) == len(second.rows) == 2 and second.rows[0].correct.count(True) <= 1


def wide_picture(colour: int = 255) -> PictureSet:
    """One picture, twice as wide as high, of which the model sees the middle square."""
    frames = np.full((1, 40, 80, 3), colour, dtype=np.uint8)
    return PictureSet.of([Sample("a", "a", frames=frames)], "image", MODEL.inputs)


def test_boxes_lie_in_the_whole_picture_in_two_colours() -> None:
    """At the left of a wide picture, beyond the model's view."""
    right, given = np.array([0.05, 0.1, 0.25, 0.9]), np.array([0.5, 0.5, 0.9, 0.9])
    drawing = with_boxes(wide_picture(), 0, [right], [given])
    found = pixels(drawing)
    assert found.shape == (SIDE // 2, SIDE, 3)
    height, width = found.shape[:2]
    for colour, box in ((RIGHT, right), (GIVEN, given)):
        rows, columns = np.nonzero(near(colour, found))
        edges = columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height
        np.testing.assert_allclose(edges, box, atol=0.03)
    middle = round(0.5 * height)
    assert near(RIGHT, found)[:, round(0.05 * width)][round(0.15 * height) : round(0.85 * height)].mean() > 0.9
    dashes = near(GIVEN, found)[:, round(0.5 * width)][middle + 3 : round(0.9 * height) - 3]
    assert 0.3 < dashes.mean() < 0.9, "the given one is dashed"
    assert drawing.text.endswith("right left 5 top 10 right 25 bottom 90; given left 50 top 50 right 90 bottom 90")


def test_the_given_mask_is_tinted_and_the_right_one_outlined() -> None:
    right, given = np.zeros((2, 16, 16), dtype=np.bool_)
    right[4:12, 2:8], given[4:12, 10:14] = True, True
    drawing = with_masks(wide_picture(0), 0, right, given)
    found = pixels(drawing)
    inside = found[30:55, round(10.5 / 16 * SIDE) : round(13.5 / 16 * SIDE)].reshape(-1, 3).mean(axis=0)
    np.testing.assert_allclose(inside, 0.6 * np.array(GIVEN), atol=12)
    rows, columns = np.nonzero(near(RIGHT, found))
    height, width = found.shape[:2]
    edges = columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height
    np.testing.assert_allclose(edges, [2 / 16, 4 / 16, 8 / 16, 12 / 16], atol=0.03)
    assert found[42, round(5 / 16 * SIDE)].max() < 40, "nothing inside the outline"
    assert drawing.text == "picture with masks; share of its area: right 19%, given 12%, both 0%"


def test_the_patch_with_the_most_attention_is_the_brightest() -> None:
    grid = np.full((1, 4, 4), 0.02, dtype=np.float32)
    grid[0, 1, 3] = 0.7
    drawing = with_attention(wide_picture(128), 0, grid, 0.5)
    found = pixels(drawing).sum(axis=-1).reshape(4, SIDE // 4, 4, SIDE // 4).mean(axis=(1, 3))
    assert np.unravel_index(int(found.argmax()), (4, 4)) == (1, 3)
    assert drawing.text == "50% on patches; of that most, 70.0%, at row 2, column 4 of 4 x 4"


def test_of_a_long_clip_the_frame_with_the_most_attention_is_shown() -> None:
    frames = np.zeros((8, 32, 32, 3), dtype=np.uint8)
    clip = PictureSet.of([Sample("a", "a", frames=frames)], "video", MODEL.inputs)
    assert shown(clip, 0).text == "4 frames side by side"
    grid = np.full((8, 4, 4), 0.001, dtype=np.float32)
    grid[3, 0, 0] = 0.9
    drawing = with_attention(clip, 0, grid, 1.0)
    found = pixels(drawing).sum(axis=-1)
    peak = np.unravel_index(int(found.argmax()), found.shape)
    assert peak[0] < SIDE / 4 and SIDE <= peak[1] < SIDE + 4 + SIDE / 4, "the second of frames 0, 3, 4, 6"
    assert drawing.text.endswith("at row 1, column 1 of 4 x 4, number 4 of 8")


def test_24_samples_with_photographs_take_little_room() -> None:
    """Noise in large squares, about as hard to compress as photographs."""
    random = np.random.default_rng(0)
    small = random.integers(0, 256, (24, 30, 40, 3), dtype=np.uint8)
    frames = [cv2.resize(one, (640, 480), interpolation=cv2.INTER_CUBIC)[None] for one in small]
    samples = [Sample(str(place), str(place), frames=one) for place, one in enumerate(frames)]
    pictures = PictureSet.of(samples, "image", MODEL.inputs)
    grid = np.full((1, 4, 4), 1 / 16, dtype=np.float32)
    total = sum(
        len(shown(pictures, place).source) + len(with_attention(pictures, place, grid, 1.0).source)
        for place in range(24)
    )
    assert 50_000 < total < 400_000
