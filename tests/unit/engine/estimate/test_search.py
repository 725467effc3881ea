"""Layouts that a search tries, and how it ranks them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.estimate.activities import TIED
from engine.estimate.counts import Counts
from engine.estimate.hardware import HardwareConfig, load_hardware
from engine.estimate.report import outlined
from engine.estimate.search import choose_layout, layouts, search_layouts
from engine.estimate.traffic import Cluster
from engine.estimate.work import ModelWork, model_work
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import Tokenizer, load_tokenizer

PLANS = Path(__file__).parents[4] / "configs" / "plans"
FEW = ["model.vision_layers=2", "model.text_layers=1", "model.alignment_layers=1", "model.generation_layers=1"]


def test_layouts_by_name(machine: HardwareConfig) -> None:
    stage = load_plan(PLANS / "emoji.yaml", ["parallel.host=zero"], 4).stage("spatial")
    found = [(one.host, one.zero_stage, one.offload) for one in layouts(stage, Cluster(machine, 1, 4))]
    zero = [("zero", zero, offload) for zero in (1, 2, 3) for offload in ("none", "optimizer")]
    zero.append(("zero", 3, "parameters"))
    assert found[0][0] == "plain" and found[1:8] == zero and len(found) == 10
    stages = [one.pipeline_stages for one in layouts(stage, Cluster(machine, 1, 4)) if one.host == "pipeline"]
    assert stages == [2, 4]


def test_a_pipeline_of_one_transformer_is_found() -> None:
    small = ["batch.micro_batch_size_per_gpu=4", "batch.gradient_accumulation_steps=2", "model.vision_layers=6"]
    plan = load_plan(PLANS / "beit3_tiny.yaml", small, 4)
    stage, tokenizer = plan.stage("masked"), load_tokenizer(plan.tokenizer)
    found = search_layouts(stage, tokenizer, Cluster(load_hardware("h100"), 1, 4), micro_batches=1)
    piped = {one.stage.parallel.pipeline_stages: one for one in found.ranked if one.division is not None}
    assert piped.keys() == {2, 4}
    assert all(one.division is not None and one.division.tied for one in piped.values())
    assert all(one.step.traffic[TIED].within > 0 for one in piped.values())


def test_a_search_keeps_the_samples_and_ranks_by_time() -> None:
    plan = load_plan(PLANS / "emoji.yaml", ["stages.spatial.batch.micro_batch_size_per_gpu=4", *FEW], 4)
    stage, tokenizer = plan.stage("spatial"), load_tokenizer(plan.tokenizer)
    told: list[str] = []
    h100 = load_hardware("h100")
    found = search_layouts(stage, tokenizer, Cluster(h100, 1, 4), micro_batches=2, progress=told.append)
    assert told == [
        f"a micro-batch of {size}, recomputed: {mode}" for size in (2, 4, 8, 16) for mode in ("none", "block")
    ]
    assert {one.samples for one in found.ranked} == {16} and found.too_large == 0
    times = [one.step.seconds for one in found.ranked]
    assert times == sorted(times) and len(times) > 8
    assert {one.stage.batch.micro_batch_size_per_gpu for one in found.ranked} == {2, 4, 8, 16}
    # With more than was asked for, the fewer replicas of a pipeline hold 16 samples together, as planned.
    assert {
        (one.stage.parallel.pipeline_stages, one.stage.batch.micro_batch_size_per_gpu)
        for one in found.ranked
        if one.stage.batch.micro_batch_size_per_gpu > 4
    } == {(2, 8), (4, 16)}
    plain = {
        one.stage.model.recompute: one
        for one in found.ranked
        if one.stage.parallel.host == "plain" and one.stage.batch.micro_batch_size_per_gpu == 4
    }
    assert plain["block"].memory.activations < plain["none"].memory.activations
    assert plain["block"].step.seconds > plain["none"].step.seconds
    tiny = replace(h100, memory_gib=1e-3)
    nothing = search_layouts(stage, tokenizer, Cluster(tiny, 1, 4), micro_batches=1)
    assert nothing.ranked == () and nothing.smallest is not None and not nothing.smallest.fits


def test_work_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a search, a choice and an estimate of the same stage."""
    counted: list[tuple[int, str]] = []
    outlines: list[int] = []

    def count(stage: StagePlan, *more: object) -> ModelWork:
        counted.append((stage.batch.micro_batch_size_per_gpu, stage.model.recompute))
        return model_work(stage, *more)

    def outline(stage: StagePlan, tokenizer: Tokenizer) -> Chain:
        outlines.append(stage.batch.micro_batch_size_per_gpu)
        return outlined(stage, tokenizer)

    monkeypatch.setattr("engine.estimate.counts.model_work", count)
    monkeypatch.setattr("engine.estimate.counts.outlined", outline)
    overrides = ["parallel=auto", "stages.spatial.batch.micro_batch_size_per_gpu=4", *FEW]
    plan = load_plan(PLANS / "emoji.yaml", overrides, 2)
    stage, tokenizer = plan.stage("spatial"), load_tokenizer(plan.tokenizer)
    cluster = Cluster(load_hardware("h100"), 1, 2)
    counts = Counts(tokenizer, cluster)
    search_layouts(stage, tokenizer, cluster, micro_batches=1, counts=counts)
    before = sorted(counted)
    assert before == [(4, "block"), (4, "none"), (8, "block"), (8, "none")]
    assert len(outlines) == 4
    best, _ = choose_layout(stage, tokenizer, cluster, micro_batches=1, counts=counts)
    counts.work(best.stage), counts.outline(best.stage)
    assert sorted(counted) == before and len(outlines) == 4
    assert counts.work(stage) == model_work(stage, tokenizer, 2, torch.device("meta"))
    longer = replace(stage, batch=replace(stage.batch, micro_batch_size_per_gpu=16))
    counts.work(longer)
    assert counted[-1] == (16, "none") and len(counted) == 5


def test_a_layout_is_chosen_by_time_among_those_that_fit() -> None:
    overrides = ["parallel=auto", "stages.spatial.batch.micro_batch_size_per_gpu=4", *FEW]
    plan = load_plan(PLANS / "emoji.yaml", overrides, 4)
    stage, tokenizer, h100 = plan.stage("spatial"), load_tokenizer(plan.tokenizer), load_hardware("h100")
    assert stage.parallel.host == "auto"
    found = search_layouts(stage, tokenizer, Cluster(h100, 1, 4), recomputed=())
    best, why = choose_layout(stage, tokenizer, Cluster(h100, 1, 4))
    # UniVLC compares the samples of a micro-batch on all replicas: there stay 16 of them.
    joined = [
        one
        for one in found.ranked
        if one.stage.batch.micro_batch_size_per_gpu * one.stage.parallel.replicas(4) == 16
        and one.stage.batch.gradient_accumulation_steps == 1
    ]
    assert {one.stage.parallel.host for one in joined} == {"plain", "zero", "pipeline"}
    assert best.step.seconds == min(one.step.seconds for one in joined)
    assert best.stage.samples_per_step(4) == 16
    assert f"{best.step.seconds:.3g} s a step" in why
    # Only the smallest fits: some memory stays free.
    least = min(joined, key=lambda one: one.memory.peak)
    smaller = replace(h100, memory_gib=1.1 * least.memory.peak / 2**30)
    tight, why = choose_layout(stage, tokenizer, Cluster(smaller, 1, 4))
    assert tight.fits
    assert tight.memory.peak == least.memory.peak
    assert "others need more memory" in why
    with pytest.raises(PlanError, match=r"stages.spatial.parallel: got 'auto'; allowed is a layout that fits 4 .*GiB"):
        choose_layout(stage, tokenizer, Cluster(replace(h100, memory_gib=1e-3), 1, 4))


def masked(size: int, accumulation: int, *more: str) -> tuple[StagePlan, Tokenizer]:
    batch = [f"batch.micro_batch_size_per_gpu={size}", f"batch.gradient_accumulation_steps={accumulation}"]
    plan = load_plan(PLANS / "beit3_tiny.yaml", ["parallel=auto", *batch, *more], 2)
    return plan.stage("masked"), load_tokenizer(plan.tokenizer)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 4), (4, 4), (32, 4)])
def test_objectives_that_compare_nothing_leave_the_micro_batch_open(size: int, accumulation: int) -> None:
    best, _ = choose_layout(*masked(size, accumulation), Cluster(load_hardware("h100"), 1, 2))
    assert best.stage.samples_per_step(2) == 2 * size * accumulation
    assert best.stage.batch.micro_batch_size_per_gpu > size  # fewer and larger ones take less time


def test_a_slow_loader_does_not_decide() -> None:
    h100, planned = load_hardware("h100"), masked(32, 4)
    slow = replace(h100, storage_gigabytes_per_second=1e-3)
    (waits, _), (best, _) = (choose_layout(*planned, Cluster(machine, 1, 2)) for machine in (slow, h100))
    assert waits.loader_waits > 0
    assert (waits.stage.parallel, waits.stage.batch) == (best.stage.parallel, best.stage.batch)


def test_micro_batches_that_an_objective_cannot_take_are_left_out() -> None:
    every = ["objectives=[{kind: mfm, every: 4}]", "batch.micro_batch_size_per_gpu=4"]
    more = ["parallel.host=zero", *FEW, *(f"stages.temporal.{one}" for one in every)]
    plan = load_plan(PLANS / "emoji.yaml", [*more, "stages.temporal.batch.gradient_accumulation_steps=2"], 2)
    stage, tokenizer = plan.stage("temporal"), load_tokenizer(plan.tokenizer)
    found = search_layouts(stage, tokenizer, Cluster(load_hardware("h100"), 1, 2), micro_batches=4, recomputed=())
    assert {one.stage.batch.micro_batch_size_per_gpu for one in found.ranked} == {4, 8}


def test_a_number_of_processes_for_experts_is_kept() -> None:
    sizes = ["batch.micro_batch_size_per_gpu=2", "batch.gradient_accumulation_steps=1", "model.ffn.num_experts=12"]
    plan = load_plan(PLANS / "limoe_tiny.yaml", ["parallel.host=auto", "parallel.expert_parallel_size=6", *sizes], 6)
    stage, tokenizer = plan.stages[0], load_tokenizer(plan.tokenizer)
    best, _ = choose_layout(stage, tokenizer, Cluster(load_hardware("h100"), 1, 6), micro_batches=1)
    assert (best.stage.parallel.host, best.stage.parallel.expert_parallel_size) == ("zero", 6)
