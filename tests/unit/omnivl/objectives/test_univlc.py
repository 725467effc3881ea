import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoded import MOMENTUM, SIZES, B, encoded, perturb
from torch import Tensor

from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Heads
from omnivl.chain.state import State
from omnivl.data.batch import DATA_KINDS
from omnivl.objectives import NegativeWeights, UniVLC
from omnivl.objectives.contrast import Teacher
from omnivl.objectives.key_queue import Keys, Pairs
from omnivl.objectives.spread_keys import SpreadKeys
from omnivl.objectives.univlc import UniVLCHead
from omnivl.parts.project import Project

LN2, LN3 = math.log(2), math.log(3)


def keys_of(visual: Tensor, text: Tensor, identity: list[int], domain: list[int], valid: list[bool]) -> Keys:
    return Keys(visual, text, torch.tensor(identity), torch.tensor(domain), torch.tensor(valid))


def contrast(
    objective: UniVLC,
    queries: Pairs,
    scale: Tensor,
    queue: Keys | None = None,
    teachers: tuple[Teacher, Teacher] | None = None,
) -> Tensor:
    """The loss with the queries as the keys of the batch, pairs of an image and a caption."""
    batch = SpreadKeys.both(queries.visual, queries.text, queries.identity, LocalGather())
    sides = objective.contrast(queries, batch, "image_text", scale, queue, teachers)
    return (sides[0].loss.mean() + sides[1].loss.mean()) / 2


def test_soft_targets_reach_the_loss_by_hand() -> None:
    # Queries and keys (1, 0) and (0, 1), scale ln 3: the logits of a query are ln 3 and 0, its normaliser is ln 4.
    # The teacher sees the same: targets 0.5 (3/4, 1/4) + 0.5 (1, 0) = (7/8, 1/8).
    # Visual to text: ln 4 - 7/8 ln 3; text to visual is the same by symmetry.
    e = torch.eye(2)
    teacher = Teacher(e, torch.tensor(0.5))
    objective = UniVLC(batch_keys="momentum", soft_target_alpha=0.5)
    loss = contrast(objective, Pairs(e, e, torch.tensor([1, 2])), torch.tensor(LN3), None, (teacher, teacher))
    assert loss.item() == pytest.approx(math.log(4) - 7 / 8 * LN3)


def test_loss_of_a_batch_by_hand() -> None:
    # Scale ln 2. Visual e1, e2; text e1, e1. Identities differ.
    # v -> t: query e1 has logits (ln 2, ln 2): ln 4 - ln 2 = ln 2; query e2 has (0, 0): ln 2. Mean ln 2.
    # t -> v: both texts have logits (ln 2, 0), normaliser ln 3: ln 3 - ln 2 and ln 3. Mean ln 3 - ln 2 / 2.
    # Loss: (ln 2 / 2 + ln 3) / 2.
    e = torch.eye(2)
    loss = contrast(UniVLC(), Pairs(e, e[[0, 0]], torch.tensor([1, 2])), torch.tensor(LN2))
    assert loss.item() == pytest.approx((LN2 / 2 + LN3) / 2)


def test_loss_is_that_of_unicl_by_hand() -> None:
    # Yang et al., UniCL, arXiv 2204.03610, equations 2 and 3; labels 1, 1, 2. Scale ln 2. Visual e1, e2, e2; texts e1.
    # v -> t: all texts are alike, so that every term is ln 3, and the mean over a query's positives too.
    # t -> v: each text has logits (ln 2, 0, 0), normaliser ln 4. The first two have positives 1 and 2: the mean of
    # ln 2 and 2 ln 2. The last has the third: 2 ln 2. Mean 5/3 ln 2.
    e = torch.eye(2)
    pairs = Pairs(e[[0, 1, 1]], e[[0, 0, 0]], torch.tensor([1, 1, 2]))
    assert contrast(UniVLC(), pairs, torch.tensor(LN2)).item() == pytest.approx((LN3 + 5 / 3 * LN2) / 2)
    # Summed over positives instead: 2 ln 3, 2 ln 3, ln 3 and 3 ln 2, 3 ln 2, 2 ln 2.
    summed = contrast(UniVLC(positive_reduction="sum"), pairs, torch.tensor(LN2))
    assert summed.item() == pytest.approx((5 / 3 * LN3 + 8 / 3 * LN2) / 2)


def test_gradient_follows_the_formula() -> None:
    """With online keys, queries and keys both get gradients: against the loss written as loops."""
    torch.manual_seed(0)
    visual, text = (F.normalize(torch.randn(4, 3), dim=-1).requires_grad_(True) for _ in range(2))
    old_visual, old_text = (F.normalize(torch.randn(3, 3), dim=-1) for _ in range(2))
    queue = keys_of(old_visual, old_text, [1, 9, 8], [2, 3, 1], [True, True, False])
    scale = torch.tensor(3.0, requires_grad=True)
    identity = [1, 2, 1, 3]
    options = UniVLC(negative_weights=NegativeWeights(video=2.0, label=0.5))
    loss = contrast(options, Pairs(visual, text, torch.tensor(identity)), scale, queue)

    weight = {0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0}  # image_text, video_text, image_label, video_label
    ids, domains = [1, 2, 1, 3, 1, 9], [0, 0, 0, 0, 2, 3]  # the invalid entry is not there
    total = torch.zeros(())
    for queries, keys in ((visual, torch.cat([text, queue.text[:2]])), (text, torch.cat([visual, queue.visual[:2]]))):
        for i in range(4):
            exponentials = [(scale * queries[i] @ key).exp() for key in keys]
            same = [ids[k] == identity[i] for k in range(6)]
            below = sum(e if same[k] else weight[domains[k]] * e for k, e in enumerate(exponentials))
            terms = [-(exponentials[k] / below).log() for k in range(6) if same[k]]
            total = total + sum(terms) / len(terms) / 4 / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    inputs = (visual, text, scale)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_negative_weights_multiply_by_domain() -> None:
    weights = NegativeWeights(image=2.0, video=3.0, caption=5.0, label=7.0)
    assert dict(zip(DATA_KINDS[:4], weights.table(), strict=False)) == {
        "image_text": 10.0,
        "video_text": 15.0,
        "image_label": 14.0,
        "video_label": 21.0,
    }


def test_metrics_by_hand() -> None:
    # Visual e1, e2; texts e1, e1; identities 1, 2. Visual 0 finds text 0 (right), visual 1 ties at 0 and takes the
    # first (wrong); text 0 finds visual 0 (right), text 1 finds visual 0 (wrong).
    e = torch.eye(2)
    layout = encoded([UniVLC()]).layout
    leaves = {"visual_embedding": e, "text_embedding": e[[0, 0]], "identity": torch.tensor([1, 2])}
    momentum = {f"momentum_{name}_embedding": leaves[f"{name}_embedding"] for name in ("visual", "text")}
    state = State({**leaves, **momentum, "logit_scale": torch.tensor(1 / 0.07)}, layout)
    objective = UniVLC(queue_size=2)
    head = UniVLCHead(2, 2).eval()
    head.queue.push(keys_of(e, e, [1, 1], [0, 0], [True, False]))
    metrics = objective.loss(state, Heads(head), LocalGather()).metrics
    assert {name: round(value.item(), 4) for name, value in metrics.items()} == {
        "temperature": 0.07,
        "visual_to_text_r1": 0.5,
        "text_to_visual_r1": 0.5,
        "positives": 1.5,  # (2 + 1) / 2: the valid queue entry is one more for identity 1
        "queue_valid": 0.5,
    }
    assert "queue_valid" not in UniVLC().loss(state, Heads(None), LocalGather()).metrics


def test_share_of_soft_targets_is_ramped(make_batch, context) -> None:
    objective = UniVLC(batch_keys="momentum", soft_target_alpha=0.4, soft_target_warmup_steps=4)
    shares = [objective.prepare(make_batch(), replace(context, step=step))["univlc/alpha"].item() for step in (0, 1, 9)]
    assert shares == pytest.approx([0.1, 0.2, 0.4])
    assert UniVLC().prepare(make_batch(), context) == {}


@pytest.mark.parametrize(
    ("objective", "uses"),
    [
        (UniVLC(), False),
        (UniVLC(queue_size=4), True),
        (UniVLC(batch_keys="momentum"), True),
    ],
)
def test_twins_are_demanded_where_they_are_read(objective: UniVLC, uses: bool) -> None:
    demands = objective.demands("video_label", 4)
    assert demands is not None
    assert objective.uses_momentum is uses
    assert demands.twins == objective.twins == ({"visual", "text"} if uses else set())


def contrasted(objective: UniVLC, state: State, layer: Project | None = None, head: UniVLCHead | None = None):
    """The loss of a state as the encoders leave it, and the state behind the projections."""
    layer = Project(SIZES, [objective], MOMENTUM) if layer is None else layer
    out = layer(state)
    return objective.loss(out, Heads(head), LocalGather()), out


def head_of(objective: UniVLC) -> UniVLCHead:
    head = objective.build_head(SIZES)
    assert isinstance(head, UniVLCHead)
    return head


def test_univlc_without_twins_is_the_symmetric_cross_entropy() -> None:
    made, out = contrasted(UniVLC(), encoded([UniVLC()]))
    assert UniVLC().build_head(SIZES) is None
    logits = out["visual_embedding"] @ out["text_embedding"].t() / 0.07
    target = torch.arange(B)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
    torch.testing.assert_close(made.loss, expected)
    assert made.metrics["temperature"].item() == pytest.approx(0.07)


def test_momentum_keys_carry_no_gradient_and_online_ones_do() -> None:
    for batch_keys in ("momentum", "online"):
        objective = UniVLC(batch_keys=batch_keys)
        layer = Project(SIZES, [objective], MOMENTUM)
        perturb(layer)
        made, out = contrasted(objective, encoded([objective]), layer)
        prefix = "momentum_" if batch_keys == "momentum" else ""
        text, visual = out[f"{prefix}text_embedding"], out[f"{prefix}visual_embedding"]
        target = torch.arange(B)
        expected = (
            F.cross_entropy(out["visual_embedding"] @ text.t() / 0.07, target)
            + F.cross_entropy(out["text_embedding"] @ visual.t() / 0.07, target)
        ) / 2
        torch.testing.assert_close(made.loss, expected)
        weight = layer.visual_projection.weight
        (got,) = torch.autograd.grad(made.loss, weight, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(got, wanted)


def test_queue_takes_keys_once_per_optimizer_step() -> None:
    """Two micro-batches of one step: nothing moves before the step, both are there after it, oldest first."""
    objective = UniVLC(queue_size=8)
    layer, head = Project(SIZES, [objective], MOMENTUM), head_of(objective)
    contrasted(objective, encoded([objective], identity=(1, 2, 3)), layer, head)
    contrasted(objective, encoded([objective], "video_label", (4, 5, 6)), layer, head)
    assert not head.queue.valid.any()
    head.after_step(LocalGather())
    keys = head.queue.keys()
    assert keys.identity.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert keys.valid.tolist() == [True] * 6 + [False] * 2
    assert keys.domain.tolist()[:6] == [DATA_KINDS.index("image_text")] * 3 + [DATA_KINDS.index("video_label")] * 3
    head.after_step(LocalGather())
    assert head.queue.keys().identity.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]


def test_queue_holds_momentum_features_and_gives_positives() -> None:
    objective = UniVLC(queue_size=4)
    layer, head = Project(SIZES, [objective], MOMENTUM), head_of(objective)
    perturb(layer)
    state = encoded([objective])
    _, out = contrasted(objective, state, layer, head)
    head.after_step(LocalGather())
    torch.testing.assert_close(head.queue.visual[:B], out["momentum_visual_embedding"])
    torch.testing.assert_close(head.queue.text[:B], out["momentum_text_embedding"])
    made, _ = contrasted(objective, state, layer, head)
    assert made.metrics["positives"].item() == 2.0  # each sample's own key and its older one
    assert made.metrics["queue_valid"].item() == 0.75


def test_skipped_steps_and_evaluation_leave_no_keys() -> None:
    objective = UniVLC(queue_size=4)
    layer, head, state = Project(SIZES, [objective], MOMENTUM), head_of(objective), encoded([objective])
    contrasted(objective, state, layer, head)
    head.discard_step()
    with torch.no_grad():
        contrasted(objective, state, layer, head)
    head.eval()
    contrasted(objective, state, layer, head)
    head.after_step(LocalGather())
    assert not head.queue.valid.any()
