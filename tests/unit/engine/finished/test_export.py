"""A stage written for classes of transformers' own."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import patience
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoProcessor, AutoTokenizer, CLIPModel

from engine.disk.trained import Trained
from engine.errors import CheckpointError
from engine.finished.export import CROPS, STRETCHES, Form, export
from engine.plan.parse import parse_plan
from launcher.commands import export as export_command
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


@pytest.mark.parametrize("form", ["omnivl", "transformers"])
@pytest.mark.parametrize(("sizes", "note"), [("native", CROPS), ("stretched", STRETCHES), ("fixed", None)])
def test_a_stage_of_whole_pictures_says_where_the_processor_crops(
    tmp_path: Path,
    sizes: str,
    note: str | None,
    form: Form,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained, _ = trained_stage(CLIP.replace("preset: tiny", f"preset: tiny, sizes: {sizes}"), tmp_path)
    note = None if note == STRETCHES and form == "omnivl" else note  # our own processor does as the evaluation does
    monkeypatch.setattr(export_command, "find_trained", lambda *_: trained)
    for name, as_json in (("lines", False), ("json", True)):
        export_command.export(trained.weights, tmp_path / name, form=form, as_json=as_json)
        said = capsys.readouterr().out
        card = (tmp_path / name / "README.md").read_text()
        for one in (CROPS, STRETCHES):
            assert (one in said) == (one == note)
            assert (f"- {one}\n" in card) == (one == note)
        stored = json.loads((tmp_path / name / "preprocessor_config.json").read_text())
        assert form == "transformers" or stored["stretched"] == (sizes == "stretched")
    assert json.loads(said)["notes"] == ([] if note is None else [note])


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


@pytest.mark.parametrize("form", ["omnivl", "transformers"])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path, form: str, umask: int, mode: int) -> None:
    trained, _ = trained_stage(CLIP, tmp_path)
    before = os.umask(umask)
    try:
        export(trained, tmp_path / "out", form=form)
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {oct(mode)}
    assert len(files) > 4
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_lies_beside_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = trained_stage(CLIP, tmp_path)
    beside = tmp_path / "out.tmp"
    beside.mkdir()
    (beside / "mine").write_text("kept")
    export(trained, tmp_path / "out")
    assert (beside / "mine").read_text() == "kept"
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {"out", "out.tmp", "weights.safetensors"}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.finished.export.model_card", full)
    with pytest.raises(CheckpointError, match=r"again: could not be written .*No space left on device"):
        export(trained, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == there
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        export(trained, tmp_path / "file" / "out")


ELSEWHERE = """
import json, sys
import torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("omnivl", "moe", "engine", "launcher"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from transformers import AutoModel, AutoProcessor, pipeline

folder, picture, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trust = {"trust_remote_code": True} if sys.argv[4] == "omnivl" else {}
model, processor = AutoModel.from_pretrained(folder, **trust), AutoProcessor.from_pretrained(folder, **trust)
from PIL import Image
with torch.no_grad():
    given = processor(images=[Image.open(picture)], text=texts, return_tensors="pt", padding=True, truncation=True)
    out = model(**given).logits_per_image
ask = pipeline("zero-shot-image-classification", model=folder, **trust)
found = {one["label"]: one["score"] for one in ask(picture, candidate_labels=texts, hypothesis_template="{}")}
features = torch.tensor(pipeline("image-feature-extraction", model=folder, **trust)(picture)) if trust else None
torch.save([out, torch.tensor([found[text] for text in texts]), features], sys.argv[5])
"""


@pytest.mark.parametrize(("form", "text"), [("omnivl", OMNIVL), ("omnivl", CLIP), ("transformers", CLIP)])
def test_an_export_loads_and_runs_in_pipelines_without_this_package(tmp_path: Path, form: str, text: str) -> None:
    trained, chain = trained_stage(text, tmp_path)
    export(trained, tmp_path / "out", form=form)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    texts, found = ["a red heart", "a dog", "a [SEP] mark"], tmp_path / "found.pt"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", ELSEWHERE, tmp_path / "out", tmp_path / "picture.png", json.dumps(texts)]
    done = patience.run(
        [*map(str, command), form, str(found)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        limit=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    logits, shares, features = torch.load(found, weights_only=True)
    frames = torch.from_numpy(pixels).permute(2, 0, 1)[None, None]
    with torch.no_grad():
        embedding = chain.encode_visual(frames)
        ids = torch.from_numpy(load_tokenizer("emoji").encode(texts, trained.stage.model.inputs.text_length))
        wanted = chain.contrast.scale() * embedding @ chain.encode_text(ids).t()
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shares, wanted[0].softmax(-1), rtol=1e-3, atol=1e-3)
    if form == "omnivl":
        torch.testing.assert_close(features.flatten(), embedding[0], rtol=1e-4, atol=1e-5)
