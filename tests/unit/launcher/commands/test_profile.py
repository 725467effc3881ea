"""``omnivl profile`` measures the chain as the stage trains it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.estimate.trained import mark_trained
from engine.plan.parse import load_plan
from launcher.commands import profile
from omnivl.chain.chain import Chain
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
"""


def test_what_is_frozen_is_measured_as_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = tmp_path / "plan.yaml", load_tokenizer("emoji")
    path.write_text(PLAN)
    measured: list[dict[str, bool]] = []

    def seconds(chain: Chain, *_: Any) -> dict[tuple[str, int], float]:
        measured.append({name: one.requires_grad for name, one in chain.named_parameters()})
        return dict.fromkeys(chain.passes, 1.0)

    monkeypatch.setattr(profile, "layer_seconds", seconds)
    frozen = ["stages.one.freeze=[embed.block.visual, 'visual_*']"]
    kept = []
    for overrides in ([], frozen):
        (stage,) = load_plan(path, overrides).stages
        uses = profile._measure(stage, tokenizer, torch.device("cpu"), 1)
        kept.append({name: use.activation_bytes for (name, _), use in uses.items()})
        with torch.device("meta"):
            chain = profile.build_chain(stage.model, stage.objectives, tokenizer.special)
        mark_trained(chain, stage)
        assert measured[-1] == {name: one.requires_grad for name, one in chain.named_parameters()}
    before, after = kept
    assert all(not trained for name, trained in measured[1].items() if name.startswith("visual_"))
    assert before["visual_00"] > 100_000 and after["visual_00"] == after["visual_01"] == 0, "nothing runs backward"
    assert after["text_00"] == before["text_00"] > 0
