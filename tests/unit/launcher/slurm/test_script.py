"""Scripts of jobs: what a user names arrives unchanged and is never run."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.slurm.profile import ClusterProfile
from launcher.slurm.script import check_options, header_line, job_name, job_script, log_pattern
from omnivl.errors import UserError

NASTY = "a b'c\"d $(touch pwned) `touch pwned` ; touch pwned # \\ é"


def test_script_hands_nasty_names_over_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script is run by bash; what would be Python writes its arguments and a variable down."""
    stand_in = tmp_path / f"python {NASTY.replace('/', '')}"
    stand_in.write_text(f'#!{sys.executable}\nimport os, sys\nprint([*sys.argv[1:], os.environ["LABEL"]])\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    spec = tmp_path / f"{NASTY}\nnext line" / "job.json"
    profile = ClusterProfile(setup=("module() { echo loaded $2; }", "module load cuda"), environment={"LABEL": NASTY})
    script = tmp_path / "job.sh"
    script.write_text(job_script({"job-name": "x", "comment": NASTY, "exclusive": True, "mem": False}, profile, spec))

    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"loaded cuda\n{['-m', 'launcher.slurm.job', str(spec), NASTY]}\n"
    assert done.stderr == ""
    assert not (tmp_path / "pwned").exists()


def test_header_comes_first_and_in_order(tmp_path: Path) -> None:
    text = job_script({"nodes": 2, "exclusive": True, "mem": False, "time": "10:00"}, ClusterProfile(), tmp_path)
    assert text.splitlines()[:5] == [
        "#!/bin/bash",
        "# Written by omnivl submit. Can be submitted again with sbatch.",
        "#SBATCH --nodes=2",
        "#SBATCH --exclusive",
        "#SBATCH --time=10:00",
    ]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a100&ib", '#SBATCH --constraint="a100&ib"'),
        ("two words", '#SBATCH --constraint="two words"'),
        ('quote " hash # back \\', '#SBATCH --constraint="quote \\" hash # back \\\\"'),
        ("n[1-3],n7", "#SBATCH --constraint=n[1-3],n7"),
        (True, "#SBATCH --constraint"),
        (4, "#SBATCH --constraint=4"),
    ],
)
def test_header_line(value: str | int | bool, line: str) -> None:
    assert header_line("constraint", value) == line


def test_header_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UserError) as error:
        header_line("comment", "one\n#SBATCH --uid=0")
    assert str(error.value) == (
        "--sbatch comment: got 'one\\n#SBATCH --uid=0'; allowed are printable characters in one line; change the value"
    )
    with pytest.raises(UserError, match="got the option 'x; rm'; allowed is a long option without dashes"):
        header_line("x; rm", True)
    with pytest.raises(UserError, match="environment: got the variable 'A B'"):
        job_script({}, ClusterProfile(environment={"A B": "1"}), Path("x"))


def test_options_of_the_script_are_not_the_users() -> None:
    with pytest.raises(UserError) as error:
        check_options({"mem": "8G", "nodes": 3}, "--sbatch")
    assert str(error.value) == "--sbatch: got the option 'nodes', which the job's script sets itself; use --nodes"


def test_names_for_slurm() -> None:
    assert job_name("run 1; $(x)") == "run_1_x_"
    assert log_pattern(Path("/runs/a b"), "slurm/%j.log") == "/runs/a b/slurm/%j.log"
    with pytest.raises(UserError, match="allowed are names without '%' and backslashes"):
        log_pattern(Path("/runs/50%j"), "slurm/%j.log")
