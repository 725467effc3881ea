"""Mutated command lines: every one does its work or is refused by name, whatever stands in its options.

``python tests/mutated_commands.py COUNT [SEED]`` tries so many by hand and prints what ended in anything else, or took
longer than ``SLOW_SECONDS`` of processor time.
"""

import contextlib
import io
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import typer
from converter_inputs import INPUTS
from PIL import Image
from safetensors.torch import save_file

from engine.plan.parse import load_plan
from launcher import cli
from launcher.slurm import submission
from omnivl.architectures.build import build_chain
from omnivl.data.convert.form import FormReader
from omnivl.data.convert.forms import FORMS
from omnivl.data.tokenizer import load_tokenizer
from omnivl.errors import UserError

ROOT = Path(__file__).parents[1]
SLOW_SECONDS = 10.0

_TINY = "model: {kind: clip, vision: {layers: 1, hidden_size: 16, num_heads: 2}, text: {layers: 1, hidden_size: 16, "
_TINY += "num_heads: 2}, image_size: 32, patch_size: 16, text_length: 8, projection_size: 8}"
_PLAN = f"""name: run
{_TINY}
parallel: {{host: plain, precision: fp32}}
batch: {{micro_batch_size_per_gpu: 4}}
stages:
  - {{name: one, steps: 3, data: [{{source: emoji, kind: image_text}}], objectives: [itc], evaluate: {{tasks: [
      {{kind: retrieval, max_samples: 8}}]}}}}
"""
FOUND = ["weights.safetensors", "--plan", "plan.yaml"]


def _form_line(reader: type[FormReader]) -> tuple[str, ...]:
    """The line that converts the files of a public data set: a path without a default is an argument."""
    given = INPUTS[reader.form].arguments(Path("forms") / reader.form)
    arguments, options = list[str](), list[str]()
    for one in fields(reader):
        if one.name not in given:
            continue
        value = given[one.name]
        if one.default is MISSING:
            arguments.append(str(value))
        else:
            for each in value if isinstance(value, tuple) else (value,):
                options += [f"--{one.name.replace('_', '-')}", str(each)]
    return ("data", "convert", reader.form, *arguments, *options, "--out", "o", "--overwrite", "--split-name", "a")


LINES: tuple[tuple[str, ...], ...] = (
    ("check", "plan.yaml", "--world-size", "2", "--json"),
    ("upgrade", "plan.yaml"),
    ("profile", "plan.yaml", "--repeats", "1", "--out", "layers.json"),
    ("estimate", "plan.yaml", "--nodes", "2", "--gpus-per-node", "2", "--stage", "one"),
    ("estimate", "plan.yaml", "--failures", "--days", "2", "--node-hours", "500", "--jitter", "0.1", "--seed", "1"),
    ("pretrain", "plan.yaml", "--run-folder", "runs/x", "--stage", "one"),
    ("submit", "plan.yaml", "--nodes", "2", "--gpus-per-node", "2", "--time", "1:00:00", "--dry-run"),
    ("submit", "plan.yaml", "--cluster", "cluster.yaml", "--sbatch", "account=x", "--launcher", "srun", "--dry-run"),
    ("jobs", "runs/x"),
    ("evaluate", *FOUND, "--tasks", "retrieval", "--batch-size", "8", "--out", "scores.json"),
    ("embed", *FOUND, "--data", "shards", "--where", "{split: [a]}", "--max-samples", "4", "--out", "e.npz"),
    ("export", "weights.safetensors", "hub", "--plan", "plan.yaml", "--max-shard-size", "1MB", "--dtype", "bf16"),
    ("routing", *FOUND, "--data", "shards", "--media", "image", "--max-samples", "4", "--out", "routing"),
    ("checkpoint", "inspect", "runs/x"),
    ("checkpoint", "verify", "runs/x"),
    ("checkpoint", "convert", "runs/x", "--out", "w.safetensors"),
    ("checkpoint", "average", "weights.safetensors", "weights.safetensors", "--out", "w.safetensors"),
    ("sweep", "run", "sweep.yaml", "--dry-run", "--parallel", "1", "--folder", "runs/s"),
    ("sweep", "run", "sweep.yaml", "--on", "slurm", "--dry-run", "--nodes", "2"),
    ("sweep", "report", "sweep.yaml", "--folder", "runs/s", "--out", "page"),
    ("report", "runs/x"),
    ("data", "inspect", "shards", "--samples", "2", "--scan", "4", "--html", "sheet.html"),
    ("data", "convert", "folder", "pictures", "--out", "o", "--overwrite", "--shorter-side", "16", "--split", "a=0.5"),
    ("data", "convert", "table", "list.csv", "--out", "o", "--overwrite", "--path", "file", "--caption", "title"),
    ("data", "convert", "table", "list.csv", "--out", "o", "--overwrite", "--picture", "left=file", "--separator", ","),
    *(_form_line(reader) for reader in FORMS),
)
"""What is mutated."""

_VALUES = (
    *("-1", "0", "1", "2", "3", "0.5", "1e30", "1e300", "-1e30", "nan", "inf", "-inf", "9" * 5000, "99999999999"),
    *("", " ", "x", "auto", "None", "../x", ".", "..", "zero", "nowhere/x", "~", "$HOME"),
    *("a" * 300, "a" * 10_000, "a\nb", "\x1b[31m", "\x07", "\u202e", "\udcff", "[/nope]", "<script>", "é", "²", "٣"),
    *("a=b", "=", "a=", "=b", "a=nan", "a=1e30", "a=-1", "../x=0.1", "{", "[", "{a: b}", "{a: [1, {b: c}]}", "- x"),
    *("plan.yaml", "weights.safetensors", "pictures", "shards", "list.csv", "emoji", "motion", "image", "video", "one"),
    *("pipe:true", "http://127.0.0.1:1/x.tar", "x{0..99999999}.tar", "x{a", "*", "**", "a,b", ",", "--", "-", "-x"),
    *("retrieval", "retrieval,retrieval", "retrieval.max_samples=0", "0.max_samples=2", "model.hidden_size=17"),
    *("stages.0.steps=1e30", "stages.one.optimizer.lr=nan", "batch={micro_batch_size_per_gpu: auto}", "5GB", "0GB"),
)


@dataclass(frozen=True)
class Finding:
    """A command line that neither did its work nor was refused by name, or took too long."""

    line: tuple[str, ...]
    said: str


def line_of(number: int, seed: int = 0) -> tuple[str, ...]:
    """The command line of a number: the same on every machine."""
    draw = random.Random(f"{seed}/{number}")
    line = list(draw.choice(LINES))
    words = 2 if line[0] in ("checkpoint", "sweep") else 3 if line[:2] == ["data", "convert"] else 1
    words = 2 if line[:2] == ["data", "inspect"] else words
    options = _options(tuple(line[:words]))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(words, len(line) + 1)
        match draw.randrange(6):
            case 0 if place < len(line):
                del line[place]
            case 1:
                line.insert(place, draw.choice(_VALUES))
            case 2 | 3:
                line += [draw.choice(options), draw.choice(_VALUES)]
            case 4:
                line.append(f"{draw.choice(options)}={draw.choice(_VALUES)}")
            case _ if place < len(line):
                line[place] = draw.choice(_VALUES)
    return tuple(line)


@cache
def _options(words: tuple[str, ...]) -> list[str]:
    command: Any = typer.main.get_command(cli.app)
    for word in words:
        context = typer.Context(command)
        command = command.get_command(context, word)
    return [name for one in command.params for name in one.opts if name.startswith("--")] or ["--help"]


def run_line(line: Sequence[str]) -> tuple[int, str]:
    """Types a line; no process is started, and no job is submitted.

    Returns:
        The exit status and what was printed as the error.
    """
    errors = io.StringIO()
    with (
        mock.patch("launcher.start.here.run_local", return_value=0),
        mock.patch("launcher.commands.pretrain.run_over_hosts", return_value=0),
        mock.patch("launcher.commands.evaluate.run_local", return_value=0),
        mock.patch("launcher.commands.sweep.run_sweep_here", return_value=0),
        mock.patch.object(submission.subprocess, "run", side_effect=UserError("no job is submitted here")),
        mock.patch.object(sys, "argv", ["omnivl", *line]),
        mock.patch.dict(os.environ, {"HOME": str(Path.cwd())}),  # what stands behind ~ must not be written to
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            return int(ended.code or 0), errors.getvalue()
    raise AssertionError("main always ends the process")


def findings(numbers: range, folder: Path, seed: int = 0) -> Iterator[Finding]:
    """The command lines of some numbers that went wrong.

    Args:
        numbers: Which.
        folder: An empty one, or one that ``prepare`` has filled. Lines write beside it as well (``../x``).
        seed: Of the draws.
    """
    for number in numbers:
        yield from findings_of(line_of(number, seed), folder)


def findings_of(line: tuple[str, ...], folder: Path) -> Iterator[Finding]:
    """What goes wrong with a line, in a folder as for ``findings``."""
    prepare(folder)
    began = time.process_time()
    with contextlib.chdir(folder):
        try:
            code, said = run_line(line)
        except BaseException:
            code, said = -1, traceback.format_exc()
    if "raised at" in said or "Traceback" in said or code not in (0, 1, 2):
        yield Finding(line, f"{code}: {said}")
    elif "\x1b" in said or "\x07" in said:
        yield Finding(line, f"control characters on the terminal: {said!r}")
    if (spent := time.process_time() - began) > SLOW_SECONDS:
        yield Finding(line, f"took {spent:.1f} s")


def prepare(folder: Path) -> None:
    """What the lines name: a plan, weights, pictures, shards, lists, a sweep; made anew where it is missing."""
    if (folder / "shards").exists():
        return
    (folder / "plan.yaml").write_text(_PLAN)
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "cluster.yaml").write_text((ROOT / "configs" / "clusters" / "example.yaml").read_text())
    (folder / "sweep.yaml").write_text("name: s\nplan: plan.yaml\naxes: {seed: [0, 1]}\n")
    plan = load_plan(folder / "plan.yaml")
    torch.manual_seed(0)
    chain = build_chain(plan.model, plan.stages[0].objectives, load_tokenizer(plan.tokenizer).special)
    save_file({name: one.contiguous() for name, one in chain.state_dict().items()}, folder / "weights.safetensors")
    pictures = folder / "pictures" / "a"
    pictures.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (32, 24), (60 * number, 0, 0)).save(pictures / f"{number}.png")
    (folder / "list.csv").write_text("file,title\n" + "".join(f"pictures/a/{one}.png,t {one}\n" for one in range(4)))
    for form, files in INPUTS.items():
        files.write(folder / "forms" / form)
    with contextlib.chdir(folder):
        line = ["data", "convert", "table", "list.csv", "--out", "shards", "--path", "file", "--caption", "title"]
        code, said = run_line(line)
    assert code == 0, said


def main() -> None:
    """Tries as many as the command line says."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began, found = time.monotonic(), 0
    os.environ["COLUMNS"] = "200"
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "here"
        folder.mkdir()
        for number in range(count):
            for finding in findings(range(number, number + 1), folder, seed):
                found += 1
                shown = [one if len(one) < 80 else f"{one[:20]}... ({len(one)})" for one in finding.line]
                print(f"--- {seed}/{number} {shown!r}\n{finding.said[-1200:]!r}", flush=True)
    print(f"{count} command lines, {found} findings, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
