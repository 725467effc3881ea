"""Optimal transport: against exact solutions, with padding, by hand."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from omnivl.objectives.optimal_transport import cosine_cost, transport_distance, transport_plan


def all_of(*shape):
    return torch.ones(shape, dtype=torch.bool)


def exact(cost):
    """The optimum of the linear programme: rows sum to 1 / M, columns to 1 / N."""
    rows, columns = cost.shape
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    sums = sums.reshape(rows + columns, rows * columns)
    masses = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    return linprog(cost.flatten().numpy(), A_eq=sums, b_eq=masses).fun


def test_two_by_two_by_hand():
    # Two words, two patches, each word beside one patch: all of each word's half goes there, at no cost.
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    # One step: kernel 1 and e^-2, columns and rows sum to 1 + e^-2 alike, so that the plan is half the softmax.
    near = 0.5 / (1 + np.exp(-2))
    plan = transport_plan(cost, all_of(1, 2), all_of(1, 2), iterations=1)
    assert plan[0].tolist() == pytest.approx(np.array([[near, 0.5 - near], [0.5 - near, near]]))
    # Each further step multiplies with the kernel again: after n steps e^-2n stands for e^-2.
    plan = transport_plan(cost, all_of(1, 2), all_of(1, 2), iterations=3)
    assert plan[0, 0, 0] == pytest.approx(0.5 / (1 + np.exp(-6)))


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 5), (6, 2), (1, 3)])
def test_many_steps_come_to_the_exact_optimum(rows, columns):
    cost = 2 * torch.rand(8, rows, columns, generator=torch.Generator().manual_seed(0))
    plan = transport_plan(cost, all_of(8, rows), all_of(8, columns), beta=0.1, iterations=2000)
    torch.testing.assert_close(plan.sum(2), torch.full((8, rows), 1 / rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plan.sum(1), torch.full((8, columns), 1 / columns), rtol=1e-3, atol=1e-4)
    wanted = torch.tensor([exact(one) for one in cost])
    torch.testing.assert_close((cost * plan).sum((1, 2)), wanted, rtol=0, atol=2e-3)
    if rows == columns:
        best = [one[linear_sum_assignment(one)].mean() for one in cost.double().numpy()]
        np.testing.assert_allclose(wanted, best, atol=1e-6)


def test_the_usual_steps_come_near_to_it():
    cost = 2 * torch.rand(16, 5, 7, generator=torch.Generator().manual_seed(1))
    found = (cost * transport_plan(cost, all_of(16, 5), all_of(16, 7))).sum((1, 2))
    wanted = torch.tensor([exact(one) for one in cost])
    even = cost.mean((1, 2))
    assert (found - wanted).abs().max() < 0.05
    assert (even - wanted).min() > 0.2


def test_padding_takes_no_part_and_an_empty_side_costs_nothing():
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(3, 5, 4, generator=draw, requires_grad=True), torch.randn(3, 6, 4, generator=draw)
    has_x, has_y = all_of(3, 5), all_of(3, 6)
    has_x[0, 3:], has_y[0, 1], has_x[2] = False, False, False
    found = transport_distance(x, y, has_x, has_y)
    alone = transport_distance(x[:1, :3], y[:1, [0, 2, 3, 4, 5]], all_of(1, 3), all_of(1, 5))
    torch.testing.assert_close(found[:1], alone)
    torch.testing.assert_close(found[1:2], transport_distance(x[1:2], y[1:2], all_of(1, 5), all_of(1, 6)))
    assert found[2] == 0
    found.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[0, 3:], torch.zeros(2, 4))
    assert torch.equal(x.grad[2], torch.zeros(5, 4))


def test_gradients_reach_the_vectors_and_not_the_plan():
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 3, 4, generator=draw, requires_grad=True), torch.randn(2, 5, 4, generator=draw)
    plan = transport_plan(cosine_cost(x, y).detach(), all_of(2, 3), all_of(2, 5))
    (wanted,) = torch.autograd.grad((cosine_cost(x, y) * plan).sum(), x)
    (found,) = torch.autograd.grad(transport_distance(x, y, all_of(2, 3), all_of(2, 5)).sum(), x)
    torch.testing.assert_close(found, wanted)
