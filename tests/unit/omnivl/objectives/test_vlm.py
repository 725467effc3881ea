import math
from dataclasses import replace

import pytest
import torch
from tiny_chain import CONFIG
from tiny_chain import TOKENS as TINY_TOKENS
from tiny_chain import make_batch as make_tiny_batch

from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.objective import Heads
from omnivl.chain.sizes import HeadSizes
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.objectives import VLM
from omnivl.objectives.vlm import MatchHead, draw_negatives

LOGITS = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
ALLOWED = torch.tensor([True, False, True, True])


def draw(uniforms: list[float], allowed: torch.Tensor = ALLOWED, epsilon: float = 0.0) -> list[int]:
    rows = len(uniforms)
    return draw_negatives(LOGITS.expand(rows, 4), allowed.expand(rows, 4), torch.tensor(uniforms), epsilon).tolist()


def test_inverse_cumulative_softmax_by_hand() -> None:
    # Without the second: (0.1, 0, 0.3, 0.4) / 0.8 = (0.125, 0, 0.375, 0.5), cumulative 0.125, 0.125, 0.5, 1.
    assert draw([0.0, 0.12, 0.13, 0.49, 0.51, 0.9999999]) == [0, 0, 2, 2, 3, 3]


def test_epsilon_flattens_by_hand() -> None:
    # Epsilon 1 on three admissible ones: (1.125, 0, 1.375, 1.5) of 4: cumulative 0.28125, 0.28125, 0.625, 1.
    assert draw([0.28, 0.29, 0.62, 0.63], epsilon=1.0) == [0, 2, 2, 3]


def test_inadmissible_candidates_are_never_drawn() -> None:
    last_off = torch.tensor([False, True, True, False])
    largest = math.nextafter(1.0, 0.0)
    assert set(draw([i / 1000 for i in range(1000)] + [largest], last_off, 1e-4)) == {1, 2}
    assert set(draw([i / 1000 for i in range(1000)], torch.tensor([False, False, False, True]))) == {3}


@pytest.mark.parametrize("probabilities", ["negatives", "all"])
def test_several_matrices_are_drawn_from_as_each_alone(probabilities: str) -> None:
    torch.manual_seed(0)
    logits, uniforms, admissible = torch.randn(2, 6, 9), torch.rand(2, 6), torch.rand(6, 9) < 0.5
    admissible[2] = False
    together = draw_negatives(logits, admissible, uniforms, 1e-4, probabilities)
    for one, rows, own in zip(together, logits, uniforms, strict=True):
        assert one.tolist() == draw_negatives(rows, admissible, own, 1e-4, probabilities).tolist()
        assert one[2] == 0


def test_shares_of_draws_are_the_softmax() -> None:
    drawn = torch.tensor(draw([(i + 0.5) / 1000 for i in range(1000)]))
    assert torch.bincount(drawn, minlength=4).tolist() == [125, 0, 375, 500]


def test_the_own_pair_can_take_its_share_before_it_is_left_out_by_hand() -> None:
    # Of all: (0.1, 0.2, 0.3, 0.4). With 0.1 added and the second left out: (0.2, 0, 0.4, 0.5) of 1.1.
    uniforms = torch.tensor([0.18, 0.19, 0.54, 0.55])
    drawn = draw_negatives(LOGITS.expand(4, 4), ALLOWED.expand(4, 4), uniforms, 0.1, "all")
    assert drawn.tolist() == [0, 2, 2, 3]
    # Among negatives it is (0.225, 0, 0.475, 0.6) of 1.3: cumulative 0.173, 0.173, 0.538, 1.
    assert draw([0.17, 0.18, 0.53, 0.54], epsilon=0.1) == [0, 2, 2, 3]


def test_draws_over_all_candidates_are_those_of_blip() -> None:
    """Its lines, ``softmax(sim) + 1e-4`` with a diagonal of zeros, where the own pair takes nearly everything."""
    torch.manual_seed(0)
    logits = torch.randn(5, 5) + 9.0 * torch.eye(5)
    weights = logits.softmax(1) + 1e-4
    weights.fill_diagonal_(0)
    shares = weights / weights.sum(1, keepdim=True)
    steps = 20_000
    uniforms = ((torch.arange(steps) + 0.5) / steps).repeat(5, 1)
    for row in range(5):
        admissible = (torch.arange(5) != row).expand(steps, 5)
        drawn = draw_negatives(logits[row].expand(steps, 5), admissible, uniforms[row], 1e-4, "all")
        found = torch.bincount(drawn, minlength=5) / steps
        torch.testing.assert_close(found, shares[row], atol=2e-4, rtol=0)


def test_similarities_to_momentum_embeddings_draw_other_samples() -> None:
    # Online, text 0 is nearest to visual 1; for the momentum encoder it is nearest to visual 2. Likewise the others.
    eye, names = torch.eye(3), ("visual_embedding", "text_embedding")
    online = {"visual_embedding": eye, "text_embedding": eye[[1, 2, 0]]}
    taught = {f"momentum_{name}": eye[[2, 0, 1]] if name == "text_embedding" else eye[[1, 2, 0]] for name in names}
    state = State(
        {
            **{**online, **taught, "identity": torch.arange(3), "logit_scale": torch.tensor(100.0)},
            "vlm/uniforms": torch.full((3, 2), 0.5),
        },
        StepLayout("image_text", 3, 1),
    )
    rows = VLM(epsilon=0.0).draw(state, LocalGather()).rows
    assert rows["vlm/negative_visual"].tolist() == [1, 2, 0]
    # Momentum visuals are e1, e2, e0 and texts e1, e2, e0: each text's nearest is its own, which may not be drawn; the
    # others are equally far, and 0.5 falls on the second of them.
    momentum = VLM(epsilon=0.0, similarities="momentum")
    assert momentum.draw(state, LocalGather()).rows["vlm/negative_visual"].tolist() == [2, 2, 1]
    # Momentum texts are e2, e0, e1: visual 0 is nearest to text 1, visual 1 to text 2, visual 2 to text 0.
    assert momentum.draw(state, LocalGather()).rows["vlm/negative_text"].tolist() == [1, 2, 0]


def test_momentum_similarities_need_twins_and_build_their_projections() -> None:
    demands = VLM(similarities="momentum").demands("image_text", 4)
    assert demands is not None
    assert demands.twins == {"visual", "text"}
    objectives = (VLM(similarities="momentum"),)
    chain = build_chain(CONFIG, objectives, TINY_TOKENS)
    assert chain.contrast.momentum_visual_projection is not None
    batch = make_tiny_batch("image_text", objectives, 4)
    chain(State.from_batch(batch, plan_layout(objectives, "image_text", 4, 1)))["loss"].backward()
    with pytest.raises(ModelError, match="momentum"):
        build_chain(replace(CONFIG, momentum=None), objectives, TINY_TOKENS)
    (kept,) = [one.after_training() for one in objectives]
    assert kept == VLM()


def test_a_row_without_candidates_is_no_nan() -> None:
    nothing = torch.zeros(4, dtype=torch.bool)
    assert draw([0.5], nothing, 1e-4) == [0]
    assert draw([0.5], nothing, 0.0) == [0]


def test_huge_logits_are_safe() -> None:
    # Similarity 1 at temperature 0.001, in bf16: the largest takes all, and an inadmissible larger one nothing.
    logits = torch.tensor([[1000.0, 2000.0, -1000.0, 900.0]], dtype=torch.bfloat16)
    assert draw_negatives(logits, ALLOWED[None], torch.tensor([0.7]), 0.0).tolist() == [0]


def matching_state(first: torch.Tensor, has_negative: list[bool]) -> State:
    size = len(has_negative)
    names = ("vlm/positive", "vlm/negative_visual", "vlm/negative_text")
    layout = StepLayout(
        "image_text", size, 1, fused={name: slice(i * size, (i + 1) * size) for i, name in enumerate(names)}
    )
    return State({"fused": first[:, None], "vlm/has_negative": torch.tensor(has_negative)}, layout)


def reading_head() -> MatchHead:
    """The first hidden value is the score of "match"; "no match" scores 0."""
    head = MatchHead(1)
    head.output.weight.data = torch.tensor([[0.0], [1.0]])
    return head


def test_loss_accuracy_and_gradient_by_hand() -> None:
    # Two samples; the second has no negative. Odds of a match are 3 in the rows that are ln 3, 1 in those that are 0.
    # Positives: ln 3 -> -ln(3/4); 0 -> ln 2. Negatives of sample 0: ln 3 -> ln 4 (wrong), 0 -> ln 2.
    # Those of sample 1 (100) do not count. Mean over 4 pairs: (ln(4/3) + ln 2 + ln 4 + ln 2) / 4.
    ln3 = math.log(3)
    first = torch.tensor([[ln3], [0.0], [ln3], [100.0], [0.0], [100.0]], requires_grad=True)
    out = VLM().loss(matching_state(first, [True, False]), Heads(reading_head()), LocalGather())
    out.loss.backward()
    assert out.loss.item() == pytest.approx((math.log(4 / 3) + 2 * math.log(2) + math.log(4)) / 4)
    # argmax takes "no match" at equal scores: right are positive 0 and negative text 0, two of four.
    assert out.metrics["accuracy"].item() == 0.5
    assert out.metrics["with_negative"].item() == 0.5
    # d / d score: (p - y) / 4 with p = 3/4 or 1/2; nothing where there is no negative.
    assert first.grad is not None
    assert first.grad[:, 0].tolist() == pytest.approx([-1 / 16, -1 / 8, 3 / 16, 0.0, 1 / 8, 0.0])


def test_a_batch_of_one_class_trains_on_its_positives() -> None:
    first = torch.randn(6, 1, requires_grad=True)
    out = VLM().loss(matching_state(first, [False, False]), Heads(reading_head()), LocalGather())
    out.loss.backward()
    positive = -torch.nn.functional.logsigmoid(first[:2, 0]).mean()
    assert out.loss.item() == pytest.approx(positive.item())
    assert first.grad is not None
    assert torch.isfinite(first.grad).all()
    assert first.grad[2:].abs().sum() == 0


def test_uniforms_belong_to_the_sample(make_batch, context) -> None:
    joined = VLM().prepare(make_batch(positions=(4, 5, 6, 7)), context)["vlm/uniforms"]
    split = [VLM().prepare(make_batch(positions=p), context)["vlm/uniforms"] for p in ((4, 5), (6, 7))]
    assert joined.shape == (4, 2)
    assert joined.dtype == torch.float32
    assert torch.equal(joined, torch.cat(split))
    assert ((joined >= 0) & (joined < 1)).all()
    assert len(set(joined.flatten().tolist())) == 8


def test_head_has_two_scores_in_fp32() -> None:
    head = VLM().build_head(HeadSizes({"fused": 8}, 4, 11, 4, 2, 1, 4))
    assert head(torch.zeros(3, 8, dtype=torch.bfloat16)).shape == (3, 2)
    assert head(torch.zeros(3, 8, dtype=torch.bfloat16)).dtype == torch.float32
