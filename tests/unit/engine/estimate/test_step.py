"""A step's time and traffic, against hand calculations on a machine of round figures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from engine.estimate.activities import (
    COLLECTIVE_MULTIPROCESSORS,
    COMPUTE,
    EXPERTS,
    GATHER,
    JOIN,
    OPTIMIZER,
    REDUCE,
    TIED,
    Copies,
)
from engine.estimate.hardware import HardwareConfig
from engine.estimate.step import estimate_step
from engine.estimate.traffic import Cluster
from engine.estimate.work import ModelWork
from engine.hosts.pipeline.division import divide
from engine.plan.parallel import BatchConfig, ParallelConfig
from engine.plan.plan import StagePlan

Work = Callable[..., ModelWork]


def _stage(accumulation: int = 1, **parallel: Any) -> StagePlan:
    batch = BatchConfig(micro_batch_size_per_gpu=1, gradient_accumulation_steps=accumulation)
    return StagePlan("one", 1, (), (), parallel=ParallelConfig(**parallel), batch=batch)


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (2, 4), (4, 8), (4, 2)])
def test_the_bubble_of_equal_stages(stages: int, micro_batches: int, machine: HardwareConfig, even_work: Work) -> None:
    work = even_work(stages)
    stage = _stage(micro_batches, host="pipeline", zero_stage=0, pipeline_stages=stages)
    names = list(work.layers)
    division = divide(
        [(name, 0) for name in names], [range(place, place + 1) for place in range(stages)], dict.fromkeys(names, 1)
    )
    step = estimate_step(stage, work, Cluster(machine, 1, stages), division=division)
    assert step.bubble == pytest.approx((stages - 1) / (stages - 1 + micro_batches), rel=1e-4)
    # Three seconds for each micro-batch and for each stage that has to be passed; then every stage's optimizer.
    assert step.seconds == pytest.approx(3.0 * (stages - 1 + micro_batches), rel=1e-3)


def test_copies_of_a_layer_send_gradients_and_get_weights(machine: HardwareConfig, even_work: Work) -> None:
    work = even_work(2)
    twice = replace(work, passes=work.passes * 2)
    order = [(name, number) for number in (0, 1) for name in work.layers]
    division = divide(order, [range(2), range(2, 4)], dict.fromkeys(work.layers, 1_000_000))
    stage = _stage(4, host="pipeline", zero_stage=0, pipeline_stages=2)
    step = estimate_step(stage, twice, Cluster(machine, 1, 2), division=division)
    # Of two layers four bytes a parameter, once there and once back, while both ends wait.
    assert step.traffic[TIED].within == pytest.approx(2 * 2 * 4e6)
    assert step.exposed[TIED] == pytest.approx(2 * 2 * 4e6 / 10e9)


@pytest.mark.parametrize(("times", "share"), [(1, 0.75), (2, 1.0)])
def test_a_pipeline_gathers_in_two_bytes_what_one_stage_has(
    machine: HardwareConfig, even_work: Work, times: int, share: float
) -> None:
    exact = even_work(2)
    work = replace(exact, passes=exact.passes * times)
    low = replace(work, layers={name: replace(size, rounded=500_000) for name, size in work.layers.items()})
    order = [(name, number) for number in range(times) for name in work.layers]
    division = divide(order, [range(times), range(times, 2 * times)], dict.fromkeys(work.layers, 1_000_000))
    stage = _stage(4, host="pipeline", zero_stage=1, pipeline_stages=2)
    whole, half = (
        estimate_step(stage, one, Cluster(machine, 1, 4), division=division).traffic[GATHER].within
        for one in (work, low)
    )
    assert half == pytest.approx(share * whole) and whole > 0


def test_plain_computes_then_reduces(machine: HardwareConfig, even_work: Work) -> None:
    step = estimate_step(_stage(host="plain"), even_work(4), Cluster(machine, 1, 4))
    reduced = 2 * 3 / 4 * 4 * 4e6
    assert step.traffic[REDUCE].within == pytest.approx(reduced) and step.traffic[REDUCE].between == 0
    # AdamW and the norm move 40 bytes a parameter, the flat copy 16; a twin 12.
    moved = (40 + 16) * 4e6 + 12 * 2e6
    assert step.exposed[OPTIMIZER] == pytest.approx(moved / 100e9)
    assert step.seconds == pytest.approx(12.0 + reduced / 10e9 + moved / 100e9)


def test_zero_1_copies_around_its_collectives(machine: HardwareConfig, even_work: Work) -> None:
    slow_copies = replace(machine, memory_share=0.5)
    step = estimate_step(_stage(host="zero", zero_stage=1), even_work(4), Cluster(slow_copies, 1, 4))
    trained, share = 4e6, 1e6
    sent, gathered = 3 / 4 * 4 * trained, 3 / 4 * 4 * trained
    # Into the bucket and divided: 16 bytes, and 12 of the share; then 12 of the share around the optimizer.
    assert step.exposed[REDUCE] == pytest.approx(sent / 10e9 + (16 * trained + 12 * share) / 50e9)
    assert step.exposed[OPTIMIZER] == pytest.approx((40 * share + 12 * 2e6) / 100e9 + 12 * share / 50e9)
    assert step.exposed[GATHER] == pytest.approx(gathered / 10e9)


@pytest.mark.parametrize(("zero", "offload", "times"), [(1, "none", 1), (1, "optimizer", 2), (2, "none", 2)])
def test_what_is_summed_where_it_is_moved_is_sent_once(
    machine: HardwareConfig, even_work: Work, zero: int, offload: str, times: int
) -> None:
    stage = _stage(host="zero", zero_stage=zero, offload=offload)
    reduced = estimate_step(stage, even_work(4), Cluster(machine, 1, 4)).traffic[REDUCE]
    assert reduced.within == pytest.approx(times * 3 / 4 * 4 * 4e6)


@pytest.mark.parametrize(
    ("zero", "offload", "back"),
    [(0, "none", 1), (1, "none", 1 / 4), (1, "optimizer", 1), (2, "none", 1), (3, "none", 1 / 4)],
)
def test_gradients_in_bf16_are_cast_back_where_they_are_kept(
    machine: HardwareConfig, even_work: Work, zero: int, offload: str, back: float
) -> None:
    slow_copies = replace(machine, memory_share=0.5, overlaps=False)
    exact, low = (
        estimate_step(
            _stage(host="zero", zero_stage=zero, offload=offload, communication_dtype=dtype),
            even_work(4),
            Cluster(slow_copies, 1, 4),
        )
        for dtype in ("fp32", "bf16")
    )
    spared = exact.traffic[REDUCE].within - low.traffic[REDUCE].within
    assert spared == exact.traffic[REDUCE].within / 2
    cast = (6 + 6 * back) * 4e6 / 50e9
    assert low.exposed[REDUCE] == pytest.approx(exact.exposed[REDUCE] - spared / 10e9 + cast)


@pytest.mark.parametrize("zero", [1, 2])
def test_what_every_use_casts_is_gathered_in_two_bytes(machine: HardwareConfig, even_work: Work, zero: int) -> None:
    slow_copies, work = replace(machine, memory_share=0.5), even_work(4, experts=400_000)
    cast = {"rounded": 500_000, "rounded_experts": 300_000}
    low = replace(work, layers={name: replace(size, **cast) for name, size in work.layers.items()})
    stage = _stage(host="zero", zero_stage=zero)
    whole, half = (estimate_step(stage, one, Cluster(slow_copies, 1, 4), expert_parallel=2) for one in (work, low))
    dense, experts = 3 / 4 * 4e6 * 0.6, 1 / 2 * 4e6 * 0.2  # of experts each process has half, and so has one other
    assert whole.traffic[GATHER].within == pytest.approx(4 * (dense + experts))
    spared = 2 * (dense * 500 / 600 + experts * 300 / 400)
    assert half.traffic[GATHER].within == pytest.approx(4 * (dense + experts) - spared)
    copied = (10 + 8 / 4) * 4 * (500_000 + 300_000 / 2)
    assert half.exposed[GATHER] == pytest.approx(whole.exposed[GATHER] - spared / 10e9 + copied / 50e9)


def test_gradients_of_more_micro_batches_are_added(machine: HardwareConfig, even_work: Work) -> None:
    one, three = (estimate_step(_stage(count, host="plain"), even_work(4), Cluster(machine, 1, 1)) for count in (1, 3))
    assert three.seconds - one.seconds == pytest.approx(2 * (12.0 + 12 * 4e6 / 100e9))


def test_many_micro_batches_take_as_long_as_if_all_were_simulated(machine: HardwareConfig, even_work: Work) -> None:
    cluster = Cluster(machine, 2, 4)
    times = [
        estimate_step(_stage(count, host="zero", zero_stage=3), even_work(3), cluster).seconds for count in (1, 2, 7)
    ]
    assert times[2] == pytest.approx(times[1] + 5 * (times[1] - times[0]))
    step = estimate_step(_stage(7, host="zero", zero_stage=3), even_work(3), cluster)
    sent = step.traffic[REDUCE].within + step.traffic[REDUCE].between
    assert sent == pytest.approx(7 * 7 / 8 * 4 * 3e6)
    gathered = step.traffic[GATHER].within + step.traffic[GATHER].between
    assert gathered == pytest.approx(7 * 5 * 7 / 8 * 4 * 1.5e6)  # twins too; the last layer stays for the backward pass


def test_zero_3_hides_what_computing_covers(machine: HardwareConfig, even_work: Work) -> None:
    slow = replace(machine, within_node=replace(machine.within_node, gigabytes_per_second=0.009))
    stage = _stage(host="zero", zero_stage=3)
    hidden = estimate_step(stage, even_work(4), Cluster(slow, 1, 4))
    # A gather of 6 MB takes half a second. All but the first, and the last reduction, hide behind seconds of work.
    assert hidden.seconds == pytest.approx(12.0 + 0.5 + 3 / 4 * 4e6 / 0.009e9, rel=0.01)
    open_ = estimate_step(stage, even_work(4), Cluster(replace(slow, overlaps=False), 1, 4))
    assert open_.seconds == pytest.approx(12.0 + 7 * 0.5 + 4 * 3 / 4 * 4e6 / 0.009e9, rel=0.01)


def test_copies_and_collectives_take_turns_with_the_computation(machine: HardwareConfig, even_work: Work) -> None:
    """The device copies for each gather and reduction, and lends multiprocessors to them, although links overlap."""
    slow = replace(machine, within_node=replace(machine.within_node, gigabytes_per_second=0.009))
    lending = replace(slow, multiprocessors=10 * COLLECTIVE_MULTIPROCESSORS)
    stage, copies = _stage(host="zero", zero_stage=3), Copies(gathered=8.0, reduced=6.0)
    cluster, wide = Cluster(slow, 1, 4), Cluster(lending, 1, 4)
    plain = estimate_step(stage, even_work(4), cluster, copies=Copies()).seconds
    copied = estimate_step(stage, even_work(4), cluster, copies=copies).seconds
    # Seven gathers of 1.5 M elements, since the last layer stays, and four reductions of a million; 100 GB/s.
    assert copied - plain == pytest.approx((7 * 8 * 1.5e6 + 4 * 6 * 1e6) / 100e9, rel=0.01)
    # Half a second of each gather and a third of each reduction, of which a tenth is the device's; the first gather and
    # the last reduction have it after and before the time in which nothing is computed.
    lent = estimate_step(stage, even_work(4), wide, copies=Copies()).seconds
    assert lent - plain == pytest.approx((7 * 0.5 + 4 / 3) / 10, rel=0.01)


def test_the_slowest_of_equal_devices_sets_the_pace(machine: HardwareConfig, even_work: Work) -> None:
    uneven = replace(machine, spread=0.1)
    assert uneven.slowest(1) == pytest.approx(1.0)
    assert uneven.slowest(8) == pytest.approx(1.153, abs=2e-3)  # 1.42 deviations
    stage = _stage(host="plain")
    alone, eight = (estimate_step(stage, even_work(4), Cluster(uneven, 1, count)) for count in (1, 8))
    computing = [
        sum(one.seconds for one in each.activities.activities if one.cause == COMPUTE) for each in (alone, eight)
    ]
    assert computing == pytest.approx([12.0, 12.0 * uneven.slowest(8)])


def test_gradients_of_experts_are_added_where_they_are(machine: HardwareConfig, even_work: Work) -> None:
    """Under ZeRO-2 a process adds its share of dense parameters, and of experts its part: all of it, without copies."""
    stage = _stage(2, host="zero", zero_stage=2)
    work = even_work(1, experts=400_000)
    step = estimate_step(stage, work, Cluster(machine, 1, 4), expert_parallel=4, copies=Copies(added_share=12.0))
    added = min(one.seconds for one in step.activities.activities if one.cause == COMPUTE)
    assert added == pytest.approx(12 * (600_000 / 4 + 400_000 / 4) / 100e9)


def test_experts_trade_four_times(machine: HardwareConfig, even_work: Work) -> None:
    work = even_work(1, experts=500_000, routed=8e6)
    step = estimate_step(_stage(host="zero", zero_stage=1), work, Cluster(machine, 2, 4), expert_parallel=8)
    traded = step.traffic[EXPERTS]
    assert (traded.within, traded.between) == pytest.approx((4 * 3e6, 4 * 4e6))
    # Of the experts nobody else has a copy; dense parameters are summed over all eight.
    reduced = step.traffic[REDUCE]
    assert reduced.within + reduced.between == pytest.approx(7 / 8 * 4 * 500_000)


def test_joined_rows(machine: HardwareConfig, even_work: Work) -> None:
    step = estimate_step(_stage(host="plain"), even_work(1, joined=1e6), Cluster(machine, 1, 4))
    assert step.traffic[JOIN].within == pytest.approx(3e6)


def test_what_limits_an_operation(machine: HardwareConfig, even_work: Work) -> None:
    program = replace(machine, operation_seconds=5.0)  # 5 s to start what takes 1 and 2 s
    step = estimate_step(_stage(host="plain"), even_work(1), Cluster(program, 1, 1))
    assert step.compute_parts == pytest.approx({"products": 3.0, "memory": 0.0, "starting operations": 7.0})
