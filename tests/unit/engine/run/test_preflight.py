"""What is wrong in the files that a plan names is found before anything is trained, in whatever stage it is."""

import json
import re
import shutil
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_inputs import BROKEN, ROOT, STAGES, plan_of, write_files, write_plan, write_samples
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel
from typer.testing import CliRunner

from engine.disk.run_folder import RunFolder
from engine.errors import PlanError
from engine.plan.parse import load_plan
from engine.run.earlier import Start
from engine.run.entrance import RunOptions, look_ahead
from engine.run.preflight import data as data_look
from engine.run.preflight import look_at
from launcher.cli import app
from omnivl.data.index_file import load_index
from omnivl.data.sources import glance as glances
from omnivl.data.sources.shards import index_path
from omnivl.errors import UserError


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # submissions and runs are written below the working folder


def omnivl(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(done.exception, UserError):  # which the command line's frame prints
        return 2, str(done.exception)
    assert done.exit_code in (0, 2), done.exception
    return done.exit_code, done.output


def check(plan: Path, *options: str) -> tuple[int, list[str]]:
    code, output = omnivl("check", plan, "--json", *options)
    return code, json.loads(output[: output.rindex("}") + 1]).get("problems", [])


def submit(plan: Path, *options: str) -> tuple[int, str]:
    return omnivl("submit", plan, "--gpus-per-node", "1", "--dry-run", *options)


def pretrain(plan: Path, run: Path, *, offline: bool = False, **start: Any) -> list[str]:
    """As far as the first process of a run looks, before it builds the first stage; returns what it says."""
    options = RunOptions(run, Start(**start), offline=offline, plan_file=plan)
    return look_ahead(RunFolder(run), load_plan(plan, (), 1), options)


def line_of(plan: Path, stage: str) -> range:
    """The lines of a stage in a plan's file."""
    starts = [number for number, line in enumerate(plan.read_text().splitlines(), 1) if line.startswith("- name: ")]
    starts.append(len(plan.read_text().splitlines()) + 1)
    return range(starts[STAGES.index(stage)], starts[STAGES.index(stage) + 1])


def test_a_right_plan_has_no_problem_and_nothing_is_left_out(here: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of(here))
    look = look_at(load_plan(plan))
    assert (look.problems, look.notes) == ([], [])
    assert check(plan) == (0, [])
    assert submit(plan)[0] == 0
    pretrain(plan, tmp_path / "run")
    assert not list(here.glob("*.index.safetensors")), "a look writes nothing"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_in_every_stage(name: str, stage: str, here: Path, tmp_path: Path) -> None:
    change, field, message = BROKEN[name]
    content, index = plan_of(here), STAGES.index(stage)
    change(content["stages"][index], here)
    plan = write_plan(tmp_path, content)
    code, problems = check(plan)
    assert (code, len(problems)) == (2, 1), problems
    place, path, text = problems[0].split(": ", 2)
    assert place.rpartition(":")[0] == str(plan)
    assert int(place.rpartition(":")[2]) in line_of(plan, stage)
    assert path == f"stages.{index}.{field}"
    assert message in text
    with pytest.raises(PlanError) as refused:
        pretrain(plan, tmp_path / "run")
    assert [one.split(": ", 2)[:2] for one in refused.value.problems] == [[place, path]]
    assert check(plan, "--offline") == (0, [])
    pretrain(plan, tmp_path / "run", offline=True)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=list(BROKEN))
def test_submit_refuses_the_same(number: int, here: Path, tmp_path: Path) -> None:
    change, field, message = list(BROKEN.values())[number]
    content, index = plan_of(here), number % len(STAGES)
    change(content["stages"][index], here)
    plan = write_plan(tmp_path, content)
    code, told = submit(plan)
    assert code == 2
    assert f": stages.{index}.{field}: " in told
    assert message in told
    assert not (tmp_path / "runs").exists(), "no job is written"
    assert submit(plan, "--offline")[0] == 0


def test_patterns_that_name_nothing_are_told_by_every_command(here: Path, tmp_path: Path) -> None:
    """Of all stages, with nothing but the plan to look at, and before an estimate is made of any stage."""
    content = plan_of(here)
    for stage in content["stages"]:
        stage |= {"freeze": ["embed.block.text"], "optimizer": {"lr_scales": {"visual_*": 0.1, "losses.vocabulary": 5}}}
    assert check(write_plan(tmp_path, content)) == (0, [])
    content["stages"][1]["freeze"].append("visual_00.attentions")
    content["stages"][2]["optimizer"]["lr_scales"]["txt_*"] = 0.1
    plan = write_plan(tmp_path, content)
    code, problems = check(plan, "--offline")
    assert (code, len(problems)) == (2, 2)
    fields = ("stages.1.freeze.1", "stages.2.optimizer.lr_scales.txt_*")
    for problem, stage, field in zip(problems, STAGES[1:], fields, strict=True):
        place, path, told = problem.split(": ", 2)
        assert place.rpartition(":")[0] == str(plan) and int(place.rpartition(":")[2]) in line_of(plan, stage)
        assert path == field and "; allowed beginnings of parameter names: " in told
    assert problems[1].endswith("; did you mean 'text_*'?")
    assert check(plan) == (2, problems)
    for command in ("estimate", "submit"):
        code, told = omnivl(command, plan, "--gpus-per-node", "1")
        assert code == 2 and all(problem in told for problem in problems)
    with pytest.raises(PlanError) as refused:
        pretrain(plan, tmp_path / "run", offline=True)
    assert list(refused.value.problems) == problems


def test_all_problems_of_all_stages_are_told_at_once(here: Path, tmp_path: Path) -> None:
    content = plan_of(here)
    chosen = ("no such weights", "filter by an unknown value", "evaluation's labels")
    for stage in content["stages"]:
        for name in chosen:
            BROKEN[name][0](stage, here)
    plan = write_plan(tmp_path, content)
    _, problems = check(plan)
    paths = [one.split(": ", 2)[1] for one in problems]
    assert paths == [f"stages.{index}.{BROKEN[name][1]}" for index in range(3) for name in chosen]
    told = submit(plan)[1]
    assert all(path in told for path in paths)


def test_what_an_override_says_is_named_as_such(here: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of(here))
    _, problems = check(plan, "stages.third.data.0.source=gone.tar")
    (problem,) = problems
    assert problem.startswith("override 'stages.third.data.0.source=gone.tar': stages.2.data.0.source: ")


def test_a_source_beside_the_plan_is_pointed_at(here: Path, tmp_path: Path) -> None:
    plans = tmp_path / "plans"
    plans.mkdir()
    shutil.copy(here / "good-000.tar", plans / "mine.tar")
    plan = write_plan(plans, plan_of(here))
    _, (problem,) = check(plan, "stages.second.data.0.source=mine.tar")
    assert problem.endswith(
        f"There is {plans / 'mine.tar'}: paths are taken from the working folder, not from the plan's"
    )
    shutil.copy(here / "good-000.tar", tmp_path / "mine.tar")
    assert check(plan, "stages.second.data.0.source=mine.tar") == (0, [])


@pytest.mark.parametrize(("tokenizer", "message"), [("gone.txt", "No such file"), ("headless.txt", "missing; needed")])
def test_a_tokenizer_is_loaded(tokenizer: str, message: str, here: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of(here, tokenizer=str(here / tokenizer)))
    code, problems = check(plan)
    assert code == 2
    assert problems[0].startswith(f"{plan}:2: tokenizer: ")
    assert message in problems[0]
    assert len(problems) == 1
    assert submit(plan)[0] == 2
    with pytest.raises(PlanError, match=message):
        pretrain(plan, tmp_path / "run")


def test_weights_that_fit_are_right_and_others_are_compared_by_shape(here: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    for width in (32, 48):
        hidden = {"hidden_size": width, "intermediate_size": 4 * width}
        ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes, **hidden)).save_pretrained(tmp_path / f"vit-{width}")
        BertModel(BertConfig(vocab_size=7, **sizes, **hidden)).save_pretrained(tmp_path / f"bert-{width}")
    content = plan_of(here)
    content["model"]["patch_size"] = 8
    content["stages"][0]["weights"] = {"vision": str(tmp_path / "vit-32")}
    assert check(write_plan(tmp_path, content)) == (0, [])
    content["stages"][1]["weights"] = {"vision": str(tmp_path / "vit-48")}
    content["stages"][2]["weights"] = {"text": str(tmp_path / "bert-48")}
    code, problems = check(write_plan(tmp_path, content))
    assert [one.split(": ", 2)[1] for one in problems] == ["stages.1.weights.vision", "stages.2.weights.text"]
    assert code == 2


def test_one_hand_over_is_tried_without_storage(here: Path, tmp_path: Path) -> None:
    content = plan_of(here)
    for before, stage in zip(STAGES, content["stages"][1:], strict=False):
        stage["init_from"] = before
    content["stages"][2]["model"] = {"num_frames": 8, "vision_layers": 3, "ffn": {"kind": "limoe"}}
    assert check(write_plan(tmp_path, content)) == (0, [])


def test_a_list_that_is_not_there_is_told_where_its_length_is_stated(here: Path, tmp_path: Path) -> None:
    content = plan_of(here)
    for stage in content["stages"][1:]:
        stage["data"][0]["fields"] = {"answers": "label"}
        stage["objectives"] = [{"kind": "vqa", "answers": "gone.txt", "num_answers": 3}]
        stage["evaluate"] = {}
    plan = write_plan(tmp_path, content)
    code, problems = check(plan)
    assert (code, [one.split(": ", 2)[1] for one in problems]) == (
        2,
        [f"stages.{n}.objectives.0.answers" for n in (1, 2)],
    )
    assert all("objective vqa: answers is 'gone.txt', and there is no such file" in one for one in problems)
    assert check(plan, "--offline") == (0, [])
    (tmp_path / "gone.txt").write_text("a\nb\nc\n")
    assert check(plan) == (0, [])


def test_only_what_is_still_to_run_is_looked_at(here: Path, tmp_path: Path) -> None:
    content, run = plan_of(here), RunFolder(tmp_path / "run")
    BROKEN["no such shard"][0](content["stages"][0], here)
    BROKEN["no such folder"][0](content["stages"][2], here)
    plan = write_plan(tmp_path, content)
    pretrain(plan, run.path, stage="second")
    with pytest.raises(PlanError, match=r"stages\.2\.data"):
        pretrain(plan, run.path, stage="third")
    for index in (0, 1):
        folder = run.stage(index, STAGES[index])
        folder.path.mkdir(parents=True)
        folder.mark_complete(3)
    with pytest.raises(PlanError) as refused:
        pretrain(plan, run.path)
    assert len(refused.value.problems) == 1
    with pytest.raises(PlanError) as refused:
        pretrain(plan, run.path, fresh=True)
    assert len(refused.value.problems) == 2
    assert run.stage(0, "first").completed_steps() == 3, "what was trained is still there"


def test_the_folder_of_the_run(here: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of(here))
    (tmp_path / "file").write_text("")
    code, told = submit(plan, "--run-folder", str(tmp_path / "file"))
    assert code == 2 and "in which nothing can be written" in told
    assert check(plan, "--run-folder", str(tmp_path / "file" / "below"))[0] == 2
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.plan.write_text(load_plan(plan, ["seed=1"]).to_yaml())
    code, problems = check(plan, "--run-folder", str(run.path))
    assert code == 2 and "seed: was 1, is now 0" in problems[0]
    assert submit(plan, "--run-folder", str(run.path))[0] == 2
    assert submit(plan, "--run-folder", str(run.path), "--fresh")[0] == 0
    assert check(plan) == (0, [])
    assert check(plan, "seed=1", "--run-folder", str(run.path)) == (0, [])
    content = plan_of(here)
    content["stages"][2]["init_from"] = "second"
    code, told = submit(write_plan(tmp_path, content), "--stage", "third", "--run-folder", str(tmp_path / "new"))
    assert code == 2 and "stages.2.init_from: got 'second', which is not complete" in told


def test_samples_that_a_run_leaves_out_are_noted(here: Path, tmp_path: Path) -> None:
    shard = tmp_path / "linked.tar"
    shutil.copy(here / "captions.tar", shard)
    with tarfile.open(shard, "a") as archive:
        for number in range(2):
            link = tarfile.TarInfo(f"9{number}.png")
            link.type, link.linkname = tarfile.LNKTYPE, "000.png"
            archive.addfile(link)
    content = plan_of(here)
    content["stages"][1]["data"] = [{"source": str(shard), "kind": "image_text", "weight": 1}]
    content["loader"] = {"max_bad_fraction": 0.5}
    plan = write_plan(tmp_path, content)
    code, output = omnivl("check", plan, "--json")
    (note,) = [one for one in json.loads(output)["notes"] if "left out" in one]
    assert code == 0 and ": stages.1.data.0.source: " in note
    assert note.endswith(
        f"2 bad samples are left out; the first: {shard}:90: .png is a hard link to '000.png', whose bytes stand "
        "elsewhere; write the archive with tar --hard-dereference"
    )
    heading = "Not looked at, or perhaps not meant:"
    assert pretrain(plan, tmp_path / "run") == [heading, *json.loads(output)["notes"]]
    assert pretrain(plan, tmp_path / "run", offline=True) == []
    assert heading in omnivl("check", plan)[1]
    assert f"{heading}\n{plan}" in submit(plan, "--run-folder", str(tmp_path / "submitted"))[1]


def test_streams_are_opened_by_pretraining_alone(here: Path, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    content = plan_of(here)
    content["stages"][1]["data"] = [
        {"source": f"pipe:touch {touched}; cat {here}/good-000.tar", "kind": "image_text", "weight": 1}
    ]
    plan = write_plan(tmp_path, content)
    code, output = omnivl("check", plan, "--json")
    assert code == 0
    (note,) = json.loads(output)["notes"]
    assert ": stages.1.data.0.source: " in note and note.endswith("a stream, which is not opened")
    assert submit(plan)[0] == 0
    assert not touched.exists()
    pretrain(plan, tmp_path / "run")
    assert touched.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("cat HERE/gone.tar", "gone.tar"),
        ("cat HERE/text.tar", "gives no sample"),
        ("cat HERE/clips.tar", "gives no sample of kind image_text"),
    ],
)
def test_pretraining_finds_a_broken_stream(command: str, message: str, here: Path, tmp_path: Path) -> None:
    content = plan_of(here)
    content["stages"][2]["data"] = [{"source": f"pipe:{command.replace('HERE', str(here))}", "kind": "image_text"}]
    with pytest.raises(PlanError, match=message):
        pretrain(write_plan(tmp_path, content), tmp_path / "run")


def test_a_stream_without_an_answer_is_given_up(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "MOST_SECONDS", 0.5)
    content = plan_of(here)
    content["stages"][2]["data"] = [{"source": "pipe:sleep 100", "kind": "image_text"}]
    begun = time.monotonic()
    pretrain(write_plan(tmp_path, content), tmp_path / "run")
    assert time.monotonic() - begun < 30


def parts_of(folder: Path, count: int) -> list[Path]:
    """Shards of which the last alone has samples of the test set."""
    shards = [folder / f"part-{number:03d}.tar" for number in range(count)]
    for number, shard in enumerate(shards):
        split = "test" if number == count - 2 else "train"
        sample = {"png": b"\x89PNG", "json": json.dumps({"caption": "a", "split": split}).encode()}
        write_samples(shard, [sample] * 1)
    return shards


def test_of_many_shards_a_few_are_read_and_indexes_are_used(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = parts_of(tmp_path, 40)
    content = plan_of(here)
    content["stages"][0]["evaluate"]["tasks"] = [
        {"kind": "retrieval", "source": f"{tmp_path}/part-{{000..039}}.tar", "where": {"split": ["test"]}}
    ]
    plan = write_plan(tmp_path, content)
    read: list[Path] = []
    whole = glances.glance_at_index

    def counted(path: Path, name: str, cache: Path | None, enough: Any) -> Any:
        found = whole(path, name, cache, enough)
        if found[1] and len(found[0]):
            read.append(path)
        return found

    monkeypatch.setattr(glances, "glance_at_index", counted)
    look = look_at(load_plan(plan))
    assert len(set(read)) <= glances.MOST_READ + 3 + 1, "three good shards, and eight of forty"
    assert look.problems == []
    (note,) = look.notes
    assert "looked at 8 of 40 shards" in note.text and "none of their samples" in note.text
    for shard in shards:
        load_index(shard, str(shard), index_path(str(shard), None))
    look = look_at(load_plan(plan))
    assert (look.problems, look.notes) == ([], []), "all of them have an index now"
    look = look_at(load_plan(plan, ["stages.first.evaluate.tasks.0.where={split: [nowhere]}"]))
    assert [one.path for one in look.problems] == [("stages", 0, "evaluate", "tasks", 0, "where")]
    look = look_at(load_plan(plan, ["stages.first.evaluate.curve={tasks: [{kind: retrieval, source: nowhere.tar}]}"]))
    assert [one.path for one in look.problems] == [("stages", 0, "evaluate", "curve", "tasks", 0, "source")]


def test_of_a_long_shard_the_beginning_is_read(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "MOST_SAMPLES", 5)
    content = plan_of(here)
    look = look_at(load_plan(write_plan(tmp_path, content)))
    assert look.problems == []
    assert all("at their first samples only" in one.text for one in look.notes) and look.notes
    content["stages"][0]["data"][0]["where"] = {"split": ["test"]}
    look = look_at(load_plan(write_plan(tmp_path, content)))
    assert look.problems == [], "it may come behind what was read"


def test_when_time_is_over_only_presence_is_looked_at(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_look, "MOST_SECONDS_IN_ALL", 0.0)
    content = plan_of(here)
    content["stages"][0]["data"][0]["where"] = {"split": ["nowhere"]}
    BROKEN["hole in a range"][0](content["stages"][2], here)
    look = look_at(load_plan(write_plan(tmp_path, content)))
    assert [one.path for one in look.problems] == [("stages", 2, "data", 0, "source")]


def test_few_samples_for_a_batch_are_noted(here: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, plan_of(here))
    look = look_at(load_plan(plan, ["stages.second.batch.micro_batch_size_per_gpu=16"]), world_size=2)
    assert look.problems == []
    (note,) = look.notes
    assert note.path == ("stages", 1, "data", 0, "source")
    assert note.text.startswith("24 samples for micro-batches of 32 over all replicas")


def test_a_baseline_that_is_thinned_without_being_asked_is_noted(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_look, "MOST_REFERENCES", 20)
    content = plan_of(here)
    source = content["stages"][1]["data"][0]["source"]
    tasks = [
        {
            "kind": "retrieval",
            "name": f"of {most}",
            "source": source,
            "baseline": {"source": source, "max_samples": most},
        }
        for most in (20, 19)
    ]
    content["stages"][1]["evaluate"] = {"tasks": tasks}
    look = look_at(load_plan(write_plan(tmp_path, content)))
    (note,) = look.notes
    assert note.path == ("stages", 1, "evaluate", "tasks", 0, "baseline", "max_samples")
    assert note.text.startswith(
        "24 samples, of which the baseline compares with 20: it is weaker than with all of them"
    )


def test_values_of_weights_are_not_read(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"embeddings.cls_token": torch.zeros(1, 1, 24)}, tmp_path / "w.safetensors")
    monkeypatch.setattr("omnivl.pretrained.files.load_file", lambda _: pytest.fail("the tensors were read"))
    content = plan_of(here)
    content["stages"][0]["weights"] = {"all": str(tmp_path / "w.safetensors")}
    assert [one.path for one in look_at(load_plan(write_plan(tmp_path, content))).problems] == [
        ("stages", 0, "weights", "all")
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_bundled_plans_lack_nothing_but_data_weights_and_tokenizers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    look = look_at(load_plan(path))
    names: Sequence[Any] = [one.path[-1] for one in look.problems if one.path]
    assert len(names) == len(look.problems)
    if "data/" not in path.read_text():
        assert not names
    assert set(names) <= {"source", "tokenizer", "all", "vision", "text", "language", "answers", "classes"}
    assert all(re.search("data/|hub/", one.text) for one in look.problems)
