"""Answers chosen from a list: targets, loss, and parity with transformers' ViLT."""

from dataclasses import replace

import pytest
import torch
from small_towers import SIZES, TOKENS, scattered
from transformers import ViltConfig, ViltForQuestionAnswering

from omnivl.architectures import OmniVL, ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS, Batch
from omnivl.errors import UserError
from omnivl.inference.predict import predict
from omnivl.objectives import VQA, PrepareContext
from omnivl.objectives.answers import soft_score
from omnivl.parts.sizes import Transformer, Words
from omnivl.pretrained.load import load_pretrained

NEAR = {"rtol": 2e-5, "atol": 2e-5}
CONTEXT = PrepareContext(0, "test", TOKENS, (2, 2), 0)
MODEL = ViLT(
    blocks=Transformer(hidden_size=16, num_heads=2, layers=2, norm_eps=1e-12),
    words=Words(length=7, vocab_size=50),
    image_size=16,
    patch_size=8,
)


class HalfOfTwo:
    """One of two replicas; the other counts ``other`` more."""

    replicas, replica = 2, 0

    def __init__(self, other):
        self.other = other

    def total(self, tensor):
        return tensor + self.other


def make_batch(answers, weights=None):
    own = torch.arange(len(answers))
    fields = {"answers": tuple(map(tuple, answers))}
    if weights is not None:
        padded = torch.tensor([[*one, *[0.0] * (10 - len(one))] for one in weights])
        fields |= {"weights": padded, "weights/present": padded > 0}
    frames = torch.zeros(len(answers), 1, 3, 16, 16, dtype=torch.uint8)
    return Batch("image_text", frames, torch.ones(len(answers), 7, dtype=torch.int64), own, own, own, fields=fields)


@pytest.mark.parametrize(
    ("kind", "scores"),
    [("official", [0.0, 0.3, 0.6, 0.9, 1.0, 1.0]), ("metric", [0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0])],
)
def test_soft_scores_by_the_number_of_people(kind, scores):
    assert [soft_score(people / 10, kind) for people in (0, 1, 2, 3, 4, 10)] == pytest.approx(scores)


def test_targets_are_the_scores_of_the_lists_answers():
    objective = VQA(answers=("cat", "dog", "no"))
    raw = [["cat"] * 2 + ["dog"] * 3 + ["tiger"] * 5, ["lion"] * 10, ["no"]]
    wanted = torch.tensor([[0.6, 0.9, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(objective.prepare(make_batch(raw), CONTEXT)["vqa/targets"], wanted)
    weighed = make_batch([["cat", "dog", "tiger"], ["lion"], ["no"]], [[0.2, 0.3, 0.5], [1.0], [1.0]])
    assert torch.equal(objective.prepare(weighed, CONTEXT)["vqa/targets"], wanted)
    metric = replace(objective, soft_scores="metric").prepare(weighed, CONTEXT)["vqa/targets"]
    torch.testing.assert_close(metric[0], torch.tensor([2 / 3, 1.0, 0.0]))


def of_loss(targets, gather=None):
    objective = VQA(answers=("cat", "dog"))
    torch.manual_seed(0)
    head = objective.build_head(HeadSizes({"fused": 4, "pooled": 6}, 5, 50, 0, 8, 1, 16))
    pooled = torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(1))
    layout = plan_layout((objective,), "image_text", len(targets), 1)
    state = State({"pooled": pooled, "vqa/targets": torch.tensor(targets)}, layout)
    return objective.loss(state, Heads(head), gather or LocalGather()), head(pooled).sigmoid()


def test_the_loss_sums_over_answers_and_leaves_out_questions_without_one():
    made, right = of_loss([[0.6, 0.0], [0.0, 0.0], [0.0, 1.0]])
    one = -0.6 * right[0, 0].log() - 0.4 * (1 - right[0, 0]).log() - (1 - right[0, 1]).log()
    other = -(1 - right[2, 0]).log() - right[2, 1].log()
    torch.testing.assert_close(made.loss, (one + other) / 2)
    assert made.metrics["answered"] == pytest.approx(2 / 3)
    chosen = right.argmax(1).tolist()
    assert made.metrics["score"] == pytest.approx(([0.6, 0.0][chosen[0]] + [0.0, 1.0][chosen[2]]) / 3)
    nothing, _ = of_loss([[0.0, 0.0]])
    assert nothing.loss == 0 and nothing.loss.requires_grad


def test_questions_are_counted_over_replicas():
    targets = [[0.6, 0.0], [0.0, 0.0], [0.0, 1.0]]
    alone, shared = of_loss(targets)[0].loss, of_loss(targets, HalfOfTwo(4))[0].loss
    # Two questions here and four there: the sum over two, times two replicas, over six.
    torch.testing.assert_close(shared, alone * 2 * 2 / 6)


@pytest.fixture
def patches_in_their_order(monkeypatch):
    """Transformers' class draws the order of an image's patches."""
    monkeypatch.setattr(torch, "multinomial", lambda weights, count: torch.arange(int(count)))


@pytest.mark.usefixtures("patches_in_their_order")
def test_loss_scores_and_gradients_equal_transformers(tmp_path):
    torch.manual_seed(0)
    config = ViltConfig(**SIZES, vocab_size=50, max_position_embeddings=7, image_size=16, patch_size=8, num_labels=5)
    peer = scattered(ViltForQuestionAnswering(config))
    peer.save_pretrained(tmp_path)
    objective = VQA(answers=("a", "b", "c", "d", "e"))
    chain = build_chain(MODEL, (objective,), TOKENS)
    load_pretrained(chain, MODEL, tmp_path)
    head = chain.losses.heads["vqa"]
    pairs = {head.hidden: peer.classifier[0], head.norm: peer.classifier[1], head.output: peer.classifier[3]}
    for own, theirs in pairs.items():
        own.load_state_dict(theirs.state_dict())
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    frames = torch.randint(0, 256, (2, 1, 3, 16, 16), dtype=torch.uint8)
    token_ids = torch.where(mask == 1, torch.randint(5, 50, (2, 7)), TOKENS.pad)
    targets = torch.tensor([[0.3, 0.0, 1.0, 0.0, 0.0], [0.0, 0.9, 0.0, 0.0, 0.6]])
    given = {"frames": frames, "token_ids": token_ids, "vqa/targets": targets}
    own = chain(State(given, plan_layout((objective,), "image_text", 2, 1)))["loss"]
    inputs = {"input_ids": token_ids, "attention_mask": mask, "pixel_values": frames[:, 0].float() / 127.5 - 1.0}
    wanted = peer(**inputs, labels=targets)
    torch.testing.assert_close(own, wanted.loss, **NEAR)
    torch.testing.assert_close(predict(chain, "vqa", frames, token_ids), wanted.logits, **NEAR)
    own.backward()
    wanted.loss.backward()
    for mine, theirs in pairs.items():
        for name, parameter in mine.named_parameters():
            torch.testing.assert_close(parameter.grad, getattr(theirs, name).grad, rtol=2e-4, atol=3e-5)
    gradients = MODEL.from_foreign({f"{name}": p.grad for name, p in peer.named_parameters()}, tmp_path)
    for name, parameter in chain.named_parameters():
        if "heads" not in name:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=2e-4, atol=3e-5, msg=name)


def test_it_trains_on_towers_with_a_decoder_as_well():
    """Of a model without a pooler the first position stands for a row."""
    torch.manual_seed(0)
    model = replace(
        OmniVL.presets["tiny"],
        **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
        **{"generation_layers": 1, "image_size": 16, "text_length": 7, "vocab_size": 50},
    )
    objective = VQA(answers=("cat", "dog"))
    chain = build_chain(model, (objective,), TOKENS)
    batch = make_batch([["cat"], ["dog"]])
    batch = replace(batch, prepared=objective.prepare(batch, CONTEXT))
    layout = plan_layout((objective,), "image_text", 2, 1)
    chain(State.from_batch(batch, layout))["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_it_acts_on_what_has_a_text_of_its_own_and_shows_something():
    acting = [kind for kind in DATA_KINDS if VQA().demands(kind, 2) is not None]
    assert acting == ["image_text", "video_text", "images_text"]


def test_the_list_may_lie_in_a_file(tmp_path):
    file = tmp_path / "answers.txt"
    file.write_text("yes\nno\nred car\n", encoding="utf-8")
    assert VQA(answers=str(file)) == VQA(answers=("yes", "no", "red car"))
    file.write_text("yes\nno\nyes\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        VQA(answers=str(file))
    assert str(caught.value) == ("objective vqa: answers.2 is 'yes' a second time; allowed is each once; remove it")
    with pytest.raises(UserError, match=r"objective own: answers is 'nowhere\.txt', and there is no such file"):
        VQA(answers="nowhere.txt", name="own")


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (VQA(), "answers: got no answer; allowed one or more; give a list, or the path of a file that holds it"),
        (
            VQA(answers=("yes", "no"), num_answers=3),
            "num_answers: got 3; allowed 2, the number of answers in the list; change either",
        ),
    ],
)
def test_a_list_that_is_not_what_the_plan_says_is_refused(objective, message):
    assert [str(misfit) for misfit in objective.misfits(MODEL.inputs, 4)] == [message]


def test_a_list_of_the_right_length_fits():
    assert list(VQA(answers=("yes", "no"), num_answers=2).misfits(MODEL.inputs, 4)) == []


def test_a_stated_length_stands_for_a_list_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objective = VQA(answers="answers.txt", num_answers=3)
    assert (objective.answers, objective.num_choices) == ("answers.txt", 3)
    assert objective.absent_lists == {"answers": "answers.txt"}
    assert list(objective.misfits(MODEL.inputs, 4)) == []
    sizes = HeadSizes(
        {"pooled": 8}, text_length=4, vocab_size=9, projection_size=4, patch_size=8, tubelet_size=1, image_size=16
    )
    head = objective.build_head(replace(sizes, widths=dict.fromkeys(("fused", "visual", "text", "pooled"), 8)))
    assert head.output.out_features == 3
    stood_in = objective.with_stand_ins()
    assert (stood_in.answers, stood_in.absent_lists) == (("0", "1", "2"), {})
    with pytest.raises(UserError, match=r"objective vqa: answers is 'answers\.txt', and there is no such file"):
        _ = objective.choices
    (tmp_path / "answers.txt").write_text("yes\nno\n", encoding="utf-8")
    assert objective.choices == ("yes", "no"), "read once it is there"
    there = VQA(answers="answers.txt", num_answers=3)
    assert (there.answers, there.absent_lists, there.with_stand_ins()) == (("yes", "no"), {}, there)
    message = "num_answers: got 3; allowed 2, the number of answers in the list; change either"
    assert [str(misfit) for misfit in there.misfits(MODEL.inputs, 4)] == [message]
