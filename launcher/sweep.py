"""``omnivl sweep``: runs the plans of a sweep file, and makes its page."""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from engine.failure import Failure, clear_failure
from engine.sweep.config import Point, Sweep, load_sweep
from engine.sweep.page import write_sweep_page
from engine.sweep.results import collect, is_complete
from launcher.slurm import options
from launcher.slurm.submission import hand_in
from launcher.slurm.sweep import waiting_or_running, write_arrays
from omnivl.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_SAID_LINES = 12
_File = Annotated[Path, typer.Argument(help="A sweep, e.g. configs/sweeps/emoji_sizes.yaml.", show_default=False)]
_Folder = Annotated[Path | None, typer.Option(help="Of its runs; runs/sweeps/NAME by default.", show_default=False)]


class Where(StrEnum):
    """Where the runs of a sweep go."""

    local = "local"
    slurm = "slurm"


@app.command()
def run(
    file: _File,
    on: Annotated[Where, typer.Option(help="This machine, or a job array of Slurm.")] = Where.local,
    folder: _Folder = None,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time; the sweep's own number by default.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, or submitted.")] = False,
    nodes: options.Nodes = 1,
    gpus_per_node: options.GpusPerNode = None,
    processes_per_node: options.ProcessesPerNode = None,
    partition: options.Partition = None,
    time_limit: options.TimeLimit = None,
    sbatch: options.Sbatch = None,
    cluster: options.Cluster = None,
    launcher: options.Launcher = None,
) -> None:
    """Runs what is not done yet, goes on with what was cut off. Exit status 1 where a run failed.

    Options from --nodes on are those of omnivl submit, for --on slurm.

    Examples:
      omnivl sweep run configs/sweeps/emoji_sizes.yaml
      omnivl sweep run configs/sweeps/emoji_sizes.yaml --parallel 1 --dry-run
      omnivl sweep run configs/sweeps/emoji_sizes.yaml --on slurm --time 1:00:00
    """
    sweep = load_sweep(file)
    runs = (folder or _default(sweep)).resolve()
    left = [point for point in sweep.points if not is_complete(runs / point.name, sweep.load(point).stages)]
    at_once = parallel or sweep.parallel
    if on is Where.local:
        _run_here(sweep, left, runs, at_once, dry_run=dry_run)
        return
    request = options.request(
        nodes, gpus_per_node, processes_per_node, partition, time_limit, sbatch, cluster, launcher
    )
    busy = set() if dry_run else waiting_or_running(runs)
    left = [point for point in left if runs / point.name not in busy]
    before = f", {len(busy)} submitted before" if busy else ""
    typer.echo(f"# {sweep.name}: {len(left)} of {len(sweep.points)} runs to submit{before}")
    if left:
        arrays = write_arrays(sweep, left, runs, request, at_once)
        hand_in(arrays, runs, chained=False, dry_run=dry_run)


@app.command()
def report(
    file: _File,
    folder: _Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of page and table; that of the runs by default.", show_default=False)
    ] = None,
) -> None:
    """Makes sweep.html and sweep.parquet from the runs that are done.

    Examples:
      omnivl sweep report configs/sweeps/emoji_sizes.yaml
    """
    sweep = load_sweep(file)
    runs = folder or _default(sweep)
    page, table = write_sweep_page(sweep, collect(sweep, runs), out or runs)
    typer.echo(f"{page}\n{table}")


def _default(sweep: Sweep) -> Path:
    return Path("runs") / "sweeps" / sweep.name


def _run_here(sweep: Sweep, points: Sequence[Point], runs: Path, parallel: int, *, dry_run: bool) -> None:
    over = [point.name for point in points if (point.nodes or 1) > 1]
    if over:
        raise UserError(
            f"{sweep.file}: axes: got more than one node for {', '.join(over)}; allowed is one on this machine; run "
            "the sweep with --on slurm"
        )
    if dry_run:
        for point in points:
            typer.echo(shlex.join(_command(sweep, point, runs / point.name)))
        return
    typer.echo(f"{sweep.name}: {len(points)} of {len(sweep.points)} runs to do, in {runs}")
    with ThreadPoolExecutor(parallel) as pool:
        ended = zip(points, pool.map(lambda point: _run(sweep, point, runs / point.name), points), strict=True)
        failed = [point.name for point, code in ended if code != 0]
    if failed:
        typer.echo(f"{len(failed)} failed: {', '.join(failed)}; failure.json in their folders says why", err=True)
        raise typer.Exit(1)


def _command(sweep: Sweep, point: Point, folder: Path) -> list[str]:
    start = [sys.executable, "-m", "launcher.cli", "pretrain", str(sweep.plan)]
    return [*start, *point.overrides, "--run-folder", str(folder)]


def _run(sweep: Sweep, point: Point, folder: Path) -> int:
    """Runs one plan to its end and returns its exit code; what it said last is kept where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    clear_failure(folder)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        code = subprocess.run(
            _command(sweep, point, folder), stdout=said, stderr=subprocess.STDOUT, check=False
        ).returncode
        if code != 0:
            said.seek(0)
            Failure(code, "".join(said.readlines()[-_SAID_LINES:]).strip()).write(folder)
    typer.echo(f"{point.name}: {'done' if code == 0 else f'failed with exit code {code}'}")
    return code
