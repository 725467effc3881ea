"""Every command of the README and of the tutorials, word by word, one after the other, with shorter plans.

The tutorial on Slurm is run by ``tests/slurm``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import typer
from documentation import ROOT, TUTORIALS, blocks, commands, copy_configs, shell
from PIL import Image

from launcher.cli import COMMANDS, app

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder in which the first tutorial was followed, and what each of its commands printed."""
    folder = tmp_path_factory.mktemp("tutorials")
    copy_configs(folder)
    return folder, {command: shell(command, folder) for command in commands(TUTORIALS / "first-run.md")}


def test_first_run(first_run: tuple[Path, dict[str, str]]) -> None:
    folder, printed = first_run
    run = folder / "runs" / "tutorial"
    for name in re.findall(r"^\| `([^`]+)` \|", (TUTORIALS / "first-run.md").read_text(), re.MULTILINE):
        assert (run / name.replace("000250", "000004")).exists(), name
    assert "whole" in printed["omnivl checkpoint verify runs/tutorial"]
    assert (folder / "runs" / "tutorial-1" / "stages" / "01-spatial" / "complete.json").is_file()
    assert (folder / "hub" / "tutorial" / "model.safetensors").is_file()
    assert (folder / "embeddings.npz").is_file()


def test_reading_a_plan(first_run: tuple[Path, dict[str, str]]) -> None:
    folder, _ = first_run
    document = TUTORIALS / "reading-a-plan.md"
    printed = {command: shell(command, folder) for command in commands(document)}
    (mistaken,) = (text for command, text in printed.items() if "zeroo" in command)
    assert mistaken.endswith("status 2\n")
    (promised,) = blocks(document, "text")
    for told, line in zip(mistaken.splitlines(), promised.splitlines(), strict=False):
        before, _, after = line.partition("...")
        assert told.startswith(before) and told.endswith(after)


def test_own_data(tmp_path: Path) -> None:
    for index in range(60):
        folder = tmp_path / "pictures" / ("animals", "food")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (4 * index, 255 - 4 * index, 90)).save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(f"a dog of colour {index}\n")
    document = TUTORIALS / "own-data.md"
    (plan,) = blocks(document, "yaml")
    (tmp_path / "mine.yaml").write_text(
        plan.replace("steps: 100", "steps: 4").replace("warmup_steps: 10", "warmup_steps: 2")
        + "launch: {processes: 1}\n"
    )
    printed = [shell(command, tmp_path) for command in commands(document)]
    assert "60" in printed[0]
    assert (tmp_path / "sheet.html").is_file()
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "mine.npz").is_file()


@pytest.mark.full
def test_a_sweep(tmp_path: Path) -> None:
    copy_configs(tmp_path)
    dry, run, report, submit = commands(TUTORIALS / "a-sweep.md")
    assert shell(dry, tmp_path).count(" pretrain ") == 16
    assert "#SBATCH --array=0-15%2" in shell(submit, tmp_path), "while there is something to do"
    assert "16 of 16 runs to do" in shell(run, tmp_path)
    assert "0 of 16 runs to submit" in shell(submit, tmp_path)
    shell(report, tmp_path)
    table = pd.read_parquet(tmp_path / "runs" / "sweeps" / "emoji_sizes" / "sweep.parquet")
    assert (table["state"] == "complete").all()


def test_reading_the_routing_page(first_run: tuple[Path, dict[str, str]]) -> None:
    folder, _ = first_run
    printed = [shell(command, folder) for command in commands(TUTORIALS / "reading-the-routing-page.md")]
    assert (folder / "runs" / "tutorial" / "routing.html").is_file()
    assert "modality" in printed[-1] and "image" in printed[-1]


def test_add_a_task(first_run: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """In a copy of the package, to which the tutorial's file and its line are added."""
    folder, _ = first_run
    document = TUTORIALS / "add-a-task.md"
    package = tmp_path / "omnivl"
    for name in ("omnivl", "moe", "engine", "launcher"):  # the command refuses packages from several places
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("embedded"))
    (package / "data" / "embedded").symlink_to(ROOT / "omnivl" / "data" / "embedded")
    file, line = blocks(document, "python")
    (package / "tasks" / "foil.py").write_text(file)
    add_member(package / "tasks" / "__init__.py", line)
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    *done, refused = (shell(f"export PYTHONPATH={paths}; {command}", folder) for command in commands(document))
    assert "right caption preferred" in done[0]
    assert json.loads(done[1][done[1].index("{") :])["results"][0]["scores"][0]["task"] == "foil"
    assert "foil" in done[2]
    (promised,) = blocks(document, "text")
    assert " ".join(refused.split()) == " ".join(promised.split())


def add_member(union: Path, entry: str) -> None:
    """Adds a tutorial's import, and the member that its union has more than a file's, to the file."""
    imported, _, shown = entry.strip().partition("\n\n")
    name = shown.partition(" = ")[0]
    text = union.read_text()
    (found,) = re.finditer(rf"^{name} = Annotated\[([^,]*),", text, re.MULTILINE)
    members = re.findall(r"\w+", found[1])
    (added,) = (
        member for member in re.findall(r"\w+", shown.partition("[")[2].partition(",")[0]) if member not in members
    )
    union.write_text(
        f"{text[: found.start()]}{imported}\n\n{name} = Annotated[{found[1].rstrip()} | {added},{text[found.end() :]}"
    )


def follow(name: str, folder: Path, file: str, test: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Follows a tutorial that adds a member of a union, in a copy of the packages, with a short run.

    Args:
        name: The tutorial.
        folder: Where to.
        file: The member's, as the tutorial says.
        test: Its check's, below ``tests/unit``.
        monkeypatch: Leads Python to the copy.

    Returns:
        What each of the tutorial's commands printed.
    """
    for package in ("moe", "omnivl", "engine", "launcher"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("embedded"))
    (folder / "omnivl" / "data" / "embedded").symlink_to(ROOT / "omnivl" / "data" / "embedded")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    document = TUTORIALS / f"{name}.md"
    text = document.read_text()
    member, entry, check = blocks(document, "python")
    (plan,) = blocks(document, "yaml")
    (plan_file,) = set(re.findall(r"^Save it as `(\w+\.yaml)`", text, re.MULTILINE))
    assert f"Save it as `{file}`" in text and f"Save it as `tests/unit/{test}`" in text
    (folder / file).write_text(member)
    add_member((folder / file).parent / "__init__.py", entry)
    checked = folder / "tests" / "unit" / test
    checked.parent.mkdir(parents=True)
    checked.write_text(check)
    for key, short in (("steps", 4), ("warmup_steps", 2), ("max_samples", 16)):
        plan = re.sub(rf"\b{key}: \d+", f"{key}: {short}", plan)
    assert "launch:" not in plan
    (folder / plan_file).write_text(f"{plan}launch: {{processes: 1}}\n")
    printed = {command: shell(command, folder) for command in commands(document)}
    assert "1 passed" in next(said for command, said in printed.items() if "pytest" in command)
    return printed


def table_rows(text: str) -> list[str]:
    """What is measured in each row of a table of scores."""
    found = re.findall(r"\S+->\S+ R@\d+", text)
    assert found
    return found


def test_add_a_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follow("add-a-router", tmp_path, "moe/routers/cosine.py", "moe/routers/test_cosine.py", monkeypatch)
    assert (tmp_path / "runs" / "cosine" / "routing.html").is_file()
    metrics = (tmp_path / "runs" / "cosine" / "stages" / "01-contrastive" / "metrics.jsonl").read_text()
    assert "router/experts_used_image" in metrics and "router/importance" in metrics


def test_add_an_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "omnivl/objectives/test_ranking.py"
    printed = follow("add-an-objective", tmp_path, "omnivl/objectives/ranking.py", test, monkeypatch)
    assert "ranking x 2" in printed["omnivl check ranking.yaml"]
    (scores,) = blocks(TUTORIALS / "add-an-objective.md", "text")
    assert table_rows(scores) == table_rows(printed["omnivl evaluate runs/ranking"])
    lines = (tmp_path / "runs" / "ranking" / "stages" / "01-pairs" / "metrics.jsonl").read_text()
    assert "ranking/right" in lines


def test_add_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = "omnivl/architectures/test_dual.py"
    printed = follow("add-an-architecture", tmp_path, "omnivl/architectures/dual.py", test, monkeypatch)
    *_, refused = printed.values()
    scores, promised = blocks(TUTORIALS / "add-an-architecture.md", "text")
    assert refused == promised
    assert table_rows(scores) == table_rows(printed["omnivl evaluate runs/dual"])


def test_make_targets_of_the_readme() -> None:
    """``make quickstart`` starts the quickstart; ``make test`` is what runs this."""
    assert commands(ROOT / "README.md") == ["make quickstart", "make test"]
    for target, recipe in (("quickstart", "omnivl pretrain configs/plans/quickstart.yaml"), ("test", "-m pytest")):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert recipe in done.stdout


def test_commands_and_options_that_the_readme_names_exist() -> None:
    root = typer.main.get_command(app)
    context = root.make_context("omnivl", ["check"])
    named = re.findall(r"`omnivl ([a-z][^`]+)`", (ROOT / "README.md").read_text())
    assert {text.split()[0] for text in named} == set(COMMANDS)
    for text in named:
        command, words = root, text.split()
        command = command.get_command(context, words[0])
        choices = getattr(command, "commands", None)
        if choices is not None:
            below = words[1].split("\\|")
            assert all(name in choices for name in below), text
            continue
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", text)) <= options, text


def test_quickstart_runs(tmp_path: Path) -> None:
    """The README's main command with a few steps of each stage."""
    copy_configs(tmp_path)
    printed = shell("omnivl pretrain configs/plans/quickstart.yaml", tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    assert "stage 3/3 joint" in printed
    assert shlex.split(printed.splitlines()[-1])
