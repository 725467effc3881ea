"""What of a run a sweep counts."""

from pathlib import Path

import pytest

from engine.plan.parse import load_plan
from engine.sweep.results import _sizes
from launcher.commands.check import count_parameters
from omnivl.data.tokenizer import load_tokenizer

PLAN = """
name: run
tokenizer: emoji
model: {preset: tiny, vision_layers: 2, text_layers: 1, alignment_layers: 1, generation_layers: 1}
batch: {micro_batch_size_per_gpu: 2}
stages:
  - name: one
    steps: 5
    data: [{source: emoji, kind: image_text}]
    objectives: [univlc]
    weights: {all: hub}
"""


@pytest.mark.parametrize(
    "overrides",
    [[], ["stages.one.freeze=[embed.block.visual, 'visual_*']"], ["stages.one.lora={rank: 2}"]],
    ids=["all", "frozen", "adapters"],
)
def test_parameters_are_those_that_the_stage_trains(overrides: list[str], tmp_path: Path) -> None:
    path, tokens = tmp_path / "plan.yaml", load_tokenizer("emoji").special
    path.write_text(PLAN)
    (stage,) = load_plan(path, overrides).stages
    counts = count_parameters(stage, tokens)
    assert _sizes(stage, tokens) == {"parameters": counts["trained"], "active_parameters": counts["trained"]}
    assert counts["frozen"] > 0, "decoders at least, which no objective gives a gradient"
    if overrides:
        (whole,) = load_plan(path).stages
        assert counts["trained"] < count_parameters(whole, tokens)["trained"]


def test_of_experts_one_token_uses_few(tmp_path: Path) -> None:
    path, tokens = tmp_path / "plan.yaml", load_tokenizer("emoji").special
    path.write_text(PLAN)
    (stage,) = load_plan(path, ["model.ffn={kind: limoe, num_experts: 4}"]).stages
    (dense,) = load_plan(path).stages
    found, without = _sizes(stage, tokens), _sizes(dense, tokens)
    assert without["parameters"] < found["active_parameters"] < found["parameters"], "a router beside one expert"
