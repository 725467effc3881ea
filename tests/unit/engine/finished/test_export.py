"""A stage written for classes of transformers' own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.finished.export import export
from engine.finished.trained import Trained
from engine.plan.parse import parse_plan
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError

OMNIVL = """
name: run
model: {preset: tiny, hidden_size: 24, vision_layers: 1, text_layers: 1, alignment_layers: 1, generation_layers: 1}
stages:
  - {name: one, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""


def trained_stage(text: str, folder: Path) -> tuple[Trained, Chain]:
    plan = parse_plan(text, "p")
    stage, tokens = plan.stages[0], load_tokenizer(plan.tokenizer).special
    torch.manual_seed(0)
    chain = build_chain(stage.model, stage.objectives, tokens).eval()
    with torch.no_grad():
        for name, parameter in chain.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(chain.state_dict(), folder / "weights.safetensors")
    return Trained(plan, stage, folder / "weights.safetensors"), chain


def test_what_no_class_computes_is_refused(tmp_path: Path) -> None:
    trained, _ = trained_stage(OMNIVL, tmp_path)
    with pytest.raises(UserError) as caught:
        export(trained, tmp_path / "out", form="transformers")
    assert str(caught.value) == (
        "--format: got 'transformers' for architecture 'omnivl', which no class of transformers computes; allowed is "
        "'omnivl'; leave it out"
    )
    assert not (tmp_path / "out").exists()
