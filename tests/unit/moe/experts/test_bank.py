import pickle

import pytest
import torch

from moe.dense import DenseFeedForward
from moe.experts.bank import ExpertBank
from moe.experts.levels import AllExperts, OneExpert, padded_rows, plan_levels
from moe.experts.products import Implementation, expert_feed_forward

COUNTS = [5, 0, 170, 1]  # two levels in a batch
LEFT_OVER = 3


def run(
    implementation: Implementation, dtype: torch.dtype, parameters: list[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and gradients of rows and parameters; the rows of no expert are told apart by a large value."""
    torch.manual_seed(1)
    rows = torch.randn(sum(COUNTS) + LEFT_OVER, 8).to(dtype)
    rows[sum(COUNTS) :] = 1e4
    rows.requires_grad_()
    inputs = [rows, *parameters]
    out = expert_feed_forward(rows, torch.tensor(COUNTS), *parameters, implementation=implementation)
    used = out[: sum(COUNTS)]
    grad_rows, *grads = torch.autograd.grad(used, inputs, torch.randn(used.shape).to(dtype))
    return used, [grad_rows[: sum(COUNTS)], *grads]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (4, 32, 8), (4, 32), (4, 32, 8), (4, 8)
    return [(0.3 * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("implementation", ["grouped", "batched"])
@pytest.mark.parametrize(
    ("activations", "weights"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_fast_products_equal_the_loop_forward_and_gradient(
    implementation: Implementation, activations: torch.dtype, weights: torch.dtype
) -> None:
    wanted, wanted_grads = run("loop", torch.float32, parameters())
    got, got_grads = run(implementation, activations, parameters(weights))
    assert got.dtype == activations
    near = {"rtol": 1e-5, "atol": 1e-5} if activations == torch.float32 else {"rtol": 0.03, "atol": 0.12}
    torch.testing.assert_close(got.float(), wanted, **near)
    for mine, theirs in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine.float(), theirs, **near)
    for gradient in got_grads[1:]:
        assert not gradient[1].any(), "an expert without a row has a gradient of zero"


def test_frozen_experts_pass_gradients_on() -> None:
    frozen = [parameter.detach() for parameter in parameters()]
    rows = torch.randn(sum(COUNTS), 8, requires_grad=True)
    upstream = torch.randn(sum(COUNTS), 8)
    grads = [
        torch.autograd.grad(
            expert_feed_forward(rows, torch.tensor(COUNTS), *frozen, implementation=how), rows, upstream
        )
        for how in ("batched", "loop")
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_each_expert_is_the_dense_layer_with_its_weights() -> None:
    torch.manual_seed(0)
    bank, x = ExpertBank(3, 8, 16, implementation="loop"), torch.randn(9, 8)
    out = bank(x, torch.tensor([2, 4, 3]))
    for expert, part in enumerate([slice(0, 2), slice(2, 6), slice(6, 9)]):
        dense = DenseFeedForward(8, 16)
        dense.fc1.weight.data, dense.fc1.bias.data = bank.fc1_weight[expert], bank.fc1_bias[expert]
        dense.fc2.weight.data, dense.fc2.bias.data = bank.fc2_weight[expert].t(), bank.fc2_bias[expert]
        torch.testing.assert_close(out[part], dense(x[part]).y)


@pytest.mark.parametrize("counts", [[0, 0], [1, 0], [0, 40, 0, 3], [1000, 3, 0, 17, 64, 64], [5] * 30 + [900, 200]])
def test_levels_hold_every_row_once(counts: list[int]) -> None:
    rows = torch.arange(1, sum(counts) + 4.0)[:, None]  # three rows behind the last expert's
    seen, out = torch.zeros(len(counts)), torch.zeros_like(rows)
    for number, level in enumerate(plan_levels(counts, len(rows))):
        assert isinstance(level, OneExpert) == (number > 0)
        filled, finite = level.fill(rows, zeros=True), level.fill(rows, zeros=False)
        assert filled.shape == (level.size, level.rows, 1)
        assert torch.equal(finite[filled > 0], filled[filled > 0])
        assert level.rows == padded_rows(level.rows)
        level.put(out, filled)
        for place in range(level.size):
            expert = place if isinstance(level, AllExperts) else level.expert
            own = filled[place][filled[place] > 0]
            first = sum(counts[:expert]) + 1
            assert ((own >= first) & (own < first + counts[expert])).all()
            seen[expert] += len(own)
    assert seen.tolist() == counts
    assert torch.equal(out[: sum(counts)], rows[: sum(counts)])


def test_what_stands_in_rows_of_no_expert_is_never_read() -> None:
    bank = ExpertBank(4, 8, 16, implementation="batched")
    x = torch.randn(sum(COUNTS) + 3, 8)
    x[sum(COUNTS) :] = torch.nan
    leaf = x.requires_grad_()
    out = bank(leaf, torch.tensor(COUNTS))[: sum(COUNTS)]
    out.sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in bank.parameters())


def test_a_crowded_expert_does_not_make_all_others_compute_zeros() -> None:
    levels = plan_levels([16] * 63 + [1000], 2008)
    assert [(level.size, level.rows) for level in levels] == [(64, 16), (1, 1024)]
    assert [(level.size, level.rows) for level in plan_levels([60, 64, 50, 58], 232)] == [(4, 64)]


def test_padding_to_few_numbers_of_rows() -> None:
    assert [padded_rows(rows) for rows in (1, 16, 17, 64, 65, 100, 128, 129, 160, 161, 250, 1000, 1024)] == [
        *(16, 16, 32, 64, 80, 112, 128, 144, 160, 176, 256, 1024, 1024)
    ]
    for rows in range(1, 3000):
        assert rows <= padded_rows(rows) < rows + max(16, rows / 8)
    assert len({padded_rows(rows) for rows in range(1025, 2049)}) == 8


def test_gradients_take_over_the_memory_of_those_that_are_gone() -> None:
    bank = ExpertBank(3, 8, 16, implementation="batched")

    def backward() -> torch.Tensor:
        bank(torch.ones(6, 8), torch.tensor([1, 2, 3])).sum().backward()
        assert bank.fc1_weight.grad is not None
        return bank.fc1_weight.grad

    first = backward()
    place, value = first.data_ptr(), first.clone()
    del first
    bank.zero_grad()
    assert backward().data_ptr() == place
    held = backward()  # added to the one that is there, which therefore had to be left alone
    torch.testing.assert_close(held, 2 * value)
    bank.zero_grad()
    assert backward().data_ptr() != held.data_ptr(), "somebody still reads the old one"
    torch.testing.assert_close(held, 2 * value)
    copy = pickle.loads(pickle.dumps(bank))
    assert torch.equal(copy.fc1_weight, bank.fc1_weight)
