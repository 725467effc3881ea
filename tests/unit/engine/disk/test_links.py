"""A link that somebody has put in the place of a file of a run: what is written stays in the run's folder."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.disk.checkpoint import remove_leftovers
from engine.disk.run_folder import RunFolder, RunFolderError, write_whole
from engine.disk.weights_file import WeightsWriter
from engine.errors import RunFileError
from engine.processes.files import remove_folder
from engine.telemetry.metrics import MetricsLog
from engine.watch.heartbeat import Sign, write_sign
from launcher.slurm.restarts import Restarts
from omnivl.data.plain_files import not_through_links
from omnivl.data.quarantine import Quarantine
from omnivl.data.sources.base import CAUSES, Rejection
from omnivl.errors import DataError
from omnivl.tasks.results import ResultFile, TaskResult, write_files


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A file that is none of the run's."""
    file = tmp_path / "foreign"
    file.write_text("precious")
    return file


def log_metrics(file: Path) -> None:
    with MetricsLog(file, None) as log:
        log.write(1, "train")


def log_bad_sample(file: Path) -> None:
    bad = Quarantine(max_bad_fraction=1, min_samples_to_judge=1, log=file)
    bad.record(1, [Rejection(next(iter(CAUSES)), "shard:key", "broken")])


def beat(file: Path) -> None:
    write_sign(file.parent, Sign(0, "node", 1, 1, 1, "step", "one", 1, 0.0, False, ""))


WRITERS: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
    "metrics.jsonl": (log_metrics, RunFileError),
    "plan.yaml.tmp": (lambda file: write_whole(file.with_suffix(""), "name: x"), RunFileError),
    "quarantine.jsonl": (log_bad_sample, DataError),
    "weights.tmp": (lambda file: WeightsWriter(file, {"a": (torch.float32, (1,))}), OSError),
    "rank-00000.json": (beat, OSError),
    "restarts.jsonl": (lambda file: Restarts(file, 1, 1).note(0, 0), OSError),
    "run.lock": (lambda file: RunFolder(file.parent).lock().__enter__(), RunFolderError),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(tmp_path: Path, foreign: Path, name: str, dangling: bool) -> None:
    """Neither into the file that it leads to, nor where there is none yet."""
    file, (write, error) = tmp_path / name, WRITERS[name]
    target = tmp_path / "none" if dangling else foreign
    file.symlink_to(target)
    with pytest.raises(error, match="a symbolic link, through which nothing is written") as caught:
        write(file)
    assert name in str(caught.value)
    assert foreign.read_text() == "precious"
    assert not (tmp_path / "none").exists()


def test_the_remedy_is_to_remove_it(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(foreign)
    with pytest.raises(RunFileError) as caught:
        log_metrics(tmp_path / "metrics.jsonl")
    assert str(caught.value) == (
        f"{tmp_path / 'metrics.jsonl'}: could not be written (a symbolic link, through which nothing is written); "
        "remove it, and give the same command again: a run goes on from its newest whole checkpoint"
    )


def test_folders_above_may_be_links(tmp_path: Path) -> None:
    """A run whose stages lie on another disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "stages").symlink_to(tmp_path / "disk")
    log_metrics(tmp_path / "stages/01-one/metrics.jsonl")
    assert (tmp_path / "disk/01-one/metrics.jsonl").is_file()


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        not_through_links(str(tmp_path / "pipe"), os.O_WRONLY)
    with pytest.raises(OSError, match="no regular file"):
        not_through_links(str(tmp_path / "pipe"), os.O_RDWR)


def test_a_link_in_a_folders_place_is_removed_alone(tmp_path: Path, foreign: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step-000002.tmp").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(checkpoints)
    assert list(checkpoints.iterdir()) == []
    assert (tmp_path / "elsewhere" / "file").is_file()
    remove_folder(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    remove_folder(tmp_path / "elsewhere")


def test_a_page_of_an_evaluation_replaces_a_link(tmp_path: Path, foreign: Path) -> None:
    for name in ("routing.html", "routing.html.tmp"):
        (tmp_path / name).symlink_to(foreign)
    page = ResultFile("routing.html", lambda path: path.write_text("page"))
    assert write_files([TaskResult((), files=(page,))], tmp_path) == [tmp_path / "routing.html"]
    assert (tmp_path / "routing.html").read_text() == "page"
    assert not (tmp_path / "routing.html").is_symlink()
    assert foreign.read_text() == "precious"
