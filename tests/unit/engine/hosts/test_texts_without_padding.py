"""Texts without padding: what is left out changes neither losses nor gradients, on a CPU and as on an accelerator."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import stage_steps
import torch
from stage_steps import Shown, build, micro_batches, step
from torch import Tensor

from engine.hosts.micro_batch import first_states
from engine.plan.parse import load_plan
from engine.plan.plan import BatchSort, Plan, StagePlan
from engine.step.compiled import compile_blocks
from omnivl.chain.gather import LocalGather
from omnivl.chain.layout import plan_layout
from omnivl.data.batch import Batch, has_visual, is_video
from omnivl.data.collate import STRIDE, Collator
from omnivl.data.example import Example
from omnivl.data.tokenizer import Tokenizer, load_tokenizer
from omnivl.parts.padding import Padding

PLANS = Path(__file__).parents[4] / "configs" / "plans"
LENGTH, SIZE = 40, 6
STAGES = {
    "quickstart": ["spatial"],
    "emoji": ["spatial", "joint"],
    "albef_tiny": ["pretrain"],
    "blip_tiny": ["pretrain"],
    "tcl_tiny": ["pretrain"],
    "flava_tiny": ["pretrain"],
    "meter_tiny": ["pretrain"],
    "align_tiny": ["contrastive"],
    "clip_tiny": ["contrastive"],
    "coca_tiny": ["pairs"],
    "git_tiny": ["captions"],
    "simvlm_tiny": ["pairs"],
    "pali_tiny": ["mixture"],
    "vilt_tiny": ["pretrain"],
    "vlmo_tiny": ["language", "pairs"],
    "beit3_tiny": ["masked"],
    "limoe_tiny": ["contrastive"],
    "blip2_tiny": ["queries", "words"],
    "vqa_tiny": ["pretrain", "closed", "open"],
}
CASES = [(name, stage) for name, stages in STAGES.items() for stage in stages]


def read(name: str, stage: str) -> tuple[StagePlan, Tokenizer]:
    length = f"model.{'words.length' if name in ('vilt_tiny', 'blip2_tiny') else 'text_length'}={LENGTH}"
    overrides = [length, f"batch.micro_batch_size_per_gpu={SIZE}", "parallel.precision=fp32"]
    plan: Plan = load_plan(PLANS / f"{name}.yaml", overrides, 1)
    return next(one for one in plan.stages if one.name == stage), load_tokenizer(plan.tokenizer)


def batches(stage: StagePlan, tokenizer: Tokenizer, *, trims: bool) -> list[Batch]:
    """A micro-batch of each kind, texts of 1 to 11 words."""

    def shown(sort: BatchSort, random: np.random.Generator) -> Shown:
        if not has_visual(sort.entry.kind):
            return [None] * SIZE
        side = stage.model.inputs.side(is_video(sort.entry.kind))
        return list(random.integers(0, 256, (SIZE, sort.layout.num_frames, side, side, 3), dtype=np.uint8))

    return micro_batches(stage, tokenizer, shown, more_words=2, trims=trims)


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Only positions that are known before the step are left out; returns how many were computed, block by block."""
    used: list[int] = []

    def known(mask: Tensor | None, kept: Tensor | None = None) -> Padding | None:
        if mask is None or kept is None:
            return None
        used.append(len(kept))
        return Padding(mask, kept)

    monkeypatch.setattr(Padding, "worth_dropping", known)
    return used


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    stage_steps.assert_equal(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_losses_and_gradients_are_those_of_padded_texts(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, tokenizer = read(name, place)
    chain = build(stage, tokenizer)
    whole = batches(stage, tokenizer, trims=False)
    on_cpu = step(chain, stage, whole)
    used = as_on_an_accelerator(monkeypatch)
    for layer in chain.layers:
        layer.drops_padding = False
    padded = step(chain, stage, whole)
    assert not used
    assert_equal(on_cpu, padded)
    for layer in chain.layers:
        layer.drops_padding = True
    assert_equal(step(chain, stage, whole), padded)
    if any(objective.needs_whole_texts for objective in stage.objectives):
        return
    trimmed = batches(stage, tokenizer, trims=True)
    texts = [batch.token_ids for batch in trimmed if batch.token_ids is not None]
    assert texts
    assert {one.shape[1] for one in texts} == {STRIDE}
    assert_equal(step(chain, stage, trimmed), padded)


def test_texts_alone_and_written_texts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """In OmniVL both streams of which the rows are known in advance compute the words alone."""
    stage, tokenizer = read("emoji", "spatial")
    overrides = ["stages.spatial.objectives=[univlc, vlm, mlm, lm]"]
    plan = load_plan(
        PLANS / "emoji.yaml", [f"model.text_length={LENGTH}", "batch.micro_batch_size_per_gpu=6", *overrides], 1
    )
    stage = plan.stages[0]
    chain, used = build(stage, tokenizer), as_on_an_accelerator(monkeypatch)
    batch = next(one for one in batches(stage, tokenizer, trims=False) if one.kind == "image_text")
    assert batch.token_ids is not None
    step(chain, stage, [batch])
    words = int((batch.token_ids != tokenizer.special.pad).sum())
    blocks = [layer for layer in chain.layers if layer.stack in ("text", "generation") and layer.level is not None]
    assert used
    assert max(used) <= 2 * (words + SIZE)
    assert max(used) < 0.5 * batch.token_ids.numel()
    assert len(used) >= len(blocks)


def test_compiled_blocks_get_whole_texts() -> None:
    stage, tokenizer = read("emoji", "spatial")
    chain = build(stage, tokenizer)
    compile_blocks(chain, backend="eager")
    given = batches(stage, tokenizer, trims=False)
    for state in first_states(given, partial(plan_layout, stage.objectives), torch.device("cpu"), chain, LocalGather()):
        assert not state.named("kept")


@pytest.mark.parametrize("pad_is_end", [False, True])
def test_a_trimmed_text_keeps_its_end(pad_is_end: bool) -> None:
    """The longest text fills a multiple of the stride but for its end."""
    _, tokenizer = read("emoji", "spatial")
    sizes = read("emoji", "spatial")[0].model.inputs

    class Ends:
        special = replace(tokenizer.special, pad=tokenizer.special.sep) if pad_is_end else tokenizer.special

        def encode(self, texts: tuple[str, ...], length: int) -> np.ndarray:
            ids = np.full((len(texts), length), self.special.pad, dtype=np.int64)
            ids[:, 0], ids[:, 1:STRIDE], ids[:, STRIDE] = self.special.cls, 50, self.special.sep
            return ids

    example = Example(np.zeros((1, 8, 8, 3), dtype=np.uint8), "a", 0, 0, 0, "", {}, {})
    batch = Collator(sizes, Ends(), trims=True).plain([example], "image_text")  # type: ignore[arg-type]
    assert batch.token_ids is not None
    assert batch.token_ids.shape[1] == 2 * STRIDE
    assert batch.token_ids[0, STRIDE] == Ends.special.sep
