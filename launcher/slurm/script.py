"""The text of a job's script. No string of the user reaches a shell or sbatch unquoted."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.slurm.profile import ClusterProfile
from omnivl.errors import UserError

OptionValue = str | int | bool

OWN_OPTIONS: Mapping[str, str] = {
    "nodes": "use --nodes",
    "gpus-per-node": "use --gpus-per-node",
    "ntasks": "use --processes-per-node",
    "ntasks-per-node": "use --processes-per-node",
    "array": "use omnivl sweep run --on slurm",
    "output": "the log lies in the run's folder",
    "error": "the log lies in the run's folder",
    "open-mode": "a job that is started again goes on in its log",
    "signal": "use grace_seconds in the cluster's file",
    "requeue": "a job that is interrupted goes on by itself",
    "no-requeue": "set restarts_without_progress: 0 in the cluster's file",
    "wrap": "the script is written for you",
    "parsable": "the job's number is printed anyway",
}
"""Options that the script sets itself, and what to do instead."""

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:;/@%+=*\[\]~^-]+")


def job_script(options: Mapping[str, OptionValue], profile: ClusterProfile, spec: Path) -> str:
    """The script of a job.

    Args:
        options: Options of ``sbatch`` without their dashes, in the order of the header.
        profile: The cluster, for its setup and variables.
        spec: What the job is to do.

    Raises:
        UserError: A name or a value that cannot be written into a script.
    """
    lines = ["#!/bin/bash", "# Written by omnivl submit. Can be submitted again with sbatch."]
    lines += [header_line(name, value) for name, value in options.items() if value is not False]
    lines += ["", "set -e", "trap '' USR1  # asks to save and to be requeued; Python listens to it below"]
    lines += ["", *profile.setup] if profile.setup else []
    lines += [""] if profile.environment else []
    for name, value in profile.environment.items():
        if _VARIABLE.fullmatch(name) is None:
            allowed = "letters, digits and '_', no digit first"
            raise UserError(f"environment: got the variable {name!r}; allowed are {allowed}; change the name")
        lines.append(f"export {name}={shlex.quote(value)}")
    lines += ["", f"exec {shlex.join([sys.executable, '-m', 'launcher.slurm.job', str(spec)])}", ""]
    return "\n".join(lines)


def header_line(name: str, value: OptionValue) -> str:
    """One ``#SBATCH`` line; ``True`` is an option without a value.

    sbatch splits such a line at blanks, ends it at ``#``, and knows quotes and backslashes; a line cannot go on in the
    next one.

    Raises:
        UserError: No name of an option, or a value that holds a newline.
    """
    if _OPTION.fullmatch(name) is None:
        raise UserError(f"--sbatch: got the option {name!r}; allowed is a long option without dashes, e.g. constraint")
    if value is True:
        return f"#SBATCH --{name}"
    text = str(value)
    if not text.isprintable():
        raise UserError(
            f"--sbatch {name}: got {text!r}; allowed are printable characters in one line; change the value"
        )
    if _PLAIN.fullmatch(text) is None:
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={text}"


def job_name(name: str) -> str:
    """The job's name for squeue, reduced to characters that are easy to type."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:64] or "omnivl"


def log_pattern(folder: Path, pattern: str) -> str:
    """The path of a log for sbatch, in which only ``pattern`` has place holders.

    Raises:
        UserError: A folder whose name sbatch would change.
    """
    text = str(folder)
    if "\\" in text or "%" in text:
        raise UserError(
            f"--run-folder: got {text!r}; allowed are names without '%' and backslashes, which Slurm replaces in the "
            "names of logs; choose another folder"
        )
    return f"{text}/{pattern}"


def check_options(options: Mapping[str, OptionValue], where: str) -> None:
    """Refuses what the script sets itself.

    Raises:
        UserError: Names the option and what to do instead.
    """
    for name in options:
        if (remedy := OWN_OPTIONS.get(name)) is not None:
            raise UserError(f"{where}: got the option {name!r}, which the job's script sets itself; {remedy}")
