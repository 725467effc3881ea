"""``omnivl evaluate``, ``embed`` and ``report`` on a run folder with fresh weights."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import patience
import pytest
import torch
from complete_run import write_complete_run
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.disk.trained import find_trained
from engine.errors import CheckpointError, PlanError
from engine.finished.evaluate import choose_tasks
from engine.plan.parse import parse_plan
from engine.plan.plan import Plan
from launcher.cli import app
from launcher.commands.embed import parse_where
from omnivl.architectures.build import build_chain
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import DataError, UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration

PLAN = f"""
name: tiny
model: {{preset: {ROOT / "configs" / "models" / "debug.yaml"}}}
stages:
  - name: spatial
    steps: 5
    data: [{{source: emoji, kind: image_text}}]
    objectives: [{{kind: univlc, queue_size: 8, batch_keys: momentum}}, mlm]
    optimizer: {{warmup_steps: 1}}
  - name: joint
    init_from: spatial
    steps: 7
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc, vlm, lm]
    optimizer: {{warmup_steps: 1}}
    evaluate:
      tasks:
        - kind: retrieval
          name: style, unseen
          where: {{style: [twemoji], label: [bugs, fruit]}}
          rerank: 3
          gallery: 2
          baseline: {{where: {{style: [fluent], label: [bugs, fruit]}}}}
        - {{kind: zero_shot, name: labels, where: {{style: [twemoji], label: [bugs, fruit]}}}}
        - {{kind: caption, name: captions, where: {{style: [twemoji], label: [bugs]}}, max_samples: 5}}
  - name: later
    init_from: joint
    steps: 3
    data: [{{source: emoji, kind: image_text}}]
    objectives: [univlc]
    optimizer: {{warmup_steps: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which two stages are complete."""
    return write_complete_run(tmp_path_factory.mktemp("runs") / "tiny", PLAN, stages=2, spread=5)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def scores(evaluation: dict[str, Any]) -> dict[str, float]:
    return {
        f"{score['task']}/{score['metric']}": score["value"]
        for result in evaluation["results"]
        for score in result["scores"]
    }


def test_the_newest_complete_stage_is_evaluated_and_written_down(folder: Path) -> None:
    printed = run("evaluate", str(folder))
    written = json.loads((folder / "evaluation-joint.json").read_text())
    assert (written["plan"], written["stage"], written["step"]) == ("tiny", "joint", 7)
    assert [score["count"] for score in written["results"][0]["scores"]] == [35] * 16
    assert len(written["results"][0]["galleries"][0]["rows"]) == 2
    assert "tiny, stage joint" in printed
    for value in scores(written).values():
        assert f"{value:.3f}" in printed
    assert "report: " in run("report", str(folder))
    assert "evaluated again (evaluation-joint.json)" in (folder / "report.html").read_text()


def test_json_holds_the_figures_without_pictures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "figures.json"
    printed = json.loads(run("evaluate", str(folder), "--tasks", "labels,caption", "--json", "--out", str(out)))
    assert [result["scores"][0]["task"] for result in printed["results"]] == ["labels", "captions"]
    assert all(result["galleries"] == [] for result in printed["results"])
    assert scores(printed) == scores(json.loads(out.read_text()))


def test_two_processes_find_what_one_finds(folder: Path, tmp_path: Path) -> None:
    """35 pictures do not divide by two: the last one of a share is a repetition, and is left out again."""
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    run("evaluate", str(folder), "--out", str(one))
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = patience.run(
        [sys.executable, "-m", "launcher.cli", "evaluate", str(folder), "--processes", "2", "--out", str(two)],
        env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        limit=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tiny, stage joint") == 1
    assert json.loads(one.read_text()) == json.loads(two.read_text())


def test_a_stage_without_tasks_takes_what_it_can_do_of_another_stages(folder: Path) -> None:
    told: list[str] = []
    tasks = choose_tasks(find_trained(folder, "spatial"), tell=told.append)
    assert [(task.name, getattr(task, "rerank", None)) for task in tasks] == [("style, unseen", 0), ("labels", None)]
    assert told == [
        "style, unseen: rerank set to 0, as stage spatial does not train 'vlm'",
        "captions: left out, as stage spatial does not train 'lm'",
    ]


def test_tasks_are_chosen_by_name_kind_file_and_overrides(folder: Path, tmp_path: Path) -> None:
    trained = find_trained(folder)
    assert [task.name for task in choose_tasks(trained, ["style, unseen", "caption,labels"])] == [
        "style, unseen",
        "labels",
        "captions",
    ]
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks:\n  - retrieval\n  - {kind: zero_shot, name: mine, max_samples: 5}\n")
    first, second = choose_tasks(trained, config=file, overrides=["mine.max_samples=6", "retrieval.rerank=2"])
    assert (first.kind, getattr(first, "rerank", None), second.max_samples) == ("retrieval", 2, 6)
    assert [task.kind for task in choose_tasks(trained, ["caption"], file)] == ["caption"]


def test_weights_outside_of_a_run_need_their_plan(folder: Path, tmp_path: Path) -> None:
    plan, weights = tmp_path / "plan.yaml", tmp_path / "mine.safetensors"
    plan.write_text(PLAN)
    source = find_trained(folder)
    own = load_file(source.weights)
    save_file({name: tensor for name, tensor in own.items() if "momentum" not in name}, weights)
    inside = json.loads(run("evaluate", str(source.weights), "--tasks", "labels", "--json", "--out", str(plan) + "1"))
    options = ["--plan", str(plan), "--stage", "joint", "--tasks", "labels", "--json"]
    assert scores(json.loads(run("evaluate", str(weights), *options))) == scores(inside)
    assert find_trained(source.weights).stage.name == "joint"
    with pytest.raises(UserError, match=r"weights outside of a run folder; .*add --plan PLAN.yaml"):
        run("evaluate", str(weights))


def test_embeddings_have_keys_and_belong_together(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bugs.npz"
    run("embed", str(folder), "--data", "emoji", "--where", "{style: [twemoji], label: bugs}", "--out", str(out))
    with np.load(out) as arrays:
        count = len(arrays["keys"])
        assert count > 3
        assert all(key.endswith("_twemoji") for key in arrays["keys"])
        assert arrays["pictures"].shape == (count, 16)
        assert np.linalg.norm(arrays["pictures"], axis=1) == pytest.approx(1.0, abs=1e-5)
        assert arrays["texts"].shape == (len(arrays["captions"]), 16)
        assert set(arrays["caption_rows"].tolist()) == set(range(count))
        assert arrays["captions"][0].split(",")[0] in ("snail", "butterfly", "bug", "ant")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as ``convert folder`` makes them: a class for each picture, and no caption."""
    place = tmp_path_factory.mktemp("labelled")
    for number in range(12):
        path = place / "pictures" / ("bird", "cat", "dog")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 * number + 1).convert("RGB").save(path)
    run("data", "convert", "folder", str(place / "pictures"), "--out", str(place / "shards"))
    return place / "shards"


def test_shards_that_have_labels_only(folder: Path, labelled: Path, tmp_path: Path) -> None:
    own = ["--set", f"labels.source={labelled}", "--set", "labels.where={}"]
    made = json.loads(run("evaluate", str(folder), "--tasks", "labels", *own, "--json", "--out", str(tmp_path / "a")))
    (score,) = made["results"][0]["scores"]
    assert (score["metric"], score["count"], score["chance"]) == ("accuracy, 3 classes", 12, pytest.approx(1 / 3))
    baseline = ["--set", f"labels.baseline={{source: {labelled}}}"]
    made = json.loads(
        run("evaluate", str(folder), "--tasks", "labels", *own, *baseline, "--json", "--out", str(tmp_path / "b"))
    )
    assert made["results"][0]["scores"][0]["baseline"] == 1.0, "each picture is its own nearest"
    out = tmp_path / "labelled.npz"
    said = json.loads(run("embed", str(folder), "--data", str(labelled), "--out", str(out), "--json"))
    assert (said["file"], said["pictures"], said["captions"], said["width"]) == (str(out), 12, 0, 16)
    with np.load(out) as arrays:
        assert sorted(arrays["labels"].tolist()) == ["bird"] * 4 + ["cat"] * 4 + ["dog"] * 4
        assert arrays["pictures"].shape == (12, 16)
        assert arrays["captions"].shape == (0,)
        assert said["arrays"] == {name: list(array.shape) for name, array in arrays.items()}


def test_tasks_that_read_captions_name_what_labelled_shards_lack(folder: Path, labelled: Path) -> None:
    where = ["--set", "captions.where={}", "--set", f"captions.source={labelled}"]
    with pytest.raises(DataError, match="no sample of kind image_text is left"):
        run("evaluate", str(folder), "--tasks", "captions", *where)


def test_export_as_json(folder: Path, tmp_path: Path) -> None:
    said = json.loads(run("export", str(folder), str(tmp_path / "out"), "--dtype", "bf16", "--json"))
    size = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    wanted = {"folder": str(tmp_path / "out"), "plan": "tiny", "stage": "joint", "step": 7, "notes": []}
    assert said == {**wanted, "format": "omnivl", "dtype": "bf16", "parameters": size, "left_out": said["left_out"]}


def test_routing_as_json(tmp_path: Path) -> None:
    routed = PLAN.replace("debug.yaml}", "debug.yaml, ffn: {kind: limoe, num_experts: 4}}")
    plan = parse_plan(routed)
    stage = plan.stages[0]
    chain = build_chain(stage.model, stage.objectives, load_tokenizer(plan.tokenizer).special)
    save_file({name: tensor.contiguous() for name, tensor in chain.state_dict().items()}, tmp_path / "w.safetensors")
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    own = [str(tmp_path / "w.safetensors"), "--plan", str(tmp_path / "plan.yaml"), "--stage", "spatial"]
    options = [*own, "--max-samples", "6", "--out", str(tmp_path / "out")]
    first = json.loads(run("routing", *options, "--json"))
    assert (first["plan"], first["stage"], first["stability"]) == ("tiny", "spatial", None)
    assert (first["pictures"], first["clips"]) == (6, 6)
    assert "image" in {row["modality"] for row in first["usage"]}
    assert all(1 <= row["experts_touched"] <= 4 for row in first["usage"])
    assert Path(first["page"]).is_file()
    again = json.loads(run("routing", *options, "--against", first["table"], "--json"))
    assert again["usage"] == first["usage"]
    assert again["stability"]


def mistaken(folder: Path, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        run("evaluate", str(folder), *arguments)
    return str(caught.value).replace(str(folder), "RUN")


def test_mistakes_say_what_is_allowed(folder: Path, tmp_path: Path) -> None:
    assert mistaken(folder.with_name("tinny")).endswith("(beside it: tiny); did you mean 'tiny'?")
    assert mistaken(folder, "--stage", "later") == (
        "RUN: got stage 'later', which is not complete; allowed are the complete ones (spatial, joint); finish it with "
        "omnivl pretrain, or choose another with --stage"
    )
    assert mistaken(folder, "--stage", "joinnt") == (
        "RUN/plan.yaml: got stage 'joinnt'; allowed are 'spatial', 'joint', 'later'; did you mean 'joint'?"
    )
    assert mistaken(folder, "--tasks", "retrievall") == (
        "--tasks: got 'retrievall'; allowed are 'style, unseen', 'labels', 'captions', 'retrieval', 'zero_shot', "
        "'neighbors', 'caption', 'routing', 'matching', 'vqa', 'gqa', 'classification', 'options', 'grounding', "
        "'phrases', 'segmentation', 'sentiment', 'few_shot', 'grounded_captions', 'drawing'; did you mean "
        "'retrieval'?"
    )
    assert mistaken(folder, "--set", "labels.prompt=x") == (
        "override 'tasks.labels.prompt=x': tasks.1.prompt: got an unknown key; allowed kind, name, source, media, "
        "where, max_samples, pictures, predictions, prompts, baseline, gallery; did you mean 'prompts'?"
    )
    assert mistaken(folder, "--stage", "spatial", "--tasks", "caption") == (
        "task 'caption' (caption): got stage 'spatial', which does not train 'lm'; allowed are stages 'joint'; "
        "choose another with --stage, or leave it out with --tasks"
    )
    assert mistaken(folder, "--stage", "spatial", "--tasks", "retrieval", "--set", "retrieval.rerank=2") == (
        "task 'style, unseen' (retrieval): got stage 'spatial', which does not train 'vlm'; allowed are stages "
        "'joint'; choose another with --stage, or set its rerank to 0"
    )
    wrong = tmp_path / "tasks.yaml"
    wrong.write_text("tasks:\n  - kind: retrieval\n    rerank: many\n")
    with pytest.raises(PlanError, match=r"tasks.yaml:3: tasks.0.rerank: got 'many'; allowed an integer"):
        run("evaluate", str(folder), "--config", str(wrong))
    with pytest.raises(UserError, match=r"allowed the folder of a run"):
        run("report", str(tmp_path))


def test_weights_that_do_not_fit_are_named(folder: Path, tmp_path: Path) -> None:
    plan, weights = tmp_path / "plan.yaml", tmp_path / "weights.safetensors"
    plan.write_text(PLAN)
    own = load_file(find_trained(folder).weights)
    options = ("--plan", str(plan), "--stage", "joint")
    absent = "embed.block.text.words"
    save_file({**{name: own[name] for name in own if name != absent}, "extra.x": own[absent]}, weights)
    with pytest.raises(CheckpointError, match=rf"missing {absent}; unknown extra.x; name the stage"):
        run("evaluate", str(weights), *options)
    save_file({**own, "embed.block.text.words": torch.zeros(3, 3)}, weights)
    with pytest.raises(CheckpointError, match=r"embed.block.text.words has shape \[3, 3\], the model has"):
        run("evaluate", str(weights), *options)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no safetensors file or is truncated"):
        run("evaluate", str(weights), *options)


def test_a_run_without_any_tasks_says_how_to_give_some(folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    start, _, rest = PLAN.partition("    evaluate:")
    plan.write_text(start + rest[rest.index("  - name: later") :])
    trained = find_trained(find_trained(folder).weights, "joint", plan)
    assert isinstance(trained.plan, Plan)
    with pytest.raises(
        UserError, match=r"choose some with --tasks retrieval,zero_shot,neighbors,caption, or give a file"
    ):
        choose_tasks(trained)
    assert [task.kind for task in choose_tasks(trained, ["retrieval"])] == ["retrieval"]


def test_routing_is_refused_where_there_are_no_routers_and_shown_where_there_are(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"task 'routing' \(routing\): got stage 'joint', which has no routers in its 'dense' feed-forward "
        r"layers; allowed are no stages of this plan; train one \(use model.ffn of kind 'limoe' or 'mome_limoe'\), or "
        r"leave it out with --tasks",
    ):
        choose_tasks(find_trained(folder), ["routing"])
    start, _, rest = PLAN.partition("    evaluate:")
    routed = "    model: {ffn: {kind: limoe, num_experts: 3, every: 1}}\n    evaluate: {tasks: [routing]}\n"
    text = start + "    evaluate:" + rest + routed
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    told: list[str] = []
    with pytest.raises(UserError, match="got no evaluation tasks"):
        choose_tasks(find_trained(find_trained(folder).weights, "spatial", path), tell=told.append)
    assert told == ["routing: left out, as stage spatial has no routers in its 'dense' feed-forward layers"]
    later = parse_plan(text).stage("later")
    weights = tmp_path / "later.safetensors"
    chain = build_chain(later.model, later.objectives, load_tokenizer("emoji").special)
    save_file({name: tensor.contiguous() for name, tensor in chain.state_dict().items()}, weights)
    out = tmp_path / "out" / "figures.json"
    printed = run(
        *["evaluate", str(weights), "--plan", str(path), "--stage", "later", "--out", str(out)],
        *["--set", "routing.max_samples=4"],
    )
    assert "experts used, image" in printed
    assert len(scores(json.loads(out.read_text()))) == 6
    assert sorted(file.name for file in out.parent.iterdir()) == [
        *["figures-routing.html", "figures-routing.parquet", "figures.json"]
    ]


def test_a_filter_is_yaml() -> None:
    assert parse_where("{style: [a, b], label: c}") == {"style": ("a", "b"), "label": ("c",)}
    with pytest.raises(UserError, match="--where: got 'bugs'; allowed is a mapping"):
        parse_where("bugs")
