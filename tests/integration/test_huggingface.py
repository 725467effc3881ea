"""``omnivl export``, and ``docs/huggingface.md`` word by word, from a fresh installation of the package."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import patience
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.disk.run_folder import RunFolder
from engine.disk.trained import find_trained, load_encoder
from engine.errors import CheckpointError
from engine.plan.parse import parse_plan
from engine.plan.yaml import read_yaml, write_yaml
from launcher.cli import app
from omnivl.architectures.build import build_chain
from omnivl.data.config import LoaderConfig
from omnivl.data.decode import evaluation_frames
from omnivl.data.sources.base import Sample
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError
from omnivl.hub import OmniVLModel
from omnivl.inference.predict import predict

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python|yaml)\n(.*?)```", PAGE, re.DOTALL)
pytestmark = pytest.mark.integration

PLAN = f"""
name: quickstart
model: {{preset: {ROOT / "configs" / "models" / "debug.yaml"}}}
parallel: {{host: plain, precision: fp32}}
launch: {{processes: 1}}
logging: {{tensorboard: false}}
stages:
  - name: joint
    steps: 2
    data: [{{source: emoji, kind: image_text}}]
    objectives: [{{kind: univlc, queue_size: 8, batch_keys: momentum}}, mlm, mrm, vlm, lm]
    optimizer: {{warmup_steps: 1}}
    batch: {{micro_batch_size_per_gpu: 4}}
"""
SCORE = {"task": "unseen", "metric": "R@1", "value": 0.25, "chance": 0.01, "baseline": None, "count": 100}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plan, a finished run of it, a picture and a clip."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "plan.yaml").write_text(PLAN)
    plan, run = parse_plan(PLAN), RunFolder(place / "runs" / "quickstart")
    stage = plan.stages[0]
    torch.manual_seed(0)
    chain = build_chain(stage.model, stage.objectives, load_tokenizer(plan.tokenizer).special)
    with torch.no_grad():
        for parameter in chain.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    at = run.stage(0, stage.name)
    at.path.mkdir(parents=True)
    run.plan.write_text(plan.to_yaml())
    save_file({name: tensor.contiguous() for name, tensor in chain.state_dict().items()}, at.weights)
    at.evaluation.write_text(json.dumps({"step": stage.steps, "results": [{"scores": [SCORE]}]}))
    at.mark_complete(stage.steps)
    colours = [Image.effect_noise((50, 40), 40 * shade).convert("RGB") for shade in (1, 2, 3, 4, 5, 6)]
    colours[0].save(place / "picture.png")
    colours[0].save(place / "clip.gif", save_all=True, append_images=colours[1:])
    return place


def export(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["export", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_the_page_from_a_fresh_installation(workplace: Path, tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("moe", "omnivl", "engine", "launcher"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    patience.run([*pip, "--target", site, source], check=True, limit=120)
    environment = {
        "PATH": os.pathsep.join([str(site / "bin"), os.environ["PATH"]]),
        "HOME": str(tmp_path),
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    found = "torch.save([images, texts, clips, probabilities, score, captions, omnivl.__file__], 'found.pt')"
    python = "\n".join(text for kind, text in BLOCKS if kind == "python")
    first, last = (text for kind, text in BLOCKS if kind == "bash")
    for command in (["bash", "-ec", first], [sys.executable, "-c", f"{python}\n{found}"], ["bash", "-ec", last]):
        done = patience.run(command, cwd=workplace, env=environment, capture_output=True, text=True, limit=150)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    images, texts, clips, probabilities, score, captions, file = torch.load(workplace / "found.pt", weights_only=True)
    assert Path(file).is_relative_to(site)
    encoder = load_encoder(find_trained(workplace / "runs" / "quickstart"), torch.device("cpu"))
    picture, clip = (
        evaluation_frames(Sample("a", "a", (workplace / name).read_bytes(), name[-3:]), 32, frames, LoaderConfig())[
            None
        ]
        for name, frames in (("picture.png", 1), ("clip.gif", 4))
    )
    token_ids = encoder.token_ids(["a red heart", "a dog"])
    near = {"rtol": 1e-5, "atol": 1e-6}
    with torch.no_grad():
        torch.testing.assert_close(images, encoder.chain.encode_visual(picture), **near)
        torch.testing.assert_close(clips, encoder.chain.encode_visual(clip), **near)
        torch.testing.assert_close(texts, encoder.chain.encode_text(token_ids), **near)
        torch.testing.assert_close(score, predict(encoder.chain, "vlm", picture, token_ids[:1]), **near)
    assert len(captions) == 1 and probabilities.shape == (1, 2)
    # The page's last command, of which the loop has left the output: a run that started from the exported folder.
    assert "weights.all from hub/quickstart" in done.stdout + done.stderr
    before, after = (load_file(find_trained(workplace / "runs" / name).weights) for name in ("quickstart", "again"))
    assert before.keys() == after.keys()
    # Two steps move a weight by not much more than two learning rates of 1e-4.
    for name in ("visual_00.block.attention.qkv.weight", "losses.heads.vlm.output.weight"):
        assert (after[name] - before[name]).abs().max() < 3e-4 < before[name].abs().max(), name
    (checkpoint,) = (workplace / "runs" / "again" / "stages" / "01-joint" / "checkpoints").glob("step-*")
    export(checkpoint, tmp_path / "checkpoint")
    for name, tensor in OmniVLModel.from_pretrained(tmp_path / "checkpoint").chain.state_dict().items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "yaml"])
def test_plans_of_the_page_can_be_read(text: str) -> None:
    tree = read_yaml(text).tree
    given = read_yaml(PLAN).tree
    (stage,) = tree["stages"]
    plan = parse_plan(write_yaml({**given, **tree, "stages": [{**given["stages"][0], **stage}]}))
    assert plan.stages[0].weights.vision is not None


def test_an_exported_folder_is_whole(workplace: Path, tmp_path: Path) -> None:
    run = workplace / "runs" / "quickstart"
    printed = export(run, tmp_path / "hub", "--max-shard-size", "100KB", "--dtype", "bf16")
    assert "left out, as they only train: heads.mrm" in printed
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "README.md"}
    assert names >= {*wanted, "preprocessor_config.json", "model.safetensors.index.json"}
    assert "model.safetensors" not in names
    model = OmniVLModel.from_pretrained(tmp_path / "hub")
    weights = load_file(find_trained(run).weights)
    for name, tensor in model.chain.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16()), name
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| unseen | R@1 | 0.250 | - | 0.010 | - | 100 |" in card
    assert str(workplace) not in card and str(ROOT) not in card
    with pytest.raises(UserError, match=r"got a place that is taken; allowed is a new or empty folder"):
        export(run, tmp_path / "hub")


def test_stages_and_files_are_named_in_other_ways(workplace: Path, tmp_path: Path) -> None:
    stage = workplace / "runs" / "quickstart" / "stages" / "01-joint"
    export(stage, tmp_path / "stage")
    shutil.copy(stage / "weights.safetensors", tmp_path / "weights.safetensors")
    export(tmp_path / "weights.safetensors", tmp_path / "file", "--plan", workplace / "plan.yaml")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("stage", "file"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert "These weights were not evaluated in their run." in (tmp_path / "file" / "README.md").read_text()
    weights = load_file(tmp_path / "weights.safetensors")
    del weights["visual_norm.block.weight"]
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"got weights without visual_norm.block.weight and 0 more"):
        export(tmp_path / "weights.safetensors", tmp_path / "less", "--plan", workplace / "plan.yaml")
    assert not (tmp_path / "less").exists()
