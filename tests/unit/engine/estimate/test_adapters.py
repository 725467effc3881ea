"""The estimate of a stage with low-rank adapters, by hand."""

from pathlib import Path

import pytest
import torch

from engine.estimate.activities import REDUCE
from engine.estimate.hardware import load_hardware
from engine.estimate.memory import process_memory
from engine.estimate.report import estimate_stage, outlined
from engine.estimate.traffic import Cluster
from engine.estimate.work import ModelWork, model_work
from engine.plan.parse import load_plan
from engine.plan.plan import StagePlan
from omnivl.data.tokenizer import Tokenizer, load_tokenizer

PLAN = Path(__file__).parents[4] / "configs" / "plans" / "emoji.yaml"
FEW = [
    *("model.vision_layers=2", "model.text_layers=1", "model.alignment_layers=1", "model.generation_layers=1"),
    *("model.momentum=null", "stages.spatial.objectives=[itc]", "stages.spatial.weights.all=hub"),
    *("stages.spatial.batch.micro_batch_size_per_gpu=4", "parallel={host: zero, zero_stage: 1}"),
]
WIDTH = 192


def stage_of(*changes: str) -> tuple[StagePlan, Tokenizer]:
    plan = load_plan(PLAN, [*FEW, *changes], 8)
    return plan.stage("spatial"), load_tokenizer(plan.tokenizer)


def work_of(*changes: str) -> ModelWork:
    stage, tokenizer = stage_of(*changes)
    return model_work(stage, tokenizer, 8, torch.device("meta"))


def test_what_is_trained_held_and_sent() -> None:
    lora = "stages.spatial.lora={rank: 4, on: [attention, feed_forward]}"
    adapted, whole = work_of(lora), work_of()
    # Of each block with its rank of 4: queries, keys and values have 3 x 4 x (192 + 192), the output a third of that,
    # the perceptron 2 x 4 x (192 + 768). Neither clips nor decoders have a step here.
    of_a_block = 4 * 4 * 2 * WIDTH + 2 * 4 * 5 * WIDTH
    for name, size in adapted.layers.items():
        before = whole.layers[name]
        blocks = name in ("visual_00", "visual_01", "text_00")
        assert size.trained == of_a_block * blocks
        assert size.frozen == before.trained + before.frozen, "all that was there rests"
        scales = 4 * blocks  # qkv, output, two of the perceptron
        assert size.queue == before.queue + 4 * scales
    trained, resting = 3 * of_a_block, sum(size.elements for size in whole.layers.values())
    stage, tokenizer = stage_of(lora)
    memory = process_memory(stage, adapted, replicas=8, expert_parallel=1)
    assert memory.moments == 8 * trained / 8
    assert memory.gradients == 4 * trained
    assert memory.weights == 4 * (trained + resting + trained / 8)

    cluster = Cluster(load_hardware("h100"), 1, 8)
    estimate = estimate_stage(stage, tokenizer, cluster, work=adapted)
    full = estimate_stage(*stage_of(), cluster, work=whole)
    assert estimate.step.traffic[REDUCE].within == pytest.approx(7 / 8 * 4 * trained)
    assert full.step.traffic[REDUCE].within > 20 * estimate.step.traffic[REDUCE].within
    assert estimate.memory.peak < full.memory.peak
    assert estimate.checkpoint_bytes == 12 * trained + 4 * resting + sum(one.queue for one in adapted.layers.values())


def test_products_of_adapters_are_counted() -> None:
    """Little is added forward; backward the products that make gradients of weights are saved."""

    def flops(work: ModelWork, way: str) -> float:
        return sum(
            count * one.flops
            for each in work.passes
            if each.layer == "visual_01"
            for one, count in getattr(each, way).items()
        )

    adapted, whole = work_of("stages.spatial.lora={rank: 4}"), work_of()
    assert 1.01 < flops(adapted, "forward") / flops(whole, "forward") < 1.1
    assert 0.5 < flops(adapted, "backward") / flops(whole, "backward") < 0.7


def test_the_outline_is_marked_as_it_is_trained() -> None:
    chain = outlined(*stage_of("stages.spatial.lora={}"))
    assert {name.rpartition(".")[2] for name, one in chain.named_parameters() if one.requires_grad} == {"down", "up"}
