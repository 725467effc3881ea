"""Pictures and clips of their own sizes: a packed batch gives the losses and gradients of one that is not."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stage_steps
import torch
from numpy.typing import NDArray
from stage_steps import Shown, micro_batches
from torch import Tensor

from engine.hosts.micro_batch import first_states
from engine.plan.parse import load_plan
from engine.plan.plan import BatchSort, StagePlan
from omnivl.chain.chain import Chain
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.chain.state import State
from omnivl.data.batch import Batch, has_visual, is_video
from omnivl.data.collate import PATCH_STRIDE, from_strip
from omnivl.data.sizes import InputSizes
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.parts.padding import Padding

PLANS = Path(__file__).parents[4] / "configs" / "plans"
SIZE = 6
STAGES = {
    "quickstart": ["spatial"],
    "emoji": ["spatial", "temporal", "joint"],
    "albef_tiny": ["pretrain"],
    "blip_tiny": ["pretrain"],
    "clip_tiny": ["contrastive"],
    "coca_tiny": ["pairs"],
    "git_tiny": ["captions"],
    "vilt_tiny": ["pretrain"],
    "vlmo_tiny": ["vision", "pairs"],
    "beit3_tiny": ["masked"],
    "limoe_tiny": ["contrastive"],
    "blip2_tiny": ["queries", "captions"],
    "vqa_tiny": ["pretrain", "open"],
    "flava_tiny": ["pretrain"],
    "meter_tiny": ["pretrain"],
}
CASES = [(name, stage) for name, stages in STAGES.items() for stage in stages]


def read(name: str, place: str, *more: str) -> tuple[StagePlan, Tokenizer]:
    overrides = [f"batch.micro_batch_size_per_gpu={SIZE}", "parallel.precision=fp32", "model.sizes=native", *more]
    plan = load_plan(PLANS / f"{name}.yaml", overrides, 1)
    return next(one for one in plan.stages if one.name == place), load_tokenizer(plan.tokenizer)


def pictures(sizes: InputSizes, frames: int, clips: bool, random: np.random.Generator) -> list[NDArray[np.uint8]]:
    """Of the largest size, of one patch, and of others between, tall and wide."""
    rows, columns = sizes.grid(clips)
    grids = [(rows, columns), (1, 1), (rows, 1), (1, columns), (rows - 1, 2), (2, columns - 1)][:SIZE]
    patch = sizes.patch_size
    return [
        random.integers(0, 256, (frames, down * patch, across * patch, 3), dtype=np.uint8) for down, across in grids
    ]


def batches(stage: StagePlan, tokenizer: Tokenizer, *, trims: bool) -> list[Batch]:
    """A micro-batch of each kind, with pictures of different sizes."""

    def shown(sort: BatchSort, random: np.random.Generator) -> Shown:
        if not has_visual(sort.entry.kind):
            return [None] * SIZE
        return pictures(stage.model.inputs, sort.layout.num_frames, is_video(sort.entry.kind), random)

    return micro_batches(stage, tokenizer, shown, more_words=1, trims=trims)


def build(stage: StagePlan, tokenizer: Tokenizer) -> Chain:
    chain = stage_steps.build(stage, tokenizer)
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if name.endswith(("positions", "times", "temporal_fc.weight", "video_delta")):
                parameter.normal_(std=0.1)  # so that a patch in another place is another one
    return chain


def step(chain: Chain, stage: StagePlan, given: Sequence[Batch]) -> dict[str, Tensor]:
    """Losses, metrics and gradients of a step."""
    return stage_steps.step(chain, stage, given, metrics=True)


def computing_all(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is computed, and only left out of attention, as on an accelerator that knows no positions."""
    monkeypatch.setattr(Padding, "worth_dropping", lambda mask, kept=None: None)
    for layer in chain.layers:
        layer.drops_padding = False


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    stage_steps.assert_equal(got, wanted, rtol=10 * tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_packed_batch_is_one_with_padding(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare_packed(*read(name, place), monkeypatch)


def test_experts_serve_as_many_tokens_with_padding_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce = [f"model.ffn.router.{option}" for option in ("capacity_factor=0.7", "priority=true")]
    compare_packed(*read("limoe_tiny", "contrastive", *scarce), monkeypatch)


def compare_packed(stage: StagePlan, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = build(stage, tokenizer)
    packed = step(chain, stage, batches(stage, tokenizer, trims=not needs_whole(stage)))
    with monkeypatch.context() as known:
        known.setattr(Padding, "worth_dropping", lambda mask, kept=None: None if kept is None else Padding(mask, kept))
        as_on_an_accelerator = step(chain, stage, batches(stage, tokenizer, trims=False))
    computing_all(chain, monkeypatch)
    whole = batches(stage, tokenizer, trims=False)
    padded = step(chain, stage, whole)
    assert_equal(packed, padded)
    assert_equal(as_on_an_accelerator, padded)
    # What stands in the padding is read by nobody.
    other = []
    for batch in whole:
        if batch.frames is not None and batch.grids is not None:
            frames, patch = batch.frames.clone(), batch.frames.shape[-2]
            for row, count in enumerate(batch.grids.prod(1).tolist()):
                frames[row, ..., count * patch :] = 255
            batch = replace(batch, frames=frames)
        other.append(batch)
    assert any(batch.grids is not None for batch in whole)
    assert_equal(step(chain, stage, other), padded, 1e-7)


def needs_whole(stage: StagePlan) -> bool:
    return any(objective.needs_whole_texts for objective in stage.objectives)


def alone(batch: Batch, row: int) -> Tensor:
    """A sample's frames as a picture of their own, ``[1, T, 3, h, w]``."""
    assert batch.frames is not None
    assert batch.grids is not None
    rows, columns = batch.grids[row].tolist()
    return from_strip(batch.frames[row], (rows, columns))[None]


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("emoji", "joint"),
        ("albef_tiny", "pretrain"),
        ("blip_tiny", "pretrain"),
        ("clip_tiny", "contrastive"),
        ("coca_tiny", "pairs"),
        ("limoe_tiny", "contrastive"),
        ("blip2_tiny", "queries"),
    ],
)
def test_embeddings_are_those_of_each_picture_alone(
    name: str, place: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, tokenizer = read(name, place)
    chain = build(stage, tokenizer)
    if padded:
        computing_all(chain, monkeypatch)
    layout = partial(plan_layout, stage.objectives)
    seen = 0
    given = [batch for batch in batches(stage, tokenizer, trims=True) if batch.frames is not None]
    for batch, state in zip(given, first_states(given, layout, torch.device("cpu"), chain, LocalGather()), strict=True):
        made = chain(state, embeds=True)["visual_embedding"]
        for row in range(batch.size):
            torch.testing.assert_close(made[row], chain.encode_visual(alone(batch, row))[0], rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen >= SIZE


def test_few_positions_are_computed() -> None:
    """With pictures of very different sizes hardly any computed position is padding."""
    stage, tokenizer = read("emoji", "joint")
    chain = build(stage, tokenizer)
    layout = partial(plan_layout, stage.objectives)
    shown = [batch for batch in batches(stage, tokenizer, trims=True) if batch.grids is not None]
    assert shown
    for batch in shown:
        state = State.from_batch(batch, layout(batch.kind, batch.size, batch.num_frames, batch.entry))
        kept = {k: v for layer in chain.layers for k, v in layer.kept_positions(state).items()}
        rows = sum(one.stop - one.start for one in state.layout.visual.values())
        assert batch.places % PATCH_STRIDE == 0
        times = stage.model.inputs.time_positions(batch.num_frames) if is_video(batch.kind) else 1
        whole = rows * (1 + times * batch.places)
        assert len(kept["kept/visual"]) < 0.6 * whole
