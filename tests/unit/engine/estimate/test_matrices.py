"""What Muon's matrices cost a process, against hand calculations and against what a step does."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import real_chain as real
import torch

from engine.estimate.activities import MATRICES, OPTIMIZER
from engine.estimate.hardware import HardwareConfig
from engine.estimate.matrices import (
    COPIED_BYTES,
    COPIED_BYTES_SHARDED,
    MOVED_BYTES,
    Matrices,
    layer_matrices,
    muon_operations,
    worked_on,
)
from engine.estimate.memory import process_memory
from engine.estimate.operations import OperationCounter
from engine.estimate.step import estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.work import LayerSize, ModelWork
from engine.hosts.stores import WholeStore
from engine.plan.parallel import BatchConfig, ParallelConfig
from engine.plan.plan import StagePlan
from engine.step.muon import MatrixSteps, MuonConfig, Placed, move_matrices
from engine.step.optimizer import ChainOptimizer, OptimizerConfig, muon_parameters, parameter_groups
from omnivl.chain.gather import LocalGather

Work = Callable[..., ModelWork]
FLOPS = 5 * (2 * 8 * 8 * 24 + 2 * 8 * 8 * 8 + 2 * 8 * 8 * 24)
"""Of a matrix of 24 x 8 or 8 x 24: x x', its square, and that times x, five times."""


def _stage(**parallel: Any) -> StagePlan:
    batch = BatchConfig(micro_batch_size_per_gpu=1, gradient_accumulation_steps=1)
    optimizer = OptimizerConfig(kind="muon")
    return StagePlan("one", 1, (), (), parallel=ParallelConfig(**parallel), batch=batch, optimizer=optimizer)


def _with_matrices(work: ModelWork, *matrices: Matrices) -> ModelWork:
    return replace(work, layers={name: replace(size, matrices=matrices) for name, size in work.layers.items()})


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)], ids=str)
def test_an_iteration_has_three_products_with_the_smaller_side(shape: tuple[int, int]) -> None:
    work = muon_operations(MuonConfig(), {shape: 3})
    assert sum(one.flops * times for one, times in work.items()) == 3 * FLOPS
    assert {one.precision for one in work if one.flops} == {"fp32"}
    bf16 = muon_operations(MuonConfig().settled("bf16"), {shape: 1})
    assert {one.precision for one in bf16 if one.flops} == {"bf16"}
    kept = muon_operations(MuonConfig(precision="fp32").settled("bf16"), {shape: 1})
    assert {one.precision for one in kept if one.flops} == {"fp32"}


def test_large_matrices_are_multiplied_in_several_batches() -> None:
    one, five = (muon_operations(MuonConfig(), {(2048, 1024): count}) for count in (1, 5))
    flops = [sum(each.flops * times for each, times in work.items()) for work in (one, five)]
    assert flops[1] == 5 * flops[0]
    assert sum(five.values()) == 3 * sum(one.values())  # two, two and one


def test_owners_share_the_matrices() -> None:
    matrices = [Matrices(8, 8, 6), Matrices(16, 8, 8, in_bank=True)]
    assert worked_on(matrices, owning=1, expert_parallel=1) == {(8, 8): 6, (16, 8): 8}
    assert worked_on(matrices, owning=4, expert_parallel=1) == {(8, 8): 2, (16, 8): 2}
    # A process has two of the eight experts' matrices, and nobody else has them.
    assert worked_on(matrices, owning=4, expert_parallel=4) == {(8, 8): 2, (16, 8): 2}
    assert worked_on(matrices, owning=4, expert_parallel=2) == {(8, 8): 2, (16, 8): 2}


@pytest.mark.parametrize(("sharded", "replicas"), [(False, 1), (False, 2), (True, 2)])
def test_bytes_beside_the_products_are_those_of_a_step(
    sharded: bool, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exchange reads what it sends and writes what arrives."""
    if replicas > 1:
        monkeypatch.setattr(MatrixSteps, "_traded", lambda _, rows, *counts: rows.clone())
    config = MuonConfig(precision="fp32")
    weights = [torch.nn.Parameter(torch.randn(96, 64)) for _ in range(3)]
    placed = [Placed(number * 96 * 64, 0, 96 * 64) for number in range(3)]
    steps = MatrixSteps(weights, placed, {}, config, group=None, device=torch.device("cpu"))
    monkeypatch.setattr(steps, "_repeated", not sharded)
    tensors = [torch.cat([one.detach().flatten() for one in weights]).requires_grad_()] if sharded else weights
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    group = {"params": tensors, "lr": 0.1, "weight_decay": 0.1, "muon": config}
    state: dict[torch.Tensor, dict[str, torch.Tensor]] = {tensor: {} for tensor in tensors}
    move_matrices(group, state, dict.fromkeys(map(id, tensors), steps))  # makes the moments
    with OperationCounter() as counter:
        move_matrices(group, state, dict.fromkeys(map(id, tensors), steps))
    counted = sum(one.bytes * times for one, times in counter.found.items())
    products = sum(one.bytes * times for one, times in muon_operations(config, {(96, 64): 3}).items())
    copied = COPIED_BYTES_SHARDED if sharded else COPIED_BYTES
    elements = sum(tensor.numel() for tensor in tensors)
    assert (counted - products) / elements == pytest.approx(MOVED_BYTES + copied, rel=0.05)


def test_a_matrix_has_one_moment(even_work: Work) -> None:
    work = _with_matrices(even_work(10), Matrices(500, 1000, 1), Matrices(100, 500, 4, in_bank=True))
    for zero, parts in ((1, 8), (3, 8)):
        memory = process_memory(_stage(host="zero", zero_stage=zero), work, replicas=8, expert_parallel=1)
        assert memory.moments == pytest.approx((8 * 10_000_000 - 4 * 7_000_000) / parts)
    plain = process_memory(_stage(host="plain"), work, replicas=8, expert_parallel=1)
    assert plain.moments == 8 * 10_000_000 - 4 * 7_000_000


def test_replicas_exchange_runs_twice_and_multiply(machine: HardwareConfig, even_work: Work) -> None:
    work = _with_matrices(even_work(4), Matrices(8, 24, 5000))
    elements = 4 * 5000 * 8 * 24
    stage = _stage(host="zero", zero_stage=2)
    step = estimate_step(stage, work, Cluster(machine, 1, 4))
    assert step.traffic[MATRICES].within == pytest.approx(2 * 3 / 4 * 4 * elements / 4)
    slow = replace(machine, peak_tflops=replace(machine.peak_tflops, bf16=1e-3))
    as_adamw = replace(stage, optimizer=OptimizerConfig())
    times = [estimate_step(one, even_work(4), Cluster(slow, 1, 4)).exposed[OPTIMIZER] for one in (stage, as_adamw)]
    assert times[0] == times[1], "without matrices it costs what AdamW costs"
    alone, repeated, shared = (
        estimate_step(_stage(host="zero", zero_stage=zero), work, Cluster(slow, 1, replicas)).exposed[OPTIMIZER]
        for zero, replicas in ((0, 1), (0, 4), (2, 4))
    )
    assert alone > 4 * FLOPS * 5000 / 1e9 > 3 * repeated
    assert repeated == pytest.approx(shared, rel=0.05), "copies of everything beside the products"


def test_replicas_that_hold_everything_send_their_steps_to_all(machine: HardwareConfig, even_work: Work) -> None:
    work = _with_matrices(even_work(4), Matrices(8, 24, 5000))
    elements = 4 * 5000 * 8 * 24
    traffic = estimate_step(_stage(host="plain"), work, Cluster(machine, 1, 4)).traffic
    assert traffic[MATRICES].within == pytest.approx(3 / 4 * 4 * elements)
    assert MATRICES not in estimate_step(_stage(host="plain"), work, Cluster(machine, 1, 1)).traffic


@pytest.mark.parametrize("ffn", real.FILLINGS)
def test_moments_are_as_many_bytes_as_a_step_leaves(ffn: str, even_work: Work) -> None:
    chain = real.build_real_chain(LocalGather(), ffn=ffn)
    config = OptimizerConfig(kind="muon")
    groups = parameter_groups(chain, config)
    optimizer = ChainOptimizer([group.options for group in groups], config)
    WholeStore(optimizer, groups, chain, torch.device("cpu"), replicas=None)  # tells the optimizer where matrices lie
    trained = [one for group in groups for one in group.parameters]
    for one in trained:
        one.grad = torch.randn_like(one)
    optimizer.step()
    held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values() if tensor.dim())
    moved = muon_parameters(chain, config).intersection(map(id, trained))
    sizes = LayerSize(
        **{"trained": sum(one.numel() for one in trained), "frozen": 0, "twins": 0, "experts": 0},
        **{"resting_experts": 0, "active": 0, "queue": 0},
        matrices=tuple(one for layer in chain.layers for one in layer_matrices(layer, moved)),
    )
    work = replace(even_work(1), layers={"visual_00": sizes})
    assert process_memory(_stage(host="plain"), work, replicas=1, expert_parallel=1).moments == held
