"""Plans of Flamingo and Frozen in paper sizes: the counts of their headers."""

from pathlib import Path

import pytest
import torch

from engine.plan.parse import load_plan
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
PARTS = {
    "flamingo_3b": {"all": (), "encoder": ("embed", "visual"), "gated": ("gated",), "model": ("language",)},
    "flamingo_9b": {"all": (), "encoder": ("embed", "visual"), "gated": ("gated",), "model": ("language",)},
    "frozen_7b": {"all": (), "encoder": ("embed", "visual"), "prefix": ("prefix",), "model": ("language",)},
}


@pytest.mark.parametrize("name", PARTS)
def test_the_header_says_the_counts(name: str) -> None:
    stage = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"]).stages[0]
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    text = (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    for beginnings in PARTS[name].values():
        found = sum(one.numel() for key, one in chain.named_parameters() if key.startswith(beginnings or ("",)))
        assert f"{found / 1e6:.1f} M" in text
