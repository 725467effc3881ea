"""What plans of all architectures train, against the gradients that torch makes."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_steps import Shown, build, micro_batches, step
from torch import Tensor

from engine.hosts.micro_batch import first_states
from engine.plan.parse import load_plan
from engine.plan.plan import BatchSort, StagePlan
from engine.step.freeze import freeze
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.names import only_trains
from omnivl.data.batch import Batch, has_visual, is_video
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.parts.block import BlockLayer

PLANS = Path(__file__).parents[2] / "configs" / "plans"
SIZE = 4
STAGES = {
    "quickstart": ["spatial", "temporal", "joint"],
    "albef_tiny": ["pretrain"],
    "align_tiny": ["contrastive"],
    "beit3_tiny": ["masked", "contrast"],
    "blip_tiny": ["pretrain"],
    "blip2_tiny": ["tower", "queries", "words", "captions"],
    "clip_tiny": ["contrastive"],
    "coca_tiny": ["pairs"],
    "codis_tiny": ["pretrain"],
    "drawing_tiny": ["learn", "draw"],
    "flamingo_tiny": ["words", "documents"],
    "flava_tiny": ["pretrain"],
    "frozen_tiny": ["words", "captions"],
    "git_tiny": ["captions"],
    "meter_tiny": ["pretrain"],
    "pali_tiny": ["mixture"],
    "simvlm_tiny": ["pairs"],
    "tcl_tiny": ["pretrain"],
    "vilt_tiny": ["pretrain"],
    "vlmo_tiny": ["language", "pairs"],
    "vqa_tiny": ["closed", "open"],
}
WITHOUT_ANSWERS = {
    *(("quickstart", "spatial"), ("quickstart", "temporal"), ("vqa_tiny", "closed")),
    ("drawing_tiny", "draw"),
}
"""Random texts are none of their classes, so that all gradients are zero; the condition of no sample is left out."""
CASES = [(name, stage) for name, stages in STAGES.items() for stage in stages]
JOINS = {("quickstart", "joint"), ("blip2_tiny", "queries"), ("flamingo_tiny", "documents"), ("meter_tiny", "pretrain")}
"""Stages in which branches come together in four ways."""


def read(name: str, place: str) -> tuple[StagePlan, Tokenizer]:
    plan = load_plan(PLANS / f"{name}.yaml", [f"batch.micro_batch_size_per_gpu={SIZE}", "parallel.precision=fp32"], 1)
    return plan.stage(place), load_tokenizer(plan.tokenizer)


def batches(stage: StagePlan, tokenizer: Tokenizer) -> list[Batch]:
    """A micro-batch of each kind."""
    sizes = stage.model.inputs

    def shown(sort: BatchSort, random: np.random.Generator) -> Shown:
        if not has_visual(sort.entry.kind):
            return [None] * SIZE
        side, frames = sizes.side(is_video(sort.entry.kind)), sort.layout.num_frames
        return [random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8) for _ in range(SIZE)]

    return micro_batches(stage, tokenizer, shown, more_words=1, trims=False)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_what_rests_gets_no_gradient_and_all_else_gets_one(name: str, place: str) -> None:
    stage, tokenizer = read(name, place)
    torch.manual_seed(0)
    chain = build_chain(stage.model, stage.objectives, tokenizer.special, gather=LocalGather()).eval()
    for parameter in chain.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    learnt = [layout.learnt for layout in stage.layouts()]
    idle = {id(one) for layer in chain.layers for one in layer.idle_parameters(learnt)}
    given = step(chain, stage, batches(stage, tokenizer))
    for one, parameter in chain.named_parameters():
        if parameter.requires_grad:
            assert (one in given) == (id(parameter) not in idle), one
            if one in given and (name, place) not in WITHOUT_ANSWERS:
                assert given[one].abs().sum() > 0, one


def entered(chain: Chain, stage: StagePlan, given: list[Batch]) -> dict[str, bool]:
    """Whether what a block is given gets a gradient, in any pass; by layer, of those that run."""
    found: dict[str, bool] = {}

    def look(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        learns = any(isinstance(one, Tensor) and one.requires_grad for one in inputs)
        found[name] = found.get(name, False) or learns

    hooks = [layer.block.register_forward_pre_hook(partial(look, name)) for name, layer in blocks(chain)]
    for state in first_states(given, partial(plan_layout, stage.objectives), torch.device("cpu"), chain, LocalGather()):
        chain(state)
    for hook in hooks:
        hook.remove()
    return found


def blocks(chain: Chain) -> Iterator[tuple[str, BlockLayer]]:
    for name, layer in chain.named_layers.items():
        if isinstance(layer, BlockLayer) and layer.level is not None and layer.level >= 0:
            yield name, layer


@pytest.mark.parametrize(
    ("name", "place"), [pytest.param(*case, marks=() if case in JOINS else pytest.mark.full) for case in CASES]
)
@pytest.mark.parametrize("of_it", [True, False], ids=["one", "all but one"])
def test_gradients_enter_the_blocks_that_counts_of_operations_say(name: str, place: str, of_it: bool) -> None:
    """One branch of the chain is frozen, or all but one."""
    stage, tokenizer = read(name, place)
    given = batches(stage, tokenizer)
    branches = {layer.branch for _, layer in blocks(build(stage, tokenizer))} - {None}
    for branch in branches:
        chain = build(stage, tokenizer)
        named = {
            f"{one}.{inner}": layer.branch_of(inner) == branch
            for one, layer in chain.named_layers.items()
            for inner, _ in layer.named_parameters()
            if not only_trains(inner)
        }
        freeze(chain, [one for one, is_of in named.items() if is_of == of_it], "freeze")
        found = entered(chain, stage, given)
        assert found
        for one, learns in found.items():
            layer = chain.named_layers[one]
            learns = learns or any(parameter.requires_grad for parameter in layer.parameters())
            # Where branches come together, a layer may read those alone that are not trained.
            says = layer.backward.inputs
            assert says >= learns if layer.branch is None else says == learns, f"{branch}: {one}"
