"""Hostfiles."""

from pathlib import Path

import pytest

from launcher.start.hosts import read_hostfile
from omnivl.errors import UserError


def test_read_hostfile(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# cluster\n\nn1 slots=8\n n2  slots=4 # half of it\n")
    assert read_hostfile(file) == {"n1": 8, "n2": 4}


@pytest.mark.parametrize("line", ["n1", "n1 slots=0", "n1 slots=two", "n1 slots=2\nn1 slots=2"])
def test_lines_that_are_refused(tmp_path: Path, line: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read_hostfile(file)
    number, last = line.count("\n") + 1, line.splitlines()[-1]
    assert str(error.value) == (
        f"{file}:{number}: got {last!r}; allowed is each machine once, HOST slots=N with N processes; write it in this "
        "form"
    )


def test_empty_and_missing_hostfiles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\); name a hostfile"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(UserError, match="got no machine; allowed are lines HOST slots=N; add one"):
        read_hostfile(tmp_path / "empty")
