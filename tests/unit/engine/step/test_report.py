"""Scalars of a step: averages, and what processes agree on with them."""

import math

import pytest
import torch

from engine.step.report import StepAverages, StepScalars
from omnivl.chain.gather import LocalGather


class TwoReplicas(LocalGather):
    """This replica and one that says twice as much."""

    replicas = 2

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        return 3.0 * tensor


def collected() -> StepScalars:
    scalars = StepScalars()
    scalars.add({"loss": torch.tensor(1.0), "loss/b": torch.tensor(4.0)})
    scalars.add({"loss": torch.tensor(3.0), "metric/b/accuracy": torch.tensor(0.5)})
    return scalars


def test_a_scalar_is_averaged_over_the_micro_batches_that_have_it() -> None:
    averages = collected().average(LocalGather())
    assert averages.by_name == {"loss": 2.0, "loss/b": 4.0, "metric/b/accuracy": 0.5}
    assert (averages.loss, averages.losses, averages.metrics) == (2.0, {"b": 4.0}, {"b/accuracy": 0.5})
    assert math.isnan(averages.gradient_norm)
    assert averages.votes == frozenset()


def test_norm_and_votes_are_read_with_them() -> None:
    votes = {"stop": False, "draw": True}
    averages = collected().average(TwoReplicas(), torch.tensor(7.0), votes)
    assert averages.by_name == {"loss": 3.0, "loss/b": 6.0, "metric/b/accuracy": 0.75}
    assert averages.gradient_norm == 7.0  # equal on every replica, not summed
    assert averages.votes == {"draw"}


@pytest.mark.parametrize("norm", [None, torch.tensor(1.0)])
def test_a_vote_is_a_vote_where_a_loss_is_not_finite(norm: torch.Tensor | None) -> None:
    scalars = StepScalars()
    scalars.add({"loss": torch.tensor(float("nan"))})
    averages = scalars.average(TwoReplicas(), norm, {"stop": True, "draw": False})
    assert math.isnan(averages.loss)
    assert averages.votes == {"stop"}


@pytest.mark.parametrize(("loss", "norm", "finite"), [(1.0, 2.0, True), (math.nan, 2.0, False), (1.0, math.inf, False)])
def test_weights_are_updated_where_all_is_finite(loss: float, norm: float, finite: bool) -> None:
    assert StepAverages({"loss": loss}, norm).are_finite == finite


def test_a_negative_norm_says_that_a_gradient_is_not_finite() -> None:
    averages = StepAverages({"loss": 1.0}, -1.0)
    assert averages.gradient_norm == math.inf
    assert not averages.are_finite
