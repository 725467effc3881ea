import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State, StepLayout
from omnivl.data.batch import DATA_KINDS, DataKind
from omnivl.errors import ModelError
from omnivl.objectives import LM, MFM, MLM, MRM, VLM, Objective, UniVLC
from omnivl.parts.config import ModelConfig, MomentumConfig
from omnivl.parts.contrast import Contrast, bounded, embed

B, S, L, D = 3, 5, 4, 6
CONFIG = ModelConfig(hidden_size=D, num_heads=1, projection_size=4, momentum=MomentumConfig(decay=0.75))


def state_for(
    objectives: list[Objective], kind: DataKind = "image_text", identity: tuple[int, ...] = (1, 2, 3)
) -> State:
    """What the encoders would hand over: random streams of the sizes that the layout asks for."""
    layout = plan_layout(objectives, kind, B, 1)
    random = torch.Generator().manual_seed(0)
    tensors = {"identity": torch.tensor(identity), "vlm/uniforms": torch.rand(B, 2, generator=random)}
    for name, segments, length in (("visual", layout.visual, S), ("text", layout.text, L)):
        rows = max((segment.stop for segment in segments.values()), default=0)
        if rows:
            tensors[name] = torch.randn(rows, length, D, generator=random)
    if layout.text:
        tensors["text_mask"] = torch.rand(len(tensors["text"]), L, generator=random) < 0.8
    if layout.momentum:
        tensors["momentum_visual"] = torch.randn(B, S, D, generator=random)
        tensors["momentum_text"] = torch.randn(B, L, D, generator=random)
    return State(tensors, layout)


def perturb(layer: Contrast) -> None:
    """Moves the online projections away from their twins, as a step would."""
    with torch.no_grad():
        for projection in (layer.visual_projection, layer.text_projection):
            projection.weight.add_(torch.randn_like(projection.weight))


def test_embedding_is_the_normalised_projection_of_the_first_position() -> None:
    # (3, 4) projected by the identity has length 5.
    projection = torch.nn.Linear(2, 2, bias=False)
    projection.weight.data = torch.eye(2)
    stream = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]], dtype=torch.bfloat16)
    torch.testing.assert_close(embed(projection, stream), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("present", ["visual", "text"])
def test_encoding_takes_the_streams_that_there_are(present: str) -> None:
    layer = Contrast(CONFIG, [])
    stream = torch.randn(B, S, D)
    rows = {present: {"clean": slice(0, B)}}
    state = State({present: stream}, StepLayout("image_text", B, 1, "encode", **rows))
    out = layer(state)
    projection = layer.visual_projection if present == "visual" else layer.text_projection
    assert set(out) == {present, f"{present}_embedding"}
    torch.testing.assert_close(out[f"{present}_embedding"], F.normalize(projection(stream[:, 0]), dim=-1))


def test_univlc_without_twins_is_the_symmetric_cross_entropy() -> None:
    objectives: list[Objective] = [UniVLC()]
    layer, state = Contrast(CONFIG, objectives), state_for([UniVLC()])
    out = layer(state)
    assert layer.momentum_visual_projection is None
    assert layer.queue is None
    logits = out["visual_embedding"] @ out["text_embedding"].t() / 0.07
    target = torch.arange(B)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2
    torch.testing.assert_close(out["univlc/loss"], expected)
    assert out["metric/univlc/temperature"].item() == pytest.approx(0.07)
    assert not {"visual", "text", "text_mask"} & set(out)


def test_momentum_keys_carry_no_gradient_and_online_ones_do() -> None:
    for batch_keys in ("momentum", "online"):
        objective = UniVLC(batch_keys=batch_keys)
        layer = Contrast(CONFIG, [objective])
        perturb(layer)
        state = state_for([objective])
        out = layer(state)
        keys = layer._momentum_pairs(state) if batch_keys == "momentum" else None
        text = out["text_embedding"] if keys is None else keys.text
        visual = out["visual_embedding"] if keys is None else keys.visual
        target = torch.arange(B)
        expected = (
            F.cross_entropy(out["visual_embedding"] @ text.t() / 0.07, target)
            + F.cross_entropy(out["text_embedding"] @ visual.t() / 0.07, target)
        ) / 2
        torch.testing.assert_close(out["univlc/loss"], expected)
        weight = layer.visual_projection.weight
        (got,) = torch.autograd.grad(out["univlc/loss"], weight, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(got, wanted)
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad is not name.startswith("momentum_")


def test_queue_takes_keys_once_per_optimizer_step() -> None:
    """Two micro-batches of one step: nothing moves before the step, both are there after it, oldest first."""
    objective = UniVLC(queue_size=8)
    layer = Contrast(CONFIG, [objective])
    assert layer.queue is not None
    first, second = state_for([objective], identity=(1, 2, 3)), state_for([objective], "video_label", (4, 5, 6))
    layer(first)
    layer(second)
    assert not layer.queue.valid.any()
    layer.after_step()
    keys = layer.queue.keys()
    assert keys.identity.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert keys.valid.tolist() == [True] * 6 + [False] * 2
    assert keys.domain.tolist()[:6] == [DATA_KINDS.index("image_text")] * 3 + [DATA_KINDS.index("video_label")] * 3
    twin = layer.momentum_visual_projection
    assert twin is not None
    layer.after_step()
    assert layer.queue.keys().identity.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]


def test_queue_holds_momentum_features_and_gives_positives() -> None:
    objective = UniVLC(queue_size=4)
    layer = Contrast(CONFIG, [objective])
    perturb(layer)
    state = state_for([objective])
    momentum = layer._momentum_pairs(state)
    layer(state)
    layer.after_step()
    assert layer.queue is not None
    torch.testing.assert_close(layer.queue.visual[:B], momentum.visual)
    torch.testing.assert_close(layer.queue.text[:B], momentum.text)
    out = layer(state)
    assert out["metric/univlc/positives"].item() == 2.0  # each sample's own key and its older one
    assert out["metric/univlc/queue_valid"].item() == 0.75


def test_skipped_steps_and_evaluation_leave_no_keys() -> None:
    objective = UniVLC(queue_size=4)
    layer, state = Contrast(CONFIG, [objective]), state_for([objective])
    assert layer.queue is not None
    layer(state)
    layer.discard_step()
    with torch.no_grad():
        layer(state)
    layer.eval()
    layer(state)
    layer.after_step()
    assert not layer.queue.valid.any()


def test_twins_move_once_per_optimizer_step_by_hand() -> None:
    # Decay 0.75, twin 0, online 1: 0.25 after one step, 0.4375 after two, however many micro-batches there were.
    objective = UniVLC(queue_size=4)
    layer, state = Contrast(CONFIG, [objective]), state_for([objective])
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
    layer = Contrast(CONFIG, [UniVLC(queue_size=4)])
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
    layer = Contrast(CONFIG, [UniVLC()])
    layer.logit_scale.data.fill_(100.0)
    assert (1.0 / layer.scale()).item() == pytest.approx(0.001)
    layer.logit_scale.data.fill_(-100.0)
    assert (1.0 / layer.scale()).item() == pytest.approx(0.5)
    layer.logit_scale.data.fill_(-math.log(0.07))
    assert (1.0 / layer.scale()).item() == pytest.approx(0.07)
    layer(state_for([UniVLC()]))["univlc/loss"].backward()
    assert layer.logit_scale.grad is not None
    assert layer.logit_scale.grad.abs().item() > 0
    assert not Contrast(CONFIG, [UniVLC(learn_temperature=False)]).logit_scale.requires_grad


def test_alignment_rows_of_mlm_and_vlm() -> None:
    objectives: list[Objective] = [VLM(), MLM()]
    layer, state = Contrast(CONFIG, objectives), state_for(objectives)
    out = layer(state)
    assert list(state.layout.alignment) == ["vlm_positive", "vlm_negative_visual", "vlm_negative_text", "mlm"]
    text, masked = state["text"][:B], state["text"][B:]
    rows = {name: out["alignment"][segment] for name, segment in state.layout.alignment.items()}
    memory = {name: out["alignment_memory"][segment].tolist() for name, segment in state.layout.alignment.items()}
    own = [0, 1, 2]
    assert torch.equal(rows["vlm_positive"], text)
    assert torch.equal(rows["vlm_negative_visual"], text)
    assert torch.equal(rows["mlm"], masked)
    assert memory["vlm_positive"] == memory["vlm_negative_text"] == memory["mlm"] == own
    assert all(negative != i for i, negative in enumerate(memory["vlm_negative_visual"]))
    chosen = [next(j for j in own if torch.equal(row, text[j])) for row in rows["vlm_negative_text"]]
    assert all(negative != i for i, negative in enumerate(chosen))
    masks = out["alignment_mask"][state.layout.alignment["vlm_negative_text"]]
    assert torch.equal(masks, state["text_mask"][:B][chosen])
    assert torch.equal(out["alignment_mask"][state.layout.alignment["mlm"]], state["text_mask"][B:])
    assert out["vlm/has_negative"].all()
    assert out["memory"].data_ptr() == state["visual"].data_ptr(), "no visual feature is copied"


def test_equal_identity_is_never_a_negative() -> None:
    # Samples 0 and 1 are the same concept: their only negative is 2; 2 may draw either.
    layer, state = Contrast(CONFIG, [VLM()]), state_for([VLM()], identity=(7, 7, 8))
    out = layer(state)
    negatives = out["alignment_memory"][state.layout.alignment["vlm_negative_visual"]].tolist()
    assert negatives[:2] == [2, 2]
    assert negatives[2] in (0, 1)
    assert out["vlm/has_negative"].tolist() == [True] * 3
    one_class = layer(state_for([VLM()], identity=(7, 7, 7)))
    assert one_class["vlm/has_negative"].tolist() == [False] * 3


def test_negatives_follow_the_similarities() -> None:
    """At the lowest temperature the most similar other sample is drawn, in both directions."""
    layer, state = Contrast(CONFIG, [VLM(epsilon=0.0)]), state_for([VLM(epsilon=0.0)])
    layer.logit_scale.data.fill_(100.0)
    out = layer(state)
    similarity = out["text_embedding"] @ out["visual_embedding"].t() - 10.0 * torch.eye(B)
    negatives = out["alignment_memory"][state.layout.alignment["vlm_negative_visual"]]
    assert negatives.tolist() == similarity.argmax(1).tolist()
    texts = out["alignment"][state.layout.alignment["vlm_negative_text"]]
    assert torch.equal(texts, state["text"][:B][similarity.argmax(0)])


def test_masked_passes_become_features_of_their_objective() -> None:
    objectives: list[Objective] = [MRM(targets="momentum"), LM()]
    layer, state = Contrast(CONFIG, objectives), state_for(objectives)
    out = layer(state)
    assert torch.equal(out["mrm/features"], state["visual"][state.layout.visual["mrm"]])
    assert torch.equal(out["memory"], state["visual"][:B])
    assert "momentum_visual" in out
    assert "momentum_text" not in out
    assert "alignment" not in out


def test_a_stage_without_clean_streams_passes() -> None:
    objective = MFM()
    layer = Contrast(CONFIG, [objective])
    layout = plan_layout([objective], "video_text", B, 4)
    state = State({"visual": torch.randn(B, S, D), "identity": torch.arange(B)}, layout)
    assert set(layer(state)) == {"identity", "mfm/features"}


@pytest.mark.parametrize("rows", [None, [2, 0]])
def test_matching_pairs_texts_with_the_named_rows(rows: list[int] | None) -> None:
    text = torch.randn(2, L, D)
    mask = torch.ones(2, L, dtype=torch.bool)
    tensors: dict[str, Tensor] = {"visual": torch.randn(B, S, D), "text": text, "text_mask": mask}
    if rows is not None:
        tensors["match/rows"] = torch.tensor(rows)
    streams = {"visual": {"clean": slice(0, B)}, "text": {"clean": slice(0, 2)}}
    out = Contrast(CONFIG, [])(State(tensors, StepLayout("image_text", 2, 1, "match", **streams)))
    assert out["alignment_memory"].tolist() == ([0, 1] if rows is None else rows)
    assert torch.equal(out["alignment"], text)
    assert torch.equal(out["memory"], tensors["visual"])


def test_a_model_without_twins_refuses_what_needs_them() -> None:
    config = ModelConfig(hidden_size=D, num_heads=1, momentum=None)
    with pytest.raises(ModelError) as caught:
        Contrast(config, [UniVLC(queue_size=4), MLM(), MRM(targets="momentum")])
    assert str(caught.value) == (
        "objectives univlc, mrm: need momentum twins, but model.momentum is off; set model.momentum, or "
        "univlc: queue_size 0, batch_keys online, soft_target_alpha 0, and targets: pixels for masked objectives"
    )
    Contrast(config, [UniVLC(), MRM()])
