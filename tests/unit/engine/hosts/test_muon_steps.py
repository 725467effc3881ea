"""Steps of Muon in the plain host, worked out by hand on a block of one 2 x 2 matrix.

The loss is the sum of the matrix' elements, each times that of the batch's only picture, so that the picture is the
gradient. Singular values of a diagonal momentum are its elements: one iteration divides them by the norm of all, and
makes p(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5 of each.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import synthetic_chain as synthetic
import torch
from torch import nn

from engine.hosts import create_host
from engine.hosts.plain import PlainHost
from engine.plan.parallel import ParallelConfig, Precision
from engine.step import muon
from engine.step.muon import MuonConfig
from engine.step.optimizer import OptimizerConfig
from engine.step.report import StepResult
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State
from omnivl.data.batch import Batch

CONFIG = OptimizerConfig(
    kind="muon",
    lr=1e-3,
    weight_decay=0.3,
    schedule="constant",
    gradient_clipping=0.0,
    muon=MuonConfig(lr=0.1, momentum=0.5, nesterov=False, iterations=1),
)
START = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
WEIGHT = "block.weight"


class Product(ChainLayer):
    """A block whose loss is linear in its matrix."""

    stack, level = "block", 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(START.clone())

    def forward(self, state: State) -> State:
        picture = state["frames"][0, 0, 0].float()
        loss = (self.weight * picture).sum()
        return state.merged({"loss": loss, "loss/product": loss})


def picture(*diagonal: int) -> Batch:
    """A batch whose picture is a diagonal matrix."""
    frames = torch.diag(torch.tensor(diagonal, dtype=torch.uint8)).expand(1, 1, 3, 2, 2)
    own = torch.zeros(1, dtype=torch.int64)
    return Batch("image_text", frames, torch.zeros(1, 1, dtype=torch.int64), own, own, own)


def host_of(config: OptimizerConfig, accumulation: int = 1) -> PlainHost:
    chain = Chain({"block": Product()})
    return PlainHost(chain, config, synthetic.plan_layout, total_steps=10, gradient_accumulation_steps=accumulation)


def train(host: PlainHost, *steps: Sequence[Batch]) -> list[StepResult]:
    return [host.step(batches, number) for number, batches in enumerate(steps)]


def weight_of(host: PlainHost) -> torch.Tensor:
    return host.chain.get_parameter(WEIGHT).detach()


def momentum_of(host: PlainHost) -> torch.Tensor:
    return cast("torch.Tensor", host._optimizer.state[host.chain.get_parameter(WEIGHT)]["exp_avg"])


def p(value: float) -> float:
    return 3.4445 * value - 4.775 * value**3 + 2.0315 * value**5


def moved(*diagonal: float, decayed: float = 1.0, lr: float = 0.1) -> torch.Tensor:
    """The start, decayed by a factor and then moved by a diagonal step."""
    return START * decayed - lr * torch.diag(torch.tensor(diagonal))


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_micro_batches_of_a_step_make_one_gradient() -> None:
    host = host_of(CONFIG, accumulation=2)
    (result,) = train(host, [picture(6, 0), picture(0, 8)])
    # The gradient is the mean diag(3, 4), the momentum half of it, over its norm diag(0.6, 0.8).
    assert result.gradient_norm == pytest.approx(5.0)
    assert_near(momentum_of(host), torch.diag(torch.tensor([1.5, 2.0])))
    assert p(0.6) == pytest.approx(1.193270, abs=1e-6)
    assert p(0.8) == pytest.approx(0.976482, abs=1e-6)
    assert_near(weight_of(host), moved(1.193270, 0.976482))


def test_gradients_are_clipped_before_they_join_the_momentum() -> None:
    clipped, free = (host_of(replace(CONFIG, gradient_clipping=clipping)) for clipping in (1.0, 0.0))
    pictures = [picture(3, 4)], [picture(100, 0)]
    results = train(clipped, *pictures)
    train(free, *pictures)
    assert [result.gradient_norm for result in results] == pytest.approx([5.0, 100.0])  # before clipping
    # Clipped gradients diag(0.6, 0.8) and diag(1, 0): momenta diag(0.3, 0.4) and diag(0.65, 0.2), of norm 0.680074.
    assert_near(momentum_of(clipped), torch.diag(torch.tensor([0.65, 0.2])))
    second = [p(value / 0.4625**0.5) for value in (0.65, 0.2)]
    assert_near(weight_of(clipped), moved(p(0.6) + second[0], p(0.8) + second[1]))
    # Without, the second gradient outweighs the first: diag(1.5, 2) and diag(50.75, 1).
    assert_near(momentum_of(free), torch.diag(torch.tensor([50.75, 1.0])))
    second = [p(value / (50.75**2 + 1) ** 0.5) for value in (50.75, 1.0)]
    assert_near(weight_of(free), moved(p(0.6) + second[0], p(0.8) + second[1]))


def test_the_decay_is_its_own_and_outside_of_the_momentum() -> None:
    options = replace(CONFIG.muon, weight_decay=0.5)
    host = host_of(replace(CONFIG, muon=options))
    train(host, [picture(3, 4)])
    # 1 - 0.1 * 0.5, with muon.weight_decay; optimizer.weight_decay, 0.3, is that of what AdamW moves.
    assert_near(weight_of(host), moved(p(0.6), p(0.8), decayed=0.95))
    assert_near(momentum_of(host), torch.diag(torch.tensor([1.5, 2.0])))


def test_a_scale_of_its_part_acts_on_the_step_and_on_the_decay() -> None:
    options = replace(CONFIG.muon, weight_decay=0.5)
    host = host_of(replace(CONFIG, muon=options, lr_scales={WEIGHT: 0.2}))
    (result,) = train(host, [picture(3, 4)])
    assert result.learning_rates == {"matrices_x0.2": pytest.approx(0.02)}  # of muon.lr, not of lr
    assert_near(weight_of(host), moved(p(0.6), p(0.8), decayed=0.99, lr=0.02))


def test_a_skipped_step_leaves_momentum_and_weights() -> None:
    host = host_of(CONFIG)
    train(host, [picture(3, 4)])
    held = weight_of(host).clone(), momentum_of(host).clone()
    poison = host.chain.get_parameter(WEIGHT).register_hook(lambda gradient: gradient * torch.inf)
    (result,) = train(host, [picture(100, 0)])
    poison.remove()
    assert result.skipped
    assert torch.equal(weight_of(host), held[0])
    assert torch.equal(momentum_of(host), held[1])
    train(host, [picture(1, 0)])
    assert_near(
        momentum_of(host), torch.diag(torch.tensor([1.25, 1.0]))
    )  # half of diag(1.5, 2), and half of diag(1, 0)


def test_frozen_matrices_stay_and_have_no_momentum() -> None:
    chain = synthetic.build_synthetic_chain()
    frozen = {f"text_00.{name}" for name, _ in chain.get_submodule("text_00").named_parameters()}
    chain.get_submodule("text_00").requires_grad_(False)
    before = {name: one.detach().clone() for name, one in chain.named_parameters()}
    config = replace(CONFIG, muon=replace(CONFIG.muon, weight_decay=0.5))
    host = PlainHost(chain, config, synthetic.plan_layout, total_steps=10)
    for step in range(2):
        host.step(synthetic.step_batches(step, 1, 4, LocalGather()), step)
    after = dict(chain.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not any(after[name] in host._optimizer.state for name in frozen)
    assert not torch.equal(after["generation_00.block.inner.weight"], before["generation_00.block.inner.weight"])


@pytest.mark.parametrize(
    ("products", "own", "expected"),
    [
        ("bf16", "auto", torch.bfloat16),
        ("fp32", "auto", torch.float32),
        ("bf16", "fp32", torch.float32),
        ("fp32", "bf16", torch.bfloat16),
    ],
)
def test_auto_takes_the_type_of_the_products_of_the_model(
    products: Precision, own: Any, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a host as a run gets it."""
    seen = []
    made = muon.orthogonalised

    def orthogonalised(matrices: torch.Tensor, iterations: int) -> torch.Tensor:
        seen.append(matrices.dtype)
        return made(matrices, iterations)

    monkeypatch.setattr(muon, "orthogonalised", orthogonalised)
    config = replace(CONFIG, muon=replace(CONFIG.muon, precision=own))
    parallel = ParallelConfig(host="plain", precision=products)
    host = create_host(parallel, Chain({"block": Product()}), config, (), total_steps=10, micro_batch_size=1)
    host.step([picture(3, 4)], 0)
    assert seen == [expected]
    assert host.chain.get_parameter(WEIGHT).dtype == torch.float32
