"""Every example of every ``--help`` is run as it stands: at once, or with the tests that take long, or it is in a list.

Those that train or read what was trained run in a folder in which two runs with few steps were made.
"""

import glob
import os
import shlex
import shutil
from pathlib import Path

import pytest
from documentation import copy_configs, help_examples, shell, shell_until
from example_inputs import own_configs, write_inputs, write_plan_of_eight, write_separated_list
from typer import Typer
from typer.testing import CliRunner

from launcher.cli import app

pytestmark = pytest.mark.integration

CANNOT_RUN = {
    "omnivl data build emoji --out emoji --full": "fetches npm packages from the network",
    "omnivl data build icons --out data/icons": "fetches an npm package of 104 MB from the network",
    "omnivl data build icons --out data/emoji-hands --set noto --set twemoji": "likewise",
    "omnivl data build icons --out data/all-icons --licences share-alike --licences non-free": "likewise",
    "omnivl sweep report configs/sweeps/emoji_sizes.yaml --markdown --out docs/sweeps": "needs kaleido and Chrome",
}
"""Examples that cannot run on a machine without more than the package, and why."""

LONG = (
    *("omnivl pretrain ", "torchrun ", "omnivl evaluate ", "omnivl export ", "omnivl embed ", "omnivl routing "),
    *("omnivl predict ", "omnivl data captions ", "omnivl experts "),
    *("omnivl checkpoint ", "omnivl report ", "omnivl measure ", "omnivl profile ", "omnivl serve "),
    "omnivl estimate ",
)
"""Beginnings of those that take long, or read what a run has trained."""

TRAINED = (
    "omnivl sweep run configs/sweeps/emoji_sizes.yaml",
    "omnivl data overlap emoji --test emoji --test-where '{label: [bugs]}' --run runs/quickstart --json",
)
"""Further ones that do, which are no beginnings."""

FINDS_SOMETHING = ("omnivl upgrade plan.yaml",)
"""Examples that end with exit status 1, since there is something to do."""

EXAMPLES = [line for line in help_examples() if line not in CANNOT_RUN]
SLOW = [line for line in EXAMPLES if line.startswith(LONG) or line in TRAINED]
QUICK = [line for line in EXAMPLES if line not in SLOW]


def test_the_lists_name_what_the_help_says() -> None:
    written = help_examples()
    assert set(CANNOT_RUN) <= set(written)
    assert all(any(line.startswith(beginning) for line in written) for beginning in LONG)
    assert {*TRAINED, *FINDS_SOMETHING} <= set(written)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", QUICK)
def test_an_example_runs(line: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(inputs, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    write_separated_list(tmp_path, ";" if '";"' in line else ",")
    if line.startswith("omnivl upgrade configs"):
        own_configs(tmp_path)
    if line.startswith("omnivl data inspect shards"):
        omnivl("omnivl data convert folder pictures --out shards")
    assert omnivl(line).strip()


def test_an_example_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the limit of a test passes while a command runs, as in one that fetches what is not there."""
    waiting = Typer()
    waiting.command()(lambda: pytest.fail("Timeout (>60.0s) from pytest-timeout."))
    monkeypatch.setitem(globals(), "app", waiting)
    with pytest.raises(pytest.fail.Exception) as error:
        omnivl("omnivl")
    assert str(error.value) == (
        "omnivl: Timeout (>60.0s) from pytest-timeout; what waits for more than the package belongs in "
        "CANNOT_RUN, what trains in LONG"
    )


def omnivl(line: str) -> str:
    """What a line prints, with patterns expanded as a shell would."""
    words = [word for text in shlex.split(line)[1:] for word in (sorted(glob.glob(text)) or [text])]  # noqa: PTH207
    try:
        result = CliRunner().invoke(app, words)
    except pytest.fail.Exception as late:  # of the test's limit
        why = str(late).rstrip(".")
        pytest.fail(f"{line}: {why}; what waits for more than the package belongs in CANNOT_RUN, what trains in LONG")
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code == (1 if line in FINDS_SOMETHING else 0), result.output
    return result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that examples name, trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    copy_configs(folder)
    shell("omnivl pretrain configs/plans/quickstart.yaml", folder)
    shell("omnivl pretrain configs/plans/clip_tiny.yaml checkpoint.every=2 checkpoint.keep_last=2", folder)
    (stage,) = folder.glob("runs/clip_tiny/stages/*")
    (folder / "RUN" / "checkpoints").mkdir(parents=True)
    for number, checkpoint in zip((100, 200), sorted((stage / "checkpoints").iterdir()), strict=True):
        (folder / "RUN" / "checkpoints" / f"step-{number}").symlink_to(checkpoint)
    return folder


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("line", SLOW)
def test_an_example_runs_on_what_was_trained(line: str, trained: Path, inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    if line.startswith("omnivl serve "):
        shutil.copytree(inputs / "pictures", tmp_path / "pictures")
        shell("omnivl data convert folder pictures --out shards", tmp_path)
        assert "ended" in shell_until(line, tmp_path, "try it: ")
        return
    if line.startswith("torchrun"):
        write_plan_of_eight(tmp_path)
    if line.endswith("--amend"):  # a run of which the last stage is still to come
        (last,) = tmp_path.glob("runs/quickstart/stages/*-joint")
        shutil.rmtree(last)
    if line == "omnivl pretrain configs/plans/quickstart.yaml":
        shutil.rmtree(tmp_path / "runs")
    assert shell(line, tmp_path).strip()
