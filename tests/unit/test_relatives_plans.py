"""Plans of TCL, FLAVA, ALIGN, BLIP, METER and Florence: the sizes that their headers say, and what is refused."""

from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.plan.parse import load_plan
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *(("tcl_base", None), ("flava_base", 61.9), ("align_b7", None), ("blip_base", None), ("blip_large", None)),
        *(("meter_base", None), ("florence_base", None), ("codis_base", None)),
    ],
)
def test_the_header_says_the_counts_that_the_built_model_has(name: str, heads: float | None) -> None:
    (stage,) = load_plan(PLANS / f"{name}.yaml").stages
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    trained = {one: parameter.numel() for one, parameter in chain.named_parameters() if parameter.requires_grad}
    text = (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    size = next(line for line in text.splitlines() if line.startswith("#   size:"))
    assert f"{sum(trained.values()) / 1e6:.1f} M" in size
    if heads is not None:
        of_heads = sum(count for one, count in trained.items() if one.startswith("losses."))
        assert f"{of_heads / 1e6:.1f} M are heads" in size
        assert round(of_heads / 1e6, 1) == heads


@pytest.mark.parametrize(
    "name",
    ["tcl_base", "codis_base", "flava_base", "align_b7", "blip_base", "blip_large", "meter_base", "florence_base"],
)
def test_a_plan_is_checked_without_data_or_vocabulary(name: str) -> None:
    plan = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], world_size=8)
    (stage,) = summarize(plan, 8)["stages"]
    assert stage["warnings"] == []
    assert stage["samples_per_step"] == plan.stages[0].batch.global_batch_size


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("tcl_tiny", "stages.0.objectives.2.pool=3", "got 3; allowed a divisor of 4, the patches per side of an image"),
        ("tcl_tiny", "model.momentum=null", "got 'univlc' with options that need momentum twins"),
        ("flava_tiny", "stages.0.objectives.0={kind: vlm, on: [pairs]}", "which draws samples by"),
        ("flava_tiny", "stages.0.data.0.kind=video_text", "stages.0.data.0.kind: got 'video_text'"),
        ("blip_tiny", "model.momentum=null", "got 'univlc' with options that need momentum twins"),
        ("blip_tiny", "stages.0.data.0.kind=video_text", "stages.0.data.0.kind: got 'video_text'"),
        ("meter_tiny", "model.momentum={}", "allowed null in 'meter', which has none"),
        ("meter_tiny", "stages.0.data.0.kind=video_text", "stages.0.data.0.kind: got 'video_text'"),
        ("meter_tiny", "stages.0.objectives=[itc, mlm]", "got 'itc', which asks for the stream 'embedding'"),
        ("align_tiny", "model.sizes=native", "allowed 'fixed' or 'stretched' with architecture 'align'"),
        ("align_tiny", "stages.0.objectives=[itc, mlm]", "got 'mlm', which asks for the stream 'fused'"),
    ],
)
def test_a_plan_that_it_cannot_serve_is_refused(name: str, change: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(PLANS / f"{name}.yaml", [change])
    assert message in str(caught.value)
