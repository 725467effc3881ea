"""What cannot be written, and what is no run, is refused before the work for it is done."""

import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.disk.run_folder import RunFolder, RunFolderError
from launcher.cli import app
from launcher.slurm.queue import submitted
from omnivl.errors import UserError, reason_of

PLAN = Path(__file__).parents[4] / "configs" / "plans" / "clip_tiny.yaml"


def told(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["measure", "FILE/mine.yaml"], "FILE"),
        (["profile", str(PLAN), "--out", "FILE/layers.json"], "--out"),
        (["embed", "nowhere", "--data", "emoji", "--out", "FILE/e.npz"], "--out"),
        (["evaluate", "nowhere", "--out", "FILE/scores.json"], "--out"),
        (["checkpoint", "convert", "nowhere", "--out", "FILE/w.safetensors"], "--out"),
        (["checkpoint", "average", "a", "b", "--out", "FILE/w.safetensors"], "--out"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(words: list[str], said: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    words = [word.replace("FILE", str(file)) for word in words]
    began = time.monotonic()
    (out,) = [word for word in words if word.startswith(f"{file}/")]
    assert told(*words) == (
        f"{said}: got {out}, which cannot be written ({file}: File exists); allowed a file in a folder of yours; "
        "choose another one"
    )
    assert time.monotonic() - began < 10


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    assert told("measure", str(tmp_path)).startswith(f"FILE: got {tmp_path}, which is a folder; allowed the name of a")


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError) as error, RunFolder(file).lock():
        raise AssertionError("locked")
    assert str(error.value) == (
        f"--run-folder: got {file}, in which nothing can be written ({file}: a file); allowed a folder of yours, there "
        "or not; choose another one"
    )


def test_a_file_is_no_run_to_report_on(tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    assert told("report", str(file)) == (
        f"{file}: got a folder without plan.yaml; allowed the folder of a run, such as runs/quickstart; name one that "
        "omnivl pretrain has written"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["sweep", "run", "FOLDER/none.yaml"],
            "none.yaml: got a file that cannot be read (No such file or directory); ",
        ),
        (["check", str(PLAN), "tokenizer=FOLDER/none.txt"], "as a vocabulary: No such file or directory; name a text "),
    ],
)
def test_a_file_that_is_not_there_is_told_in_words(words: list[str], reason: str, tmp_path: Path) -> None:
    said = told(*[word.replace("FOLDER", str(tmp_path)) for word in words])
    assert reason in said and "Errno" not in said


def test_the_reason_of_an_error() -> None:
    assert reason_of(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason_of(OSError("of a library")) == "of a library"
    assert reason_of(ValueError("no number")) == "no number"


def test_jobs_of_what_was_never_submitted_are_refused_before_slurm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue here
    assert told("jobs", str(tmp_path)).startswith(f"{tmp_path}: got a folder without slurm/jobs.jsonl; allowed one for")


@pytest.mark.parametrize("line", ["{", "3", '{"job": 4}'])
def test_a_damaged_list_of_jobs_is_named_by_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    good = '{"job": 4, "stage": null, "folders": []}'
    (tmp_path / "slurm" / "jobs.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError) as error:
        submitted(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/slurm/jobs.jsonl:2: got a line that is no record of a job; remove the line"
    )
