"""Distillation by its formulas, and what a teacher is and is not part of."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_clip import SMALL, TOKENS, make_batch, run, scattered_chain
from torch import Tensor

from omnivl.architectures import OmniVL
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.preparation import Preparation
from omnivl.chain.state import State
from omnivl.data.batch import DataKind
from omnivl.errors import UserError
from omnivl.objectives import ITC, ITM, VLM, Distil, DistilMatching, Objective
from omnivl.objectives.distil import contrastive_divergence, feature_distance
from omnivl.objectives.distil_matching import matching_divergence
from omnivl.objectives.teacher import OwnTeacher, Taught, TaughtHead, Teacher, TeacherFacts, stand_in_teachers

TAUGHT = "runs/teacher"
STUDENT = replace(SMALL, vision=replace(SMALL.vision, hidden_size=8), text=replace(SMALL.text, hidden_size=6))
PAIRED = OmniVL(
    **{"hidden_size": 16, "num_heads": 2, "vision_layers": 1, "text_layers": 1, "projection_size": 8},
    **{"alignment_layers": 1, "generation_layers": 1, "image_size": 16, "video_size": 16, "patch_size": 8},
    **{"num_frames": 3, "tubelet_size": 1, "text_length": 8, "vocab_size": 50},
)


def unit(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def test_the_contrastive_divergence_by_hand() -> None:
    """Two pairs on two axes.

    The teacher's cosines are the identity and its scale is log 3: each text's shares of the pictures are 3/4 and 1/4.
    The student's cosines are all 1: its shares are 1/2 and 1/2. KL = 3/4 log(3/2) + 1/4 log(1/2), in both directions.
    """
    axes = unit([1.0, 0.0], [0.0, 1.0])
    same = unit([1.0, 0.0], [1.0, 0.0])
    got = contrastive_divergence(
        (same, same), torch.tensor(5.0), (axes, axes), torch.tensor(math.log(3)), LocalGather()
    )
    assert got.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_softening_divides_logits_and_multiplies_the_loss_by_its_square() -> None:
    """As above with a scale of 2 log 3 and a temperature of 2: equal shares, 4 times the loss."""
    axes, same = unit([1.0, 0.0], [0.0, 1.0]), unit([1.0, 0.0], [1.0, 0.0])
    scale = torch.tensor(2 * math.log(3))
    got = contrastive_divergence((same, same), torch.tensor(5.0), (axes, axes), scale, LocalGather(), soften=2.0)
    assert got.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)), abs=1e-6)


def test_the_gradient_of_a_logit_is_the_difference_of_shares() -> None:
    """d KL / d logit = (student's share - teacher's) / texts, halved by the two directions.

    With one text against two pictures: the student's logits are scale * cosine, so that the gradient of the scale is
    the sum of cosine * difference of shares.
    """
    random = torch.Generator().manual_seed(0)
    visual, text, other, words = (F.normalize(torch.randn(3, 4, generator=random), dim=-1) for _ in range(4))
    scale = torch.tensor(2.0, requires_grad=True)
    contrastive_divergence((visual, text), scale, (other, words), torch.tensor(3.0), LocalGather()).backward()
    wanted = torch.zeros(())
    for cosines, theirs in ((text @ visual.t(), words @ other.t()), (visual @ text.t(), other @ words.t())):
        difference = (2.0 * cosines).softmax(1) - (3.0 * theirs).softmax(1)
        wanted = wanted + (cosines * difference).sum() / 3 / 2
    torch.testing.assert_close(scale.grad, wanted)


def test_feature_distances_by_hand() -> None:
    made, wanted = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[4.0, 3.0]]])
    assert feature_distance(made, wanted, "mse").item() == pytest.approx(1.0)
    assert feature_distance(made, wanted, "cosine").item() == pytest.approx(1 - 24 / 25)


def test_the_matching_divergence_by_hand() -> None:
    """The teacher is sure by odds of 3 to 1, the student by 1 to 1; its gradient is the difference of shares."""
    logits = torch.zeros(1, 2, requires_grad=True)
    got = matching_divergence(logits, torch.tensor([math.log(3)]))
    assert got.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25]]))
    softened = matching_divergence(torch.zeros(1, 2), torch.tensor([2 * math.log(3)]), soften=2.0)
    assert softened.item() == pytest.approx(got.item(), abs=1e-6)


def taught(objectives: tuple[Objective, ...], teacher: Teacher, config: Any = STUDENT) -> Chain:
    chain = build_chain(config, objectives, TOKENS)
    for module in chain.modules():
        if isinstance(module, TaughtHead):
            module.teacher = teacher
    return chain


def state_of(objectives: tuple[Objective, ...], config: Any, kind: DataKind = "image_text") -> State:
    batch = make_batch(kind)
    prepared = Preparation(objectives, TOKENS, config.inputs, seed=0)(batch, "noise", 0)
    layout = plan_layout(objectives, batch.kind, batch.size, batch.num_frames)
    return State.from_batch(replace(batch, prepared=prepared), layout)


def test_a_student_that_equals_its_teacher_has_no_loss() -> None:
    objectives = (ITC(), Distil(teacher=TAUGHT))
    chain = scattered_chain(SMALL, objectives)
    head = chain.program[-1].get_submodule("heads.distil")
    assert isinstance(head, TaughtHead)
    head.teacher = Teacher(copy.deepcopy(scattered_chain(SMALL, (ITC(),))))
    out = run(chain, objectives, make_batch())
    assert abs(out["loss/distil"].item()) < 1e-5
    head.teacher = Teacher(scattered_chain(SMALL, (ITC(),), seed=1))
    assert run(chain, objectives, make_batch())["loss/distil"].item() > 1e-2


@pytest.mark.parametrize("kind", ["image_text", "video_text"])
@pytest.mark.parametrize("feature_loss", ["cosine", "mse"])
def test_the_student_learns_and_the_teacher_does_not(kind: DataKind, feature_loss: Any) -> None:
    teacher = Teacher(scattered_chain(SMALL, (ITC(),)))
    before = copy.deepcopy(teacher.chain.state_dict())
    objectives = (Distil(teacher=TAUGHT, features={"visual": 16, "text": 12}, feature_loss=feature_loss),)
    torch.manual_seed(0)
    chain = taught(objectives, teacher)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = chain(state_of(objectives, STUDENT, kind))
        losses.append({name: out[f"metric/distil/{name}"].item() for name in ("contrast", "visual", "text")})
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert all(losses[-1][name] < 0.9 * first for name, first in losses[0].items()), losses[:: len(losses) - 1]
    for name, tensor in teacher.chain.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(one.grad is None and not one.requires_grad for one in teacher.chain.parameters())


def test_padding_of_texts_has_no_part_in_their_features() -> None:
    objective = Distil(teacher=TAUGHT, contrast=0.0, features={"text": 12})
    teacher = Teacher(scattered_chain(SMALL, (ITC(),)))
    torch.manual_seed(0)
    chain = taught((objective,), teacher)
    state = state_of((objective,), STUDENT)
    got = chain(state)["loss"]
    with torch.no_grad():
        kept = make_batch().token_ids != TOKENS.pad
        text_only = replace(state.layout, mode="encode", objectives=(), class_only=False)
        own = chain.fold(State({"token_ids": state["token_ids"]}, replace(text_only, visual={}))).rows("text", "clean")
        made = chain.program[-1].get_submodule("heads.distil.maps.text")(own)
        theirs = teacher.lesson(state, {"text": 12}).features["text"]
        distance = 1 - F.cosine_similarity(made, theirs, dim=-1)
    torch.testing.assert_close(got, distance[kept].mean())


@pytest.mark.parametrize("features", [{}, {"visual": 16}, {"visual": 16, "text": 12}])
@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_idle_parameters_are_those_without_a_gradient(contrast: float, features: dict[str, int]) -> None:
    if contrast == 0.0 and not features:
        pytest.skip("there is no such objective")
    objectives = (Distil(teacher=TAUGHT, contrast=contrast, features=features),)
    torch.manual_seed(0)
    chain = taught(objectives, Teacher(scattered_chain(SMALL, (ITC(),))))
    state = state_of(objectives, STUDENT)
    chain(state)["loss"].backward()
    idle = {id(parameter) for layer in chain.layers for parameter in layer.idle_parameters([state.layout])}
    for name, parameter in chain.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in idle), name


def test_a_teacher_is_in_no_list_of_the_students() -> None:
    """Neither parameter nor buffer: no optimizer, checkpoint or sharding meets it."""
    objectives = (ITC(), Distil(teacher=TAUGHT))
    without = build_chain(STUDENT, objectives, TOKENS).state_dict()
    chain = taught(objectives, Teacher(scattered_chain(SMALL, (ITC(),))))
    assert chain.state_dict().keys() == without.keys()
    chain.train()
    head = chain.program[-1].get_submodule("heads.distil")
    assert isinstance(head, TaughtHead)
    assert isinstance(head.teacher, Teacher)
    assert not head.teacher.chain.training
    assert head.teacher.flops(state_of(objectives, STUDENT).layout) > 0


@pytest.mark.parametrize("teaches", [VLM(), ITM(alignment_weight=0.0)])
def test_matching_follows_the_teachers_probabilities_of_the_same_pairs(teaches: Objective) -> None:
    torch.manual_seed(1)
    teacher = Teacher(build_chain(PAIRED, (teaches,), TOKENS))
    for parameter in teacher.chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    objectives = (DistilMatching(teacher=TAUGHT),)
    torch.manual_seed(0)
    chain = taught(objectives, teacher, PAIRED)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    state = state_of(objectives, PAIRED)
    for _ in range(60):
        out = chain(state)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["loss"].item() < 1e-3
    seen = objectives[0].draw(state, LocalGather()).rows["distil_matching"]
    own = Teacher(chain)
    torch.testing.assert_close(own.odds(state, seen), teacher.odds(state, seen), atol=0.15, rtol=0.1)


def test_the_pairs_that_a_teacher_scores_are_those_of_the_student() -> None:
    """Row b of the student is text b beside the picture that ``seen`` names."""
    objectives = (DistilMatching(teacher=TAUGHT, replaced=0.9),)
    torch.manual_seed(0)
    chain = build_chain(PAIRED, objectives, TOKENS).eval()
    own = Teacher(copy.deepcopy(chain))
    for module in chain.modules():
        if isinstance(module, TaughtHead):
            module.teacher = own
    out = chain(state_of(objectives, PAIRED))
    assert abs(out["metric/distil_matching/divergence"].item()) < 1e-6
    torch.testing.assert_close(out["metric/distil_matching/accuracy"], out["metric/distil_matching/teacher_accuracy"])


def test_a_hard_share_adds_the_true_targets() -> None:
    losses = {}
    for hard in (0.0, 0.5):
        objectives = (DistilMatching(teacher=TAUGHT, hard=hard),)
        torch.manual_seed(0)
        teacher = Teacher(build_chain(PAIRED, (VLM(),), TOKENS))
        torch.manual_seed(1)
        chain = taught(objectives, teacher, PAIRED)
        losses[hard] = chain(state_of(objectives, PAIRED))["loss"].item()
        if hard == 0.0:
            torch.manual_seed(1)
            plain = build_chain(PAIRED, (ITM(alignment_weight=0.0, name="distil_matching"),), TOKENS)
            true = plain(state_of((ITM(alignment_weight=0.0, name="distil_matching"),), PAIRED))["loss"].item()
    assert losses[0.5] == pytest.approx(0.5 * losses[0.0] + 0.5 * true, rel=1e-5)


def test_exported_heads_need_no_teacher() -> None:
    assert Distil(teacher=TAUGHT).after_training() is None
    kept = DistilMatching(teacher=TAUGHT, weight=2.0, hard=0.5, replaced=0.3).after_training()
    assert kept == ITM(name="distil_matching", replaced=0.3, alignment_weight=0.0)
    with torch.device("meta"):
        own, other = (build_chain(PAIRED, (one,), TOKENS) for one in (DistilMatching(teacher=TAUGHT), kept))
    assert own.state_dict().keys() == other.state_dict().keys()


def test_costs_are_counted_without_a_teacher() -> None:
    objectives = (Distil(teacher=TAUGHT, features={"visual": 16, "text": 12}), ITC())
    chain = build_chain(STUDENT, objectives, TOKENS)
    stand_in_teachers(chain)
    assert chain(state_of(objectives, STUDENT))["loss/distil"].requires_grad
    featured = (replace(objectives[0], contrast=0.0),)
    chain = build_chain(STUDENT, featured, TOKENS)
    stand_in_teachers(chain)
    assert chain(state_of(featured, STUDENT))["loss/distil"].requires_grad
    matching = (DistilMatching(teacher=TAUGHT),)
    chain = build_chain(PAIRED, matching, TOKENS)
    stand_in_teachers(chain)
    assert chain(state_of(matching, PAIRED))["loss"].requires_grad
    head = chain.program[-1].get_submodule("heads.distil_matching")
    assert isinstance(head, TaughtHead)
    assert isinstance(head.teacher, OwnTeacher)


FACTS = TeacherFacts(
    "runs/teacher", SMALL.inputs, ("visual", "text", "embedding"), ("image", "clip"), {"visual": 16, "text": 12}, None
)


def refusal(objective: Taught, facts: TeacherFacts, shown: tuple[str, ...] = ("image",)) -> str:
    with pytest.raises(UserError) as raised:
        objective.check_teacher(objective.key, facts, SMALL.inputs, shown)
    return str(raised.value)


def test_teachers_that_do_not_fit() -> None:
    own, inputs = Distil(teacher=TAUGHT), SMALL.inputs
    own.check_teacher(own.key, FACTS, inputs, ("image", "clip"))
    assert refusal(own, replace(FACTS, inputs=replace(inputs, image_size=32))) == (
        "objective distil: got teacher runs/teacher with image_size 32; allowed is the student's, 16, as both read one "
        "batch; change the student's model to it, or take another teacher"
    )
    assert "with num_frames 5;" in refusal(own, replace(FACTS, inputs=replace(inputs, num_frames=5)), ("clip",))
    own.check_teacher(own.key, replace(FACTS, inputs=replace(inputs, num_frames=5)), inputs, ("image",))
    assert refusal(own, replace(FACTS, inputs=replace(inputs, text_length=4))) == (
        "objective distil: got teacher runs/teacher with text_length 4; allowed is the student's, 8, or more; lower "
        "the student's, or take another teacher"
    )
    assert "that makes no embeddings;" in refusal(own, replace(FACTS, streams=("visual", "text", "fused")))
    assert "that reads no clips;" in refusal(own, replace(FACTS, shows=("image",)), ("clip",))
    featured = Distil(teacher=TAUGHT, features={"visual": 192})
    assert refusal(featured, FACTS) == (
        "objective distil: got teacher runs/teacher whose stream 'visual' has width 16; allowed is that of "
        "features.visual, 192; set features.visual to 16"
    )
    patched = Distil(teacher=TAUGHT, features={"visual": 16})
    assert "with patch_size 4;" in refusal(patched, replace(FACTS, inputs=replace(inputs, patch_size=4)))
    assert "without a matching head;" in refusal(DistilMatching(teacher=TAUGHT), FACTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": TAUGHT, "soften": 0.0}, "objective distil: soften must be above 0, got 0.0"),
        (
            {"teacher": TAUGHT, "contrast": 0.0},
            "objective distil: contrast must be above 0 where there are no features, got 0.0",
        ),
        (
            {"teacher": TAUGHT, "features": {"sound": 3}},
            "objective distil: features must be widths of visual and text, got {'sound': 3}",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        Distil(**options)
    assert str(raised.value) == message


@pytest.mark.parametrize("kind", [Distil, DistilMatching])
def test_a_teacher_has_to_be_named(kind: type[Taught]) -> None:
    (misfit,) = kind().misfits(SMALL.inputs, 4)
    assert str(misfit) == (
        "teacher: got null; allowed the folder of a finished run or of an exported model, or null beside a "
        "teacher_stage of this run; name one"
    )
    assert not list(kind(teacher=TAUGHT).misfits(SMALL.inputs, 4))
    assert not list(kind(teacher_stage="first").misfits(SMALL.inputs, 4))


def test_visual_features_need_pictures_of_one_size() -> None:
    (misfit,) = Distil(teacher=TAUGHT, features={"visual": 16}).misfits(replace(SMALL.inputs, native=True), 4)
    assert str(misfit) == "features: got 'visual'; allowed 'text' where pictures keep their sizes; leave it out"


def test_matching_takes_negatives_of_its_own_replica() -> None:
    with pytest.raises(UserError) as raised:
        DistilMatching(teacher=TAUGHT, negatives="global")
    wanted = "'local', as the teacher reads this replica's samples, got 'global'"
    assert str(raised.value) == f"objective distil_matching: negatives must be {wanted}"
