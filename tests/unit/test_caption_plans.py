"""Plans of CoCa, GIT, SimVLM and PaLI in their sizes: the counts of their headers, and a check without their data."""

from pathlib import Path

import pytest
import torch

from engine.plan.parse import load_plan
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[2] / "configs" / "plans"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


def chain_of(name: str) -> Chain:
    stage = load_plan(PLANS / f"{name}.yaml").stages[0]
    with torch.device("meta"):
        return build_chain(stage.model, stage.objectives, TOKENS)


def count(chain: Chain, *beginnings: str) -> int:
    return sum(one.numel() for name, one in chain.named_parameters() if name.startswith(beginnings or ("",)))


@pytest.mark.parametrize(("name", "published", "words"), [("coca_base", 383, 297), ("coca_large", 787, 484)])
def test_the_header_of_coca_says_the_counts(name: str, published: int, words: int) -> None:
    chain, text = chain_of(name), (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    every = count(chain)
    own = every - count(chain, "visual_pool", "contrast")
    decoder = count(chain, "embed.block.text", "text_", "generation_", "losses")
    assert f"{every / 1e6:.1f} M in all; without poolers and projections {own / 1e6:.1f} M ({published} M as" in text
    assert f"{words} M of them in the" in text
    assert own / 1e6 == pytest.approx(published, abs=0.6)
    assert decoder / 1e6 == pytest.approx(words, abs=0.6)


def test_the_header_of_git_says_the_counts() -> None:
    chain, text = chain_of("git_base"), (PLANS / "git_base.yaml").read_text(encoding="utf-8")
    every = count(chain)
    theirs = every - 768 - 769 + (1024 - 40) * 768  # a word less in table and head, more positions
    assert f"{every / 1e6:.1f} M in all" in text
    assert f"{theirs / 1e6:.1f} M, as transformers' GitForCausalLM" in text


@pytest.mark.parametrize("name", ["pali_3b", "pali_17b"])
def test_the_header_of_pali_says_the_counts(name: str) -> None:
    chain, text = chain_of(name), (PLANS / f"{name}.yaml").read_text(encoding="utf-8")
    every, mapped = count(chain), count(chain, "visual_map")
    tower = count(chain, "embed.block.visual", "visual_") - mapped
    assert f"{every / 1e6:,.1f} M in all: image encoder {tower / 1e6:,.1f} M" in text
    assert f"{(every - tower - mapped) / 1e6:,.1f} M" in text


@pytest.mark.parametrize("name", ["coca_base", "coca_large", "git_base", "simvlm_base", "pali_3b", "pali_17b"])
def test_a_plan_is_checked_without_data_or_vocabulary(name: str) -> None:
    plan = load_plan(PLANS / f"{name}.yaml", ["tokenizer=emoji"], world_size=32)
    summary = summarize(plan, 32)
    assert [stage["name"] for stage in summary["stages"]] == [stage.name for stage in plan.stages]
