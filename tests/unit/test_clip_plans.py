"""CLIP's plans of the paper's sizes have the published numbers of parameters, to the last one."""

from pathlib import Path

import pytest
import torch

from engine.plan.parse import load_plan
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


@pytest.mark.parametrize(
    ("name", "counts"), [("clip_b16", [149_620_737]), ("clip_l14", [427_616_513, 427_616_513 + (24**2 - 16**2) * 1024])]
)
def test_plans_have_the_published_numbers_of_parameters(name: str, counts: list[int]) -> None:
    plan = load_plan(PLANS / f"{name}.yaml")
    for stage, count in zip(plan.stages, counts, strict=True):
        with torch.device("meta"):
            chain = build_chain(stage.model, stage.objectives, TOKENS)
        assert sum(parameter.numel() for parameter in chain.parameters()) == count
    text = (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"#   size:      {counts[0] / 1e6:.1f} M in all, {counts[0]:,} as published" in text
    summary = summarize(load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], world_size=32), 32)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in plan.stages]
