"""What stands in for packages of this one is named before anything is imported."""

import os
import subprocess
import sys
from pathlib import Path

import patience
import pytest

from omnivl.__main__ import shadows

ROOT = Path(__file__).parents[3]


def command(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    run = [sys.executable, "-P", "-c", "from omnivl.__main__ import main; main()", "--help"]
    return patience.run(run, cwd=folder, env=environment, capture_output=True, text=True, limit=120)


def test_nothing_is_in_the_way(tmp_path: Path) -> None:
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


@pytest.mark.parametrize("name", ["moe", "engine", "launcher"])
def test_another_package_of_the_same_name(tmp_path: Path, name: str) -> None:
    other = tmp_path / "site" / name
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('imported')")
    done = command(tmp_path, tmp_path / "site")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"package {name!r}: got that of another package, {other.resolve()}; allowed is {ROOT / name}; uninstall one of "
        "the two, or give this one an environment of its own"
    )


@pytest.mark.parametrize("file", ["engine.py", "moe/__init__.py"])
def test_a_module_in_the_working_folder(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("")
    name = file.removesuffix(".py").partition("/")[0]
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"package {name!r}: got {tmp_path / file} in the working folder, which processes of")


def test_a_folder_that_is_no_package_is_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    assert command(tmp_path).returncode == 0


def test_a_package_that_is_missing() -> None:
    (found,) = shadows(("no_such_package",))
    assert found.startswith("package 'no_such_package': not found beside ")
