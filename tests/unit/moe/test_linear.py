"""The casting linear map against torch's own, and its behaviour under sharding."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import DenseConfig
from moe.dense import DenseFeedForward
from moe.feed_forward import build_feed_forward
from moe.linear import Linear
from moe.slot import Slot
from moe.working import gather_on_use


class OperationNames(TorchDispatchMode):
    """Names of the operations that are no views and allocate more than memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "empty" not in str(func):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (0, 6)])
def test_bf16_input_equals_a_cast_linear(bias, gathered, shape):
    torch.manual_seed(0)
    layer = Linear(6, 5, bias)
    if gathered:
        gather_on_use(layer.weight)
    if bias:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(shape).bfloat16().requires_grad_()
    twin = x.detach().clone().requires_grad_()
    grad = torch.randn(*shape[:-1], 5).bfloat16()
    own = layer(x)
    own.backward(grad)
    weight = layer.weight.detach().clone().requires_grad_()
    offset = None if not bias else layer.bias.detach().clone().requires_grad_()
    cast = None if offset is None else offset.bfloat16()
    wanted = F.linear(twin, weight.bfloat16(), cast)
    wanted.backward(grad)
    assert own.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(own, wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad, twin.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=2e-2, atol=2e-2)
    if bias:
        torch.testing.assert_close(layer.bias.grad, offset.grad, rtol=2e-2, atol=2e-2)


def test_fp32_input_takes_torchs_own_path_exactly():
    layer = Linear(6, 5)
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_backward_reads_the_weight_that_the_parameter_holds_then():
    """ZeRO-3 frees the storage after forward and gathers it anew before backward."""
    layer = Linear(6, 5)
    gather_on_use(layer.weight)
    x = torch.randn(4, 6).bfloat16().requires_grad_()
    out = layer(x)
    whole = layer.weight.data
    layer.weight.data = torch.empty(0)  # partitioned
    layer.weight.data = whole * 2  # gathered again; doubled to see which one is read
    out.backward(torch.ones_like(out))
    wanted = torch.ones(4, 5) @ (whole.bfloat16() * 2).float()
    torch.testing.assert_close(x.grad.float(), wanted, rtol=2e-2, atol=2e-2)


def test_frozen_weight_and_input_get_no_gradient():
    layer = Linear(6, 5).requires_grad_(False)
    x = torch.randn(4, 6).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None
    trained = Linear(6, 5)
    trained(x.detach()).sum().backward()
    assert trained.weight.grad.shape == (5, 6)


def test_zero_start():
    assert not Linear(3, 2, zero=True).weight.any()


def test_dense_feed_forward_by_hand():
    layer = build_feed_forward(DenseConfig(), 1, 2, Slot(0, ("text",), ("text",)))
    assert isinstance(layer, DenseFeedForward)
    with torch.no_grad():
        layer.fc1.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        layer.fc1.bias.copy_(torch.tensor([0.0, 1.0]))
        layer.fc2.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.fc2.bias.fill_(0.5)
    # x = 1: inner (1, -1); gelu(1) = 0.8413447, gelu(-1) = -0.1586553.
    # 3 x 0.8413447 - 4 x 0.1586553 + 0.5 = 2.3894130
    out = layer(torch.tensor([[1.0]]))
    torch.testing.assert_close(out.y, torch.tensor([[2.3894130]]))
    assert out.router_sums is None


def test_weights_start_so_that_outputs_vary_as_much_as_inputs():
    torch.manual_seed(0)
    weight = Linear(400, 300).weight
    assert weight.abs().max() <= 2 * 400**-0.5
    # A normal distribution cut at two deviations keeps 0.774 of its variance.
    assert abs(float(weight.detach().var()) * 400 - 0.774) < 0.02


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("reads", ["product", "input", "both"])
def test_gradients_added_in_the_product_equal_those_that_autograd_adds(
    gathered: bool, reads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(6, 5).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    if gathered:
        gather_on_use(layer.weight)
    torch.nn.init.normal_(layer.bias)
    found = []
    for added in (True, False):
        monkeypatch.setattr("moe.linear.adds_in_products", lambda x, added=added: added)
        own = x.clone().requires_grad_()
        layer.zero_grad()
        made, beside = layer(own, beside=True)
        loss = (made**2).sum() * (reads != "input") + (beside**3).sum() * (reads != "product")
        loss.backward()
        found.append((made.detach(), own.grad, layer.weight.grad, layer.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_on_an_accelerator_no_kernel_adds_the_gradients_up() -> None:
    with torch.device("meta"):
        layer, x = Linear(6, 5), torch.empty(4, 6, requires_grad=True)
    made, beside = layer(x, beside=True)
    with OperationNames() as names:
        torch.autograd.backward([made, beside], [torch.empty_like(made), torch.empty_like(beside)])
    assert names.found == ["addmm", "mm", "sum"]


def test_on_a_cpu_the_input_is_returned_as_it_is() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    assert Linear(6, 5)(x, beside=True)[1] is x
