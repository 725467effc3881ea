"""Heads of downstream tasks: losses by hand, and every one of them from generated scenes to gradients."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from omnivl.architectures import ALBEF, XVLM, Architecture, OmniVL, Unified, ViLT
from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads, Objective, PrepareContext
from omnivl.chain.preparation import Preparation, asked_fields
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State
from omnivl.data.batch import Batch, DataKind
from omnivl.data.cached_encoder import CachedEncoder
from omnivl.data.collate import Collator
from omnivl.data.config import AugmentConfig, DataEntryConfig
from omnivl.data.example import ExampleReader
from omnivl.data.limits import DEFAULT_LIMITS
from omnivl.data.sources import open_source
from omnivl.data.tokenizer import TextReader, Tokenizer, load_tokenizer
from omnivl.errors import UserError
from omnivl.inference.predict import predict
from omnivl.objectives import ITC, MLM, VQA, Choose, Locate, Recognize, Region, Regress, Segment
from omnivl.objectives.locate import centred, corners, overlaps
from omnivl.objectives.region import coverage
from omnivl.objectives.segment import dice
from omnivl.parts.sizes import Transformer, Words

TOKENIZER = load_tokenizer("emoji")
SIZES = {"image_size": 32, "patch_size": 8}
SMALL = Transformer(hidden_size=16, num_heads=2, layers=1)
ONE_WIDTH = {
    **{"hidden_size": 16, "num_heads": 2, "video_size": 32, "text_length": 20, "projection_size": 8, "num_frames": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "vocab_size": TOKENIZER.special.vocab_size, "tubelet_size": 2},
}
OMNIVL = OmniVL(**SIZES, **ONE_WIDTH, vision_layers=1, text_layers=1)
MODELS: Mapping[str, Architecture] = {
    "omnivl": OMNIVL,
    "unified": Unified.like(OMNIVL),
    "vilt": ViLT(blocks=SMALL, words=Words(length=20, vocab_size=TOKENIZER.special.vocab_size), **SIZES),
    "albef": ALBEF(
        **SIZES, vision=SMALL, text=SMALL, fusion=SMALL, generation_layers=0, text_length=20,
        vocab_size=TOKENIZER.special.vocab_size,
    ),
    "xvlm": XVLM(
        **SIZES, vision=SMALL, text=SMALL, fusion=SMALL, text_length=20, vocab_size=TOKENIZER.special.vocab_size
    ),
}  # fmt: skip
PLAIN = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
FOOD = {"style": ("fluent",), "group": ("food & drink",)}
YES = ("yes", "no")


def entry_of(task: str, kind: DataKind, fields: tuple[str, ...]) -> DataEntryConfig:
    where = {"task": (task,), **({} if task == "sentiment" else FOOD)}
    pictures = ("left.png", "right.png") if kind == "images_text" else ()
    kept = {name: "mask.png" if name == "mask" else name for name in fields}
    return DataEntryConfig(source="scenes", kind=kind, where=where, fields=kept, pictures=pictures, augment=PLAIN)


def batch_of(model: Architecture, objective: Objective, entry: DataEntryConfig, count: int = 4) -> Batch:
    """A batch of generated samples with the objective's draws."""
    asked = asked_fields([objective], entry.kind, "scenes")
    reader = ExampleReader(
        entry, open_source(entry, seed=0), model.inputs, key="scenes", seed=0, limits=DEFAULT_LIMITS, asked=asked
    )
    examples = [reader.example(position)[0] for position in range(count)]
    readers = {"text": TextReader(TOKENIZER, model.inputs.text_length)}
    preparation = Preparation((objective,), TOKENIZER.special, model.inputs, 0, readers)
    collator = Collator(model.inputs, TOKENIZER, preparation)
    return collator.collate(examples, entry.kind, "scenes", 0, reader.field_types)


STATEMENTS = VQA(answers=("false", "true"), loss_kind="softmax")
CASES: Mapping[str, tuple[str, Objective, DataEntryConfig]] = {
    **{
        f"{model} {objective.key}": (model, objective, entry_of(task, "image_text", fields))
        for model in ("omnivl", "vilt", "albef")
        for objective, task, fields in (
            (VQA(answers=YES), "questions", ("answers",)),
            (VQA(name="entail", answers=("neutral", "entailment"), loss_kind="softmax"), "entailment", ("answers",)),
            (Choose(), "reasons", ("options", "option")),
            (Locate(), "expressions", ("box",)),
        )
    },
    "choose, ten of a dialogue": (
        *("omnivl", Choose(options=3, most_options=10, context=("history",), loss_kind="relevance")),
        entry_of("dialogue", "image_text", ("options", "option", "relevance", "history")),
    ),
    "choose, reasons for an answer": (
        *("omnivl", Choose(field="rationales", index="rationale", given=("answer",))),
        entry_of("reasons", "image_text", ("rationales", "rationale", "answer")),
    ),
    "choose, each separately": (
        *("omnivl", Choose(loss_kind="binary")),
        entry_of("reasons", "image_text", ("options", "option")),
    ),
    "omnivl region": ("omnivl", Region(), entry_of("expressions", "image_text", ("candidates", "target"))),
    "vilt region": (
        *("vilt", Region(patches="fused_visual")),
        entry_of("expressions", "image_text", ("candidates", "target")),
    ),
    "omnivl segment": ("omnivl", Segment(), entry_of("expressions", "image_text", ("mask",))),
    "unified segment": ("unified", Segment(patches="fused_visual"), entry_of("expressions", "image_text", ("mask",))),
    "pairs of pictures": ("omnivl", STATEMENTS, entry_of("pairs", "images_text", ("answers",))),
    "unified pairs of pictures": ("unified", STATEMENTS, entry_of("pairs", "images_text", ("answers",))),
    "clips": ("omnivl", STATEMENTS, entry_of("clip_statements", "video_text", ("answers",))),
    "sentiment": ("omnivl", Regress(scale=3.0), entry_of("sentiment", "video_text", ("sentiment",))),
    **{
        f"{one.key} of regions": ("xvlm", one, entry_of("captions", "image_text", ("regions", "region_boxes")))
        for one in (ITC(regions=2), MLM(regions=2, probability=0.5, whole_words=True), Locate(regions=2))
    },
    "recognize": (
        *("omnivl", Recognize(classes=YES, field="answer")),
        entry_of("questions", "image_text", ("answer",)),
    ),
    "recognize clips by the class token": (
        *("albef", Recognize(classes=YES, field="answer", pool="first")),
        entry_of("questions", "image_text", ("answer",)),
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_from_samples_to_gradients(case: str) -> None:
    """The loss is finite, falls in a few steps, and reaches the head and the encoders that the objective reads."""
    name, objective, entry = CASES[case]
    model = MODELS[name]
    batch = batch_of(model, objective, entry)
    torch.manual_seed(0)
    chain = build_chain(model, (objective,), TOKENIZER.special)
    layout = plan_layout((objective,), batch.kind, batch.size, batch.num_frames)
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = chain(State.from_batch(batch, layout))["loss"]
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    targets = batch.prepared.get(f"{objective.key}/targets")
    least = 0.0  # of a cross-entropy with several right answers, the targets' entropy
    if targets is not None and targets.is_floating_point():
        least = torch.special.entr(targets).sum(1).mean().item()
    assert losses[-1] - least < 0.8 * (losses[0] - least), losses
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters([layout])}
    missed = [name for name, one in chain.named_parameters() if one.grad is None and id(one) not in idle]
    assert not [name for name in missed if not name.startswith(("project", "losses.vocabulary"))], missed


def state_of(objective: Objective, size: int, rows: torch.Tensor, fields: Mapping[str, torch.Tensor]) -> State:
    """A state at the end of a chain whose fused rows are ``rows``, each as a whole."""
    return State({"pooled": rows, **fields}, plan_layout((objective,), "image_text", size, 1))


def head_of(objective: Objective, width: int = 6) -> torch.nn.Module:
    torch.manual_seed(1)
    widths = {"fused": width, "visual": width, "text": width}
    head = objective.build_head(HeadSizes(widths, 8, 20, 0, 4, 1, 8))
    assert head is not None
    return head


def test_one_of_several_answers() -> None:
    """Softmax with people's shares as targets; a question without an answer in the list is left out."""
    objective, pooled = VQA(answers=("no", "maybe", "yes"), loss_kind="softmax"), torch.randn(3, 6)
    head = head_of(objective)
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.2, 0.6], [0.0, 0.0, 0.0]])
    found = objective.loss(state_of(objective, 3, pooled, {"vqa/targets": targets}), Heads(head), LocalGather())
    logs = head(pooled).softmax(1).log()
    by_hand = -(logs[0, 0] + 0.25 * logs[1, 1] + 0.75 * logs[1, 2]) / 2
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)
    assert found.metrics["answered"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["softmax", "binary"])
def test_one_of_several_options(kind: str) -> None:
    """Of the second sample only two options are there."""
    objective = Choose(options=3, most_options=3, loss_kind=kind)  # type: ignore[arg-type]
    head, pooled = head_of(objective), torch.randn(6, 6)
    targets = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    state = state_of(objective, 2, pooled, {"choose/targets": targets, "choose/present": present})
    found = objective.loss(state, Heads(head), LocalGather())
    scores = head(pooled).view(3, 2).T  # rows are stacked option by option
    if kind == "softmax":
        by_hand = -(scores[0].softmax(0)[1].log() + scores[1, :2].softmax(0)[0].log()) / 2
    else:
        right = F.logsigmoid(scores[0, 1]) + F.logsigmoid(scores[1, 0])
        wrong = F.logsigmoid(-scores[0, 0]) + F.logsigmoid(-scores[0, 2]) + F.logsigmoid(-scores[1, 1])
        by_hand = -(right + wrong) / 5
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)


def test_options_are_drawn_anew_and_the_right_one_is_always_there() -> None:
    """Of ten options three are scored; which ones depends on the sample's position alone."""
    objective = Choose(options=3, most_options=10)
    entry = entry_of("dialogue", "image_text", ("options", "option"))
    batch = batch_of(OMNIVL, objective, entry, count=16)
    places = set()
    for row in range(16):
        right = int(batch.prepared["choose/targets"][row].argmax())
        places.add(right)
        text = TOKENIZER.decode(batch.prepared[f"choose/{right}/token_ids"][row].tolist())
        option = batch.fields["options"][row][int(batch.fields["option"][row])]  # type: ignore[index]
        assert text == TOKENIZER.decode(TOKENIZER.encode([f"{batch.captions[row]} {option}"], 20)[0].tolist())
        texts = {tuple(batch.prepared[f"choose/{number}/token_ids"][row].tolist()) for number in range(3)}
        assert len(texts) == 3
    assert places == {0, 1, 2}, "the order does not say which is right"
    again = batch_of(OMNIVL, objective, entry, count=16)
    assert all(torch.equal(batch.prepared[name], again.prepared[name]) for name in batch.prepared)


def test_options_are_whole_behind_a_long_context() -> None:
    """What is left out are the first words: of the context, then of the question."""
    objective = Choose(options=2, most_options=2, context=("history",))
    entry = entry_of("reasons", "image_text", ("options", "option"))
    made = batch_of(OMNIVL, Choose(), entry, count=2)
    question = "which fruit is on the left of the picture"
    fields: dict[str, torch.Tensor | tuple[object, ...]] = {
        "options": (("a red apple", "a red grapes"), ("a red apple " * 10 + "left", "a red apple " * 10 + "right")),
        "option": torch.tensor([1.0, 0.0]),
        "history": (["a green apple"] * 20, None),
    }
    batch = replace(made, captions=(question, question), fields=fields)
    reader = TextReader(TOKENIZER, 14)
    context = PrepareContext(0, "scenes", TOKENIZER.special, (4, 4), 0, readers={"text": reader})
    prepared = objective.prepare(batch, context)
    ids = [prepared[f"choose/{number}/token_ids"].numpy() for number in range(2)]
    kept = "fruit is on the left of the picture"
    assert (ids[0][0] == TOKENIZER.encode([f"{kept} a red apple"], 14)[0]).all()
    assert (ids[1][0] == TOKENIZER.encode([f"{kept} a red grapes"], 14)[0]).all()
    assert (ids[0][0] != ids[1][0]).sum() == 1, "the options differ in their last word"
    for number in range(2):
        assert TOKENIZER.decode(ids[number][1].tolist()) == " ".join(["a red apple"] * 4), "cut as any text"
    for options in (["a red apple", "plum"], ["a red apple"]):
        (text, *_) = objective.texts(question, options, TextReader(TOKENIZER, 16), {"history": ["a green apple"] * 20})
        assert text == f"{question} a red apple", "the other options do not matter"


def test_what_is_given_is_left_out_last() -> None:
    """A reason is read behind the answer that it is for: the history goes first, then the question, then the answer."""
    objective = Choose(context=("history",), given=("answer",))
    fields = {"history": ["is it red", "no"], "answer": "a green apple"}

    def read(length: int) -> str:
        (text,) = objective.texts("which fruit is it", ["it is on the left"], TextReader(TOKENIZER, length), fields)
        return text

    everything = "is it red no which fruit is it a green apple it is on the left"
    ends = [everything.split(" ", start)[-1] for start in range(12)]
    least = 2 + len(TextReader(TOKENIZER, 40).words("it is on the left"))
    kept = [ends.index(read(length)) for length in range(least, 40)]
    assert kept == sorted(kept, reverse=True) and {0, 4, 8, 11} <= set(kept), "from the whole to the option alone"
    for length, start in enumerate(kept, start=least):
        reader = TextReader(TOKENIZER, length)
        assert reader.fits(ends[start]) and (start == 0 or not reader.fits(ends[start - 1])), "no more than needed"


class Pairs(CachedEncoder):
    """A token is two characters, so that tokens reach over words."""

    special = TOKENIZER.special

    def _words(self, text: str) -> list[int]:
        return [100 + ord(text[place]) % 50 for place in range(0, len(text), 2)]

    def _pieces_by_id(self) -> list[str | None]:
        raise AssertionError("not needed: no words are hidden")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Pairs()], ids=["words", "pairs of characters"])
def test_no_more_is_left_out_than_needed(tokenizer: Tokenizer) -> None:
    """Words; without blanks, characters. What fits as a whole is not changed."""
    begin = "is it  a 'red' apple? 这是苹果吗 \U0001f34e\U0001f34e or a plum"
    starts = ["", "plum", "a plum", "or a plum", "\U0001f34e or a plum", "\U0001f34e\U0001f34e or a plum"]
    for cut in range(1, 6):
        starts.append("这是苹果吗"[-cut:] + " " + starts[5])
    for words in ("apple?", "'red' apple?", "a 'red' apple?", "it  a 'red' apple?", "is it  a 'red' apple?"):
        starts.append(f"{words} {starts[10]}")
    assert starts[-1] == begin
    for length in range(3, 60):
        reader = TextReader(tokenizer, length)  # type: ignore[arg-type]
        for option in ("no", "a red apple"):
            fitting = [one for start in starts if reader.fits(one := f"{start} {option}".lstrip())]
            assert Choose().texts(begin, [option], reader) == [fitting[-1] if fitting else option]


def test_a_box() -> None:
    """L1 of centre and size, and 1 - GIoU; a box out of view is left out."""
    objective, pooled = Locate(l1_weight=2.0, giou_weight=0.5), torch.randn(2, 6)
    head = head_of(objective)
    wanted = torch.tensor([[0.1, 0.2, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0]])
    fields = {"field/box": wanted, "field/box/present": torch.tensor([True, False])}
    found = objective.loss(state_of(objective, 2, pooled, fields), Heads(head), LocalGather())
    x, y, width, height = head(pooled)[0]
    far = (x - 0.3).abs() + (y - 0.55).abs() + (width - 0.4).abs() + (height - 0.7).abs()
    left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    shared = (right.clamp(max=0.5) - left.clamp(min=0.1)).clamp(min=0) * (
        bottom.clamp(max=0.9) - top.clamp(min=0.2)
    ).clamp(min=0)
    union = width * height + 0.4 * 0.7 - shared
    around = (right.clamp(min=0.5) - left.clamp(max=0.1)) * (bottom.clamp(min=0.9) - top.clamp(max=0.2))
    by_hand = 2.0 * far + 0.5 * (1 - shared / union + (around - union) / around)
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)
    assert found.metrics["iou"].item() == pytest.approx((shared / union).item(), rel=1e-5)


def test_overlaps_of_boxes() -> None:
    one = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2], [0.1, 0.1, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3]])
    other = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.8, 0.8, 1.0, 1.0], [0.1, 0.1, 0.4, 0.4], [0.3, 0.3, 0.3, 0.3]])
    iou, giou = overlaps(one, other)
    torch.testing.assert_close(iou, torch.tensor([0.0625 / 0.4375, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(giou[:3], torch.tensor([1 / 7 - 0.125 / 0.5625, -0.92, 1.0]))
    assert torch.isfinite(giou).all()
    torch.testing.assert_close(corners(centred(other)), other)


def test_a_region() -> None:
    """The mean of the covered patches' keys, times the row's query; regions out of view cannot be chosen."""
    objective, head = Region(most_regions=3, inner_size=5), None
    head = head_of(objective)
    pooled, visual = torch.randn(2, 6), torch.randn(2, 1 + 4, 6)
    boxes = torch.tensor(
        [[[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 1.0], [0.0] * 4], [[0.5, 0.5, 1, 1.0], [0.0] * 4, [0.0] * 4]]
    )
    fields = {
        **{"visual/clean": visual, "field/candidates": boxes, "field/target": torch.tensor([1.0, 1.0])},
        "field/candidates/present": torch.tensor([[True, True, False], [True, False, False]]),
    }
    found = objective.loss(state_of(objective, 2, pooled, fields), Heads(head), LocalGather())
    query, keys = head.query(pooled[0]), head.key(visual[0, 1:])  # type: ignore[operator]
    scores = torch.stack([keys[0] @ query, keys.mean(0) @ query]) / 5**0.5
    by_hand = -scores.softmax(0)[1].log()  # the second sample's region is out of view
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)


def test_coverage_adds_up_to_the_box() -> None:
    boxes = torch.tensor([[0.1, 0.3, 0.85, 0.95], [0.0, 0.0, 1.0, 1.0]])
    covered = coverage(boxes, 4, 5)
    torch.testing.assert_close(covered.sum((1, 2)) / 20, torch.tensor([0.75 * 0.65, 1.0]))
    assert covered[0, 0].max() == 0 and covered[0, 2, 2] == 1


def test_a_mask() -> None:
    """Pixels of patches are where the patches are; cross-entropy and Dice by hand; an empty mask is left out."""
    objective = Segment(inner_size=5, dice_weight=0.3)
    head = head_of(objective)
    pooled, visual = torch.randn(2, 6), torch.randn(2, 1 + 4, 6)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:6, 3:8] = True
    fields = {"visual/clean": visual, "field/mask": mask, "field/mask/present": mask.any((1, 2))}
    state = state_of(objective, 2, pooled, fields)
    found, logits = objective.loss(state, Heads(head), LocalGather()), objective.predict(state, Heads(head))
    tile = head.pixels(head.norm(head.query(pooled[0]) * head.key(visual[0, 1 + 3])))  # type: ignore[operator]
    torch.testing.assert_close(logits[0, 4:, 4:], tile.view(4, 4))
    inside = mask[0].float()
    probability = logits[0].sigmoid()
    entropy = -(inside * probability.log() + (1 - inside) * (1 - probability).log()).mean()
    overlap = (2 * (probability * inside).sum() + 1) / (probability.sum() + inside.sum() + 1)
    by_hand = entropy + 0.3 * (1 - overlap)
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)
    assert dice(mask.float(), mask.float())[0].item() == 1.0


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_a_number(kind: str) -> None:
    objective = Regress(loss_kind=kind, scale=3.0)  # type: ignore[arg-type]
    head, pooled, wanted = head_of(objective), torch.randn(2, 6), torch.tensor([-1.5, 3.0])
    state = state_of(objective, 2, pooled, {"field/sentiment": wanted})
    found, far = objective.loss(state, Heads(head), LocalGather()), head(pooled) - wanted / 3
    by_hand = far.abs().mean() if kind == "l1" else far.square().mean()
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)
    torch.testing.assert_close(objective.predict(state, Heads(head)), 3 * head(pooled))
    assert found.metrics["error"].item() == pytest.approx((3 * far).abs().mean().item())


def test_a_class() -> None:
    """The mean of the patches without padding; a class that is not in the list is left out."""
    objective = Recognize(classes=("a", "b", "c"))
    head, visual = head_of(objective), torch.randn(2, 1 + 3, 6)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    fields = {"visual/clean": visual, "visual_mask/clean": mask, "recognize/targets": torch.tensor([-100, 2])}
    layout = plan_layout((objective,), "image_text", 2, 1)
    found = objective.loss(State(fields, layout), Heads(head), LocalGather())
    whole = head.output(head.norm(visual[1, 1:3].mean(0)))  # type: ignore[operator]
    by_hand = -whole.softmax(0)[2].log()
    torch.testing.assert_close(found.loss, by_hand)
    same_gradient(found.loss, by_hand, head)


def test_a_stated_number_of_classes_stands_for_a_list_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    objective = Recognize(classes="classes.txt", num_classes=400)
    assert (objective.num_choices, objective.absent_lists) == (400, {"classes": "classes.txt"})
    assert len(objective.with_stand_ins().choices) == 400
    with pytest.raises(UserError, match=r"objective recognize: classes is 'classes\.txt', and there is no such file"):
        _ = objective.choices
    assert [str(one) for one in Recognize(classes="motions", num_classes=400).misfits(None, 1)] == []  # type: ignore[arg-type]
    (found,) = Recognize(classes=("a", "b"), num_classes=3).misfits(None, 1)  # type: ignore[arg-type]
    assert str(found) == "num_classes: got 3; allowed 2, the number of classes in the list; change either"
    assert Recognize(classes="motions").absent_lists == {}


def same_gradient(one: torch.Tensor, other: torch.Tensor, head: torch.nn.Module) -> None:
    """Both losses have the same gradient at all weights of the head."""
    weights = list(head.parameters())
    found = [torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True) for loss in (one, other)]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found[0])
    for own, wanted in zip(*found, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("length", [20, 9], ids=["whole texts", "texts that are too long"])
def test_predictions_of_options_are_the_scores_of_training(length: int) -> None:
    """``predict`` with the texts of all options gives the scores that the loss compares, whatever was left out."""
    objective, model = Choose(), replace(OMNIVL, text_length=length)
    batch = batch_of(model, objective, entry_of("reasons", "image_text", ("options", "option")))
    torch.manual_seed(0)
    chain = build_chain(model, (objective,), TOKENIZER.special).eval()
    reader, listed = TextReader(TOKENIZER, length), batch.fields["options"]
    texts = [
        objective.texts(caption, own, reader)  # type: ignore[arg-type]
        for caption, own in zip(batch.captions, listed, strict=True)
    ]
    whole = [caption for caption, own in zip(batch.captions, texts, strict=True) if own[0].startswith(caption)]
    assert len(whole) == (batch.size if length == 20 else 0)
    assert batch.frames is not None
    rows = torch.arange(batch.size).repeat_interleave(4)
    ids = torch.from_numpy(reader.encode([one for own in texts for one in own]))
    scores = predict(chain, "choose", batch.frames, ids, rows).view(batch.size, 4)
    loss = chain(State.from_batch(batch, plan_layout((objective,), batch.kind, batch.size, 1)))["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(scores, batch.prepared["choose/targets"]))
