"""Weights of a stage are loaded on another machine than that of the run."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.disk.trained import Trained, load_encoder
from engine.plan.parse import parse_plan
from moe.config import SparseConfig
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import load_tokenizer

PLAN = """
name: run
model: {preset: tiny, hidden_size: 24, vision_layers: 1, text_layers: 1, alignment_layers: 1, generation_layers: 1,
  ffn: {kind: limoe, num_experts: 2, every: 1, implementation: megablocks}}
stages:
  - {name: one, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""


def test_a_stage_that_used_megablocks_is_loaded_where_it_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", None)
    plan = parse_plan(PLAN, "p")
    stage, tokens = plan.stages[0], load_tokenizer(plan.tokenizer).special
    ffn = stage.model.ffn
    assert isinstance(ffn, SparseConfig)
    model = replace(stage.model, ffn=replace(ffn, implementation="loop"))
    chain = build_chain(model, stage.objectives, tokens, compute_dtype=torch.bfloat16).eval()
    save_file(chain.state_dict(), tmp_path / "weights.safetensors")
    encoder = load_encoder(Trained(plan, stage, tmp_path / "weights.safetensors"), torch.device("cpu"))
    frames = torch.randint(0, 256, (2, 1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        near = {"rtol": 0.05, "atol": 0.02}  # bf16
        torch.testing.assert_close(encoder.chain.encode_visual(frames), chain.encode_visual(frames), **near)
