"""What the planner makes of captions shorter than the model reads, and of a contrast over accumulated micro-batches."""

from pathlib import Path

import pytest
import torch

from engine.estimate.work import ModelWork, model_work
from engine.plan.parse import load_plan
from omnivl.data.tokenizer import load_tokenizer

EMOJI = Path(__file__).parents[4] / "configs" / "plans" / "emoji.yaml"
LONG = ["model.text_length=64", "batch.micro_batch_size_per_gpu=8", "parallel.precision=bf16"]
PAIRS = "stages.spatial.data=[{source: emoji, kind: image_text}]"


def counted(*overrides: str, words: int | None = None) -> ModelWork:
    plan = load_plan(EMOJI, [*LONG, PAIRS, *overrides], 2)
    return model_work(plan.stages[0], load_tokenizer(plan.tokenizer), 2, torch.device("meta"), words)


def operations(work: ModelWork, stack: str, of: str = "forward") -> float:
    passes = [one for one in work.passes if one.layer.startswith(stack)]
    assert passes
    return sum(operation.flops * number for one in passes for operation, number in getattr(one, of).items())


def test_short_captions_are_less_work_for_texts_alone() -> None:
    whole, short = counted(), counted(words=6)  # 8 of 64 tokens
    assert operations(short, "visual_0") == operations(whole, "visual_0")
    for of in ("forward", "backward"):
        assert operations(short, "text_0", of) == pytest.approx(operations(whole, "text_0", of) / 8, rel=0.15)
    assert short.useful_flops < whole.useful_flops
    assert max(peak.forward for peak in short.peaks) < max(peak.forward for peak in whole.peaks)
    assert counted(words=500).useful_flops == whole.useful_flops


def test_negatives_of_all_replicas_keep_their_length() -> None:
    """Texts that are joined with those of other replicas are as long as the model reads; those alone are not."""
    joined = "stages.spatial.objectives=[univlc, {kind: vlm, negatives: global}]"
    whole, short = counted(joined), counted(joined, words=6)
    assert operations(short, "alignment") == operations(whole, "alignment")
    assert operations(short, "text_0") < 0.3 * operations(whole, "text_0")


def test_encoders_run_twice_forward_where_the_step_is_contrasted() -> None:
    objectives = "stages.spatial.objectives=[univlc, lm]"
    steps = "batch.gradient_accumulation_steps=4"
    once, twice = counted(objectives, steps), counted(objectives, steps, "batch.contrast=global")
    for stack in ("visual_0", "text_0"):
        assert operations(twice, stack) == 2 * operations(once, stack)
        assert operations(twice, stack, "backward") == operations(once, stack, "backward")
    assert operations(twice, "generation") == operations(once, "generation")
    assert counted(objectives, "batch.contrast=global").passes == counted(objectives).passes
