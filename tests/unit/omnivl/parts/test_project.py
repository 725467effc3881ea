import math

import pytest
import torch
import torch.nn.functional as F
from encoded import MOMENTUM, SIZES, B, D, S, encoded, perturb

from omnivl.chain.gather import LocalGather
from omnivl.chain.objective import Heads
from omnivl.chain.state import State, StepLayout
from omnivl.errors import ModelError
from omnivl.objectives import MLM, MRM, VLM, UniVLC
from omnivl.parts.project import Project, bounded, embed, first, last_token

LAYOUT = StepLayout("image_text", B, 1, "encode", text={"clean": slice(0, B)})


def test_embedding_is_the_normalised_projection_of_the_first_position() -> None:
    # (3, 4) projected by the identity has length 5.
    projection = torch.nn.Linear(2, 2, bias=False)
    projection.weight.data = torch.eye(2)
    stream = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]], dtype=torch.bfloat16)
    torch.testing.assert_close(embed(projection, first(stream, State({}, LAYOUT))), torch.tensor([[0.6, 0.8]]))


def test_several_positions_give_the_mean_of_their_embeddings() -> None:
    # (3, 4) and (0, 2) become (0.6, 0.8) and (0, 1): their mean (0.3, 0.9) has length sqrt(0.9).
    projection = torch.nn.Linear(2, 2, bias=False)
    projection.weight.data = torch.eye(2)
    made = embed(projection, torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]))
    torch.testing.assert_close(made, torch.tensor([[0.3, 0.9]]) / math.sqrt(0.9))


def test_several_embeddings_are_kept_where_a_stream_asks_for_them() -> None:
    layer = Project(SIZES, [], pools={"visual": lambda stream, state: stream[:, 1:3]}, several=("visual",))
    stream = torch.randn(B, S, D)
    rows = StepLayout("image_text", B, 1, "encode", visual={"clean": slice(0, B)})
    found = layer(State({"visual": stream}, rows))["visual_embedding"]
    wanted = [F.normalize(layer.visual_projection(stream[:, place]), dim=-1) for place in (1, 2)]
    torch.testing.assert_close(found, torch.stack(wanted, dim=1))


def test_a_text_is_pooled_where_it_ends_in_a_layer_without_bias() -> None:
    layer = Project(SIZES, [], MOMENTUM, bias=False, pools={"text": last_token})
    stream = torch.randn(B, 4, D)
    # A text of two tokens, a full one, and one with a gap.
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)
    out = layer(State({"text": stream, "text_mask": mask}, LAYOUT))
    ends = torch.stack([stream[0, 1], stream[1, 3], stream[2, 2]])
    assert layer.text_projection.bias is None
    torch.testing.assert_close(out["text_embedding"], F.normalize(layer.text_projection(ends), dim=-1))


@pytest.mark.parametrize("present", ["visual", "text"])
def test_encoding_takes_the_streams_that_there_are(present: str) -> None:
    layer = Project(SIZES, [], MOMENTUM)
    stream = torch.randn(B, S, D)
    rows = {present: {"clean": slice(0, B)}}
    state = State({present: stream}, StepLayout("image_text", B, 1, "encode", **rows))
    out = layer(state)
    projection = layer.visual_projection if present == "visual" else layer.text_projection
    assert set(out) == {present, f"{present}_embedding"}
    torch.testing.assert_close(out[f"{present}_embedding"], F.normalize(projection(stream[:, 0]), dim=-1))


def test_momentum_embeddings_are_the_twins() -> None:
    objective = UniVLC(batch_keys="momentum")
    layer, state = Project(SIZES, [objective], MOMENTUM), encoded([objective])
    perturb(layer)
    out = layer(state)
    for stream, twin in (("visual", layer.momentum_visual_projection), ("text", layer.momentum_text_projection)):
        assert twin is not None
        torch.testing.assert_close(out[f"momentum_{stream}_embedding"], embed(twin, state[f"momentum_{stream}"][:, 0]))
        assert not out[f"momentum_{stream}_embedding"].requires_grad
    assert Project(SIZES, [UniVLC()], MOMENTUM).momentum_visual_projection is None
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad is not name.startswith("momentum_")


def test_only_what_a_loss_reads_is_trained() -> None:
    """Hard negatives are drawn from the embeddings without a gradient: VLM alone trains nothing here."""
    layer = Project(SIZES, [VLM()], MOMENTUM)
    assert {id(one) for one in layer.idle_parameters([encoded([VLM()]).layout])} == {id(p) for p in layer.parameters()}
    layer = Project(SIZES, [VLM(), UniVLC()], MOMENTUM)
    assert not list(layer.idle_parameters([encoded([VLM(), UniVLC()]).layout]))


def test_twins_move_once_per_optimizer_step_by_hand() -> None:
    # Decay 0.75, twin 0, online 1: 0.25 after one step, 0.4375 after two, however many micro-batches there were.
    objective = UniVLC(queue_size=4)
    layer, state = Project(SIZES, [objective], MOMENTUM), encoded([objective])
    twin = layer.momentum_visual_projection
    assert twin is not None
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(0.0)
        for parameter in layer.visual_projection.parameters():
            parameter.fill_(1.0)
    for expected in (0.25, 0.4375):
        for _ in range(3):
            layer(state)
        layer.after_step()
        assert all((parameter == expected).all() for parameter in twin.parameters())


def test_twins_move_in_the_storage_that_the_host_names() -> None:
    """A host that shards parameters keeps its part elsewhere; only that part moves."""
    layer = Project(SIZES, [UniVLC(queue_size=4)], MOMENTUM)
    perturb(layer)
    twin = layer.momentum_visual_projection
    assert twin is not None
    shards = {id(parameter): parameter.detach().flatten()[:3].clone() for parameter in layer.parameters()}
    before = [parameter.clone() for parameter in twin.parameters()]
    old = [shards[id(parameter)].clone() for parameter in twin.parameters()]
    layer.local_storage = lambda parameter: shards[id(parameter)]
    layer.after_step()
    for parameter, whole, shard, online in zip(
        twin.parameters(), before, old, layer.visual_projection.parameters(), strict=True
    ):
        assert torch.equal(parameter, whole)
        torch.testing.assert_close(shards[id(parameter)], 0.75 * shard + 0.25 * shards[id(online)])


def test_temperature_leads_back_from_its_bounds() -> None:
    # x = 2 above the bound 1: a positive gradient (descent lowers x) passes, a negative one does not. Likewise below.
    for value, clamped, gradient, passed in (
        (2.0, 1.0, 3.0, 3.0),
        (2.0, 1.0, -3.0, 0.0),
        (-2.0, 0.0, -3.0, -3.0),
        (-2.0, 0.0, 3.0, 0.0),
        (0.5, 0.5, 3.0, 3.0),
        (0.5, 0.5, -3.0, -3.0),
    ):
        x = torch.tensor([value], requires_grad=True)
        out = bounded(x, 0.0, 1.0)
        out.backward(torch.tensor([gradient]))
        assert out.item() == clamped
        assert x.grad is not None
        assert x.grad.item() == passed


def test_temperature_is_clamped_and_learnt() -> None:
    layer = Project(SIZES, [UniVLC()], MOMENTUM)
    layer.logit_scale.data.fill_(100.0)
    assert (1.0 / layer.scale()).item() == pytest.approx(0.001)
    layer.logit_scale.data.fill_(-100.0)
    assert (1.0 / layer.scale()).item() == pytest.approx(0.5)
    layer.logit_scale.data.fill_(-math.log(0.07))
    assert (1.0 / layer.scale()).item() == pytest.approx(0.07)
    state = layer(encoded([UniVLC()]))
    UniVLC().loss(state, Heads(), LocalGather()).loss.backward()
    assert layer.logit_scale.grad is not None
    assert layer.logit_scale.grad.abs().item() > 0
    assert not Project(SIZES, [UniVLC(learn_temperature=False)], MOMENTUM).logit_scale.requires_grad


def test_a_model_without_twins_refuses_what_needs_them() -> None:
    with pytest.raises(ModelError) as caught:
        Project(SIZES, [UniVLC(queue_size=4), MLM(), MRM(targets="momentum")])
    assert str(caught.value) == (
        "objectives univlc, mrm: need momentum twins, but model.momentum is off; set model.momentum, or "
        "univlc: queue_size 0, batch_keys online, soft_target_alpha 0, and targets: pixels for masked objectives"
    )
    Project(SIZES, [UniVLC(), MRM()])
