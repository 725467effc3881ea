"""Plans of the papers' sizes: they can be checked without their data, and have the published numbers of parameters."""

from pathlib import Path

import pytest
import torch

from engine.plan.parse import load_plan
from engine.step.freeze import freeze, freeze_idle
from launcher.commands.check import summarize
from moe.attribute import AttributeFeedForward, AttributeLinear
from moe.config import AttributeConfig
from moe.sparse import SparseFeedForward
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
PUBLISHED = {
    "vlmo_base": (175e6, None),
    "vlmo_large": (562e6, None),
    "beit3_base": (222e6, None),
    "beit3_large": (674e6, None),
    "beit3_giant": (1.9e9, None),
    "limoe_b16": (None, None),
    "limoe_l16": (None, None),
    "limoe_h14": (5.6e9, 675e6),
    "uni_perceiver_moe_base": (None, 167e6),
}
"""Parameters in all, and of those that one token meets where experts are chosen; None where no count is known."""


def counts(name: str) -> tuple[int, int]:
    """Parameters of blocks and embeddings in all and for one token, without what only clips of a tubelet need.

    Projections, temperature and heads are left out: what the papers count ends with the transformer.
    """
    stage = load_plan(PLANS / f"{name}.yaml").stages[-1]
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    total, resting = 0, 0
    for layer, module in chain.named_children():
        if layer.startswith(("embed", "unified")):
            total += sum(parameter.numel() for parameter in module.parameters())
        for part in module.modules():
            if isinstance(part, SparseFeedForward | AttributeFeedForward | AttributeLinear):
                config = stage.model.ffn
                chosen = config.top_k if isinstance(config, AttributeConfig) else config.router.experts_per_token
                size = sum(parameter.numel() for parameter in part.experts.parameters())
                resting += size * round(config.num_experts - chosen) // config.num_experts
    visual = chain.embed.block.visual
    total -= visual.patches.video_delta.numel() + visual.times.numel()
    return total, total - resting


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_says_the_counts_that_the_built_model_has(name: str) -> None:
    total, active = counts(name)
    text = (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    size = next(line for line in text.splitlines() if line.startswith("#   size:"))
    assert f"{total / 1e6:.1f} M in blocks and embeddings" in size
    assert active == total or f"{active / 1e6:.1f} M of them for a token" in size
    for made, published in zip((total, active), PUBLISHED[name], strict=True):
        if published is not None:
            near = 0.03 if published >= 1e9 else 0.007  # "1.9 B" and "about 5.6 B" have two digits
            assert made == pytest.approx(published, rel=near)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_is_checked_without_data_or_vocabulary(name: str) -> None:
    plan = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], world_size=32)
    summary = summarize(plan, 32)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in plan.stages]
    for stage in summary["stages"]:
        assert stage["parameters"]["trained"] + stage["parameters"]["frozen"] > 1e8


def test_the_second_stage_of_vlmo_trains_words_their_perceptrons_and_the_head() -> None:
    for name in ("vlmo_base", "vlmo_large"):
        stage = load_plan(PLANS / f"{name}.yaml").stage("language")
        with torch.device("meta"):
            chain = build_chain(stage.model, stage.objectives, TOKENS)
        freeze(chain, stage.freeze, "stages.1.freeze")
        freeze_idle(chain, stage.layouts())
        trained = {parameter for parameter, one in chain.named_parameters() if one.requires_grad}
        assert "embed.block.text.words" in trained
        assert {
            "unified_00.block.ffn.experts.text.fc1.weight",
            "unified_00.block.norm2.perceptrons.text.weight",
        } <= trained
        assert "losses.vocabulary.decoder.weight" in trained
        assert not any(
            part in one for one in trained for part in ("visual", "qkv", "out.", "norm1", "vision", "fusion")
        )
