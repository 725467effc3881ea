"""Plans of ViLT: what is refused, and where the message leads; the published size."""

from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.plan.parse import load_plan
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[4] / "configs" / "plans"
TINY = PLANS / "vilt_tiny.yaml"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)
ALLOWED = (
    "allowed objectives on the streams of architecture 'vilt': fused, fused_visual; take it out or change model.kind"
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stages.0.objectives=[itm, univlc]",
            f"stages.0.objectives.1.kind: got 'univlc', which asks for the stream 'embedding'; {ALLOWED}",
        ),
        (
            "stages.0.objectives=[itm, lm]",
            f"stages.0.objectives.1.kind: got 'lm', which asks for the stream 'generation'; {ALLOWED}",
        ),
        (
            "stages.0.objectives=[itm, {kind: mlm, grounded: false}]",
            f"stages.0.objectives.1.kind: got 'mlm', which asks for the stream 'text'; {ALLOWED}",
        ),
        (
            "model.patch_size=24",
            "model.image_size: got 64; allowed a multiple of patch_size 24; change either",
        ),
        (
            "model.blocks.num_heads=5",
            "model.blocks.hidden_size: got 192; allowed a multiple of num_heads 5; change either",
        ),
        (
            "model.blocks.norm=post",
            "model.blocks.norm: got 'post'; allowed 'pre' in 'vilt'; set it to 'pre'",
        ),
        (
            "stages.0.evaluate.tasks=[retrieval]",
            "stages.0.evaluate.tasks.0.kind: got 'retrieval' for a stage that has no trained embeddings; allowed "
            "'matching'; add a contrastive objective such as 'univlc', or remove the task",
        ),
        (
            "stages.0.evaluate.tasks=[{kind: matching, media: video, source: motion}]",
            "stages.0.evaluate.tasks.0.media: got 'video' for a stage that has architecture 'vilt', which takes no video; "
            "allowed 'image'; change model.kind, or set media to 'image'",
        ),
    ],
)
def test_a_plan_that_it_cannot_serve_is_refused(change: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        load_plan(TINY, [change])
    assert message in str(caught.value)


def test_the_vocabulary_is_the_tokenizers() -> None:
    assert load_plan(TINY).stages[0].model.heads.vocab_size == 4096


def test_the_paper_s_plan_has_the_published_size_and_is_checked_without_data() -> None:
    plan = load_plan(PLANS / "vilt_b32.yaml")
    with torch.device("meta"):
        chain = build_chain(plan.stages[0].model, (), TOKENS)
    size = sum(parameter.numel() for parameter in chain.parameters())
    assert size == 111_595_008
    assert f"#   size:      {size / 1e6:.1f} M in the transformer" in (PLANS / "vilt_b32.yaml").read_text(
        encoding="utf-8"
    )
    (stage,) = summarize(load_plan(PLANS / "vilt_b32.yaml", ["tokenizer=emoji"], world_size=64), 64)["stages"]
    # The transformer, its embeddings and pooler; of the heads that of words, whose last map is no table of embeddings.
    head = 768 * 768 + 768 + 2 * 768 + 30522 * 768 + 30522
    assert stage["parameters"]["trained"] == size + head + 2 * 768 + 2
