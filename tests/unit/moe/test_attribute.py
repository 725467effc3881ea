import pytest
import torch
from torch import nn

from moe.attribute import AttributeFeedForward
from moe.config import AttributeConfig
from moe.tokens import Segment, Tokens

IMAGE, TEXT, MASKED = (1, 0, 1), (0, 1, 1), (0, 1, 0)
MIXED = Tokens(
    (
        Segment("image", 4, attributes=IMAGE),
        Segment("text", 5, attributes=TEXT),
        Segment("image", 2, attributes=IMAGE),
    )
)


def layer(top_k: int = 2, noise: float = 0.0) -> AttributeFeedForward:
    torch.manual_seed(0)
    config = AttributeConfig(num_experts=4, top_k=top_k, noise=noise, num_attributes=3, attribute_size=6)
    return AttributeFeedForward(config, 8, 16)


def one_by_one(slot: AttributeFeedForward, x: torch.Tensor, attributes: tuple[int, ...]) -> torch.Tensor:
    """The weighted sum of the chosen experts' outputs."""
    expert, gate = slot.choose([attributes])
    bank, total = slot.experts, torch.zeros_like(x)
    for number, weight in zip(expert[0].tolist(), gate[0], strict=True):
        inner = nn.functional.gelu(x @ bank.fc1_weight[number].t() + bank.fc1_bias[number])
        total = total + weight * (inner @ bank.fc2_weight[number] + bank.fc2_bias[number])
    return total


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_merged_experts_give_the_weighted_sum_of_their_outputs_forward_and_gradient(top_k: int) -> None:
    slot, x = layer(top_k), torch.randn(11, 8, requires_grad=True)
    y = slot(x, MIXED).y
    parts = [one_by_one(slot, x[:4], IMAGE), one_by_one(slot, x[4:9], TEXT), one_by_one(slot, x[9:], IMAGE)]
    torch.testing.assert_close(y, torch.cat(parts))
    upstream = torch.randn_like(y)
    inputs = [x, *slot.parameters()]
    options = {"retain_graph": True, "allow_unused": True}
    ours = torch.autograd.grad(y, inputs, upstream, **options)
    theirs = torch.autograd.grad(torch.cat(parts), inputs, upstream, **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_the_gate_is_worked_out_from_the_attributes() -> None:
    slot = layer()
    hidden = slot.embed.weight @ torch.tensor([1.0, 0.0, 1.0]) + slot.embed.bias
    normal = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-5).sqrt()
    probs = (slot.gate.weight @ normal).softmax(-1)
    best = probs.argsort(descending=True)[:2]
    expert, gate = slot.choose([IMAGE])
    assert expert[0].tolist() == best.tolist()
    torch.testing.assert_close(gate[0], probs[best] / probs[best].sum())


def test_what_a_token_holds_makes_no_difference_and_noise_is_for_training() -> None:
    slot = layer(noise=4.0)
    slot.eval()
    assert torch.equal(slot.choose([IMAGE, TEXT, MASKED])[0], slot.choose([IMAGE, TEXT, MASKED])[0])
    slot.train()
    seen = {tuple(slot.choose([IMAGE])[0][0].tolist()) for _ in range(40)}
    assert len(seen) > 1


def test_bf16_tokens_stay_bf16() -> None:
    slot, x = layer(), torch.randn(11, 8)
    low = slot(x.bfloat16(), MIXED).y
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), slot(x, MIXED).y, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (0, 0)}, "ffn.blocks: got \\[0, 0\\], allowed is each block once"),
        ({"top_k": 9}, "ffn.top_k: got 9, allowed is 1 to num_experts 8"),
    ],
)
def test_contradictions_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeConfig(**options)
