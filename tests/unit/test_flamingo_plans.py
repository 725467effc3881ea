"""Plans of Flamingo and Frozen in paper sizes: the counts of their headers, and a check without their data."""

from pathlib import Path

import pytest
import torch

from engine.plan.parse import load_plan
from engine.step.freeze import freeze
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
ENCODER = ("embed", "visual")
FLAMINGO = {
    "{} M in all": ("",),
    "{} M in the encoder": ENCODER,
    "{} M in the language model": ("language",),
    "{} M of them in gated": ("gated",),
}
PARTS = {
    "flamingo_3b": FLAMINGO,
    "flamingo_9b": FLAMINGO,
    "frozen_7b": {
        "{} M in all": ("",),
        "{} M in the encoder": ENCODER,
        "{} M in the map to the prefix": ("prefix",),
        "{} M in the language model": ("language",),
    },
}


@pytest.mark.parametrize("name", PARTS)
def test_the_header_says_the_counts(name: str) -> None:
    stage = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"]).stages[0]
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    lines = (PLANS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    text = " ".join(" ".join(line.lstrip("#") for line in lines if line.startswith("#")).split())
    for words, beginnings in PARTS[name].items():
        found = sum(one.numel() for key, one in chain.named_parameters() if key.startswith(beginnings))
        assert words.format(f"{found / 1e6:.1f}") in text
    freeze(chain, stage.freeze, "freeze")
    trained = sum(one.numel() for one in chain.parameters() if one.requires_grad)
    if name != "frozen_7b":
        assert f"{trained / 1e6:.1f} M trained" in text


@pytest.mark.parametrize("name", PARTS)
def test_a_plan_is_checked_without_data_or_vocabulary(name: str) -> None:
    plan = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], 32)
    summary = summarize(plan, world_size=32)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in plan.stages]
