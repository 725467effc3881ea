"""``omnivl upgrade``: plans, model files and sweeps of earlier spelling rewritten into today's."""

import difflib
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import PlanError
from engine.plan.rewrite import Rewritten, is_model_file, rewrite_model_file, rewrite_plan
from engine.plan.yaml import read_yaml
from engine.sweep.rewrite import rewrite_sweep
from engine.telemetry.console import say
from omnivl.data.plain_files import read_small


def upgrade(
    files: Annotated[list[Path], typer.Argument(help="Plans, model files or sweeps.", show_default=False)],
    write: Annotated[bool, typer.Option("--write", help="Replace the files instead of printing diffs.")] = False,
) -> None:
    """Rewrites fields of earlier spelling into today's. Comments, order and blank lines stay.

    Without --write it prints what it would change. Nothing is written where any of the files has a mistake. Exit
    status 0 where all is of today's spelling, or was written; 1 where something is to be written; 2 for mistakes.

    Examples:
      omnivl upgrade plan.yaml
      omnivl upgrade plan.yaml --write
      omnivl upgrade configs/plans/*.yaml configs/models/*.yaml --write
    """
    texts = {file: _read(file) for file in dict.fromkeys(files)}
    done: dict[Path, Rewritten] = {}
    problems: list[str] = []
    for file, text in texts.items():
        try:
            done[file] = _rewrite(file, text)
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(problems)
    for file, text in texts.items():
        new = done[file].text
        if new == text:
            say(f"{file}: is of today's spelling")
        elif write:
            _replace(file.resolve(), new)
            count = len(done[file].earlier)
            say(f"{file}: rewritten ({count} field{'' if count == 1 else 's'})")
        else:
            lines = (text.splitlines(keepends=True), new.splitlines(keepends=True))
            say("".join(difflib.unified_diff(*lines, str(file), str(file))).removesuffix("\n"))
        for other in done[file].others:
            say(f"{other}, which {file} names, holds earlier fields as well: omnivl upgrade {other}", err=True)
    if not write and any(done[file].text != text for file, text in texts.items()):
        raise typer.Exit(1)


def _read(file: Path) -> str:
    """A file's text with its own ends of lines."""
    try:
        return read_small(file).decode("utf-8")
    except OSError as error:
        got = f"a file that cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        got = f"bytes that are no UTF-8 (at byte {error.start})"
    raise PlanError([f"{file}: got {got}; allowed a YAML file; name a plan, a model file or a sweep"])


def _rewrite(file: Path, text: str) -> Rewritten:
    """Whichever kind of file it is; what is no mapping is read as a plan, whose errors say what is wrong."""
    tree = read_yaml(text).tree
    if not isinstance(tree, dict) or "stages" in tree:
        return rewrite_plan(text, str(file))
    if "axes" in tree:
        return rewrite_sweep(text, file)
    if is_model_file(tree):
        return rewrite_model_file(text, str(file))
    allowed = "a plan (stages), a sweep (axes) or a model file"
    raise PlanError([f"{file}:1: got a mapping that is none of these; allowed {allowed}; name one"])


def _replace(file: Path, text: str) -> None:
    """Writes beside the file and renames, so that a crash leaves the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(text.encode("utf-8"))
            opened.flush()
            os.fsync(opened.fileno())
        beside.chmod(file.stat().st_mode)
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
