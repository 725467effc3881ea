"""Codes of a tokenizer that a finished stage has trained, as targets of masked objectives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_clip import TOKENS

from omnivl.architectures import CLIP, OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.backward import Backward
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads, Objective, PrepareContext
from omnivl.chain.state import State
from omnivl.data.batch import Batch
from omnivl.errors import UserError
from omnivl.inference.predict import predict
from omnivl.objectives import MDM, MFM, MMM, MRM, Quantize
from omnivl.objectives.codes import RandomCodebook, TrainedCodebook
from omnivl.objectives.masked_visual import PatchHead
from omnivl.objectives.teacher import TaughtHead, Teacher, TeacherFacts, stand_in_teachers
from omnivl.parts.quantize import VectorQuantizer

CODEBOOK = TrainedCodebook(num_codes=9, teacher="runs/codes")
TOKENIZER = Quantize(width=2, quantizer=VectorQuantizer(num_codes=9, size=3))
SMALL = replace(
    OmniVL.presets["tiny"],
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "alignment_layers": 1},
    **{"generation_layers": 0, "image_size": 16, "video_size": 16, "patch_size": 4, "text_length": 5, "vocab_size": 50},
)
SEES = replace(CLIP.presets["tiny"], vocab_size=50, text_length=8, image_size=16, patch_size=4, projection_size=1)


def tokenizer() -> Chain:
    torch.manual_seed(1)
    return build_chain(SEES, (TOKENIZER,), TOKENS)


def student(objective: Objective, teacher: Chain) -> tuple[Chain, State, Batch]:
    """A chain with the teacher in its place, the state before its losses, and the batch."""
    torch.manual_seed(0)
    chain = build_chain(SMALL, (objective,), TOKENS)
    (head,) = (one for one in chain.modules() if isinstance(one, TaughtHead))
    head.teacher = Teacher(teacher)
    frames = torch.randint(0, 256, (3, 1, 3, 16, 16), dtype=torch.uint8)
    own = torch.arange(3)
    batch = Batch("image", frames, None, own, own, own)
    context = PrepareContext(0, "x", TOKENS, (4, 4), 0)
    batch = replace(batch, prepared=objective.prepare(batch, context))
    state = State.from_batch(batch, plan_layout((objective,), "image", 3, 1))
    for layer in chain.program[:-1]:
        state = layer(state)
    return chain, state, batch


@pytest.mark.parametrize("every", [1, 3])
def test_the_loss_is_the_cross_entropy_with_the_tokenizers_codes(every: int) -> None:
    objective, teacher = MRM(probability=0.4, codebook=CODEBOOK, every=every), tokenizer()
    chain, state, batch = student(objective, teacher)
    head = chain.losses.heads["mrm"]
    assert isinstance(head, PatchHead) and head.codes is not None and batch.frames is not None
    codes = predict(teacher.eval(), "quantize", batch.frames)
    assert len(codes.unique()) > 1
    scores = head.codes.scores(state.rows("visual", "mrm")[:, 1:])
    total, count = torch.zeros(()), 0
    for row, sample in enumerate(batch.prepared["mrm/rows"].tolist()):
        mask = batch.prepared["mrm/mask"][row].flatten()
        total = total + F.cross_entropy(scores[row][mask], codes[sample][mask], reduction="sum")
        count += int(mask.sum())
    made = objective.loss(state, Heads(head), LocalGather())
    torch.testing.assert_close(made.loss, total / count)
    made.loss.backward()
    assert all(one.grad is not None for one in head.parameters())
    assert all(one.grad is None for one in teacher.parameters())


def test_the_tokenizer_is_no_part_of_the_model() -> None:
    chain, _, _ = student(MRM(codebook=CODEBOOK), tokenizer())
    assert not any("quantizer" in name for name in chain.state_dict())
    assert not any("quantizer" in name for name, _ in chain.named_parameters())


@pytest.mark.parametrize("objective", [MRM(codebook=CODEBOOK), MDM(codebook=CODEBOOK), MMM(codebook=CODEBOOK)])
def test_what_is_asked_of_the_engine(objective: Objective) -> None:
    assert objective.pupils == (CODEBOOK,)
    assert not replace(objective, codebook=RandomCodebook()).pupils  # type: ignore[call-arg]
    assert not replace(objective, codebook=None).pupils  # type: ignore[call-arg]


def test_operations_of_the_tokenizer_count() -> None:
    objective = MRM(codebook=CODEBOOK)
    chain, state, _ = student(objective, tokenizer())
    head, full = chain.losses.heads["mrm"], Backward()
    assert isinstance(head, PatchHead)
    encoder = head.flops(state.layout, full)
    assert encoder > 0
    assert head.flops(plan_layout((objective,), "image", 6, 1), full) == pytest.approx(2 * encoder)
    assert MRM(codebook=RandomCodebook(num_codes=9)).build_head(SMALL.heads).flops(state.layout, full) == 0.0


def test_where_costs_are_counted_nothing_is_loaded() -> None:
    objective = MRM(codebook=CODEBOOK)
    chain = build_chain(SMALL, (objective,), TOKENS)
    stand_in_teachers(chain)
    frames, own = torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8), torch.arange(2)
    batch = Batch("image", frames, None, own, own, own)
    batch = replace(batch, prepared=objective.prepare(batch, PrepareContext(0, "x", TOKENS, (4, 4), 0)))
    assert chain(State.from_batch(batch, plan_layout((objective,), "image", 2, 1)))["loss"].isfinite()


FACTS = TeacherFacts("runs/codes", SMALL.inputs, ("visual",), ("image", "clip"), {"visual": 16}, None, {"quantize": 9})


@pytest.mark.parametrize(
    ("facts", "codebook", "shown", "said"),
    [
        ({"codes": {}}, {}, "image", "without a tokenizer 'quantize'; allowed is one with it; it has none"),
        ({}, {"objective": "codes"}, "image", "without a tokenizer 'codes'; allowed is one with it; it has 'quantize'"),
        ({}, {"num_codes": 512}, "image", "with 9 codes; allowed is codebook.num_codes, 512; set that to 9"),
        ({}, {}, "clip", "for clips; allowed is one for images"),
        (
            {"inputs": replace(SMALL.inputs, patch_size=8)},
            {},
            "image",
            "with patch_size 8; allowed is the student's, 4",
        ),
        ({"inputs": replace(SMALL.inputs, image_size=32)}, {}, "image", "with image_size 32; allowed is the student's"),
    ],
)
def test_tokenizers_that_do_not_fit(facts, codebook, shown, said) -> None:
    with pytest.raises(UserError, match="objective mrm: got teacher runs/codes") as found:
        replace(CODEBOOK, **codebook).check_teacher("mrm", replace(FACTS, **facts), SMALL.inputs, (shown,))
    assert said in str(found.value)
    texts = replace(FACTS, inputs=replace(SMALL.inputs, text_length=2))
    CODEBOOK.check_teacher("mrm", texts, SMALL.inputs, ("image",))
    assert MFM(codebook=CODEBOOK).pupils
