"""``omnivl sweep``: runs the plans of a sweep file, and makes its page."""

import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from engine.run_folder import write_whole
from engine.sweep.config import Point, Sweep, load_sweep
from engine.sweep.page import write_sweep_page
from engine.sweep.results import FAILURE, collect, is_complete

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_SAID_LINES = 12
_File = Annotated[Path, typer.Argument(help="A sweep, e.g. configs/sweeps/emoji_sizes.yaml.", show_default=False)]
_Folder = Annotated[Path | None, typer.Option(help="Of its runs; runs/sweeps/NAME by default.", show_default=False)]


@app.command()
def run(
    file: _File,
    folder: _Folder = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Runs at the same time; the sweep's own number by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be run, one command each.")] = False,
) -> None:
    """Runs what is not done yet, goes on with what was cut off. Exit status 1 where a run failed."""
    sweep = load_sweep(file)
    runs = folder or _default(sweep)
    left = [point for point in sweep.points if not is_complete(runs / point.name, sweep.load(point).stages)]
    if dry_run:
        for point in left:
            typer.echo(shlex.join(_command(sweep, point, runs / point.name)))
        return
    typer.echo(f"{sweep.name}: {len(left)} of {len(sweep.points)} runs to do, in {runs}")
    with ThreadPoolExecutor(parallel or sweep.parallel) as pool:
        ended = zip(left, pool.map(lambda point: _run(sweep, point, runs / point.name), left), strict=True)
        failed = [point.name for point, code in ended if code != 0]
    if failed:
        typer.echo(f"{len(failed)} failed: {', '.join(failed)}; {runs}/RUN/{FAILURE} says why", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    file: _File,
    folder: _Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of page and table; that of the runs by default.", show_default=False)
    ] = None,
) -> None:
    """Makes sweep.html and sweep.parquet from the runs that are done."""
    sweep = load_sweep(file)
    runs = folder or _default(sweep)
    page, table = write_sweep_page(sweep, collect(sweep, runs), out or runs)
    typer.echo(f"{page}\n{table}")


def _default(sweep: Sweep) -> Path:
    return Path("runs") / "sweeps" / sweep.name


def _command(sweep: Sweep, point: Point, folder: Path) -> list[str]:
    start = [sys.executable, "-m", "launcher.cli", "pretrain", str(sweep.plan)]
    return [*start, *point.overrides, "--run-folder", str(folder)]


def _run(sweep: Sweep, point: Point, folder: Path) -> int:
    """Runs one plan to its end and returns its exit code; what it said last is kept where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        code = subprocess.run(
            _command(sweep, point, folder), stdout=said, stderr=subprocess.STDOUT, check=False
        ).returncode
        if code != 0:
            said.seek(0)
            last = "".join(said.readlines()[-_SAID_LINES:]).strip()
            write_whole(folder / FAILURE, json.dumps({"code": code, "said": last}, indent=1))
    typer.echo(f"{point.name}: {'done' if code == 0 else f'failed with exit code {code}'}")
    return code
