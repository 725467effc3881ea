"""CLIP's losses by their formulas, and against transformers' classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_clip import SMALL, make_batch, run, scattered_chain
from torch import Tensor
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from omnivl.architectures.build import build_chain
from omnivl.chain.gather import LocalGather
from omnivl.data.special_tokens import SpecialTokens
from omnivl.errors import UserError
from omnivl.objectives import ITC
from omnivl.objectives.contrast import pair_contrast, sigmoid_contrast
from omnivl.objectives.itc import Embedded, soft_target_loss
from omnivl.objectives.spread_keys import SpreadKeys

TYPES = ("softmax", "soft", "sigmoid")


def embedded(size: int = 5) -> Embedded:
    random = torch.Generator().manual_seed(0)
    visual, text = (F.normalize(torch.randn(size, 4, generator=random), dim=-1) for _ in range(2))
    return Embedded(visual.requires_grad_(), text.requires_grad_())


def keys_of(own: Embedded) -> tuple[SpreadKeys, SpreadKeys]:
    """Visual and textual keys, all of one identity: the losses of pairs do not look at it."""
    return SpreadKeys.both(own.visual, own.text, torch.zeros(len(own.text), dtype=torch.int64), LocalGather())


def softmax_loss(own: Embedded, scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    sides = pair_contrast(*keys_of(own), scale, pairs_only=True, label_smoothing=label_smoothing)
    return (sides[0].loss.mean() + sides[1].loss.mean()) / 2


def sigmoid_loss(own: Embedded, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_contrast(*keys_of(own), scale, bias)[0].mean()


def compare(got: Tensor, wanted: Tensor, inputs: list[Tensor]) -> None:
    """Both values and the gradients of all inputs."""
    torch.testing.assert_close(got, wanted)
    for one, other in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other)


def test_softmax_is_transformers_loss() -> None:
    own, scale = embedded(), torch.tensor(3.0, requires_grad=True)
    wanted = image_text_contrastive_loss(scale * own.text @ own.visual.t())
    compare(softmax_loss(own, scale), wanted, [own.visual, own.text, scale])


def test_sigmoid_is_the_formula() -> None:
    """As in SigLIP's algorithm 1 and in transformers' ``SiglipModel``, which reads texts by rows."""
    own = embedded()
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    logits = own.text @ own.visual.t() * scale + bias
    signs = 2 * torch.eye(5) - 1
    wanted = -F.logsigmoid(signs * logits).sum(-1).mean()
    compare(sigmoid_loss(own, scale, bias), wanted, [own.visual, own.text, scale, bias])


def test_sigmoid_is_transformers_loss() -> None:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(
            text_config={**tower, "vocab_size": 20, "max_position_embeddings": 6, "projection_size": 8},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
        )
    )
    model.logit_scale.data.fill_(math.log(10.0))
    model.logit_bias.data.fill_(-10.0)
    out = model(torch.randint(0, 20, (5, 6)), torch.randn(5, 3, 8, 8), return_loss=True)
    own = Embedded(out.image_embeds, out.text_embeds)
    objective = ITC(loss_type="sigmoid")
    scale = torch.tensor(1.0 / objective.temperature_options.initial)
    got = sigmoid_loss(own, scale, torch.tensor(objective.initial_bias))
    torch.testing.assert_close(got, out.loss)


def test_sigmoid_by_hand() -> None:
    # One pair at cosine 1 and another at 1, across 0: logits 2 - 1 = 1 for pairs and -1 elsewhere. Four terms of
    # log(1 + e^-1) = 0.313262, over two pictures.
    own = Embedded(torch.eye(2), torch.eye(2))
    loss = sigmoid_loss(own, torch.tensor(2.0), torch.tensor(-1.0))
    assert loss.item() == pytest.approx(2 * 0.313262, rel=1e-5)


@pytest.mark.parametrize("by", ["scale", "temperature"])
def test_soft_targets_are_the_formula(by: str) -> None:
    own, t = embedded(), torch.tensor(0.5, requires_grad=True)

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return -(targets * logits.log_softmax(-1)).sum(1).mean()

    logits = own.text @ own.visual.t() / t
    targets = (
        (own.visual @ own.visual.t() + own.text @ own.text.t()) / 2 * (t if by == "temperature" else 1 / t)
    ).softmax(-1)
    wanted = (cross_entropy(logits, targets) + cross_entropy(logits.t(), targets.t())) / 2
    got = soft_target_loss(own, 1.0 / t, t * 1.0 if by == "temperature" else 1.0 / t, LocalGather())
    compare(got, wanted, [own.visual, own.text, t])
    assert (targets.sum(0) - 1).abs().max() > 1e-3  # transposed rows do not add up to 1: the sums above matter


def test_of_several_embeddings_the_most_alike_is_contrasted_with_smoothed_labels() -> None:
    """The loss as BLIP-2's released code writes it."""
    random = torch.Generator().manual_seed(0)
    visual = F.normalize(torch.randn(5, 3, 4, generator=random), dim=-1).requires_grad_()
    text, t = embedded().text, torch.tensor(0.3, requires_grad=True)
    every = torch.matmul(visual.unsqueeze(1), text.unsqueeze(-1)).squeeze()
    to_text = every.max(-1).values / t
    every = torch.matmul(text.unsqueeze(1).unsqueeze(1), visual.permute(0, 2, 1)).squeeze()
    to_visual = every.max(-1).values / t
    labels = torch.arange(5)
    wanted = sum(F.cross_entropy(logits, labels, label_smoothing=0.1) for logits in (to_text, to_visual)) / 2
    own = Embedded(visual, text)
    compare(softmax_loss(own, 1.0 / t, label_smoothing=0.1), wanted, [visual, text, t])


@pytest.mark.parametrize("loss_type", TYPES)
def test_the_temperature_starts_and_ends_where_the_papers_say(loss_type: str) -> None:
    objective = ITC(loss_type=loss_type)
    chain = build_chain(SMALL, (objective,), SpecialTokens(0, 1, 49, 2, 3, vocab_size=50, num_reserved=4))
    sigmoid = loss_type == "sigmoid"
    start = math.log(10.0) if sigmoid else math.log(1 / 0.07)
    assert chain.contrast.logit_scale.item() == pytest.approx(start, rel=1e-6)
    assert chain.contrast.log_scale_bounds == pytest.approx(
        (-math.log(1e4), math.log(1e4)) if sigmoid else (0, 4.60517)
    )
    biases = {name: parameter.item() for name, parameter in chain.losses.named_parameters()}
    assert biases == ({"heads.itc.bias": -10.0} if sigmoid else {})


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("kind", ["image_text", "video_text"])
def test_the_chain_learns_one_batch(kind: str, loss_type: str) -> None:
    objectives = (ITC(loss_type=loss_type, temperature=0.2),)
    chain, batch = scattered_chain(SMALL, objectives), make_batch(kind)
    optimizer = torch.optim.Adam(chain.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = run(chain, objectives, batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.7 * losses[0], losses
    names = {"temperature", "visual_to_text_r1", "text_to_visual_r1", *({"bias"} if loss_type == "sigmoid" else ())}
    assert {name.split("/")[-1] for name in out.named("metric")} == names


def test_it_needs_a_text_beside_something_to_see() -> None:
    acts = {kind: ITC().demands(kind, 2) is not None for kind in ("image_text", "video_label", "image", "text")}
    assert acts == {"image_text": True, "video_label": True, "image": False, "text": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_bounds": (0.5, 0.1)}, "temperature_bounds must be two rising numbers above 0, got"),
        ({"temperature": 2.0}, "temperature must be within temperature_bounds, 0.01 to 1.0, got 2.0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        (
            {"label_smoothing": 0.1, "loss_type": "sigmoid"},
            "label_smoothing must be 0 where loss_type is 'sigmoid', got 0.1",
        ),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ITC(**options)
