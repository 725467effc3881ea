"""Bytes of a process, against the rules that ZeRO is known for."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.estimate.memory import process_memory, stay_gathered
from engine.estimate.work import ModelWork
from engine.hosts.pipeline.division import divide
from engine.plan.parallel import BatchConfig, ParallelConfig
from engine.plan.plan import StagePlan

Work = Callable[..., ModelWork]


def _stage(accumulation: int = 1, **parallel: Any) -> StagePlan:
    batch = BatchConfig(micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulation)
    return StagePlan("one", 1, (), (), parallel=ParallelConfig(**parallel), batch=batch)


def test_plain_keeps_sixteen_bytes_a_parameter_and_a_flat_copy_of_gradients(even_work: Work) -> None:
    alone = process_memory(_stage(host="plain"), even_work(10), replicas=1, expert_parallel=1)
    assert alone.weights + alone.gradients + alone.moments == 16 * 10_000_000
    assert alone.twins == 4 * 5_000_000 and alone.queue == 10 * 1000 and alone.buffers == 0
    # Gradients come as activations go: the peak of both is what was followed, not their sum.
    assert alone.peak == (4 + 8) * 10_000_000 + alone.twins + alone.queue + 100_000_000
    two = process_memory(_stage(host="plain"), even_work(10), replicas=2, expert_parallel=1)
    assert two.buffers == 4 * 10_000_000
    more = process_memory(_stage(2, host="plain"), even_work(10), replicas=1, expert_parallel=1)
    assert more.peak - alone.peak == 90_000_000 + 4 * 10_000_000 - 100_000_000


@pytest.mark.parametrize(
    ("zero", "per_parameter"),
    [
        (1, 4 + 4 / 8 + 4 + 8 / 8),  # weights, the share that moves, gradients, moments
        (2, 4 + 4 / 8 + 4 / 8 + 8 / 8),
        (3, 16 / 8),
    ],
)
def test_zero_shards_over_eight(zero: int, per_parameter: float, even_work: Work) -> None:
    memory = process_memory(_stage(host="zero", zero_stage=zero), even_work(10), replicas=8, expert_parallel=1)
    assert memory.weights + memory.gradients + memory.moments == pytest.approx(per_parameter * 10_000_000)


def test_zero_1_holds_its_buffer_at_the_end_of_a_step_alone(even_work: Work) -> None:
    stage = _stage(2, host="zero", zero_stage=1)
    several, one = (process_memory(stage, even_work(10), replicas=count, expert_parallel=1) for count in (8, 1))
    # An eighth of the gradients, which is more than a bucket, and the share of the sums; alone it flattens all of them.
    assert several.buffers == 4 * (10_000_000 / 8 + 10_000_000 / 8) and one.buffers == 4 * 10_000_000
    assert several.moment == "backward" and several.peak == pytest.approx(
        several.weights + several.moments + several.twins + several.queue + several.activations + several.gradients
    )
    assert one.peak - (several.peak - several.weights - several.moments) - one.weights - one.moments == 4 * 1_000_000


def test_offloading_moves_twelve_bytes_and_gradients_to_the_host(even_work: Work) -> None:
    stage = _stage(host="zero", zero_stage=2, offload="optimizer")
    memory = process_memory(stage, even_work(10), replicas=8, expert_parallel=1)
    assert memory.host == 16 * 10_000_000 / 8
    assert memory.moments == memory.gradients == 0 and memory.weights == 4 * 10_000_000


def test_experts_are_held_in_parts(even_work: Work) -> None:
    stage = _stage(host="zero", zero_stage=1)
    memory = process_memory(stage, even_work(10, experts=800_000), replicas=8, expert_parallel=4)
    assert memory.gradients == 4 * 10 * (200_000 + 800_000 / 4)


def test_a_pipeline_stage_holds_its_layers_and_some_micro_batches(even_work: Work) -> None:
    stage = _stage(8, host="pipeline", zero_stage=0)
    work = even_work(4)
    names = list(work.layers)
    division = divide([(name, 0) for name in names], [range(2), range(2, 4)], dict.fromkeys(names, 1_000_000))
    first, last = (
        process_memory(stage, work, replicas=1, expert_parallel=1, division=division, number=number)
        for number in (0, 1)
    )
    assert first.weights == 4 * 2_000_000
    assert first.activations == 2 * 2 * 8_000_000 + 4 * 1_000_000  # what is passing on top of what is kept
    assert first.peak - last.peak == 2 * 8_000_000
    assert replace(first, peak=0.0).causes == first.causes


def test_copies_of_a_layer_have_no_moments(even_work: Work) -> None:
    work = even_work(2)
    twice = replace(work, passes=work.passes * 2)
    order = [(name, number) for number in (0, 1) for name in work.layers]
    division = divide(order, [range(2), range(2, 4)], dict.fromkeys(work.layers, 1_000_000))
    assert division.owners == {"visual_00": 0, "visual_01": 1}
    stage = _stage(4, host="pipeline", zero_stage=1)
    for number in (0, 1):
        memory = process_memory(stage, twice, replicas=4, expert_parallel=1, division=division, number=number)
        assert memory.moments == 8 * 1_000_000 / 4
        assert memory.weights == 4 * (2_000_000 + 1_000_000 / 4)  # both layers, and the share that moves of one
        assert memory.gradients == 4 * 2_000_000 and memory.twins == 4 * 2 * 500_000


def test_zero_3_holds_whole_layers_and_buckets(even_work: Work) -> None:
    memory = process_memory(_stage(host="zero", zero_stage=3), even_work(10), replicas=8, expert_parallel=1)
    # Three layers of 1.5 million; a bucket of one million, its joined copy, and the eighth that comes out.
    assert memory.buffers == 4 * (4_500_000 + 2_125_000)
    layers = list(even_work(10).layers.values())
    assert stay_gathered(layers, 7_000_000) == [False] * 7 + [True] * 3  # 0, 3 and 6 million lie in between


def test_offloaded_parameters_leave_the_device(even_work: Work) -> None:
    stage = _stage(host="zero", zero_stage=3, offload="parameters")
    memory = process_memory(stage, even_work(10), replicas=8, expert_parallel=1)
    assert memory.weights == 0 and memory.host == (16 + 4) * 10_000_000 / 8
