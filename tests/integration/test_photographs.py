"""A new user's journey with photographs and clips that nobody here prepared, from folders to plain ``transformers``.

A folder of photos as phones save them (turned by EXIF), a CSV list, a COCO file, and clips with a CSV of Kinetics ->
shards -> ``data inspect`` -> ``check`` -> two stages -> Ctrl-C -> resumed on another layout -> ``evaluate`` ->
``report`` -> ``export`` -> loaded where this engine is not.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import patience
import pytest
from photographs import KINDS, write_clips, write_coco, write_list, write_photos

from omnivl.architectures import OmniVL
from omnivl.inference.pictures import PictureSet

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

MODEL = {
    "omnivl": f"{{preset: {ROOT / 'configs' / 'models' / 'debug.yaml'}}}",
    "clip": "{kind: clip, preset: tiny, image_size: 32, patch_size: 16, projection_size: 16}",
}
RUNS = """
name: photographs
seed: 5
model: {model}
parallel: {{host: plain, precision: fp32}}
launch: {{processes: 1}}
batch: {{micro_batch_size_per_gpu: 4, gradient_accumulation_steps: 2}}
logging: {{every: 1}}
checkpoint: {{every: 2, keep_last: 2}}
stages:
  - name: pictures
    steps: 6
    data:
      - {{source: shards/photos, kind: image_text, weight: 2}}
      - {{source: shards/list, kind: image_text}}
      - {{source: shards/coco, kind: image_text, where: {{split: [train]}}}}
    objectives: {first}
    optimizer: {{lr: 1e-3, warmup_steps: 2}}
  - name: joint
    init_from: pictures
    steps: 4
    data:
      - {{source: shards/coco, kind: image_text}}
{clips}
    objectives: {second}
    optimizer: {{lr: 5e-4, warmup_steps: 1}}
    evaluate:
      tasks:
        - {{kind: retrieval, name: own photos, source: shards/photos, max_samples: 16}}
"""
CLIPS = '      - {source: shards/clips, kind: video_label, prompts: ["a {label} that moves", "{label}"]}'


@dataclass(frozen=True)
class Journey:
    """The folder in which the user types, and what ``omnivl`` printed there."""

    folder: Path

    def environment(self) -> dict[str, str]:
        left = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        return {
            **left,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }

    def omnivl(self, *words: str, code: int = 0) -> str:
        done = patience.run(
            [sys.executable, "-m", "launcher.cli", *words],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            limit=300,
        )
        assert done.returncode == code, f"omnivl {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def interrupted(self, plan: str, metrics: Path, lines: int) -> str:
        """Runs a plan and presses Ctrl-C once its first stage has written some lines of metrics."""
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "pretrain", plan],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            limit = patience.Limit(240)
            while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
                assert process.poll() is None, process.communicate()[0][-3000:]
                assert not limit.passed(), "no step was taken"
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            said, _ = patience.communicate(process, 120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 128 + signal.SIGINT, said[-3000:]
        return said

    def python_without_engine(self, code: str) -> str:
        """What a script prints in a process that cannot import this engine."""
        blocked = "import sys\nsys.modules.update(dict.fromkeys(('omnivl', 'engine', 'moe', 'launcher')))\n"
        done = patience.run(
            [sys.executable, "-c", blocked + code],
            cwd=self.folder,
            env={
                **self.environment(),
                "PYTHONPATH": "",
                "HF_HUB_OFFLINE": "1",
                "HF_MODULES_CACHE": str(self.folder / "hf"),
            },
            capture_output=True,
            text=True,
            limit=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Everything converted into shards."""
    here = Journey(tmp_path_factory.mktemp("journey"))
    write_photos(here.folder / "photos")
    write_list(here.folder / "album")
    write_coco(here.folder / "coco")
    write_clips(here.folder / "kinetics")
    for form, inputs, wanted in (
        ("folder", ("photos", "--text", "both", "--out", "shards/photos"), 24),
        (
            "table",
            ("album/list.csv", "--path", "file", "--caption", "title", "--keep", "album", "--out", "shards/list"),
            9,
        ),
        (
            "coco",
            ("coco/captions_train2017.json", "coco/train2017", "--split-name", "train", "--out", "shards/coco"),
            12,
        ),
        ("kinetics", ("kinetics/kinetics.csv", "kinetics/clips", "--check", "full", "--out", "shards/clips"), 9),
    ):
        told = json.loads(here.omnivl("data", "convert", form, *inputs, "--json"))
        assert (told["samples"], told["rejected"]) == (wanted, {}), form
    return here


@dataclass(frozen=True)
class Run(Journey):
    """A run of two stages that was interrupted and resumed.

    Attributes:
        checked: What ``omnivl check --json`` printed before.
        stopped: What the run printed until Ctrl-C.
        before: The metrics of the first stage at that moment.
        resumed: What the run printed afterwards.
    """

    checked: str
    stopped: str
    before: bytes
    resumed: str


@pytest.fixture(scope="module")
def run(shards: Journey) -> Run:
    """Two stages, interrupted by Ctrl-C and resumed on two processes of ZeRO-2."""
    first, second = "[{kind: univlc, queue_size: 8, batch_keys: momentum}, mlm]", "[{kind: univlc, queue_size: 8}]"
    text = RUNS.format(model=MODEL["omnivl"], first=first, second=second, clips=CLIPS)
    (shards.folder / "plan.yaml").write_text(text)
    checked = shards.omnivl("check", "plan.yaml", "--json")
    metrics = shards.folder / "runs" / "photographs" / "stages" / "01-pictures" / "metrics.jsonl"
    stopped = shards.interrupted("plan.yaml", metrics, 2)
    before = metrics.read_bytes()
    layout = [
        "parallel.host=zero",
        "parallel.zero_stage=2",
        "launch.processes=2",
        "batch.gradient_accumulation_steps=1",
    ]
    resumed = shards.omnivl("pretrain", "plan.yaml", *layout)
    return Run(shards.folder, checked, stopped, before, resumed)


def test_what_was_converted_is_counted(shards: Journey) -> None:
    counts = {
        name: json.loads(shards.omnivl("data", "inspect", f"shards/{name}", "--json")) for name in ("photos", "clips")
    }
    assert counts["photos"]["captions"] == 24
    assert counts["photos"]["labels"] == dict.fromkeys(KINDS, 8)
    assert counts["clips"]["labels"] == {f"{kind} moving": 3 for kind in KINDS}
    shards.omnivl("data", "inspect", "shards/coco", "--html", "sheet.html")
    assert (shards.folder / "sheet.html").read_text().count("data:image/") == 12


def test_two_stages_are_interrupted_and_resumed_on_another_layout(run: Run) -> None:
    stages = [(one["name"], one["steps"], one["samples_per_step"]) for one in json.loads(run.checked)["stages"]]
    assert stages == [("pictures", 6, 8), ("joint", 4, 8)]
    assert "stopping after this step; a checkpoint is saved" in run.stopped
    taken = run.before.count(b"\n")
    assert 2 <= taken < 6
    assert f"going on after step {taken}" in run.resumed
    folder = run.folder / "runs" / "photographs" / "stages"
    assert (folder / "01-pictures" / "metrics.jsonl").read_bytes().startswith(run.before), "no step is taken twice"
    for stage, steps in (("01-pictures", 6), ("02-joint", 4)):
        records = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        trained = [record for record in records if record["event"] == "train"]
        assert [record["step"] for record in trained] == list(range(1, steps + 1))
        assert all(np.isfinite(record["loss"]) for record in trained)
        assert not (folder / stage / "quarantine.jsonl").exists()
    assert re.search(r"own photos +image->text R@1 +[\d.]+ +±\.\d+ +0\.062 ", run.resumed)
    assert re.search(r"step 4/4 .* lr \d", run.resumed)
    assert "whole" in run.omnivl("checkpoint", "verify", "runs/photographs")


@dataclass
class _Outline(HTMLParser):
    """Headings and links of a page."""

    def __post_init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [value for value in [found.get("id")] if value]
        self.links += [value for value in [found.get("href")] if value]


def test_it_is_evaluated_reported_and_exported(run: Run) -> None:
    assert (run.folder / "runs" / "photographs" / "stages" / "02-joint" / "complete.json").is_file()
    told = json.loads(run.omnivl("evaluate", "runs/photographs", "--processes", "2", "--json"))
    scores = {score["metric"]: score for result in told["results"] for score in result["scores"]}
    assert scores["image->text R@10"]["count"] == 16
    assert scores["image->text R@10"]["chance"] == pytest.approx(10 / 16)
    run.omnivl("report", "runs/photographs")
    page = (run.folder / "runs" / "photographs" / "report.html").read_text()
    outline = _Outline()
    outline.feed(page)
    assert [link for link in outline.links if link.startswith("#")] == [
        *("#scores-1", "#scores-2", "#stage-1", "#stage-2", "#plan")
    ]
    assert {link.removeprefix("#") for link in outline.links} <= set(outline.ids)
    assert "Complete: 2 stages." in page
    run.omnivl("export", "runs/photographs", "hub/photographs")
    code = """
import omnivl.hub
from transformers import AutoModel, AutoProcessor
model, processor = (one.from_pretrained("hub/photographs") for one in (AutoModel, AutoProcessor))
out = model(**processor(images=["photos/ball/IMG_0000.JPG"], text=["a red ball", "a blue tent"]))
print(tuple(out.logits_per_image.shape))
"""
    done = patience.run(
        [sys.executable, "-c", code], cwd=run.folder, env=run.environment(), capture_output=True, text=True, limit=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "(1, 2)"


def test_an_architecture_of_transformers_loads_where_this_engine_is_not(shards: Journey) -> None:
    text = RUNS.format(model=MODEL["clip"], first="[itc]", second="[itc]", clips="").replace("photographs", "clip")
    (shards.folder / "clip.yaml").write_text(text)
    shards.omnivl("check", "clip.yaml")
    shards.omnivl("pretrain", "clip.yaml")
    shards.omnivl("export", "runs/clip", "hub/clip", "--format", "transformers")
    code = """
from PIL import Image
from transformers import AutoModel, AutoProcessor
model, processor = (one.from_pretrained("hub/clip") for one in (AutoModel, AutoProcessor))
picture, texts = Image.open("coco/train2017/000000000000.jpg"), ["a red ball on the ground", "a blue tent"]
inputs = processor(images=[picture], text=texts, return_tensors="pt", padding=True)
out = model(**inputs)
print(type(model).__name__, tuple(out.logits_per_image.shape), bool(out.logits_per_image.isfinite().all()))
"""
    assert shards.python_without_engine(code).splitlines()[-1] == "CLIPModel (1, 2) True"


@pytest.mark.parametrize("scaled", [(), ("--shorter-side", "40")], ids=["copied", "scaled"])
def test_photos_are_upright_whatever_the_phone_did(shards: Journey, scaled: tuple[str, ...]) -> None:
    name = f"shards/upright{len(scaled)}"
    shards.omnivl("data", "convert", "folder", "photos", "--text", "both", "--out", name, *scaled)
    pictures = PictureSet(str(shards.folder / name), "image", {}, OmniVL.presets["tiny"].inputs, 24)
    for sample, frames in zip(pictures.samples, pictures.frames(range(24)), strict=True):
        rows = frames[0].float().mean(dim=(0, 2))
        assert rows[:4].mean() > 220, f"{sample.key}: the sky is above"
        assert rows[-4:].mean() < 80, f"{sample.key}: the ground is below"


def test_clips_with_labels_only_are_evaluated(run: Run) -> None:
    task = {"kind": "zero_shot", "name": "moving", "source": "shards/clips", "media": "video"}
    task |= {"where": {"split": ["validate"]}, "prompts": ["a {label} that moves"]}
    (run.folder / "tasks.yaml").write_text(json.dumps({"tasks": [task]}))
    told = json.loads(run.omnivl("evaluate", "runs/photographs", "--config", "tasks.yaml", "--out", "c.json", "--json"))
    ((score,),) = [result["scores"] for result in told["results"]]
    assert (score["count"], score["chance"]) == (3, pytest.approx(1 / 3))


def test_an_export_of_the_engines_own_class_loads_where_the_engine_is_not(run: Run) -> None:
    run.omnivl("export", "runs/photographs", "hub/alone")
    code = """
from transformers import AutoModel, AutoProcessor
model, processor = (one.from_pretrained("hub/alone", trust_remote_code=True) for one in (AutoModel, AutoProcessor))
out = model(**processor(images=["photos/ball/IMG_0000.JPG"], text=["a red ball", "a blue tent"]))
print(tuple(out.logits_per_image.shape))
"""
    assert run.python_without_engine(code).splitlines()[-1] == "(1, 2)"
