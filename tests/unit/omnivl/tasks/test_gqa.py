"""GQA as a task: its figures are those of the scorer, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError
from omnivl.inference.encoder import Encoder
from omnivl.inference.pictures import PictureSet
from omnivl.objectives import VQA, Recognize
from omnivl.tasks import GQATask, Provided
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers.gqa import Choices, GQAQuestion, gqa_scores

TOKENIZER = load_tokenizer("emoji")
MODEL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "text_length": 12, "vocab_size": TOKENIZER.special.vocab_size},
)
ANSWERS = ("red", "blue", "yes", "no")

QUESTIONS: tuple[Mapping[str, object], ...] = (
    {"answers": ["red"], "structural": "query", "semantic": "attr", "global_group": "color", "entailed": ["1", "2"]},
    {"answers": ["no"], "structural": "verify", "semantic": "obj", "detailed": "existC", "entailed": ["0"]},
    {"answers": ["yes"], "structural": "verify", "semantic": "rel", "balanced": False},
    {"answers": ["blue"], "structural": "query", "semantic": "attr", "global_group": "color", "entailed": []},
    {"answers": ["color"], "structural": "compare", "semantic": "attr", "detailed": "twoCommon"},
)
SAID = ("red", "no", "no", "red", "yes")
CHOICES = {
    "0": {"valid": ["red", "blue"], "plausible": ["red"]},
    "1": {"valid": ["yes", "no"], "plausible": ["yes", "no"]},
    "3": {"valid": ["red", "blue"], "plausible": ["blue"]},
    "4": {"valid": ["color"], "plausible": []},
    "of no sample": {"valid": [], "plausible": []},
}


@dataclass(frozen=True)
class Asked(GQATask):
    """With questions of this file."""

    given: tuple[Mapping[str, object], ...] = QUESTIONS

    def picture_set(self, encoder: Encoder) -> PictureSet:
        found = PictureSet("emoji", "image", {"style": ("twemoji",)}, MODEL.inputs, len(self.given), "media")
        found.samples = [
            replace(sample, captions=(f"question {place}",), meta={"question_id": str(place), **fields})
            for place, (sample, fields) in enumerate(zip(found.samples, self.given, strict=True))
        ]
        return found


class Saying(Encoder):
    def predict(
        self, objective: str, pictures: PictureSet, texts: Sequence[str] = (), candidates: Tensor | None = None
    ) -> Tensor:
        assert list(texts) == [f"question {place}" for place in range(len(pictures))]
        return torch.eye(len(ANSWERS))[[ANSWERS.index(one) for one in SAID]]


def encoder_of(cls: type[Encoder] = Saying) -> Encoder:
    torch.manual_seed(0)
    chain = build_chain(MODEL, (VQA(answers=ANSWERS, loss_kind="softmax"),), TOKENIZER.special)
    return cls(chain, MODEL, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=4)


def test_figures_are_those_of_the_scorer(tmp_path: Path) -> None:
    path = tmp_path / "val_choices.json"
    path.write_text(json.dumps(CHOICES))
    task = Asked(choices=str(path), consistency=True, gallery=2)
    (result,) = run_tasks([task], encoder_of())
    found = {score.metric.removeprefix("accuracy, "): score for score in result.scores}
    questions = {
        "0": GQAQuestion("red", "query", "attr", group="color", entailed=("1", "2")),
        "1": GQAQuestion("no", "verify", "obj", entailed=("0",)),
        "2": GQAQuestion("yes", "verify", "rel", balanced=False),
        "3": GQAQuestion("blue", "query", "attr", group="color"),
        "4": GQAQuestion("color", "compare", "attr", detailed="twoCommon"),
    }
    choices = {number: Choices(**own) for number, own in CHOICES.items()}
    wanted = gqa_scores(questions, dict(zip("01234", SAID, strict=True)), choices, consistency=True)
    assert {name: score.value for name, score in found.items()} == pytest.approx(wanted)
    # By hand: 0 entails 1 (right) and 2 (wrong), 1 entails 0 (right).
    assert found["consistency"].value == pytest.approx(3 / 4)
    assert (found["accuracy"].value, found["accuracy"].chance) == (0.5, 0.25)
    assert (found["open"].chance, found["binary"].count) == (0.5, 2)
    assert (found["distribution"].graded, found["distribution"].interval) == (False, None)
    assert found["validity"].value == pytest.approx(3 / 4), "4 has color, material and shape"
    (gallery,) = result.galleries
    assert [(one.asked, one.given, one.wanted, one.right) for one in gallery.examples] == [
        ("question 0", "red", "red", True),
        ("question 2", "no", "yes", False),
    ]


def test_a_trained_head_answers_and_what_is_not_asked_for_is_not_scored() -> None:
    (result,) = run_tasks([Asked(gallery=0)], encoder_of(Encoder))
    metrics = {score.metric for score in result.scores}
    assert metrics.isdisjoint({"consistency", "validity", "plausibility"})
    assert {"accuracy", "accuracy, open", "accuracy, structural: verify", "distribution"} <= metrics
    assert result.galleries == ()


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"structural": 3}, {}, "'structural' is 3; allowed: a text"),
        ({"answers": []}, {}, r"'answers' is \[\]; allowed: a list of texts"),
        ({"question_id": "1"}, {}, "another sample has the 'question_id' '1', too"),
        ({"entailed": ["77"]}, {"consistency": True}, "question 0 of GQA entails 77, which is not among the 5"),
    ],
)
def test_what_is_refused(changed: Mapping[str, object], options: Mapping[str, bool], message: str) -> None:
    task = Asked(given=({**QUESTIONS[0], **changed}, *QUESTIONS[1:]), **options)
    with pytest.raises(DataError, match=message):
        run_tasks([task], encoder_of())


def test_no_balanced_question() -> None:
    task = Asked(given=tuple({**fields, "balanced": False} for fields in QUESTIONS))
    with pytest.raises(DataError, match="task gqa: no question is balanced"):
        run_tasks([task], encoder_of())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("[]", r"'\.' has no lists 'valid' and 'plausible'"),
        ('{"0": {"valid": []}}', "'0' has no lists 'valid' and 'plausible'"),
        ("{", ":1: no JSON"),
        (json.dumps({name: CHOICES[name] for name in "013"}), "question 4 of GQA is not in the choices file"),
    ],
)
def test_files_of_choices_that_are_none(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "choices.json"
    path.write_text(written)
    with pytest.raises(DataError, match=message):
        run_tasks([Asked(choices=str(path))], encoder_of())


def test_samples_are_examined_before_a_run(tmp_path: Path) -> None:
    task = Asked()
    task.examine(task.picture_set(encoder_of()))
    with pytest.raises(DataError, match="there is no such file; name GQA's own"):
        replace(task, choices=str(tmp_path / "none.json")).examine(task.picture_set(encoder_of()))
    lacking = Asked(given=({"answers": ["red"]},))
    with pytest.raises(DataError, match="'structural' is nothing"):
        lacking.examine(lacking.picture_set(encoder_of()))


def test_an_objective_of_another_kind_is_named() -> None:
    (lack,) = GQATask(objective="recognize").lacks(Provided(MODEL, (Recognize(classes=("a", "b")),)))
    assert lack.remedy == "name an objective of kind 'vqa'"
