"""Predictions of tasks: a line for each sample, with what is right and without it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import FOOD, MODEL, TOKENIZER, Oracle, Says, encoder_of
from torch import Tensor

from omnivl.chain.objective import Objective
from omnivl.data.sources.base import Sample
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.inference.search import SearchOptions
from omnivl.objectives import LM, VQA, Choose, Locate, Regress, Segment
from omnivl.tasks import (
    CaptionTask,
    ClassificationTask,
    GroundingTask,
    MatchingTask,
    NeighborsTask,
    OptionsTask,
    PredictingTask,
    RetrievalTask,
    SegmentationTask,
    SentimentTask,
    VQATask,
    ZeroShotTask,
)
from omnivl.tasks.predicting import PREDICTIONS, KeepingTask, json_lines
from omnivl.tasks.results import write_files
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers.masks import run_lengths

ANSWERS = ("contradiction", "neutral", "entailment")
ENTAILMENT = ClassificationTask(where={**FOOD, "task": ("entailment",)}, max_samples=60)
OPTIONS = OptionsTask(where={**FOOD, "task": ("reasons",)}, max_samples=40, reasons="why")
GROUNDING = GroundingTask(where={**FOOD, "task": ("expressions",)}, max_samples=40)
TRUTH = ("answer", "answers", "option", "rationale", "box", "sentiment", "relevance")
"""Fields that say what is right."""


def kept(task: KeepingTask, encoder: Encoder, folder: Path) -> list[dict[str, Any]]:
    """The lines that an evaluation writes."""
    results = run_tasks([replace(task, predictions=True)], encoder)
    (path,) = write_files(results, folder, "evaluation-")
    assert path.name == f"evaluation-{PREDICTIONS}"
    return [json.loads(line) for line in path.read_text().splitlines()]


def blind(task: PredictingTask, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The lines for the same samples, of which nothing says what is right."""
    unjudged = PredictingTask.unjudged

    def without(self: PredictingTask, encoder: Encoder) -> PictureSet:
        pictures = unjudged(self, encoder)
        pictures.samples = [replace(one, meta=without_truth(one.meta), members={}) for one in pictures.samples]
        return pictures

    monkeypatch.setattr(PredictingTask, "unjudged", without)
    with torch.no_grad():
        asked = replace(task, predictions=True)
        pictures = asked.unjudged(encoder)
        with pytest.raises(DataError):
            asked.truth(pictures, encoder)
        return [json.loads(line) for line in json_lines(asked.lines(pictures, encoder)).splitlines()]


def without_truth(meta: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in meta.items() if name not in TRUTH}


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    (result,) = run_tasks([ENTAILMENT], encoder_of(VQA(answers=ANSWERS), says=lambda sample, text: torch.eye(3)[0]))
    assert result.files == ()


def neutral(sample: Sample, text: str) -> Tensor:
    return torch.eye(3)[1]


def test_answers(tmp_path: Path) -> None:
    lines = kept(ENTAILMENT, encoder_of(VQA(answers=ANSWERS), says=neutral), tmp_path)
    assert len(lines) == 60 and {line["answer"] for line in lines} == {"neutral"}
    assert [line["right"] for line in lines] == [line["truth"] == "neutral" for line in lines]
    assert {True, False} == {line["right"] for line in lines}
    sample = ENTAILMENT.picture_set(encoder_of(VQA(answers=ANSWERS))).samples[7]
    assert lines[7]["where"] == sample.where and lines[7]["text"] == sample.captions[0]
    assert lines[7]["question_id"] == sample.meta["question_id"]
    assert set(lines[7]) == {"where", "question_id", "text", "answer", "probability", "truth", "right"}
    assert lines[7]["probability"] == pytest.approx(np.e / (np.e + 2)), "by softmax among three"


def test_vqa_keeps_scores_and_peoples_answers(tmp_path: Path) -> None:
    task = VQATask(source="scenes", where={**FOOD, "task": ("questions",)}, max_samples=30)
    lines = kept(task, encoder_of(VQA(answers=("yes", "no")), says=lambda s, t: torch.tensor([1.0, 0.0])), tmp_path)
    assert {line["answer"] for line in lines} == {"yes"} and all(isinstance(line["truth"], list) for line in lines)
    assert [line["right"] for line in lines] == [line["score"] > 0 for line in lines]


def test_boxes(tmp_path: Path) -> None:
    whole = encoder_of(Locate(), says=lambda sample, text: torch.tensor([0.25, 0.0, 0.75, 1.0]))
    lines = kept(GROUNDING, whole, tmp_path)
    assert lines[0]["box"] == pytest.approx([0.25, 0.0, 0.75, 1.0]) and len(lines[0]["truth"]) == 4
    assert [line["right"] for line in lines] == [line["iou"] >= 0.5 for line in lines]


def test_masks_have_the_run_lengths_of_coco(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], dtype=bool)
    assert run_lengths(mask) == {"size": [2, 3], "counts": [2, 3, 1]}, "columns: 00 11 10"
    assert run_lengths(~mask) == {"size": [2, 3], "counts": [0, 2, 3, 1]}, "the first run is of what is outside"
    assert run_lengths(np.zeros((2, 3), dtype=bool)) == {"size": [2, 3], "counts": [6]}
    task = SegmentationTask(where={**FOOD, "task": ("expressions",)}, max_samples=4)
    lines = kept(task, encoder_of(Segment(), says=lambda sample, text: torch.ones(32, 32)), tmp_path)
    assert lines[0]["mask"] == {"size": [32, 32], "counts": [0, 1024]}
    assert sum(lines[0]["truth"]["counts"]) == 1024 and lines[0]["iou"] == sum(lines[0]["truth"]["counts"][1::2]) / 1024


def test_numbers(tmp_path: Path) -> None:
    task = SentimentTask(where={"task": ("sentiment",)}, max_samples=20)
    lines = kept(task, encoder_of(Regress(), says=lambda sample, text: 0.5), tmp_path)
    assert {line["number"] for line in lines} == {0.5}
    assert [line["right"] for line in lines] == [round(line["truth"]) == 0 for line in lines], "0.5 rounds to 0"


HEADS = (Choose(), Choose(name="why", field="rationales", index="rationale", given=("answer",)))


def by_length(sample: Sample, text: str) -> float:
    return len(text) + 0.001 * (sum(place * ord(letter) for place, letter in enumerate(text)) % 997)


@pytest.mark.parametrize("place", ["given", "context"])
def test_reasons_are_scored_for_every_answer(tmp_path: Path, place: str) -> None:
    """The answer that is assumed stands before a reason, or at the beginning; scores are those of an evaluation."""
    why = replace(HEADS[1], given=(), context=()) if place == "context" else HEADS[1]
    encoder = encoder_of(HEADS[0], replace(why, **{place: ("answer",)}), says=by_length)  # type: ignore[arg-type]
    lines = kept(OPTIONS, encoder, tmp_path)
    samples = OPTIONS.picture_set(encoder).samples
    for line, sample in zip(lines, samples, strict=True):
        options, reasons = sample.meta["options"], sample.meta["rationales"]
        assert isinstance(options, list) and isinstance(reasons, list)
        question = sample.captions[0]
        wanted = [by_length(sample, f"{question} {option}") for option in options]
        assert line["scores"] == pytest.approx(wanted) and line["option"] == int(np.argmax(wanted))
        begins = [f"{question} {one}" if place == "given" else f"{one} {question}" for one in options]
        given = [[by_length(sample, f"{begin} {one}") for one in reasons] for begin in begins]
        assert np.array(line["reason_scores"]) == pytest.approx(np.array(given))
        assert line["reason"] == int(np.argmax(given[line["option"]]))
        assert line["truth"] == {"option": sample.meta["option"], "reason": sample.meta["rationale"]}
        right = int(np.argmax(given[line["truth"]["option"]])) == line["truth"]["reason"]
        assert line["reason_right"] == right and line["right"] == (line["rank"] == 1)
    plain, thorough = (run_tasks([one], encoder)[0] for one in (OPTIONS, replace(OPTIONS, predictions=True)))
    assert plain.scores == thorough.scores, "which needs the reasons of the right answers alone"


def test_reasons_that_do_not_read_the_answer_are_the_same_for_all(tmp_path: Path) -> None:
    (first, *_) = kept(OPTIONS, encoder_of(HEADS[0], replace(HEADS[1], given=()), says=by_length), tmp_path)
    assert first["reason_scores"] == [first["reason_scores"][0]] * 4


class Writes(Oracle):
    """Writes the same caption for every picture."""

    def generate(
        self, objective: str, pictures: PictureSet, search: SearchOptions, texts: Sequence[str] = ()
    ) -> Tensor:
        return torch.from_numpy(TOKENIZER.encode(["red apple"] * len(pictures), 8))


def writer() -> Encoder:
    made = encoder_of(LM())
    return Writes(made.chain, MODEL, TOKENIZER, made.gather, made.device, batch_size=8)


CAPTIONS = CaptionTask(where={"style": ("noto",), "label": ("fruit",)}, max_samples=6)


def test_captions(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    lines = kept(CAPTIONS, writer(), tmp_path)
    assert {line["caption"] for line in lines} == {"red apple"}
    assert all("text" not in line and isinstance(line["truth"], list) for line in lines)
    assert [line["right"] for line in lines] == ["red apple" in line["truth"] for line in lines]


def test_pictures_without_captions_get_some(monkeypatch: pytest.MonkeyPatch) -> None:
    unjudged = PredictingTask.unjudged

    def without(self: PredictingTask, encoder: Encoder) -> PictureSet:
        pictures = unjudged(self, encoder)
        pictures.samples = [replace(one, captions=()) for one in pictures.samples]
        return pictures

    monkeypatch.setattr(PredictingTask, "unjudged", without)
    lines = CAPTIONS.lines(CAPTIONS.unjudged(writer()), writer())
    assert [line["caption"] for line in lines] == ["red apple"] * 6


@pytest.mark.parametrize(
    ("task", "heads", "says"),
    [
        (replace(ENTAILMENT, max_samples=12), (VQA(answers=ANSWERS),), neutral),
        (
            VQATask(source="scenes", where={**FOOD, "task": ("questions",)}, max_samples=12),
            (VQA(answers=ANSWERS),),
            neutral,
        ),
        (replace(OPTIONS, max_samples=12), HEADS, by_length),
        (replace(GROUNDING, max_samples=12), (Locate(),), lambda sample, text: torch.tensor([0.0, 0.0, 0.5, 0.5])),
        (
            SegmentationTask(where={**FOOD, "task": ("expressions",)}, max_samples=12),
            (Segment(),),
            lambda sample, text: torch.ones(32, 32),
        ),
        (
            SentimentTask(where={"task": ("sentiment",)}, max_samples=12),
            (Regress(),),
            lambda sample, text: float(len(text)),
        ),
    ],
    ids=lambda one: one.kind if isinstance(one, PredictingTask) else "",
)
def test_predictions_do_not_need_what_is_right(
    task: PredictingTask, heads: tuple[Objective, ...], says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the fields that say it, the same is predicted, and nothing is said of it."""
    encoder = encoder_of(*heads, says=says)
    judged = kept(task, encoder, tmp_path)
    lines = blind(task, encoder, monkeypatch)
    own = {"where", "question_id", "text", *replace(task, predictions=True).predicts}
    assert lines == [{name: value for name, value in line.items() if name in own} for line in judged]
    assert all(set(line) == own for line in lines)


class Knowing(Encoder):
    """Fruit lies at "fruit" and "grapes", anything else at the other texts; "grapes" matches everything."""

    def pictures(self, pictures: PictureSet) -> Tensor:
        return torch.stack([torch.eye(2)[int(sample.label == "fruit")] for sample in pictures.samples])

    def texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.eye(2)[int(text in ("fruit", "grapes"))] for text in texts])

    def predict(
        self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
    ) -> Tensor:
        assert candidates is not None
        return torch.stack([torch.tensor([float(texts[one] == "grapes") for one in row]) for row in candidates])


def knowing(kind: type[Knowing] = Knowing) -> Encoder:
    made = encoder_of(VQA(answers=("a", "b")))
    return kind(made.chain, made.model, made.tokenizer, made.gather, made.device)


def test_classes_without_a_trained_head(tmp_path: Path) -> None:
    labels = {"label": ("fruit", "drink")}
    where = {**labels, "style": ("twemoji",)}
    tasks = NeighborsTask(where=where, known={**labels, "style": ("noto",)}, k=5), ZeroShotTask(where=where)
    for task in tasks:
        lines = kept(task, knowing(), tmp_path)
        assert {line["label"] for line in lines} == {"fruit", "drink"}
        assert all(line["truth"] == line["label"] and line["right"] for line in lines)


def test_texts_that_are_found(tmp_path: Path) -> None:
    """The first ten of each picture; ties count against it."""
    where = {"label": ("fruit",), "style": ("twemoji",)}
    for task in (RetrievalTask(where=where), MatchingTask(where=where)):
        lines = kept(task, knowing(), tmp_path)
        assert len(lines) > 10 and all(len(line["texts"]) == len(line["scores"]) == 10 for line in lines)
        assert {(line["texts"][0], line["scores"][0], line["scores"][1]) for line in lines} == {("grapes", 1.0, 0.0)}
        ranks = {line["truth"][0]: (line["rank"], line["right"]) for line in lines}
        assert ranks.pop("grapes") == (1, True) and set(ranks.values()) == {(len(lines), False)}


class Contrary(Knowing):
    """Its head says the opposite of its embeddings."""

    def predict(self, *given: Any, **named: Any) -> Tensor:
        return -40 * super().predict(*given, **named)


def test_texts_that_are_found_are_those_that_are_reranked(tmp_path: Path) -> None:
    """By the cosine "grapes" is the first of three that are re-ranked; ranks are those of the figure."""
    task = RetrievalTask(where={"label": ("fruit",), "style": ("twemoji",)}, rerank=3)
    encoder = knowing(Contrary)
    lines = kept(task, encoder, tmp_path)
    (result,) = run_tasks([task], encoder)
    figures = {score.metric: score.value for score in result.scores}
    assert {(line["texts"].index("grapes"), line["scores"][0]) for line in lines} == {(2, 0.0)}
    assert lines[0]["scores"][2] == pytest.approx(1 / 0.07 - 40)
    assert np.mean([line["rank"] <= 5 for line in lines]) == figures["image->text, re-ranked R@5"]
    assert figures["image->text, re-ranked R@5"] != figures["image->text R@5"]
