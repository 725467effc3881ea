"""Low-rank adapters by hand, against the formula of LoRA, and against the map into which they are merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.linear import Linear, merged_weight
from moe.stacked import Stacked
from moe.working import gather_on_use, used_in


def adapted(
    inputs: int, outputs: int, matrices: int, *, rank: int = 2, alpha: float = 3.0, dropout: float = 0.0
) -> Linear:
    """A map whose adapter adds something."""
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, matrices=matrices)
    torch.nn.init.normal_(layer.bias)
    torch.nn.init.normal_(layer.adapt(rank, alpha, dropout, seed=1).up)
    return layer.requires_grad_(False)


def by_formula(layer: Linear, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``W x + b + alpha / r * B A x`` of each map of the weight by itself, one behind the other."""
    matrices, rank = layer.adapter.matrices, layer.adapter.rank
    made = []
    for number in range(matrices):
        a = down[number * rank : (number + 1) * rank]
        b, w, bias = (one.chunk(matrices)[number] for one in (up, layer.weight, layer.bias))
        made.append(F.linear(x, w, bias) + 3.0 / rank * F.linear(F.linear(x, a), b))
    return torch.cat(made, dim=-1)


def test_rank_one_by_hand() -> None:
    layer = Linear(2, 2)
    adapter = layer.adapt(1, 2.0, 0.0, seed=0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
        adapter.down.copy_(torch.tensor([[1.0, -1.0]]))
        adapter.up.copy_(torch.tensor([[2.0], [3.0]]))
    x = torch.tensor([[5.0, 1.0]], requires_grad=True)
    # W x + b = (7.5, 18.5); A x = 4, alpha / r = 2, B A x = (8, 12): (7.5 + 16, 18.5 + 24)
    out = layer(x)
    assert out.tolist() == [[23.5, 42.5]]
    # W + 2 B A = [[1 + 4, 2 - 4], [3 + 6, 4 - 6]]
    merged = merged_weight(layer.weight, adapter.down, adapter.up, adapter.scale)
    assert merged.tolist() == [[5.0, -2.0], [9.0, -2.0]]
    out.sum().backward()
    assert adapter.up.grad.tolist() == [[8.0], [8.0]], "alpha / r times A x"
    assert adapter.down.grad.tolist() == [[50.0, 10.0]], "alpha / r times (2 + 3) times x"
    assert x.grad.tolist() == [[14.0, -4.0]], "the sums of the merged columns"


@pytest.mark.parametrize("matrices", [1, 2, 3])
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradient_are_those_of_the_formula(matrices: int, gathered: bool, dtype: torch.dtype) -> None:
    layer = adapted(6, 12, matrices)
    adapter = layer.adapter.requires_grad_(True)
    if gathered:
        for parameter in layer.parameters():
            gather_on_use(parameter)
    x = torch.randn(3, 4, 6)
    own = x.to(dtype).requires_grad_()
    down, up, theirs = (one.detach().clone().requires_grad_() for one in (adapter.down, adapter.up, x))
    got, wanted = layer(own), by_formula(layer, theirs, down, up)
    assert got.dtype == dtype
    slope = torch.randn_like(wanted)
    got.backward(slope.to(dtype))
    wanted.backward(slope)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    torch.testing.assert_close(got.float(), wanted, **near)
    torch.testing.assert_close(own.grad.float(), theirs.grad, **near)
    for parameter, peer in ((adapter.down, down), (adapter.up, up)):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, peer.grad, **near)
    assert layer.weight.grad is None and layer.bias.grad is None
    if gathered and dtype == torch.bfloat16:
        assert {used_in(one) for one in layer.parameters()} == {torch.bfloat16}, "all may be gathered in two bytes"


def test_a_part_is_these_rows_of_the_whole() -> None:
    layer, x = adapted(5, 12, 3), torch.randn(2, 5)
    whole = layer(x)
    for begin, end in ((0, 1), (1, 3), (2, 3), (0, 3)):
        torch.testing.assert_close(layer.part(x, begin, end), whole[:, 4 * begin : 4 * end])
    plain = Linear(5, 12, matrices=3)
    torch.testing.assert_close(plain.part(x, 1, 3), plain(x)[:, 4:])


@pytest.mark.parametrize("matrices", [1, 3])
def test_the_merged_map_computes_the_same(matrices: int) -> None:
    layer, x = adapted(8, 12, matrices), torch.randn(7, 8)
    held = {name.rpartition(".")[2]: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    merged = Linear(8, 12)
    merged.load_state_dict({"weight": merged_weight(**held), "bias": layer.bias})
    torch.testing.assert_close(merged(x), layer(x))
    assert not torch.allclose(merged.weight, layer.weight, atol=0.1), "the adapter adds something"


def test_what_else_reads_the_input_gets_it_beside() -> None:
    layer, x = adapted(4, 4, 1), torch.randn(3, 4)
    out, beside = layer(x, beside=True)
    assert torch.equal(out, layer(x))
    assert torch.equal(beside, x)


def test_gradients_added_in_the_product_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators, where the adapter reads what the product hands on."""
    layer, x = adapted(4, 6, 3), torch.randn(3, 4)
    layer.adapter.requires_grad_(True)
    slope, other = torch.randn(3, 6), torch.randn(3, 4)
    found = []
    for within in (False, True):
        monkeypatch.setattr("moe.linear.adds_in_products", lambda x, within=within: within)
        given = x.clone().requires_grad_()
        out, beside = layer(given, beside=True)
        ((out * slope).sum() + (beside * other).sum()).backward()
        found.append([out, given.grad, layer.adapter.down.grad, layer.adapter.up.grad])
        layer.zero_grad()
    for one, same in zip(*found, strict=True):
        torch.testing.assert_close(one, same)


def test_a_new_adapter_adds_nothing_and_draws_its_own_numbers() -> None:
    layer, x = Linear(400, 300, matrices=3), torch.randn(2, 400)
    before, state = layer(x), torch.get_rng_state()
    adapter = layer.adapt(50, 16.0, 0.5, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer(x), before)
    assert (adapter.down.shape, adapter.up.shape) == ((150, 400), (300, 50))
    assert adapter.scale.item() == pytest.approx(16 / 50)
    # As a weight starts: a normal distribution cut at two deviations keeps 0.774 of its variance.
    assert abs(float(adapter.down.detach().var()) * 400 - 0.774) < 0.02
    again, other = (Linear(400, 300, matrices=3).adapt(50, 16.0, 0.5, seed=seed).down for seed in (7, 8))
    assert torch.equal(adapter.down, again)
    assert not torch.equal(adapter.down, other)


def test_dropout_is_of_the_adapters_input_in_training() -> None:
    layer, x = adapted(6, 5, 1, dropout=0.5), torch.randn(4, 6)
    torch.manual_seed(3)
    got = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    adapter = layer.adapter
    wanted = F.linear(x, layer.weight, layer.bias) + 1.5 * dropped @ adapter.down.t() @ adapter.up.t()
    torch.testing.assert_close(got, wanted)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), by_formula(layer, x, adapter.down, adapter.up))


def test_optimizers_of_whole_matrices_see_each_pair() -> None:
    adapter = Linear(4, 12, matrices=3).adapt(2, 1.0, 0.0, seed=0)
    assert {id(one): stacked for one, stacked in adapter.stacked()} == {
        id(adapter.down): Stacked(3),
        id(adapter.up): Stacked(3),
    }


def test_rows_that_are_no_matrix_have_no_adapter() -> None:
    with pytest.raises(AssertionError, match="rows that are vectors of their own"):
        Linear(4, 2, matrices=0).adapt(1, 1.0, 0.0, seed=0)


def test_without_storage() -> None:
    with torch.device("meta"):
        layer = Linear(4, 12, matrices=3)
    adapter = layer.adapt(2, 1.0, 0.0, seed=0)
    assert adapter.down.is_meta and adapter.up.is_meta and adapter.scale.is_meta
    assert layer(torch.empty(5, 4, device="meta")).shape == (5, 12)


def test_a_compiled_map_computes_the_same() -> None:
    layer, x = adapted(6, 12, 3), torch.randn(4, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
