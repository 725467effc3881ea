"""Experts on a device: the default implementation equals the loop, and reads nothing back from the device."""

import pytest
import torch

from moe.config import LIMoEConfig
from moe.experts.megablocks import import_problem
from moe.experts.products import expert_feed_forward
from moe.routers import ExpertChoice, NoisyRouterLossConfig, TokenChoice
from moe.routers.losses import RouterLossConfig
from moe.sparse import SparseFeedForward
from moe.tokens import Segment, Tokens

COUNTS = [40, 0, 200, 3]
CHOICES = {
    "token_choice": LIMoEConfig(
        num_experts=4, every=1, router=TokenChoice(top_k=2, losses=NoisyRouterLossConfig(z=0.1))
    ),
    "expert_choice": LIMoEConfig(
        num_experts=4, every=1, router=ExpertChoice(experts_per_token=2.0, losses=RouterLossConfig(z=0.1))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_by_default_equal_the_loop_forward_and_gradient(device, dtype):
    check_against_loop("auto", device, dtype)


@pytest.mark.gpu
def test_the_products_of_megablocks_equal_the_loop_forward_and_gradient():
    reason = import_problem()
    if reason is not None:
        pytest.skip(f"megablocks does not import: {reason}")
    check_against_loop("megablocks", torch.device("cuda"), torch.bfloat16)


def check_against_loop(implementation, device, dtype):
    torch.manual_seed(0)
    rows = torch.randn(sum(COUNTS) + 5, 32, device=device).to(dtype).requires_grad_()
    shapes = (4, 64, 32), (4, 64), (4, 64, 32), (4, 32)
    parameters = [(0.2 * torch.randn(shape, device=device)).requires_grad_() for shape in shapes]
    counts, upstream = torch.tensor(COUNTS, device=device), torch.randn(sum(COUNTS), 32, device=device).to(dtype)

    def run(implementation):
        out = expert_feed_forward(rows, counts, *parameters, implementation=implementation)[: sum(COUNTS)]
        grad_rows, *grads = torch.autograd.grad(out, [rows, *parameters], upstream)
        return [out, grad_rows[: sum(COUNTS)], *grads]

    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.25}
    for mine, theirs in zip(run(implementation), run("loop"), strict=True):
        torch.testing.assert_close(mine, theirs, **near)


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_a_layer_with_padding_gives_finite_gradients_on_the_device(device, config):
    torch.manual_seed(0)
    layer = SparseFeedForward(config, 32, 64, ("image", "text")).to(device)
    x = torch.randn(24, 32, device=device).bfloat16().requires_grad_()
    valid = torch.arange(24, device=device) % 5 != 0
    out = layer(x, Tokens((Segment("image", 10), Segment("text", 14)), valid))
    assert out.y.device.type == device.type
    assert not out.y[~valid].any()
    (out.y.float().square().mean() + out.router_sums.sum() * 1e-3).backward()
    assert torch.isfinite(x.grad).all()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_gradients_are_the_same_bits_every_time(device, config):
    def gradients():
        torch.manual_seed(0)
        layer = SparseFeedForward(config, 32, 64, ("image",)).to(device)
        x = torch.randn(256, 32).to(device).bfloat16().requires_grad_()
        layer(x, Tokens.of("image", x)).y.float().square().sum().backward()
        return [x.grad, layer.router.gate.weight.grad]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_nothing_is_read_back_from_a_gpu(config):
    torch.manual_seed(0)
    layer = SparseFeedForward(config, 32, 64, ("image",)).to("cuda")
    x = torch.randn(64, 32, device="cuda").bfloat16().requires_grad_()
    tokens = Tokens.of("image", x)
    layer(x, tokens)  # kernels are loaded
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, tokens).y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
