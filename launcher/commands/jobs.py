"""``omnivl jobs``: the jobs of runs, with their state in Slurm and the progress of their runs."""

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from engine.telemetry.console import PlainConsole, PlainTable
from launcher.slurm.queue import job_rows, queue, submitted

_PLACES = ("*/slurm/jobs.jsonl", "sweeps/*/slurm/jobs.jsonl")


def jobs(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs; all below runs/ by default.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """Shows jobs that omnivl submit has submitted: state, step, throughput, estimated end.

    Examples:
      omnivl jobs
      omnivl jobs runs/quickstart --json
    """
    found = runs or sorted(path.parent.parent for kind in _PLACES for path in Path("runs").glob(kind))
    records = [submitted(run) for run in found]
    known = queue() if records else {}
    rows = [row for one in records for row in job_rows(one, known, datetime.datetime.now().astimezone())]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = PlainTable("job", "run", "state", "why", "stage", "step", "samples/s", "end")
    for row in rows:
        step = "" if row.step is None else f"{row.step}/{row.steps}"
        rate = "" if row.samples_per_second is None else f"{row.samples_per_second:.1f}"
        table.add_row(row.job, row.run, row.state, row.why, row.stage or "", step, rate, row.end or "")
    PlainConsole().print(table)
