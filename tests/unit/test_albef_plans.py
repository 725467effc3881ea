"""Plans of ALBEF: the published size, and what is refused, with where the message leads."""

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
STREAMS = "allowed objectives on the streams of architecture 'albef': visual, text, embedding, fused, momentum_fused"


def test_the_papers_plan_has_the_published_number_of_parameters() -> None:
    plan = load_plan(PLANS / "albef_base.yaml")
    (stage,) = plan.stages
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    count = sum(parameter.numel() for parameter in chain.parameters() if parameter.requires_grad)
    # The map to the words is tied there; 512 positions, two token types.
    published = count - 30_522 * 768 + (512 - 25) * 768 + 2 * 768
    assert published == 209_937_725
    text = (PLANS / "albef_base.yaml").read_text(encoding="utf-8")
    assert f"#   size:      {count / 1e6:.1f} M that are trained" in text
    assert f"{published / 1e6:.1f} M" in text
    summary = summarize(load_plan(PLANS / "albef_base.yaml", ["tokenizer=emoji"], world_size=8), 8)
    assert [stage["name"] for stage in summary["stages"]] == ["pretrain"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stages.0.objectives=[univlc, lm]",
            f"stages.0.objectives.1.kind: got 'lm', which asks for the stream 'generation'; {STREAMS}; take it out",
        ),
        (
            "stages.0.objectives=[univlc, mrm]",
            f"stages.0.objectives.1.kind: got 'mrm', which asks for the stream 'masked_visual'; {STREAMS}; take it out",
        ),
        ("model.momentum=null", "stages.0.objectives.2: got 'mlm' with options that need momentum twins"),
        ("stages.0.data.0.kind=video_text", "stages.0.data.0.kind: got 'video_text'"),
        ("model.patch_size=24", "model.image_size: got 64; allowed a multiple of patch_size 24; change either"),
    ],
)
def test_a_plan_that_it_cannot_serve_is_refused(change: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(PLANS / "albef_tiny.yaml", [change])
    assert message in str(caught.value)


def test_a_decoder_is_built_where_the_plan_says_so() -> None:
    changes = ["stages.0.objectives=[univlc, vlm, lm]", "model.generation_layers=2"]
    (stage,) = load_plan(PLANS / "albef_tiny.yaml", changes).stages
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    assert [name for name in chain.named_layers if name.startswith("generation")] == ["generation_00", "generation_01"]
