"""What has to pass before a change goes in: one failure does not hide the rest."""

import os
import shutil
from pathlib import Path

import patience
import pytest

ROOT = Path(__file__).parents[2]
MAKE = """#!/bin/bash
echo "made $*"
for target in $FAILS; do [[ " $* " == *" $target "* ]] && exit 2; done
exit 0
"""


@pytest.mark.parametrize(("fails", "code"), [("", 0), ("lint", 2), ("test", 2), ("lint test", 2)])
def test_tests_run_whatever_the_checks_say(tmp_path: Path, fails: str, code: int) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "make").write_text(MAKE)
    (tools / "make").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "FAILS": fails, "OMNIVL_INSTALL_SLURM": "0"}
    done = patience.run(
        ["bash", str(tmp_path / ".ci" / "run")], limit=60, capture_output=True, text=True, env=environment
    )
    made = [line for line in done.stdout.splitlines() if line.startswith("made ")]
    assert [line.split()[-1] for line in made] == ["install-dev", "test", "lint"]
    assert done.returncode == code, done.stderr


def test_no_run_of_the_tests_stops_at_the_first_failure() -> None:
    text = "\n".join((ROOT / name).read_text() for name in ("Makefile", ".ci/run", "pyproject.toml"))
    lines = [line for line in text.splitlines() if "-m pytest" in line or line.startswith("addopts")]
    assert len(lines) >= 3
    runs = [line for line in lines if "-m pytest" in line]
    assert len(runs) == 2 and all(line.split(" tests")[-1].endswith("|| status=$$?; \\") for line in runs), "both run"
    for line in lines:
        assert not {"-x", "--exitfirst"} & set(line.replace('"', " ").split())
        assert "--maxfail" not in line
