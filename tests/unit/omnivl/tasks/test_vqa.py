"""Question answering as a task: answers by each kind of objective, what stands beside the score, what is refused."""

from dataclasses import replace

import pytest
import torch

from omnivl.architectures import OmniVL, ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, UserError
from omnivl.inference.encoder import Encoder
from omnivl.objectives import ITM, VQA, Answer
from omnivl.parts.sizes import Transformer, Words
from omnivl.tasks import Lack, Provided, VQATask
from omnivl.tasks.answering import as_people_spell
from omnivl.tasks.run import run_tasks
from omnivl.tasks.scorers.vqa import vqa_accuracy

TOKENIZER = load_tokenizer("emoji")
VOCABULARY = TOKENIZER.special.vocab_size
TOWERS = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 1, "image_size": 16, "text_length": 12, "vocab_size": VOCABULARY},
)
FUSED = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=1),
    words=Words(length=12, vocab_size=VOCABULARY),
    image_size=16,
    patch_size=8,
)
WHERE = {"style": ("twemoji",), "group": ("food & drink",), "question_type": ("kind", "check")}
TASK = VQATask(where=WHERE, max_samples=20, gallery=4)
ANSWERS = ("fruit", "yes", "no")


def encoder_of(model, objective, cls=Encoder):
    torch.manual_seed(0)
    chain = build_chain(model, (objective,), TOKENIZER.special)
    return cls(chain, model, TOKENIZER, LocalGather(), torch.device("cpu"), batch_size=8)


class SayingYes(Encoder):
    """Answers every question with the list's second answer."""

    def predict(self, objective, pictures, texts=(), candidates=None):
        assert texts == [sample.meta["question"] for sample in pictures.samples]
        return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(texts), -1)


def test_scores_stand_beside_what_the_question_alone_tells():
    (result,) = run_tasks([TASK], encoder_of(FUSED, VQA(answers=ANSWERS), SayingYes))
    scores = {score.metric: score for score in result.scores}
    samples = TASK.picture_set(encoder_of(FUSED, VQA(answers=ANSWERS))).samples
    checks = [sample.meta["answers"] for sample in samples if sample.meta["question_type"] == "check"]
    kinds = [sample.meta["answers"][0] for sample in samples if sample.meta["question_type"] == "kind"]
    yes = sum(answers == ["yes"] for answers in checks)
    assert scores["accuracy"].value == pytest.approx(yes / 20)
    assert scores["accuracy, check"].value == pytest.approx(yes / len(checks))
    assert scores["accuracy, kind"].value == 0
    best, most = max(yes, len(checks) - yes), max(map(kinds.count, kinds))
    assert scores["accuracy, check"].chance == pytest.approx(best / len(checks))
    assert scores["accuracy"].chance == pytest.approx((best + most) / 20)
    assert scores["accuracy by the question's type alone"].value == pytest.approx((best + most) / 20)
    (constant,) = [score for name, score in scores.items() if name.endswith("to all questions")]
    assert constant.value == pytest.approx(max(best, most) / 20)
    assert [score.count for score in result.scores] == [20, 20, 20, len(checks), len(kinds)]
    (gallery,) = result.galleries
    assert [one.given for one in gallery.examples] == ["yes"] * 4


@pytest.mark.parametrize(
    ("answer", "given", "expected"),
    [
        ("yes", ["Yes"] * 10, "Yes"),
        ("t - shirt", ["T-shirt"] * 3 + ["shirt"] * 7, "T-shirt"),
        ("no", ["yes"] * 10, "no"),
    ],
)
def test_answers_are_compared_in_any_spelling(answer, given, expected):
    assert as_people_spell(answer, given) == expected
    # Each of ten people left out in turn: three who agree leave two, 2 / 3, to themselves and 1 to the other seven.
    score = {"yes": 1.0, "no": 0.0}.get(answer, (3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy(as_people_spell(answer, given), given) == pytest.approx(score)


@pytest.mark.parametrize(
    ("model", "objective", "options"),
    [
        (FUSED, VQA(answers=ANSWERS), {}),
        (TOWERS, VQA(answers=ANSWERS), {}),
        (TOWERS, Answer(), {"answers": ANSWERS, "candidates": 2}),
        (TOWERS, Answer(), {"answers": ANSWERS, "first_token_twice": True}),
        (TOWERS, Answer(), {}),
    ],
)
def test_it_runs_on_every_kind_of_objective(model, objective, options):
    task = replace(TASK, objective=objective.key, **options)
    (result,) = run_tasks([task], encoder_of(model, objective))
    assert len(result.scores) == 5
    assert all(0 <= score.value <= 1 for score in result.scores)
    answers = {one.given for one in result.galleries[0].examples}
    assert answers <= set(ANSWERS) or (objective.key == "answer" and not options)


def test_it_needs_an_objective_that_answers():
    assert TASK.lacks(Provided(FUSED, (VQA(answers=ANSWERS),))) == []
    assert replace(TASK, objective="answer").lacks(Provided(TOWERS, (Answer(),))) == []
    assert TASK.lacks(Provided(FUSED, (ITM(),))) == [Lack("does not train 'vqa'", "add the objective 'vqa'")]
    wrong = Lack("trains 'itm', which is of another kind", "name an objective of kind 'vqa' or 'answer'")
    assert replace(TASK, objective="itm").lacks(Provided(FUSED, (ITM(),))) == [wrong]


def test_samples_without_questions_or_a_missing_list_are_refused():
    encoder = encoder_of(FUSED, VQA(answers=ANSWERS))
    with pytest.raises(DataError, match=r"has no text 'question', the question; name its field in 'question'"):
        run_tasks([replace(TASK, source="emoji", where={"style": ("twemoji",)})], encoder)
    with pytest.raises(DataError, match=r"has no list 'answers', which this task needs; filter it out with `where`"):
        run_tasks([replace(TASK, source="emoji", where={"style": ("twemoji",)}, question="name")], encoder)
    with pytest.raises(UserError, match=r"task vqa: answers is 'nowhere\.txt', and there is no such file"):
        VQATask(answers="nowhere.txt")
