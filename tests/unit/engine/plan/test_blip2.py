"""Plans of BLIP-2: what is refused, and where the message leads; the published size."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from engine.errors import PlanError
from engine.plan.parse import load_plan
from engine.step.freeze import freeze
from launcher.commands.check import summarize
from omnivl.architectures.build import build_chain
from omnivl.data.special_tokens import SpecialTokens

PLANS = Path(__file__).parents[4] / "configs" / "plans"
TINY = PLANS / "blip2_tiny.yaml"
TOKENS = SpecialTokens(pad=0, cls=1, sep=2, mask=3, decode=4, vocab_size=100, num_reserved=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "stages.1.objectives=[itc, mrm]",
            "stages.1.objectives.1.kind: got 'mrm', which asks for the stream 'masked_visual'; allowed objectives on the "
            "streams of architecture 'blip2': visual, queries, text, embedding, fused, generation, language; take it "
            "out or change model.kind",
        ),
        ("model.patch_size=24", "model.image_size: got 64; allowed a multiple of patch_size 24; change either"),
        ("model.qformer.norm=pre", "model.qformer.norm: got 'pre'; allowed 'post' there; set it to 'post'"),
        (
            "stages.1.model={num_queries: 4}",
            "stages.1.model.num_queries: got 4 for weights of stage 'tower' with 8; allowed 8; set both to the same",
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
    stage = load_plan(PLANS / "blip2_opt.yaml").stages[0]
    with torch.device("meta"):
        chain = build_chain(stage.model, stage.objectives, TOKENS)
    sizes = {name: count(layer.parameters()) for name, layer in chain.named_layers.items()}
    tower = count(chain.embed.block.visual.parameters())
    tower += sum(size for name, size in sizes.items() if name.startswith("visual_"))
    words = count(chain.embed.block.text.parameters())
    # The head on words without its last map, which is the words' table in the paper.
    qformer = words + sum(size for name, size in sizes.items() if name.startswith("qformer_"))
    qformer += 768 * 768 + 768 + 2 * 768 + 30523
    assert tower == 985_952_256
    assert qformer == 186_282_811 - (512 - 32) * 768
    others = 32 * 768 + sizes["contrast"] + 768 * 2 + 2
    freeze(chain, stage.freeze, "stages.0.freeze")
    trained = count(one for one in chain.parameters() if one.requires_grad)
    assert trained == qformer + 30523 * 768 + others + 2 * 1408 == 209_778_494
    checked, _ = summarize(load_plan(PLANS / "blip2_opt.yaml", ["tokenizer=emoji"], world_size=16), 16)["stages"]
    assert checked["parameters"]["trained"] == trained
    assert checked["parameters"]["frozen"] == tower - 2 * 1408, "but for the tower's last norm"
    text = (PLANS / "blip2_opt.yaml").read_text(encoding="utf-8")
    for size in ("985.95 M", "186.28 M", "185.91 M", "209.8 M"):
        assert size in text


def count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
