"""Layer normalisation in mixed precision."""

import torch
import torch.nn.functional as F

from omnivl.parts.linear import LayerNorm


def test_fp32_equals_torch():
    layer, x = LayerNorm(8), torch.randn(3, 8)
    assert torch.equal(layer(x), F.layer_norm(x, (8,), eps=1e-6))


def test_bf16_gradients_are_summed_in_fp32():
    torch.manual_seed(0)
    layer = LayerNorm(16)
    x, grad = torch.randn(4000, 16).bfloat16(), torch.randn(4000, 16).bfloat16()
    out = layer(x.requires_grad_())
    out.backward(grad)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    normal = F.layer_norm(x.detach().double(), (16,), eps=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), (normal * grad).sum(0), rtol=1e-3, atol=0.02)
    torch.testing.assert_close(layer.bias.grad.double(), grad.double().sum(0), rtol=1e-4, atol=1e-3)
