"""``omnivl sweep``: runs the plans of a sweep file, and makes its page."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engine.plan.consent import require_consent
from engine.plan.plan import Plan
from engine.run.preflight.findings import under_heading
from engine.sweep.config import Point, Sweep, load_sweep
from engine.sweep.page import write_sweep_markdown, write_sweep_page
from engine.sweep.results import collect, is_complete
from engine.telemetry.console import say
from launcher.commands.consent import ALLOW_VARIABLE, AllowCommands
from launcher.commands.look import Offline, told_of_runs
from launcher.commands.resources import Resources, takes_resources
from launcher.slurm.submission import Request, hand_in
from launcher.slurm.sweep import shape_of, waiting_or_running, write_arrays
from launcher.start.local_sweep import run_sweep_here

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_File = Annotated[Path, typer.Argument(help="A sweep, e.g. configs/sweeps/emoji_sizes.yaml.", show_default=False)]
_Folder = Annotated[Path | None, typer.Option(help="Of its runs; runs/sweeps/NAME by default.", show_default=False)]


class Where(StrEnum):
    """The folder of a sweep's runs."""

    local = "local"
    slurm = "slurm"


@app.command()
@takes_resources
def run(
    file: _File,
    on: Annotated[Where, typer.Option(help="This machine, or a job array of Slurm.")] = Where.local,
    folder: _Folder = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time; the sweep's own number by default.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, or submitted.")] = False,
    resources: Resources = Resources(),  # noqa: B008 - frozen
    allow_commands: AllowCommands = False,
    offline: Offline = False,
) -> None:
    """Starts the runs that are not done, resumes interrupted ones. Exit status 1 if a run failed. Ctrl-C saves first.

    Options from --nodes on are those of omnivl submit, for --on slurm, which first looks at what the runs read.

    Examples:
      omnivl sweep run configs/sweeps/emoji_sizes.yaml
      omnivl sweep run configs/sweeps/emoji_sizes.yaml --parallel 1 --dry-run
      omnivl sweep run configs/sweeps/emoji_sizes.yaml --on slurm --time 1:00:00
    """
    sweep = load_sweep(file)
    if allow_commands:
        os.environ[ALLOW_VARIABLE] = "1"  # for the commands that it starts
    for point in sweep.points:
        require_consent(point.plan, [point.base, sweep.file], allowed=allow_commands)
    runs = (folder or _default(sweep)).resolve()
    left = [point for point in sweep.points if not is_complete(runs / point.name, point.plan.stages)]
    at_once = parallel or sweep.parallel
    if on is Where.local:
        if code := run_sweep_here(sweep, left, runs, at_once, dry_run=dry_run, offline=offline):
            raise typer.Exit(code)
        return
    request = resources.request(allow_commands=allow_commands)
    busy = set() if dry_run else waiting_or_running(runs)
    left = [point for point in left if runs / point.name not in busy]
    before = f", {len(busy)} submitted before" if busy else ""
    say(f"# {sweep.name}: {len(left)} of {len(sweep.points)} runs to submit{before}")
    if left and not offline:
        for line in under_heading(told_of_runs(sweep, [_planned(sweep, one, request) for one in left], runs)):
            say(line, err=True)
    if left:
        arrays = write_arrays(sweep, left, runs, request, at_once)
        hand_in(arrays, runs, chained=False, dry_run=dry_run)


def _planned(sweep: Sweep, point: Point, request: Request) -> tuple[Point, Plan, int]:
    """A run with its plan and its number of processes."""
    nodes, processes = shape_of(point, request)
    return point, sweep.plan_for(point, nodes * processes), nodes * processes


@app.command()
def report(
    file: _File,
    folder: _Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of page and table; that of the runs by default.", show_default=False)
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Also sweep.md with pictures; needs kaleido and Chrome.")
    ] = False,
) -> None:
    """Makes sweep.html and sweep.parquet from the runs that are done.

    Examples:
      omnivl sweep report configs/sweeps/emoji_sizes.yaml
      omnivl sweep report configs/sweeps/emoji_sizes.yaml --markdown --out docs/sweeps
    """
    sweep = load_sweep(file)
    runs = folder or _default(sweep)
    rows = collect(sweep, runs)
    for written in write_sweep_page(sweep, rows, out or runs):
        say(written)
    if markdown:
        say(write_sweep_markdown(sweep, rows, out or runs))


def _default(sweep: Sweep) -> Path:
    return Path("runs") / "sweeps" / sweep.name
