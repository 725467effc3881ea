"""A stage written for classes of transformers' own."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer, CLIPModel

from engine.finished.export import export
from engine.finished.trained import Trained
from engine.plan.parse import parse_plan
from omnivl.architectures.build import build_chain
from omnivl.chain.chain import Chain
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError

CLIP = """
name: run
model: {kind: clip, preset: tiny, vision: {hidden_size: 24, num_heads: 2, layers: 1, activation: quick_gelu},
  text: {hidden_size: 16, num_heads: 2, layers: 2}}
stages:
  - {name: one, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [{kind: itc, loss_type: sigmoid}]}
"""
OMNIVL = """
name: run
model: {preset: tiny, hidden_size: 24, vision_layers: 1, text_layers: 1, alignment_layers: 1, generation_layers: 1}
stages:
  - {name: one, steps: 1, data: [{source: emoji, kind: image_text}], objectives: [univlc]}
"""
TEXTS = ["a red heart", "a face with tears of joy and [SEP] marks", "cat " * 30]


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


@torch.no_grad()
def test_clip_is_read_by_transformers_own_class(tmp_path: Path) -> None:
    trained, chain = trained_stage(CLIP, tmp_path)
    done = export(trained, tmp_path / "out", form="transformers")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("clip", ["CLIPModel"])
    assert done.left_out == ("losses.heads.itc.bias",)
    assert done.parameters == sum(parameter.numel() for parameter in chain.parameters()) - 1
    model, missing = CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(missing[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer, length = AutoTokenizer.from_pretrained(tmp_path / "out"), trained.stage.model.inputs.text_length
    read = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    own = torch.from_numpy(load_tokenizer("emoji").encode(TEXTS, length))
    assert torch.equal(read["input_ids"], own[:, : read["input_ids"].shape[1]])
    made = F.normalize(model.get_text_features(**read).pooler_output, dim=-1)
    torch.testing.assert_close(made, chain.encode_text(own), rtol=1e-4, atol=1e-5)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    inputs = processor(images=[Image.fromarray(pixels)], text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    out = model(**inputs)
    frames = torch.from_numpy(pixels).permute(2, 0, 1)[None, None]
    torch.testing.assert_close(out.image_embeds, chain.encode_visual(frames), rtol=1e-4, atol=1e-4)
    wanted = chain.contrast.scale() * chain.encode_visual(frames) @ chain.encode_text(own).t()
    torch.testing.assert_close(out.logits_per_image, wanted, rtol=1e-4, atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from transformers import AutoTokenizer, CLIPModel" in card
    assert "omnivl.hub" not in card


def test_clip_is_also_written_as_the_engines_own_class(tmp_path: Path) -> None:
    from omnivl.hub import OmniVLModel

    trained, chain = trained_stage(CLIP, tmp_path)
    export(trained, tmp_path / "out")
    model = OmniVLModel.from_pretrained(tmp_path / "out")
    own = torch.from_numpy(load_tokenizer("emoji").encode(TEXTS, 16))
    torch.testing.assert_close(model.get_text_features(own).pooler_output, chain.encode_text(own))
    # The temperature's bounds are those of the objective that trained it, not of UniVLC.
    (itc,) = model.config.objectives
    assert itc.temperature_options.bounds == (1e-4, 1e4)


def test_what_no_class_computes_is_refused(tmp_path: Path) -> None:
    trained, _ = trained_stage(OMNIVL, tmp_path)
    with pytest.raises(UserError) as caught:
        export(trained, tmp_path / "out", form="transformers")
    assert str(caught.value) == (
        "--format: got 'transformers' for architecture 'omnivl', which no class of transformers computes; allowed is "
        "'omnivl'; leave it out"
    )
    assert not (tmp_path / "out").exists()


def test_names_are_texts_in_the_card(tmp_path: Path) -> None:
    trained, _ = trained_stage(CLIP, tmp_path)
    named = replace(trained.plan, name="x\n---\n<script>alert(1)</script> [y](http://z)")
    export(replace(trained, plan=named), tmp_path / "out", form="transformers")
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    assert lines[4] == r"# x\\n---\\n\<script>alert(1)\</script> \[y\](http://z), stage one"
    assert lines.count("---") == 2
