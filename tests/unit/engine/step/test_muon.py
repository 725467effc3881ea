"""Muon against torch's own, and the matrices that it finds in a chain."""

import itertools
import math

import pytest
import real_chain as real
import torch
from torch import nn

from engine.estimate.allocations import Allocations
from engine.step import muon
from engine.step.muon import (
    STEP_COPIES,
    MatrixSteps,
    MuonConfig,
    Placed,
    matrices_in,
    move_matrices,
    orthogonalised,
)
from engine.step.optimizer import ChainOptimizer, OptimizerConfig, parameter_groups, set_learning_rates
from engine.step.whole import whole_shape
from moe.experts.bank import ExpertBank
from moe.linear import Linear
from moe.stacked import Stacked
from omnivl.chain.chain import Chain, ChainLayer
from omnivl.chain.gather import LocalGather
from omnivl.chain.state import State

SHAPES = [(12, 12), (24, 8), (8, 24), (5, 1)]


class Block(ChainLayer):
    """A block of a stack around one module."""

    stack, level = "block", 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: State) -> State:
        return state


def steps_of(parameter: nn.Parameter, config: MuonConfig, stacked: Stacked | None = None) -> MatrixSteps:
    known = {} if stacked is None else {id(parameter): stacked}
    own = [Placed(0, 0, parameter.numel())]
    return MatrixSteps([parameter], own, known, config, group=None, device=torch.device("cpu"))


@pytest.mark.parametrize("scale", ["shape", "rms"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moves_a_matrix_as_torch_does(shape: tuple[int, int], nesterov: bool, scale: str) -> None:
    torch.manual_seed(0)
    linear = Linear(shape[1], shape[0], bias=False)
    theirs = nn.Parameter(linear.weight.detach().clone())
    options = MuonConfig(lr=0.03, nesterov=nesterov, weight_decay=0.2, precision="bf16", scale=scale)  # type: ignore[arg-type]
    config = OptimizerConfig(kind="muon", lr=1e-3, muon=options)
    chain = Chain({"block": Block(linear)})
    groups = parameter_groups(chain, config)
    assert [(group.name, group.names) for group in groups] == [("matrices", ("block.module.weight",))]
    ours = ChainOptimizer([group.options for group in groups], config)
    ours.matrix_steps[id(linear.weight)] = steps_of(linear.weight, options)
    adjust = {"shape": "original", "rms": "match_rms_adamw"}[scale]
    reference = torch.optim.Muon(
        [theirs], lr=0.03, weight_decay=0.2, momentum=0.95, nesterov=nesterov, adjust_lr_fn=adjust
    )
    for step in range(4):
        set_learning_rates(ours, groups, config.learning_rate(0, 10))
        gradient = torch.randn(shape)
        linear.weight.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
        torch.testing.assert_close(linear.weight, theirs, rtol=0, atol=2e-3 * 0.03 * max(shape), msg=f"step {step}")
    assert ours.moment_names(linear.weight) == ("exp_avg",)
    assert set(ours.state[linear.weight]) == {"step", "exp_avg"}


def test_fp32_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in [(3, 16, 16), (2, 40, 10), (10, 40)]:
        made = orthogonalised(torch.randn(shape), 5)
        assert made.shape == torch.Size(shape)
        values = torch.linalg.svdvals(made)
        assert values.max() < 1.25
        assert values.flatten().sort().values[len(values.flatten()) // 20] > 0.5


def test_a_matrix_without_gradient_stays() -> None:
    assert torch.equal(orthogonalised(torch.zeros(4, 6), 5), torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("sharded", "replicas", "copies"), [(True, True, STEP_COPIES), (False, True, STEP_COPIES), (False, False, 3)]
)
def test_copies_of_a_step(sharded: bool, replicas: bool, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted with matrices of which one is multiplied at a time; an exchange copies what it sends."""
    monkeypatch.setattr(muon, "_TOGETHER_ON_CPU", 1)
    if replicas:
        monkeypatch.setattr(MatrixSteps, "_traded", lambda _, rows, *counts: rows.clone())
    weights = [nn.Parameter(torch.randn(16, 16)) for _ in range(200)]
    config = MuonConfig(precision="fp32")
    placed = [Placed(number * 256, 0, 256) for number in range(200)]
    steps = MatrixSteps(weights, placed, {}, config, group=None, device=torch.device("cpu"))
    monkeypatch.setattr(steps, "_repeated", not sharded)
    tensors = [torch.cat([one.detach().flatten() for one in weights]).requires_grad_()] if sharded else weights
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    group = {"params": tensors, "lr": 0.1, "weight_decay": 0.1, "muon": config}
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {tensor: {} for tensor in tensors}
    move_matrices(group, state, dict.fromkeys(map(id, tensors), steps))  # makes the moments
    with Allocations() as tracker:
        move_matrices(group, state, dict.fromkeys(map(id, tensors), steps))
    assert tracker.most / sum(tensor.nbytes for tensor in tensors) == pytest.approx(copies, rel=0.05)


def test_stacked_maps_and_experts_are_orthogonal_each_for_itself() -> None:
    torch.manual_seed(0)
    config = MuonConfig()
    qkv = nn.Parameter(torch.randn(36, 12))
    together = steps_of(qkv, config, Stacked(3)).step(qkv.detach().flatten()).view(3, 12, 12)
    for one, part in zip(together, qkv.detach().view(3, 12, 12), strict=True):
        torch.testing.assert_close(one, orthogonalised(part, 5), rtol=1e-4, atol=1e-5)
    bank = nn.Parameter(torch.randn(4, 18, 6))
    for transposed, factor in ((False, math.sqrt(3)), (True, 1.0)):
        steps = steps_of(bank, config, Stacked(transposed=transposed)).step(bank.detach().flatten()).view(4, 18, 6)
        for one, expert in zip(steps, bank.detach(), strict=True):
            torch.testing.assert_close(one, factor * orthogonalised(expert, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unified", [False, True], ids=["towers", "unified"])
@pytest.mark.parametrize("ffn", real.FILLINGS)
def test_moves_the_matrices_of_blocks_and_nothing_else(ffn: str, unified: bool) -> None:
    chain = real.build_real_chain(LocalGather(), ffn=ffn, unified=unified)
    groups = parameter_groups(chain, OptimizerConfig(kind="muon", layer_decay=0.9))
    moved = {name for group in groups if group.muon is not None for name in group.names}
    parameters = {name: one for name, one in chain.named_parameters() if one.requires_grad}
    assert sorted(itertools.chain(*(group.names for group in groups))) == sorted(parameters)
    assert all(len(whole_shape(parameters[name])) > 1 for name in moved)
    assert not any(word in name for name in moved for word in ("embed", "router", "gate", "bias", "norm", "losses"))
    blocks = [name for layer in chain.layers if (layer.level or 0) >= 0 and layer.level is not None for name in [layer]]
    assert blocks
    kept = set(parameters) - moved
    assert all("weight" not in name or parameters[name].dim() < 2 or _outside(name) for name in kept), kept


def _outside(name: str) -> bool:
    """Whether a matrix belongs to no block, or is a router's."""
    layer = name.split(".")[0]
    return not layer.rpartition("_")[2].isdigit() or ".router." in name or ".gate." in name or ".embed." in name


def test_the_scale_of_the_groups_follows_the_rates() -> None:
    config = OptimizerConfig(kind="muon", lr=1e-3, layer_decay=0.5, schedule="constant", muon=MuonConfig(lr=0.02))
    linear = Linear(4, 4)
    chain = Chain({"block": Block(linear)})
    groups = parameter_groups(chain, config)
    optimizer = ChainOptimizer([group.options for group in groups], config)
    rates = set_learning_rates(optimizer, groups, config.learning_rate(3, 10))
    assert rates == {"matrices_x0.5": pytest.approx(0.01), "no_decay_x0.5": pytest.approx(5e-4)}


def test_modules_say_how_matrices_lie() -> None:
    bank, fused, gate = ExpertBank(2, 4, 8), Linear(4, 12, matrices=3), Linear(4, 2, matrices=0)
    known = matrices_in(nn.ModuleList([bank, fused, gate]))
    assert known[id(bank.fc2_weight)] == Stacked(transposed=True)
    assert id(bank.fc1_weight) not in known
    assert known[id(fused.weight)].count == 3
    assert known[id(gate.weight)].count == 0
